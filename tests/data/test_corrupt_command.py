"""`abpem corrupt` of a data set: kinds and modalities, its words, its errors."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile

import lightning_abpem
from lightning_abpem.cli import main
from lightning_abpem.data.audio_corruptions import AUDIO_KINDS
from lightning_abpem.data.corrupt_work import CorruptOptions
from lightning_abpem.data.image_corruptions import IMAGE_KINDS
from lightning_abpem.trainer.options import argument_words
from tests.data.clean import RATE, images, leads_out


def test_the_command_finds_all_missing_recordings_before_it_makes_anything(data, tmp_path, capsys):
    soundfile.write(tmp_path / "wind.wav", np.full(9, 0.1), RATE)
    words = ["--modality", "audio", "--kind", "wind, rain,gaussian_noise,crowd", "--severity", "1"]
    with pytest.raises(SystemExit):
        main(["corrupt", str(data), str(tmp_path / "out"), *words, "--recordings", str(tmp_path)])
    assert "to have rain.wav, crowd.wav (or .flac, .ogg), but it has only wind.wav" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
    first = images(data, tmp_path / "again", "fog", 5, size=32)
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


def test_the_help_and_the_page_have_the_words_of_the_options(capsys):
    with pytest.raises(SystemExit):
        main(["corrupt", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    page = (Path(lightning_abpem.__file__).parents[1] / "docs" / "command-line.md").read_text()
    words = argument_words(CorruptOptions)
    assert list(words) == [own.name for own in fields(CorruptOptions)]
    for name, said in words.items():
        assert said.rstrip(".") in shown
        assert f"| `--{name.replace('_', '-')}` | {said.rstrip('.')} |" in page
