"""Audio corruptions: gains and levels by hand, the noises' spectra and rhythms, and recordings of other rates."""

import numpy as np
import pytest
import soundfile
from scipy import signal, stats

from lightning_abpem.data.audio_corruptions import AUDIO_KINDS, Recordings, corrupt_audio
from lightning_abpem.data.noises import NOISE_KINDS, procedural

RATE = 16000
GAINS = dict(enumerate((1, 2, 4, 6, 8), start=1))
QUIET = 1e-3 * np.sin(np.arange(8000) / 20)  # so that nothing is clipped


def rng(seed=0):
    return np.random.default_rng(seed)


def rms(wave):
    return np.sqrt(np.mean(wave**2))


@pytest.fixture
def folder(tmp_path):
    """A wind of 48 kHz in stereo, 0.5 s: 1 kHz, twice as loud on the left; and rain of 16 kHz, two samples."""
    tone = 0.2 * np.sin(2 * np.pi * 1000 * np.arange(24000) / 48000)
    soundfile.write(tmp_path / "wind.wav", np.stack([tone, tone / 2], 1), 48000, subtype="FLOAT")
    soundfile.write(tmp_path / "rain.flac", np.array([0.25, -0.125]), RATE, subtype="PCM_16")
    return tmp_path


# ------------------------------------------------------------------------------------------------------ all kinds


def test_the_kinds_are_the_published_ones():
    assert AUDIO_KINDS == ("gaussian_noise", "traffic", "crowd", "rain", "thunder", "wind")


@pytest.mark.parametrize("kind", AUDIO_KINDS)
@pytest.mark.parametrize("severity", GAINS)
def test_waves_stay_waves(kind, severity):
    wave = 0.9 * np.sin(np.arange(5600) / 7).astype(np.float32)
    before = wave.copy()
    corrupted = corrupt_audio(wave, kind, severity, rng(), 8000)
    assert corrupted.shape == wave.shape
    assert corrupted.dtype == np.float64
    assert np.abs(corrupted).max() == 1  # noise over a loud wave is clipped
    np.testing.assert_array_equal(wave, before)
    np.testing.assert_array_equal(corrupted, corrupt_audio(wave, kind, severity, rng(), 8000))
    assert not np.array_equal(corrupted, corrupt_audio(wave, kind, severity, rng(1), 8000))


@pytest.mark.parametrize(("severity", "sd"), [(1, 0.08), (2, 0.12), (3, 0.18)])
def test_gaussian_noise_is_normal_with_its_standard_deviation(severity, sd):
    noise = corrupt_audio(np.zeros(20000), "gaussian_noise", severity, rng(), RATE)
    assert stats.kstest(noise, "norm", args=(0, sd)).pvalue > 0.01
    assert stats.kstest(noise, "norm", args=(0, 1.05 * sd)).pvalue < 0.01
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.03  # 4 standard errors


@pytest.mark.parametrize(("severity", "sd"), [(4, 0.26), (5, 0.38)])
def test_loud_gaussian_noise_is_clipped(severity, sd):
    noise = corrupt_audio(np.zeros(200000), "gaussian_noise", severity, rng(), RATE)
    beyond = 2 * stats.norm.sf(1 / sd)
    assert np.mean(np.abs(noise) == 1) == pytest.approx(beyond, abs=4 * np.sqrt(beyond / 200000))
    assert np.mean(np.abs(noise) < sd) == pytest.approx(0.6827, abs=0.005)


@pytest.mark.parametrize("kind", NOISE_KINDS)
@pytest.mark.parametrize(("severity", "gain"), GAINS.items())
def test_procedural_noise_is_louder_by_its_gain(kind, severity, gain):
    noise = corrupt_audio(QUIET, kind, severity, rng(), RATE) - QUIET
    assert 20 * np.log10(rms(noise) / rms(QUIET)) == pytest.approx(gain, abs=1e-6)


def test_silence_counts_as_a_hundredth_of_full_scale():
    noise = corrupt_audio(np.zeros(8000), "wind", 4, rng(), RATE)
    assert rms(noise) == pytest.approx(0.01 * 10 ** (6 / 20))


# ----------------------------------------------------------------------------------------------------- recordings


@pytest.mark.parametrize(("severity", "gain"), GAINS.items())
def test_a_recording_is_repeated_amplified_added_and_clipped(folder, severity, gain):
    wave = np.array([0.0, 0.1, -0.9, 0.5, 0.7])
    factor = 10 ** (gain / 20)
    by_hand = [0 + 0.25 * factor, 0.1 - 0.125 * factor, -0.9 + 0.25 * factor, 0.5 - 0.125 * factor]
    by_hand += [min(1, 0.7 + 0.25 * factor)]
    corrupted = corrupt_audio(wave, "rain", severity, rng(), RATE, Recordings(folder))
    np.testing.assert_allclose(corrupted, by_hand, rtol=1e-12)
    np.testing.assert_array_equal(corrupted, corrupt_audio(wave, "rain", severity, rng(1), RATE, Recordings(folder)))


