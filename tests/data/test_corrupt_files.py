"""Corrupted copies on disk: layout, lists, contents, interruptions, workers."""

import os

import numpy as np
import pytest
import soundfile
from PIL import Image

import lightning_abpem
from lightning_abpem.data.audio_corruptions import corrupt_audio
from lightning_abpem.data.corruptions import Corruption, sample_rng
from lightning_abpem.data.image_corruptions import corrupt_image
from tests.data.clean import IDS, RATE, contents, images, load, sounds, stop_after, store


def test_frames_and_their_list(data, tmp_path):
    out = tmp_path / "out"
    new = images(data, out, "frost", 2, quality=90, seed=4)
    assert new == out / "json" / "video" / "frost" / "severity_2.json"
    folder = "video/frost/severity_2"
    frames = {f"{folder}/frame_{i}/{name}.jpg" for i in (0, 5) for name in IDS}
    assert set(contents(out)) == frames | {
        f"{folder}/settings.json",
        "json/video/frost/severity_2.json",
        "json/video/frost/severity_2.meta.json",
    }
    for old, entry in zip(load(data)["data"], load(new)["data"], strict=True):
        assert entry["video_path"] == "../../../video/frost/severity_2"
        assert entry["wav"] == f"../../../../clean/sound/{entry['video_id']}.wav"
        assert {**entry, "wav": "", "video_path": ""} == {**old, "wav": "", "video_path": ""}
        assert os.path.samefile(new.parent / entry["wav"], data.parent / old["wav"])
        with Image.open(new.parent / entry["video_path"] / "frame_5" / f"{entry['video_id']}.jpg") as picture:
            assert (picture.size, picture.mode, picture.format) == ((16, 16), "RGB", "JPEG")
    assert load(new.with_suffix(".meta.json")) == {
        "modality": "image",
        "kind": "frost",
        "severity": 2,
        "seed": 4,
        "version": lightning_abpem.__version__,
        "data_list": "../clean/test.json",
        "frost": "procedural",
        "quality": 90,
        "size": 16,
        "files": 6,
    }


def test_sounds_and_their_list(data, tmp_path):
    out = tmp_path / "out"
    new = sounds(data, out)
    assert new == out / "json" / "audio" / "rain" / "severity_3.json"
    for entry in load(new)["data"]:
        assert entry["wav"] == f"../../../audio/rain/severity_3/{entry['video_id']}.wav"
        assert entry["video_path"] == "../../../../clean/frames"
        info = soundfile.info(new.parent / entry["wav"])
        assert (info.samplerate, info.channels, info.frames, info.subtype) == (RATE, 1, 8000, "PCM_16")
    meta = load(new.with_suffix(".meta.json"))
    assert (meta["noise"], meta["files"], meta["data_list"]) == ("procedural", 3, "../clean/test.json")
    assert not {"frost", "quality", "size"} & set(meta)


def test_both_modalities_one_after_the_other(data, tmp_path):
    out = tmp_path / "out"
    both = images(sounds(data, out), out, allow_outside=[tmp_path])
    entry = load(both)["data"][0]
    assert os.path.samefile(both.parent / entry["wav"], out / "audio" / "rain" / "severity_3" / f"{IDS[0]}.wav")
    assert contents(out / "video" / "gaussian_noise" / "severity_3" / "frame_5") == contents(
        images(data, tmp_path / "alone").parents[3] / "video" / "gaussian_noise" / "severity_3" / "frame_5"
    )


def test_a_sound_is_corrupted_with_its_own_numbers(data, tmp_path):
    new = sounds(data, tmp_path / "out", "gaussian_noise", 1, seed=7)
    for entry in load(new)["data"]:
        name = entry["video_id"]
        clean, _ = soundfile.read(data.parent / "sound" / f"{name}.wav", always_2d=True)
        rng = sample_rng(7, Corruption("audio", "gaussian_noise", 1), name)
        expected = corrupt_audio(clean.mean(1), "gaussian_noise", 1, rng, RATE)
        found, _ = soundfile.read(new.parent / entry["wav"], dtype="int16")
        np.testing.assert_array_equal(found, np.clip(np.round(expected * 2**15), -(2**15), 2**15 - 1))


def test_a_frame_is_corrupted_with_its_own_numbers(data, tmp_path):
    """16 x 16 from 40 x 30: 21 x 16 pixels, of which the columns 2 to 17 stay."""
    new = images(data, tmp_path / "out", "shot_noise", 1, seed=7, quality=100)
    with Image.open(data.parent / "frames" / "frame_5" / "b.jpg") as picture:
        clean = np.asarray(picture.resize((21, 16), Image.Resampling.BICUBIC), float)[:, 2:18] / 255
    rng = sample_rng(7, Corruption("image", "shot_noise", 1), "b/frame_5")
    expected = corrupt_image(clean, "shot_noise", 1, rng)
    with Image.open(new.parents[3] / "video" / "shot_noise" / "severity_1" / "frame_5" / "b.jpg") as picture:
        found = np.asarray(picture.convert("L"), float) / 255
    grey = expected @ (0.299, 0.587, 0.114)
    assert np.abs(found - grey).mean() < 0.01  # JPEG at 100 keeps brightness, and halves the resolution of colours
    assert np.abs(found - clean @ (0.299, 0.587, 0.114)).mean() > 0.02


