"""Corrupted copies on disk: layout, lists, interruptions, workers, and what is refused before anything is written."""

import json
import os
import shutil
from itertools import product

import numpy as np
import pytest
import soundfile
from PIL import Image

import lightning_abpem
from lightning_abpem.cli import main
from lightning_abpem.data.audio_corruptions import AUDIO_KINDS, corrupt_audio
from lightning_abpem.data.corrupt_files import corrupt_data_set
from lightning_abpem.data.corruptions import Corruption, sample_rng
from lightning_abpem.data.image_corruptions import IMAGE_KINDS, corrupt_image
from lightning_abpem.data.published_layout import as_json

IDS = ("-aB_000030", "b", "ünï c")
RATE = 16000


@pytest.fixture
def data(tmp_path):
    """The list of three sounds of 0.5 s, and of their two frames of 40 x 30 pixels."""
    home = tmp_path / "clean"
    rng = np.random.default_rng(0)
    entries = []
    for i, name in enumerate(IDS):
        wav = home / "sound" / f"{name}.wav"
        wav.parent.mkdir(parents=True, exist_ok=True)
        wave = 0.1 * rng.standard_normal((8000, 1 + i % 2)).clip(-3, 3)  # the second one is stereo
        soundfile.write(wav, wave, RATE, subtype="PCM_16")
        for frame in (0, 5):
            picture = home / "frames" / f"frame_{frame}" / f"{name}.jpg"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(picture)
        entries.append({"video_id": name, "wav": f"sound/{name}.wav", "video_path": "frames", "labels": f"/m/{i}"})
    return store(home / "test.json", entries)


def store(path, entries):
    path.write_text(json.dumps({"data": entries}))
    return path


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def change(data, i, **changed):
    entries = load(data)["data"]
    entries[i] |= changed
    return store(data, entries)


def images(data, out, kind="gaussian_noise", severity=3, **options):
    return corrupt_data_set(data, out, "image", kind, severity, **{"size": 16, **options})


def sounds(data, out, kind="rain", severity=3, **options):
    return corrupt_data_set(data, out, "audio", kind, severity, **options)


