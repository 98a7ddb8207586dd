"""Frames and sound of the benchmarks' layout: what a sample is, where it comes from, and what is wrong with a list."""

import csv
import json
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch import Trainer
from PIL import Image
from scipy import signal
from sklearn.datasets import load_digits

from lightning_abpem import ABPEM
from lightning_abpem.data import audio_visual
from lightning_abpem.data.audio_corruptions import Recordings, corrupt_audio
from lightning_abpem.data.audio_visual import AudioVisualC, AudioVisualPairs
from lightning_abpem.data.corruptions import Corruption, sample_rng
from lightning_abpem.data.image_corruptions import corrupt_image
from lightning_abpem.models import CAVMAE
from tests.data.test_filterbank import by_definition

SPEECH = Path(audio_visual.__file__).parent / "spoken_digits"
NOISE = Corruption("audio", "gaussian_noise", 3)
FAULTS = (NOISE, Corruption("image", "shot_noise", 5), Corruption("image", "contrast", 2))
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six digits, seen and heard, in the published layout: list.json, classes.csv, wavs, frames."""
    folder = tmp_path_factory.mktemp("benchmark")
    with (SPEECH / "clips.csv").open() as file:
        clips = {row["digit"]: row for row in csv.DictReader(file)}
    scans, entries = load_digits(), []
    (folder / "wavs").mkdir()
    (folder / "frames" / "frame_5").mkdir(parents=True)
    for digit in (3, 1, 4, 5, 9, 2):
        name, clip = f"digit-{digit}_000030", clips[str(digit)]
        wave, _ = soundfile.read(SPEECH / "clips.ogg", int(clip["length"]), int(clip["start"]))
        soundfile.write(folder / "wavs" / f"{name}.wav", signal.resample_poly(wave, 2, 1), 16000)
        grey = np.uint8(scans.images[scans.target == digit][0] * 255 / 16)
        colour = np.dstack([grey, 255 - grey, np.full_like(grey, 20 * digit)])
        Image.fromarray(colour).resize((40, 48)).save(folder / "frames" / "frame_5" / f"{name}.jpg")
        entries.append({"video_id": name, "wav": f"wavs/{name}.wav", "video_path": "frames", "labels": f"/m/{digit}"})
    write_list(folder, entries)
    write_csv(folder, "index,mid,display_name", *(f'{i},/m/{i},"digit, {i}"' for i in range(10)))
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def write_list(folder, entries):
    (folder / "list.json").write_text(json.dumps({"data": entries}))


def write_csv(folder, *lines):
    (folder / "classes.csv").write_text("".join(f"{line}\n" for line in lines))


def entries_of(folder):
    return json.loads((folder / "list.json").read_text())["data"]


def pairs_of(folder, **options):
    return AudioVisualPairs(folder / "list.json", folder / "classes.csv", **options)


def data_of(folder, **options):
    return AudioVisualC(folder / "list.json", folder / "classes.csv", **options)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def picture(folder, index):
    with Image.open(folder / "frames" / "frame_5" / f"{entries_of(folder)[index]['video_id']}.jpg") as image:
        return image.convert("RGB")


# -------------------------------------------------------------------------------------------------------- samples


def test_shapes_types_and_labels(folder):
    pairs = pairs_of(folder)
    assert len(pairs) == 6
    for (audio, video), label in pairs:
        assert audio.shape == (1024, 128)
        assert video.shape == (3, 224, 224)
        assert audio.dtype == video.dtype == torch.float32
        assert label.shape == ()
        assert label.dtype == torch.int64
    assert pairs.labels.tolist() == [label.item() for _, label in pairs] == [3, 1, 4, 5, 9, 2]
    assert pairs.labels.dtype == np.int64
    assert pairs.classes == 10
    assert pairs.names[3] == "digit, 3"
    assert pairs.skipped == 0


def test_names_are_the_mids_without_display_names(copy):
    write_csv(copy, "mid,index", *(f"/m/{i},{9 - i}" for i in range(10)))
    pairs = pairs_of(copy)
    assert pairs.names[6] == "/m/3"
    assert pairs.labels.tolist() == [6, 8, 5, 4, 0, 7]


def test_preprocessing_of_sound_from_its_definition(folder):
    audio, _ = pairs_of(folder).sample(1, ())
    wave, rate = soundfile.read(folder / entries_of(folder)[1]["wav"], dtype="int16")
    energies = by_definition(wave / 32768, rate, 128)
    assert 20 < len(energies) < 60
    expected = np.full((1024, 128), 5.081 / 4.4849)  # of zeros
    expected[: len(energies)] = (energies + 5.081) / 4.4849
    np.testing.assert_allclose(audio, expected, atol=1e-5)


def test_long_sound_is_cut(copy):
    wave = 0.1 * np.random.default_rng(0).standard_normal(11 * 16000)
    path = copy / entries_of(copy)[0]["wav"]
    soundfile.write(path, wave, 16000, "FLOAT")
    longer, _ = pairs_of(copy).sample(0, ())
    wave = soundfile.read(path)[0]
    soundfile.write(path, (wave - wave.mean())[: 400 + 1023 * 160], 16000, "DOUBLE")
    torch.testing.assert_close(pairs_of(copy).sample(0, ())[0], longer, rtol=0, atol=0.01)
    assert (longer != 5.081 / 4.4849).all()


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [((40, 48), (224, 268), (0, 22)), ((61, 40), (341, 224), (58, 0)), ((300, 250), (268, 224), (22, 0))],
)
def test_preprocessing_of_frames_by_hand(copy, size, resized, corner):
    picture(copy, 1).resize(size).save(copy / "frames" / "frame_5" / f"{entries_of(copy)[1]['video_id']}.jpg")
    _, video = pairs_of(copy).sample(1, ())
    pixels = np.asarray(picture(copy, 1).resize(resized, Image.Resampling.BICUBIC))
    left, top = corner
    for channel in range(3):
        cropped = pixels[top : top + 224, left : left + 224, channel] / 255
        np.testing.assert_allclose(video[channel], (cropped - MEAN[channel]) / STD[channel], atol=1e-6)


def test_grey_frames_become_rgb(copy):
    picture(copy, 0).convert("L").save(copy / "frames" / "frame_5" / f"{entries_of(copy)[0]['video_id']}.jpg")
    _, video = pairs_of(copy).sample(0, ())
    pixels = video.permute(1, 2, 0).double().numpy() * STD + MEAN
    np.testing.assert_allclose(pixels, pixels[..., :1].repeat(3, axis=2), atol=1e-6)
    assert pixels.std() > 0.05


def test_channels_are_averaged(copy):
    path = copy / entries_of(copy)[0]["wav"]
    wave, rate = soundfile.read(path)
    expected, _ = pairs_of(copy).sample(0, ())
    soundfile.write(path, np.stack([1.5 * wave, 0.5 * wave], 1), rate, "DOUBLE")
    torch.testing.assert_close(pairs_of(copy).sample(0, ())[0], expected, rtol=0, atol=1e-4)


def test_other_rates_are_resampled_with_one_warning(copy):
    time = np.arange(2 * 48000) / 48000
    for entry in entries_of(copy)[:2]:
        soundfile.write(copy / entry["wav"], 0.3 * np.sin(2 * np.pi * 440 * time), 48000, "DOUBLE")
    soundfile.write(copy / entries_of(copy)[2]["wav"], 0.3 * np.sin(2 * np.pi * 440 * time[::3]), 16000, "DOUBLE")
    pairs = pairs_of(copy)
    with pytest.warns(UserWarning, match="Sound at 48000 Hz is resampled to 16000 Hz") as caught:
        (resampled, _), _ = [pairs.sample(index, ()) for index in (0, 1)]
    assert len(caught) == 1
    direct = pairs[2][0][0]
    assert ((resampled == resampled[-1, 0]).all(1) == (direct == direct[-1, 0]).all(1)).all()  # as many frames
    loudest = direct[:198] > direct[:198].max() - 2  # bands far from the tone hold the resampling filter's noise
    torch.testing.assert_close(resampled[:198][loudest], direct[:198][loudest], rtol=0, atol=0.01)


def test_workers_share_the_warning(copy):
    for entry in entries_of(copy):
        wave, _ = soundfile.read(copy / entry["wav"])
        soundfile.write(copy / entry["wav"], wave, 8000)
    data = data_of(copy, num_workers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(data.test_dataloader())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.pairs.sample(0, ())


# ----------------------------------------------------------------------------------------------------- corruption


def test_corruption_on_the_fly_is_corruption_by_hand(copy):
    """On the waveform before its filterbank, on the crop before its normalisation, in the order given."""
    index, seed = 2, 7
    name, wav = entries_of(copy)[index]["video_id"], copy / entries_of(copy)[index]["wav"]
    (audio, video), _ = pairs_of(copy, corruptions=FAULTS, seed=seed)[index]
    image = np.asarray(picture(copy, index).resize((224, 268), Image.Resampling.BICUBIC))[22:246] / 255
    for fault in FAULTS[1:]:
        image = corrupt_image(image, fault.kind, fault.severity, sample_rng(seed, fault, f"{name}/frame_5"))
    expected = torch.from_numpy((image - MEAN) / STD).permute(2, 0, 1).float()
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)
    wave, rate = soundfile.read(wav)
    wave = corrupt_audio(wave, "gaussian_noise", 3, sample_rng(seed, NOISE, name), rate)
    soundfile.write(wav, wave, rate, "DOUBLE")
    torch.testing.assert_close(audio, pairs_of(copy).sample(index, ())[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("fault", "touched"), [(FAULTS[0], 0), (FAULTS[1], 1)])
def test_a_corruption_touches_its_modality_alone(folder, fault, touched):
    clean, corrupted = pairs_of(folder).sample(0, ()), pairs_of(folder).sample(0, (fault,))
    assert not torch.equal(clean[touched], corrupted[touched])
    assert torch.equal(clean[1 - touched], corrupted[1 - touched])


def test_sample_takes_its_corruptions_instead_of_the_configured(folder):
    clean, corrupted = pairs_of(folder), pairs_of(folder, corruptions=FAULTS)
    assert same(corrupted.sample(1, ()), clean[1][0])
    assert same(clean.sample(1, FAULTS), corrupted[1][0])
    assert not torch.equal(clean.sample(1, FAULTS[::-1])[1], corrupted[1][0][1])


def test_noise_depends_on_seed_and_video_alone(copy):
    first, other = pairs_of(copy, seed=1), pairs_of(copy, seed=2)
    assert not torch.equal(first.sample(0, (NOISE,))[0], other.sample(0, (NOISE,))[0])
    expected = first.sample(0, FAULTS)
    write_list(copy, entries_of(copy)[::-1])
    assert same(pairs_of(copy, seed=1).sample(5, FAULTS), expected)


def test_any_number_of_workers_and_any_order_give_the_same_samples(folder):
    def items(**options):
        loader = data_of(folder, corruptions=FAULTS, batch_size=1, **options).test_dataloader()
        return {label.item(): inputs for inputs, label in loader}

    expected = items()
    assert len(expected) == 6
    for options in ({"num_workers": 2}, {"num_workers": 2, "shuffle": True}):
        found = items(**options)
        assert found.keys() == expected.keys()
        assert all(same(found[label], expected[label]) for label in expected)


def test_sound_beyond_full_scale_is_clipped_before_noise(copy):
    path = copy / entries_of(copy)[0]["wav"]
    wave = 1.5 * np.sin(np.arange(8000) / 5)
    soundfile.write(path, wave, 16000, "DOUBLE")
    loud = pairs_of(copy).sample(0, (NOISE,))[0]
    soundfile.write(path, wave.clip(-1, 1), 16000, "DOUBLE")
    assert torch.equal(pairs_of(copy).sample(0, (NOISE,))[0], loud)


@pytest.mark.parametrize("as_folder", [True, False])
def test_recordings_and_frost_of_the_users(folder, tmp_path, as_folder):
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000)
    soundfile.write(tmp_path / "rain.wav", noise, 16000)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save(tmp_path / "ice.png")
    rain, frost = Corruption("audio", "rain", 3), Corruption("image", "frost", 3)
    ice = tmp_path if as_folder else [np.asarray(Image.open(tmp_path / "ice.png")) / np.float32(255)]
    pairs = pairs_of(folder, recordings=tmp_path if as_folder else Recordings(tmp_path), frost=ice)
    audio, video = pairs.sample(0, (rain, frost))
    name = entries_of(folder)[0]["video_id"]
    image = np.asarray(picture(folder, 0).resize((224, 268), Image.Resampling.BICUBIC))[22:246] / 255
    pictures = [np.asarray(Image.open(tmp_path / "ice.png")) / np.float32(255)]
    image = corrupt_image(image, "frost", 3, sample_rng(0, frost, f"{name}/frame_5"), pictures)
    expected = torch.from_numpy((image - MEAN) / STD).permute(2, 0, 1).float()
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)
    drawn_audio, drawn_video = pairs_of(folder).sample(0, (rain, frost))
    assert not torch.equal(audio, drawn_audio)
    assert not torch.equal(video, drawn_video)


# ---------------------------------------------------------------------------------------------------------- paths


def test_paths_relative_to_the_list_to_a_root_and_absolute(folder, tmp_path):
    expected = pairs_of(folder)[3][0]
    shutil.copy(folder / "list.json", tmp_path)
    shutil.copy(folder / "classes.csv", tmp_path)
    assert same(pairs_of(tmp_path, root=folder)[3][0], expected)
    assert same(AudioVisualPairs(str(folder / "list.json"), str(folder / "classes.csv"))[3][0], expected)
    frames = {"video_path": str(folder / "frames")}
    write_list(tmp_path, [entry | frames | {"wav": str(folder / entry["wav"])} for entry in entries_of(folder)])
    assert same(pairs_of(tmp_path, root=folder)[3][0], expected)
    assert same(pairs_of(tmp_path, root="elsewhere", allow_outside=True)[3][0], expected)
    assert same(pairs_of(tmp_path, root="elsewhere", allow_outside=[folder])[3][0], expected)


@pytest.mark.parametrize("broken", ["raise", "skip"])
@pytest.mark.parametrize("how", ["absolute", "dots", "link"])
@pytest.mark.parametrize("key", ["wav", "video_path"])
def test_paths_that_lead_out_are_refused(copy, folder, key, how, broken):
    entries = entries_of(copy)
    away = folder / entries[2][key]
    (copy / "link").symlink_to(away)
    entries[2][key] = {"absolute": str(away), "dots": os.path.relpath(away, copy), "link": "link"}[how]
    write_list(copy, entries)
    for make in (pairs_of, data_of):
        with pytest.raises(ValueError, match=rf"Expected `{key}` of data\[2\] of .* to stay in .*--allow-outside"):
            make(copy, broken=broken)
        make(copy, broken=broken, allow_outside=True)


def test_a_frame_that_is_a_link_out_is_refused(copy, folder):
    name = entries_of(copy)[1]["video_id"]
    frame = copy / "frames" / "frame_5" / f"{name}.jpg"
    frame.unlink()
    frame.symlink_to(folder / "frames" / "frame_5" / f"{name}.jpg")
    with pytest.raises(ValueError, match=r"Expected `video_path` of data\[1\] of .* to stay in"):
        pairs_of(copy)


def test_another_frame_of_the_video(copy):
    shutil.copytree(copy / "frames" / "frame_5", copy / "frames" / "frame_0")
    first, second = (entry["video_id"] for entry in entries_of(copy)[:2])
    shutil.copy(copy / "frames" / "frame_5" / f"{second}.jpg", copy / "frames" / "frame_0" / f"{first}.jpg")
    assert torch.equal(pairs_of(copy, frame=0)[0][0][1], pairs_of(copy)[1][0][1])


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "to be JSON, but: Expecting value: line 1 column 1"),
        ('{"data": [\n{"video_id" "x"}]}', "to be JSON, but: Expecting ':' delimiter: line 2 column 13"),
        (b'{"data": "\xff"}', "to be JSON, but: 'utf-8' codec can't decode"),
        ("[1, 2]", r'to be {"data": [...]}, not empty, but got [1, 2].'),
        ('{"entries": []}', r"not empty, but got {'entries': []}."),
        ('{"data": {}}', r"not empty, but got {'data': {}}."),
        ('{"data": []}', r"not empty, but got {'data': []}."),
        ('{"data": ["a"]}', "data[0] of {path} to be an object, but got 'a'."),
    ],
)
def test_lists_that_are_none(copy, content, message):
    path = copy / "list.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message.replace("{path}", str(path)))) as caught:
        pairs_of(copy)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("key", ["video_id", "wav", "video_path", "labels"])
def test_entries_without_a_key(copy, key):
    entries = entries_of(copy)
    entries[4].pop(key)
    write_list(copy, entries)
    others = ", ".join(k for k in ("video_id", "wav", "video_path", "labels") if k != key)
    message = f"Expected data[4] of {copy / 'list.json'} to have `{key}`, a string, but got only {others}."
    with pytest.raises(ValueError, match=re.escape(message)):
        pairs_of(copy)


@pytest.mark.parametrize(("key", "value"), [("wav", 5), ("video_id", ""), ("labels", None), ("labels", ["/m/1"])])
def test_entries_with_another_type(copy, key, value):
    entries = entries_of(copy)
    entries[1][key] = value
    write_list(copy, entries)
    message = f"Expected data[1] of {copy / 'list.json'} to have `{key}`, a string, but got {value!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        pairs_of(copy)


@pytest.mark.parametrize("mid", ["/m/unknown", "/m/1,/m/2"])
def test_labels_that_are_not_one_mid(copy, mid):
    entries = entries_of(copy)
    entries[2]["labels"] = mid
    write_list(copy, entries)
    message = f"Expected `labels` of data[2] of {copy / 'list.json'} to be one mid of the CSV's 10, but got {mid!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        pairs_of(copy)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "columns index and mid are wanted, and got none."),
        (("index,name", "0,a"), "columns index and mid are wanted, and got index, name."),
        (("index,mid",), "0 indices should be 0, 1, 2, ..., and got []."),
        (("index,mid", "1,a", "2,b"), "2 indices should be 0, 1, 2, ..., and got [1, 2]."),
        (("index,mid", "0,a", "zero,b"), "line 3 has no index or mid of its own: 'zero', 'b'."),
        (("index,mid", "0,a", "0,b"), "line 3 has no index or mid of its own: '0', 'b'."),
        (("index,mid", "0,a", "1,a"), "line 3 has no index or mid of its own: '1', 'a'."),
        (("index,mid", "0,a", "1"), "line 3 has no index or mid of its own: '1', None."),
    ],
)
def test_csvs_that_are_none(copy, lines, message):
    write_csv(copy, *lines)
    with pytest.raises(ValueError, match=re.escape(f"{copy / 'classes.csv'} to be a CSV of classes, but: {message}")):
        pairs_of(copy)


def test_a_byte_order_mark_is_no_part_of_the_first_column(copy):
    for name in ("classes.csv", "list.json"):
        (copy / name).write_bytes(b"\xef\xbb\xbf" + (copy / name).read_bytes())
    assert len(pairs_of(copy)) == 6


def test_neither_list_nor_csv(copy):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        AudioVisualPairs(copy / "none.json", copy / "classes.csv")
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        AudioVisualPairs(copy / "list.json", copy / "none.csv")


def test_broken_takes_two_values(folder):
    with pytest.raises(ValueError, match='Expected `broken` to be "raise" or "skip", but got \'ignore\''):
        pairs_of(folder, broken="ignore")


def test_missing_files_are_counted_in_one_error(copy):
    entries = entries_of(copy)
    (copy / entries[1]["wav"]).unlink()
    picture_path = copy / "frames" / "frame_5" / f"{entries[3]['video_id']}.jpg"
    picture_path.unlink()
    message = (
        f"Expected all files of {copy / 'list.json'} to exist, but 2 are missing: {copy / entries[1]['wav']} (data[1] "
        f'of {copy / "list.json"}), {picture_path} (data[3] of {copy / "list.json"}). With `broken="skip"`'
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        pairs_of(copy)


def test_only_the_first_missing_files_are_named(copy):
    shutil.rmtree(copy / "frames")
    with pytest.raises(FileNotFoundError, match=r"but 6 are missing: (.*, ){5}\.\.\.\. With") as caught:
        pairs_of(copy)
    assert "data[4]" in str(caught.value)
    assert "data[5]" not in str(caught.value)


def break_files(folder):
    """Entries 0 to 4, in five ways; entry 5 stays. What a message about each of them names."""
    waves = [folder / entry["wav"] for entry in entries_of(folder)]
    frames = [folder / "frames" / "frame_5" / f"{entry['video_id']}.jpg" for entry in entries_of(folder)]
    waves[0].write_bytes(b"RIFF and nothing else")
    soundfile.write(waves[1], np.zeros(399), 16000)
    soundfile.write(waves[2], np.full(8000, np.nan), 16000, "FLOAT")
    frames[3].write_bytes(b"no picture")
    frames[4].write_bytes(frames[4].read_bytes()[:-200])
    return [waves[0], waves[1], waves[2], frames[3], frames[4]]


def test_files_that_cannot_be_read_are_named_when_they_are(copy):
    paths = break_files(copy)
    pairs = pairs_of(copy)
    assert len(pairs) == 6
    messages = [
        "to be 25 ms of sound at least, but: Error opening",
        "to be 25 ms of sound at least, but got 399 samples at 16000 Hz, too few or not all finite.",
        "to be 25 ms of sound at least, but got 8000 samples at 16000 Hz, too few or not all finite.",
        "to be a picture, but: cannot identify image file",
        "to be a picture, but: image file is truncated",
    ]
    for index, (path, message) in enumerate(zip(paths, messages, strict=True)):
        expected = f"Expected {path} (data[{index}] of {copy / 'list.json'}) {message}"
        with pytest.raises(ValueError, match=re.escape(expected)):
            pairs[index]
    assert pairs[5][1] == 2


def test_what_is_missing_or_unreadable_can_be_skipped(copy):
    expected = pairs_of(copy).sample(5, FAULTS)
    paths = break_files(copy)
    paths[3].unlink()
    message = rf"5 of 6 entries of {re.escape(str(copy / 'list.json'))} are left out\. .*data\[0\]"
    with pytest.warns(UserWarning, match=message) as caught:
        data = data_of(copy, broken="skip")
    assert len(caught) == 1
    pairs = data.pairs
    assert (len(pairs), pairs.skipped, pairs.labels.tolist(), pairs.classes) == (1, 5, [2], 10)
    assert same(pairs.sample(0, FAULTS), expected)


def test_skipping_nothing_says_nothing(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = pairs_of(folder, broken="skip")
    assert (len(pairs), pairs.skipped) == (6, 0)


def test_skipping_everything_is_an_error(copy):
    shutil.rmtree(copy / "wavs")
    message = f"Expected {copy / 'list.json'} to have an entry that can be read, but it has none. Expected {copy}"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        pairs_of(copy, broken="skip")
    assert "there is no such file" in str(error.value)


# ---------------------------------------------------------------------------------------------------- data module


def test_batches(folder):
    data = data_of(folder, batch_size=4)
    ((audio, video), label), rest = data.test_dataloader()
    assert audio.shape == (4, 1024, 128)
    assert video.shape == (4, 3, 224, 224)
    assert torch.equal(label, torch.tensor([3, 1, 4, 5]))
    assert len(rest[1]) == 2
    inputs = next(iter(data.predict_dataloader()))
    assert len(inputs) == 2
    assert same(inputs, (audio, video))


def test_shuffling_follows_the_seed(folder, monkeypatch):
    monkeypatch.setattr(AudioVisualPairs, "sample", lambda pairs, index, corruptions: (torch.zeros(1), torch.zeros(1)))

    def order(**options):
        return torch.cat([label for _, label in data_of(folder, **options).test_dataloader()]).tolist()

    shuffled = order(shuffle=True, seed=3)
    assert order(shuffle=True, seed=3) == shuffled
    assert sorted(shuffled) == [1, 2, 3, 4, 5, 9]
    assert order(seed=3) == [3, 1, 4, 5, 9, 2]
    assert len({tuple(order(shuffle=True, seed=seed)) for seed in range(5)}) > 2


def test_pairs_can_be_pickled(folder):
    pairs = pairs_of(folder, corruptions=FAULTS)
    assert same(pickle.loads(pickle.dumps(pairs))[0][0], pairs[0][0])


def runner(**options):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **options,
    )


def test_in_a_trainers_run(folder):
    torch.manual_seed(0)
    model = CAVMAE(10, embed_dim=32, num_heads=2, encoder_depth=1).eval()
    data = data_of(folder, corruptions=FAULTS, batch_size=3, shuffle=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*shuffl")
        (source,) = runner().test(model, data, verbose=False)
    with torch.no_grad():
        hits = [model(*(x[None] for x in inputs)).argmax().item() == label.item() for inputs, label in data.pairs]
    assert source["accuracy"] == pytest.approx(np.mean(hits))

    abpem = ABPEM(fusion="blocks_u.*.attn", modalities=CAVMAE.modalities, k=7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (adapted,) = runner(callbacks=[abpem], limit_test_batches=2).test(model, data, verbose=False)
    assert {"accuracy", "abpem/test/entropy"} <= adapted.keys()
    assert np.isfinite(adapted["abpem/test/entropy"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_prediction_gets_the_inputs_alone(folder):
    model = CAVMAE(10, embed_dim=32, num_heads=2, encoder_depth=1).eval()
    data = data_of(folder, batch_size=4)
    logits = torch.cat(runner().predict(model, data))
    with torch.no_grad():
        expected = torch.cat([model(*(x[None] for x in inputs)) for inputs, _ in data.pairs])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