def test_quality_changes_the_size_of_files(data, tmp_path):
    def size(quality):
        out = tmp_path / str(quality)
        images(data, out, quality=quality, size=64)
        return sum(len(content) for name, content in contents(out).items() if name.endswith(".jpg"))

    assert size(30) < size(85) < size(100)


def test_recordings_are_used_and_named(data, tmp_path):
    noise = tmp_path / "noise"
    noise.mkdir()
    soundfile.write(noise / "rain.wav", np.full((2400, 2), 0.125), 48000, subtype="FLOAT")
    new = sounds(data, tmp_path / "out", "rain", 1, recordings=noise)
    clean, _ = soundfile.read(data.parent / "sound" / "-aB_000030.wav")
    found, _ = soundfile.read(tmp_path / "out" / "audio" / "rain" / "severity_1" / "-aB_000030.wav")
    middle = slice(200, 600)  # of the 800 samples of the noise at 16 kHz
    np.testing.assert_allclose(found[middle], clean[middle] + 0.125 * 10**0.05, atol=2e-3)
    assert load(new.with_suffix(".meta.json"))["noise"] == "../noise"
    white = sounds(data, tmp_path / "out", "gaussian_noise", 1, recordings=noise)
    assert load(white.with_suffix(".meta.json"))["noise"] is None


def test_frost_pictures_are_used_and_named(data, tmp_path):
    pictures = tmp_path / "ice"
    pictures.mkdir()
    Image.new("RGB", (300, 300), (0, 0, 255)).save(pictures / "blue.png")
    new = images(data, tmp_path / "out", "frost", 5, frost=pictures)
    with Image.open(tmp_path / "out" / "video" / "frost" / "severity_5" / "frame_0" / "b.jpg") as picture:
        red, _, blue = np.asarray(picture, float).mean((0, 1))
    assert blue > red + 60
    assert load(new.with_suffix(".meta.json"))["frost"] == "../ice"
    foggy = images(data, tmp_path / "out", "fog", 5, frost=pictures)
    assert load(foggy.with_suffix(".meta.json"))["frost"] is None


def test_an_interrupted_run_goes_on(data, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        images(data, out, progress=stop_after(2))
    folder = out / "video" / "gaussian_noise" / "severity_3"
    finished = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    assert len(finished) == 2
    assert not (out / "json").exists()
    partial = folder / "frame_5" / ".b.jpg.partial"  # as if the run had been killed while it wrote
    partial.parent.mkdir(exist_ok=True)
    partial.write_bytes(b"half")
    calls = []
    images(data, out, progress=lambda *numbers: calls.append(numbers))
    assert calls == [(done, 6) for done in range(1, 7)]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    images(data, whole)
    assert contents(out) == contents(whole)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    images(data, out)  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")} == before


def test_the_seed_and_the_corruption_change_the_bytes_and_the_order_does_not(data, tmp_path):
    def jpegs(out):
        return sorted(content for name, content in contents(tmp_path / out).items() if name.endswith(".jpg"))

    images(data, tmp_path / "a")
    images(data, tmp_path / "b", seed=1)
    store(data, load(data)["data"][::-1])
    images(data, tmp_path / "c")
    assert jpegs("a") == jpegs("c")
    assert not set(jpegs("a")) & set(jpegs("b"))


def test_workers_write_the_same_bytes_and_stop_at_a_broken_file(data, tmp_path):
    """One pool for both, since a worker takes seconds to start."""
    ice = tmp_path / "ice"
    ice.mkdir()
    Image.new("RGB", (300, 300), (0, 90, 255)).save(ice / "blue.png")
    images(data, tmp_path / "one", "frost", frost=ice)
    last = data.parent / "frames" / "frame_5" / f"{IDS[2]}.jpg"
    intact = last.read_bytes()
    last.write_bytes(b"no picture")
    calls = []
    with pytest.raises(ValueError, match=r"ünï c\.jpg \(data\[2\] of .*test\.json\) to be readable, but: "):
        images(data, tmp_path / "two", "frost", frost=ice, workers=2, progress=lambda *numbers: calls.append(numbers))
    assert calls == [(done, 6) for done in range(1, len(calls) + 1)]
    assert 2 <= len(calls) <= 5  # the sixth file waits until two are finished
    assert not (tmp_path / "two" / "json").exists()
    left, whole = contents(tmp_path / "two"), contents(tmp_path / "one")
    assert len(left) >= 1 + len(calls)  # the settings, too
    assert left.items() <= whole.items()
    last.write_bytes(intact)
    images(data, tmp_path / "two", "frost", frost=ice)  # goes on without workers
    assert contents(tmp_path / "two") == whole


def test_a_sound_that_is_too_loud_is_clipped(data, tmp_path):
    """As the data module does, which reads the same files."""
    wave = np.array([0.0, 1.5, -2.0, 0.5] * 200)
    made = []
    for name, samples in (("loud", wave), ("clipped", wave.clip(-1, 1))):
        soundfile.write(data.parent / "sound" / "b.wav", samples, RATE, subtype="FLOAT")
        sounds(data, tmp_path / name, "gaussian_noise", 2)
        made.append((tmp_path / name / "audio/gaussian_noise/severity_2/b.wav").read_bytes())
    assert made[0] == made[1]


def test_a_frame_that_others_have_is_missed(data, tmp_path):
    gap = data.parent / "frames" / "frame_5" / f"{IDS[1]}.jpg"
    gap.unlink()
    with pytest.warns(UserWarning, match=rf"1 frames are missing .* The first: {gap} \(data\[1\] of "):
        images(data, tmp_path / "out")