def test_a_recording_is_cut(folder):
    assert corrupt_audio(np.zeros(1), "rain", 2, rng(), RATE, Recordings(folder)) == pytest.approx(0.25 * 10**0.1)


def test_a_recording_is_brought_to_the_datas_rate_and_to_mono(folder):
    noise = Recordings(folder)("wind", RATE)
    assert noise.shape == (8000,)  # 0.5 s, not 24000 samples
    spectrum = np.abs(np.fft.rfft(noise))
    assert spectrum.argmax() * RATE / len(noise) == 1000  # Hz; unresampled it would sound at 333
    tone = 0.15 * np.sin(2 * np.pi * 1000 * np.arange(8000) / RATE)
    np.testing.assert_allclose(noise[200:-200], tone[200:-200], atol=1e-3)
    corrupted = corrupt_audio(np.zeros(16000), "wind", 1, rng(), RATE, Recordings(folder))
    np.testing.assert_allclose(corrupted[200:7800], 10**0.05 * tone[200:7800], atol=2e-3)
    np.testing.assert_array_equal(corrupted[8000:], corrupted[:8000])


def test_recordings_are_kept_by_kind_and_rate(folder):
    recordings = Recordings(folder)
    assert recordings("wind", RATE) is recordings("wind", RATE)
    assert len(recordings("wind", 8000)) == 4000
    with pytest.raises(ValueError, match="read-only"):
        recordings("wind", RATE)[0] = 1


def test_wav_comes_before_flac(folder):
    soundfile.write(folder / "rain.wav", np.array([0.5, 0.5]), RATE, subtype="FLOAT")
    np.testing.assert_array_equal(Recordings(folder)("rain", RATE), 0.5)


def test_no_folder_or_nothing_in_it(tmp_path):
    with pytest.raises(NotADirectoryError, match=r"Expected `folder` to be a folder of noise recordings.*nowhere"):
        Recordings(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"traffic\.wav, crowd\.wav, .*wind\.wav; or \.flac, \.ogg.*got none"):
        Recordings(tmp_path)


def test_a_kind_that_was_not_recorded(folder):
    with pytest.raises(FileNotFoundError, match=r"to have traffic\.wav \(or .flac.*has only rain\.flac, wind\.wav"):
        corrupt_audio(QUIET, "traffic", 1, rng(), RATE, Recordings(folder))


def test_broken_recordings(folder):
    (folder / "crowd.wav").write_bytes(b"RIFF of nothing")
    with pytest.raises(ValueError, match=r"crowd\.wav to be a readable recording, but: "):
        Recordings(folder)
    soundfile.write(folder / "crowd.wav", np.zeros((0, 2)), RATE)
    with pytest.raises(ValueError, match=r"crowd\.wav to be a recording with samples, but it has none"):
        Recordings(folder)
    soundfile.write(folder / "crowd.wav", np.array([0.0, np.nan]), RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"crowd\.wav to have finite samples"):
        Recordings(folder)("crowd", RATE)


# --------------------------------------------------------------------------------------------- procedural noises


@pytest.mark.parametrize("kind", NOISE_KINDS)
@pytest.mark.parametrize("rate", [500, 8000, 16000, 44100])
@pytest.mark.parametrize("samples", [1, 2, 100, 5600])
def test_noises_have_unit_level_at_any_rate_and_length(kind, rate, samples):
    noise = procedural(kind, samples, rate, rng())
    assert noise.shape == (samples,)
    assert rms(noise) == pytest.approx(1)
    np.testing.assert_array_equal(noise, procedural(kind, samples, rate, rng()))


def share(kind, low, high, rate, seconds):
    """Share of the power of 20 noises, all of one level, between two frequencies."""
    noises = [procedural(kind, int(seconds * rate), rate, rng(seed)) for seed in range(20)]
    power = (np.abs(np.fft.rfft(noises)) ** 2).sum(0)
    frequencies = np.fft.rfftfreq(len(noises[0]), 1 / rate)
    return power[(frequencies >= low) & (frequencies < high)].sum() / power.sum()


@pytest.mark.parametrize(("rate", "seconds"), [(8000, 0.7), (16000, 2)])
@pytest.mark.parametrize(
    ("kind", "low", "high", "least"),
    [
        ("wind", 20, 600, 0.8),
        ("rain", 900, 8000, 0.9),
        ("thunder", 10, 250, 0.8),
        ("crowd", 80, 3500, 0.95),
        ("traffic", 30, 1700, 0.95),
        ("traffic", 35, 260, 0.25),  # engines' lowest harmonics
        ("traffic", 260, 1700, 0.25),  # tyres
    ],
)
def test_noises_are_where_they_should_be(kind, low, high, least, rate, seconds):
    assert share(kind, low, high, rate, seconds) > least


