"""Settings, lists and files that corrupting refuses, most of them before anything is written."""

from typing import Any

import numpy as np
import pytest
import soundfile

from lightning_abpem.data.published_layout import as_json
from tests.data.clean import IDS, RATE, change, contents, images, load, sounds, stop_after, store


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
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(ValueError, match="Expected shallow values and strings of whole characters"):
        as_json(deep)


def test_settings_of_another_form_are_refused(data, tmp_path):
    sounds(data, tmp_path / "out")
    (tmp_path / "out" / "audio" / "rain" / "severity_3" / "settings.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"settings\.json to hold an object, but got \[1\]"):
        sounds(data, tmp_path / "out")