def contents(folder):
    """Of all files under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop_after(count, error=KeyboardInterrupt):
    def progress(done, total):
        if done == count:
            raise error

    return progress


# -------------------------------------------------------------------------------------------------- layout and lists


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


def test_the_whole_can_be_moved(data, tmp_path):
    new = sounds(data, tmp_path / "clean" / "corrupted")
    shutil.move(tmp_path / "clean", tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / new.relative_to(tmp_path / "clean")
    for entry in load(moved)["data"]:
        assert (moved.parent / entry["wav"]).is_file()
        assert (moved.parent / entry["video_path"] / "frame_0" / f"{entry['video_id']}.jpg").is_file()


def test_paths_hold_through_links_and_from_any_folder(data, tmp_path, monkeypatch):
    (tmp_path / "disk" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep" / "er")
    monkeypatch.chdir(tmp_path / "clean")
    new = sounds("test.json", "../link/out")
    for entry in load(new)["data"]:
        assert (new.parent / entry["wav"]).is_file()
        assert (new.parent / entry["video_path"] / "frame_0" / f"{entry['video_id']}.jpg").is_file()


def test_both_modalities_one_after_the_other(data, tmp_path):
    out = tmp_path / "out"
    both = images(sounds(data, out), out, allow_outside=[tmp_path])
    entry = load(both)["data"][0]
    assert os.path.samefile(both.parent / entry["wav"], out / "audio" / "rain" / "severity_3" / f"{IDS[0]}.wav")
    assert contents(out / "video" / "gaussian_noise" / "severity_3" / "frame_5") == contents(
        images(data, tmp_path / "alone").parents[3] / "video" / "gaussian_noise" / "severity_3" / "frame_5"
    )


# ----------------------------------------------------------------------------------------------------- what is in them


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


# ------------------------------------------------------------------------------------------------- runs and interrupts


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


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed was 0 and is now 1; choose another `out`, or delete .*severity_3"),
        ({"quality": 60, "size": 17}, "quality was 85 and is now 60, size was 16 and is now 17;"),
    ],
)
def test_other_settings_are_refused(data, tmp_path, changed, message):
    with pytest.raises(KeyboardInterrupt):
        images(data, tmp_path / "out", progress=stop_after(2))
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        images(data, tmp_path / "out", **changed)
    assert contents(tmp_path / "out") == before
    images(data, tmp_path / "out", severity=4, **changed)  # which has a folder of its own


def test_another_source_of_noise_or_list_is_refused(data, tmp_path):
    sounds(data, tmp_path / "out")
    noise = tmp_path / "noise"
    noise.mkdir()
    soundfile.write(noise / "rain.wav", np.full(9, 0.1), RATE)
    with pytest.raises(ValueError, match=r"noise was 'procedural' and is now '\.\./noise'"):
        sounds(data, tmp_path / "out", recordings=noise)
    other = store(data.with_name("other.json"), load(data)["data"])
    with pytest.raises(ValueError, match=r"data_list was '\.\./clean/test\.json' and is now '\.\./clean/other\.json'"):
        sounds(other, tmp_path / "out")


def test_files_of_unknown_settings_are_refused(data, tmp_path):
    stranger = tmp_path / "out" / "audio" / "rain" / "severity_3" / "b.wav"
    stranger.parent.mkdir(parents=True)
    stranger.touch()
    with pytest.raises(ValueError, match=r"to be empty or to have settings\.json, but got other files; choose another"):
        sounds(data, tmp_path / "out")


def test_missing_files_are_counted_before_anything_is_written(data, tmp_path):
    for name in IDS[1:]:
        (data.parent / "sound" / f"{name}.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"all 3 entries .*, but 2 have none: .*b\.wav \(data\[1\]\), .*\[2\]"):
        sounds(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(load(images(data, tmp_path / "out"))["data"]) == 3  # which need no sound


def test_only_the_first_missing_files_are_named(data, tmp_path):
    entry = load(data)["data"][0]
    store(data, [{**entry, "video_id": f"no{i}"} for i in range(7)])
    with pytest.raises(FileNotFoundError, match=r"but 7 have none: .*no4\.jpg or in .*\(data\[4\]\), \.\.\.") as raised:
        images(data, tmp_path / "out")
    assert "data[5]" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_broken_frames(data, tmp_path, content):
    path = data.parent / "frames" / "frame_5" / "b.jpg"
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    with pytest.raises(ValueError, match=r"b\.jpg \(data\[1\] of .*test\.json\) to be readable, but: "):
        images(data, tmp_path / "out")
    assert not (tmp_path / "out" / "json").exists()


@pytest.mark.parametrize(
    ("wave", "message"), [([], "T >= 1"), ([0.0, np.inf], "to be finite"), ([0.0, np.nan], "to be finite")]
)
def test_broken_sounds(data, tmp_path, wave, message):
    soundfile.write(data.parent / "sound" / "b.wav", np.array(wave), RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match=rf"b\.wav \(data\[1\] of .*\) to be readable, but: .*{message}"):
        sounds(data, tmp_path / "out")


def test_a_sound_that_is_too_loud_is_clipped(data, tmp_path):
    """As the data module does, which reads the same files."""
    wave = np.array([0.0, 1.5, -2.0, 0.5] * 200)
    made = []
    for name, samples in (("loud", wave), ("clipped", wave.clip(-1, 1))):
        soundfile.write(data.parent / "sound" / "b.wav", samples, RATE, subtype="FLOAT")
        corrupt_data_set(data, tmp_path / name, "audio", "gaussian_noise", 2)
        made.append((tmp_path / name / "audio/gaussian_noise/severity_2/b.wav").read_bytes())
    assert made[0] == made[1]


def test_an_error_of_the_disk_is_not_blamed_on_the_input(data, tmp_path):
    blocked = tmp_path / "out" / "audio" / "rain" / "severity_3" / ".b.wav.partial"

    def block(done, total):
        blocked.mkdir(exist_ok=True)

    with pytest.raises(IsADirectoryError):
        sounds(data, tmp_path / "out", progress=block)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"video_id": IDS[1]}, r"Expected each `video_id` once, but 'b' is in data\[1\] and data\[2\] of .*test\.json"),
        ({"video_id": "../b"}, r"`video_id` of data\[2\] of .* to be part of a file name, but got '\.\./b'"),
        ({"wav": 3}, r"Expected data\[2\] of .*test\.json to have `wav`, a string, but got 3"),
        ({"video_path": ""}, r"Expected data\[2\] of .* to have `video_path`, a string"),
    ],
)
def test_bad_entries(data, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        sounds(change(data, 2, **changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[1]", '{"data": []}', '{"data": {}}'])
def test_lists_that_are_none(data, tmp_path, content):
    data.write_text(content)
    with pytest.raises(ValueError, match=r'test\.json to be \{"data": \[\.\.\.\]\}, not empty, but got '):
        sounds(data, tmp_path / "out")


def test_a_list_that_is_not_json(data, tmp_path):
    data.write_text("{")
    with pytest.raises(ValueError, match=r"test\.json to be JSON, but: Expecting"):
        sounds(data, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "frost"}, "`kind` of audio to be one of"),
        ({"severity": 6}, r"`severity` to be an integer in \[1, 5\], but got 6"),
        ({"seed": -1}, "Expected `seed` to be an integer >= 0, but got -1"),
        ({"workers": 0}, "Expected `workers` to be an integer >= 1, but got 0"),
        ({"quality": 101}, r"Expected `quality` to be an integer in \[1, 100\], but got 101"),
        ({"size": 2.5}, "Expected `size` to be an integer >= 1, but got 2.5"),
    ],
)
def test_bad_settings(data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sounds(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_missing_recording_is_found_before_anything_is_written(data, tmp_path):
    soundfile.write(tmp_path / "wind.wav", np.full(9, 0.1), RATE)
    with pytest.raises(FileNotFoundError, match=r"to have rain\.wav"):
        sounds(data, tmp_path / "out", recordings=tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_command_finds_all_missing_recordings_before_it_makes_anything(data, tmp_path, capsys):
    soundfile.write(tmp_path / "wind.wav", np.full(9, 0.1), RATE)
    words = ["--modality", "audio", "--kind", "wind, rain,gaussian_noise,crowd", "--severity", "1"]
    with pytest.raises(SystemExit):
        main(["corrupt", str(data), str(tmp_path / "out"), *words, "--recordings", str(tmp_path)])
    assert "to have rain.wav, crowd.wav (or .flac, .ogg), but it has only wind.wav" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_frame_that_others_have_is_missed(data, tmp_path):
    gap = data.parent / "frames" / "frame_5" / f"{IDS[1]}.jpg"
    gap.unlink()
    with pytest.warns(UserWarning, match=rf"1 frames are missing .* The first: {gap} \(data\[1\] of "):
        images(data, tmp_path / "out")


def test_paths_relative_to_a_root(data, tmp_path):
    moved = tmp_path / "lists" / "deep" / "severity_0.json"
    moved.parent.mkdir(parents=True)
    moved.write_bytes(data.read_bytes())
    made = corrupt_data_set(moved, tmp_path / "a", "audio", "wind", 3, root=data.parent)
    plain = corrupt_data_set(data, tmp_path / "b", "audio", "wind", 3)
    for one, other in zip(*(json.loads(path.read_text())["data"] for path in (made, plain)), strict=True):
        assert (made.parent / one["wav"]).read_bytes() == (plain.parent / other["wav"]).read_bytes()
        assert (made.parent / one["video_path"]).resolve() == (plain.parent / other["video_path"]).resolve()


# ------------------------------------------------------------------------------------------------------- leading out


@pytest.fixture
def secret(tmp_path):
    """A folder beside the data's, with a sound and frames."""
    folder = tmp_path / "secret"
    for frame, name in product((0, 5), IDS):
        picture = folder / f"frame_{frame}" / f"{name}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(picture)
    soundfile.write(folder / "s.wav", np.zeros(800), RATE)
    return folder