def envelope(kind, rate=16000, seconds=10, count=20):
    """Power of noises a hundred times a second: (count, 100 * seconds)."""
    noises = np.stack([procedural(kind, seconds * rate, rate, rng(seed)) for seed in range(count)])
    return (noises**2).reshape(count, 100 * seconds, -1).mean(2)


def test_a_crowd_speaks_four_syllables_a_second():
    changes = envelope("crowd", count=8)
    power = (np.abs(np.fft.rfft(changes - changes.mean(1, keepdims=True))) ** 2).mean(0)
    at = np.fft.rfftfreq(changes.shape[1], 0.01)
    assert power[(at > 3) & (at < 5.5)].mean() > 3 * power[(at > 10) & (at < 20)].mean()


def test_voices_and_engines_have_pitches():
    """Lines in the spectrum: its geometric mean is well below its mean, which in a hiss it is not."""

    def flatness(kind, low, high):
        noises = np.stack([procedural(kind, 160000, RATE, rng(seed)) for seed in range(4)])
        frequencies, power = signal.welch(noises, RATE, nperseg=8192)
        band = power[:, (frequencies > low) & (frequencies < high)]
        return (np.exp(np.log(band).mean(1)) / band.mean(1)).mean()

    assert flatness("wind", 120, 450) > 0.8
    assert flatness("crowd", 120, 450) < 0.5
    assert flatness("traffic", 45, 250) < 0.5


def test_wind_comes_in_log_normal_gusts():
    loudness = np.log(envelope("wind")).ravel() / 2
    assert 0.6 < loudness.std() < 1.2
    assert abs(stats.skew(loudness)) < 0.5
    assert np.corrcoef(loudness[5:], loudness[:-5])[0, 1] > 0.5  # 50 ms later it is much the same


def test_thunder_claps_at_once_and_dies_away():
    """The fastest rise in a tenth of a second beats the fastest fall by far."""
    changes = np.log(envelope("thunder").reshape(20, -1, 10).mean(2))
    steps = np.diff(changes)
    assert np.median(steps.max(1)) > 1.5 * -np.median(steps.min(1))


def test_rain_has_heavier_tails_than_a_hiss():
    assert stats.kurtosis(procedural("rain", 80000, RATE, rng())) > 1


# ----------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "hail"}, "Expected `kind` to be one of gaussian_noise, traffic, .*, wind, but got 'hail'"),
        ({"severity": 0}, r"Expected `severity` to be an integer in \[1, 5\], but got 0"),
        ({"severity": 6}, r"Expected `severity` to be an integer in \[1, 5\], but got 6"),
        ({"severity": 2.0}, r"Expected `severity` to be an integer in \[1, 5\], but got 2\.0"),
        ({"rate": 0}, "Expected `rate` to be a positive integer, in Hz, but got 0"),
        ({"rate": 16e3}, "Expected `rate` to be a positive integer, in Hz, but got 16000.0"),
        ({"wave": np.zeros((2, 9))}, r"Expected `wave` to be of shape \(T,\), mono, with T >= 1, but got \(2, 9\)"),
        ({"wave": np.zeros(0)}, r"Expected `wave` to be of shape .*, but got \(0,\)"),
        ({"wave": np.array([0, np.nan])}, "Expected `wave` to be finite"),
        ({"wave": np.array([0.1, -1.5])}, r"Expected `wave` to be in \[-1, 1\], but it reaches 1\.5"),
        ({"wave": np.array([0, -(2**15)], np.int16)}, r"Expected `wave` to be in \[-1, 1\], but it reaches 32768"),
    ],
)
def test_bad_inputs(changed, message):
    arguments = {"wave": QUIET, "kind": "rain", "severity": 1, "rng": rng(), "rate": RATE} | changed
    with pytest.raises(ValueError, match=message):
        corrupt_audio(**arguments)


@pytest.mark.parametrize(
    ("kind", "samples", "rate", "message"),
    [
        ("gaussian_noise", 1, 1, "Expected `kind` to be one of traffic, crowd, rain, thunder, wind, but got"),
        ("rain", 0, 1, "Expected `samples` to be a positive integer, but got 0"),
        ("rain", 1, 0.5, "Expected `rate` to be a positive integer, but got 0.5"),
    ],
)
def test_bad_inputs_of_noises(kind, samples, rate, message):
    with pytest.raises(ValueError, match=message):
        procedural(kind, samples, rate, rng())


def test_recordings_need_a_rate(folder):
    with pytest.raises(ValueError, match="Expected `rate` to be a positive integer, in Hz, but got 0"):
        Recordings(folder)("rain", 0)
