"""Corruptions: hand-computed values where they are deterministic, their distribution where they are random."""

import numpy as np
import pytest

from lightning_abpem.data.corruptions import AUDIO_CORRUPTIONS, IMAGE_CORRUPTIONS, corrupt_audio, corrupt_images

RATE = 8000
IMAGES = np.random.default_rng(0).random((6, 96, 96))
WAVES = 0.1 * np.sin(np.outer(np.arange(1, 7), np.arange(4000)) / 20)


def audio(kind, severity, seed=0, waves=WAVES):
    return corrupt_audio(waves, kind, severity, seed, RATE, speech=0.5 * np.random.default_rng(1).random((20, 4000)))


@pytest.mark.parametrize("kind", IMAGE_CORRUPTIONS)
@pytest.mark.parametrize("severity", range(1, 6))
def test_images_stay_images(kind, severity):
    corrupted = corrupt_images(IMAGES, kind, severity, seed=0)
    assert corrupted.shape == IMAGES.shape
    assert corrupted.min() >= 0
    assert corrupted.max() <= 1
    assert np.array_equal(corrupted, corrupt_images(IMAGES, kind, severity, seed=0))
    assert not np.array_equal(corrupted, IMAGES)


@pytest.mark.parametrize("kind", ["gaussian_noise", "impulse_noise", "speckle_noise", "fog"])
def test_random_images_follow_the_seed(kind):
    assert not np.array_equal(corrupt_images(IMAGES, kind, 3, seed=0), corrupt_images(IMAGES, kind, 3, seed=1))


@pytest.mark.parametrize("kind", AUDIO_CORRUPTIONS)
@pytest.mark.parametrize("severity", range(1, 6))
def test_waves_stay_waves(kind, severity):
    corrupted = audio(kind, severity)
    assert corrupted.shape == WAVES.shape
    assert np.isfinite(corrupted).all()
    assert np.abs(corrupted).max() <= 1
    assert np.array_equal(corrupted, audio(kind, severity))
    assert not np.array_equal(corrupted, audio(kind, severity, seed=1))


def test_contrast_and_brightness_by_hand():
    image = np.array([[[0.0, 0.2], [0.4, 1.0]]])
    np.testing.assert_allclose(corrupt_images(image, "contrast", 1, 0), 0.4 + 0.4 * (image - 0.4))
    np.testing.assert_allclose(corrupt_images(image, "contrast", 5, 0), 0.4 + 0.05 * (image - 0.4))
    np.testing.assert_allclose(corrupt_images(image, "brightness", 3, 0), [[[0.3, 0.5], [0.7, 1.0]]])


def test_noise_has_its_standard_deviation():
    grey = np.full((200, 32, 32), 0.5)
    for severity, sd in enumerate((0.08, 0.12, 0.18), start=1):  # beyond, clipping narrows it
        assert corrupt_images(grey, "gaussian_noise", severity, 0).std() == pytest.approx(sd, rel=0.02)
        assert (audio("gaussian_noise", severity, waves=np.zeros((6, 20000)))).std() == pytest.approx(sd, rel=0.02)
    assert corrupt_images(grey, "speckle_noise", 1, 0).std() == pytest.approx(0.5 * 0.15, rel=0.02)


def test_impulse_noise_hits_its_share():
    grey = np.full((200, 32, 32), 0.5)
    for severity, amount in enumerate((0.03, 0.06, 0.09, 0.17, 0.27), start=1):
        corrupted = corrupt_images(grey, "impulse_noise", severity, 0)
        assert (corrupted != 0.5).mean() == pytest.approx(amount, rel=0.05)
        assert (corrupted == 1).sum() == pytest.approx((corrupted == 0).sum(), rel=0.1)


def test_blurs_keep_the_mean_and_flat_images():
    flat = np.full((1, 224, 224), 0.3)
    dot = np.zeros((1, 224, 224))
    dot[0, 112, 112] = 1
    for kind in ("defocus_blur", "gaussian_blur"):
        np.testing.assert_allclose(corrupt_images(flat, kind, 5, 0), flat)
        assert corrupt_images(dot, kind, 5, 0).sum() == pytest.approx(1, abs=1e-3)


def test_the_defocus_disk_has_its_radius():
    dot = np.zeros((1, 224, 224))
    dot[0, 112, 112] = 1
    disk = corrupt_images(dot, "defocus_blur", 5, 0)[0] > 1e-3
    assert disk[112].sum() == pytest.approx(21, abs=1)
    assert disk.sum() == pytest.approx(np.pi * 10**2, rel=0.1)


def test_fog_leaves_the_brightest_possible_value_in_range():
    black = np.zeros((50, 32, 32))
    black[:, 0, 0] = 1
    fog = corrupt_images(black, "fog", 5, 0)[:, 1:, 1:]
    assert fog.max() <= 3 / 4  # amount / (1 + amount)
    assert fog.std((1, 2)).min() > 0.02
    assert fog.mean() > 0.2


@pytest.mark.parametrize("kind", [kind for kind in AUDIO_CORRUPTIONS if kind != "gaussian_noise"])
def test_noise_is_louder_by_its_gain(kind):
    quiet = WAVES / 100  # so that nothing is clipped
    for severity, gain in enumerate((1, 2, 4, 6, 8), start=1):
        noise = audio(kind, severity, waves=quiet) - quiet
        ratio = 20 * np.log10(np.sqrt((noise**2).mean(1) / (quiet**2).mean(1)))
        np.testing.assert_allclose(ratio, gain, atol=1e-6)


def test_spectra():
    """Wind is low, rain is high, pink noise falls by about 3 dB an octave."""

    def power(kind, low, high):
        noise = audio(kind, 5, waves=np.full((40, 8000), 1e-4)) - 1e-4
        spectrum = (np.abs(np.fft.rfft(noise)) ** 2).mean(0)
        return spectrum[low:high].mean()

    assert power("wind", 50, 500) > 20 * power("wind", 1500, 4000)
    assert power("rain", 1500, 3500) > 2 * power("rain", 50, 500)
    assert power("pink_noise", 200, 400) == pytest.approx(2 * power("pink_noise", 400, 800), rel=0.15)


@pytest.mark.parametrize(("kind", "severity"), [("sepia", 1), ("fog", 0), ("fog", 6)])
def test_unknown_kind_or_severity(kind, severity):
    with pytest.raises(ValueError, match="Expected `(kind|severity)`"):
        corrupt_images(IMAGES, kind, severity, 0)