def leads_out(data, secret, key, how):
    """The list with an entry that leads to the secret folder."""
    target = secret / "s.wav" if key == "wav" else secret
    link = data.parent / "link"
    if how == "link":
        link.symlink_to(target)
    elif how == "folder":
        link.symlink_to(target.parent)
    chained = {"link": "link", "folder": f"link/{target.name}"}
    relative = os.path.relpath(target, data.parent)
    words = {"absolute": str(target), "dots": relative, "deep": f"sound/../{relative}", **chained}
    return change(data, 1, **{key: words[how]})


@pytest.mark.parametrize("how", ["absolute", "dots", "deep", "link", "folder"])
@pytest.mark.parametrize("key", ["wav", "video_path"])
@pytest.mark.parametrize("make", [sounds, images])
def test_paths_that_lead_out_are_refused(data, secret, tmp_path, make, key, how):
    """Those of the other modality too, for the new list has them."""
    leads_out(data, secret, key, how)
    with pytest.raises(ValueError, match=rf"Expected `{key}` of data\[1\] of .* to stay in .*clean, .*secret.*outside"):
        make(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    make(data, tmp_path / "anywhere", allow_outside=True)
    make(data, tmp_path / "there", allow_outside=[secret])
    with pytest.raises(ValueError, match="to stay in"):
        make(data, tmp_path / "out", allow_outside=[tmp_path / "elsewhere"])


def test_a_frame_that_is_a_link_out_is_refused(data, secret, tmp_path):
    frame = data.parent / "frames" / "frame_5" / "b.jpg"
    frame.unlink()
    frame.symlink_to(secret / "frame_0" / "b.jpg")
    with pytest.raises(ValueError, match=r"the files of data\[1\] of .* to stay in .*secret"):
        images(data, tmp_path / "out")
    sounds(data, tmp_path / "out")


def test_links_and_absolute_paths_within_are_taken(data, tmp_path):
    home = data.parent
    (home / "link").symlink_to(home / "sound")
    (tmp_path / "home").symlink_to(home)
    plain = sounds(data, tmp_path / "plain")
    change(data, 0, wav=str(home / "sound" / f"{IDS[0]}.wav"))
    change(data, 1, wav="link/../sound/b.wav")
    change(data, 2, wav=f"link/{IDS[2]}.wav")
    linked = sounds(tmp_path / "home" / "test.json", tmp_path / "linked")
    names = [f"{name}.wav" for name in IDS]
    folders = [path.parents[3] / "audio" / "rain" / "severity_3" for path in (plain, linked)]
    assert [(folders[0] / name).read_bytes() for name in names] == [(folders[1] / name).read_bytes() for name in names]


def test_a_folder_whose_name_begins_alike_is_outside(data, secret, tmp_path):
    secret.rename(tmp_path / "clean-secret")
    change(data, 1, wav="../clean-secret/s.wav")
    with pytest.raises(ValueError, match="to stay in"):
        sounds(data, tmp_path / "out")


@pytest.mark.parametrize("inside", ["audio", "audio/rain", "audio/rain/severity_3", "json", "json/audio"])
def test_outputs_stay_in_their_folder(data, secret, tmp_path, inside):
    link = tmp_path / "out" / inside
    link.parent.mkdir(parents=True)
    link.symlink_to(secret)
    before = contents(secret)
    with pytest.raises(ValueError, match="Expected .* to be in .*out, but it is a link, or in one, to .*secret"):
        sounds(data, tmp_path / "out")
    assert contents(secret) == before


def test_a_frames_folder_that_is_a_link(data, secret, tmp_path):
    link = tmp_path / "out" / "video" / "fog" / "severity_3" / "frame_5"
    link.parent.mkdir(parents=True)
    link.symlink_to(secret)
    with pytest.raises(ValueError, match="frame_5 to be in .*out, but it is a link"):
        images(data, tmp_path / "out", "fog")


def test_links_in_the_way_of_a_file_are_replaced(data, secret, tmp_path):
    """Under the name of the file, of its temporary one, and of the list."""
    before = contents(secret)
    folder = tmp_path / "out" / "audio" / "rain" / "severity_3"

    def plant(done, total):
        for name in (".b.wav.partial", "b.wav"):
            if done == 1:
                (folder / name).symlink_to(secret / f"new-{name}")

    lists = tmp_path / "out" / "json" / "audio" / "rain"
    lists.mkdir(parents=True)
    (lists / "severity_3.json").symlink_to(secret / "s.wav")
    new = sounds(data, tmp_path / "out", progress=plant)
    assert contents(secret) == before
    assert not new.is_symlink()
    assert not (folder / "b.wav").is_symlink()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "to be JSON, but it is nested too deeply"),
        ('{"data": ' + "[" * 100_000, "to be JSON, but it is nested too deeply"),
        ('{"a":' * 100_000, "to be JSON, but it is nested too deeply"),
        ('{"data": [{"x": NaN}]}', "to be JSON, but: NaN is no finite number"),
        ('{"data": [{"x": -Infinity}]}', "to be JSON, but: -Infinity is no finite number"),
        ('{"data": [{"x": 1e999}]}', "to be JSON, but: 1e999 is no finite number"),
        ('{"data": [{"x": ' + "9" * 5000 + "}]}", "to be JSON, but: Exceeds the limit"),
        ('{"data": [{"wav": "a", "wav": "b"}]}', "to be JSON, but: 'wav' is twice in an object"),
        ('{"data": [], "data": []}', "to be JSON, but: 'data' is twice in an object"),
        ("null", "not empty, but got None"),
        ('{"data": "abc"}', "not empty, but got"),
        ('{"data": [[1]]}', r"Expected data\[0\] of .* to be an object, but got \[1\]"),
        ('{"data": [{}]}', r"Expected data\[0\] of .* to have `video_id`, a string, but got only an empty one"),
    ],
)
def test_lists_of_another_form_are_a_sentence(data, tmp_path, content, message):
    data.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        sounds(data, tmp_path / "out")
    assert len(str(error.value)) < 400
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["video_id", "wav", "video_path"])
@pytest.mark.parametrize("odd", ["\0", "\x1b[2J", "a\nb", "\ud800"])
def test_names_with_control_characters_are_refused(data, tmp_path, key, odd):
    change(data, 1, **{key: odd})
    with pytest.raises(ValueError, match=rf"Expected `{key}` of data\[1\] of .* without control characters, but got"):
        sounds(data, tmp_path / "out")


def test_what_the_new_list_cannot_have_is_told_before_anything_is_written(data, tmp_path):
    change(data, 1, extra="\ud800")
    with pytest.raises(ValueError, match="Expected shallow values and strings of whole characters"):
        sounds(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_too_deep_to_be_written_is_a_sentence():
    deep = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(ValueError, match="Expected shallow values and strings of whole characters"):
        as_json(deep)


def test_settings_of_another_form_are_refused(data, tmp_path):
    sounds(data, tmp_path / "out")
    (tmp_path / "out" / "audio" / "rain" / "severity_3" / "settings.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"settings\.json to hold an object, but got \[1\]"):
        sounds(data, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_lets_nothing_lead_out_unless_told(data, secret, tmp_path, capsys):
    leads_out(data, secret, "wav", "dots")
    words = ["corrupt", str(data), str(tmp_path / "out"), "--kind", "rain", "--severity", "1", "--workers", "1"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Expected `wav` of data[1]" in error
    assert "--allow-outside" in error
    assert len(error.splitlines()) == 1
    main([*words, "--allow-outside"])
    assert (tmp_path / "out" / "audio" / "rain" / "severity_1" / "b.wav").is_file()


def test_the_command(data, tmp_path, capsys):
    words = ["--kind", "fog,contrast", "--severity", "2,5", "--workers", "1", "--size", "32"]
    main(["corrupt", str(data), str(tmp_path / "out"), "--modality", "image", *words])
    lists = sorted(path.relative_to(tmp_path / "out" / "json") for path in (tmp_path / "out").rglob("severity_?.json"))
    assert [str(path) for path in lists] == [
        f"video/{kind}/severity_{severity}.json" for kind in ("contrast", "fog") for severity in (2, 5)
    ]
    shown = "".join(capsys.readouterr().out.split())
    for path in lists:
        assert str(path) in shown
    first = corrupt_data_set(data, tmp_path / "again", "image", "fog", 5, size=32)
    picture = "video/fog/severity_5/frame_5/" + json.loads(first.read_text())["data"][0]["video_id"] + ".jpg"
    assert (tmp_path / "out" / picture).read_bytes() == (tmp_path / "again" / picture).read_bytes()


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (["--kind", "wind,fog"], {("audio", "wind"), ("video", "fog")}),
        (["--kind", "gaussian_noise", "--modality", "audio"], {("audio", "gaussian_noise")}),
        (["--kind", "all", "--modality", "audio"], {("audio", kind) for kind in AUDIO_KINDS}),
        (["--kind", "all"], {("audio", kind) for kind in AUDIO_KINDS} | {("video", kind) for kind in IMAGE_KINDS}),
    ],
)
def test_the_command_knows_whose_a_kind_is(data, tmp_path, words, made):
    out = tmp_path / "out"
    main(["corrupt", str(data), str(out), "--severity", "1", "--workers", "1", "--size", "32", *words])
    assert {path.parts[-3:-1] for path in out.glob("json/*/*/severity_1.json")} == made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gaussian_noise", "Expected `--modality` to be audio or image, for gaussian_noise is a kind of each."),
        ("wind,haze", "Expected `kind` to be one of audio: gaussian_noise, "),
    ],
)
def test_the_command_asks_whose_a_kind_is(data, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        main(["corrupt", str(data), str(tmp_path / "out"), "--kind", words, "--severity", "1"])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kind", "haze", "--severity", "1"], "Expected `kind` of audio to be one of gaussian_noise"),
        (["--kind", "wind", "--severity", "strong"], "Expected `severity` to be an integer in [1, 5], or several"),
        (["--kind", "wind", "--severity", "7"], "Expected `severity` to be an integer in [1, 5], but got 7"),
        (["--kind", "wind", "--severity", "1", "--colour", "red"], "Expected no arguments but those of --help"),
        (["--kind", "wind", "--severity", "1", "--recordings", "nowhere"], "nowhere"),
    ],
)
def test_errors_of_the_command(data, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        main(["corrupt", str(data), str(tmp_path / "out"), "--modality", "audio", *words])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "abpem corrupt: " in error
    assert message in error
    assert not (tmp_path / "out").exists()
