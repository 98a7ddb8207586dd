"""Corrupted copies of plain folders: names, formats, what is left out, interruptions, links."""

import io
import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from lightning_abpem.cli import main
from lightning_abpem.data.audio_corruptions import corrupt_audio
from lightning_abpem.data.corrupt_files import corrupt_data_set
from lightning_abpem.data.corrupt_folder import corrupt_folder
from lightning_abpem.data.corrupt_work import CorruptOptions
from lightning_abpem.data.corruptions import Corruption, sample_rng
from lightning_abpem.data.frames import centre_square
from lightning_abpem.data.image_corruptions import corrupt_image

PICTURES = ("a.png", "deep/er/b.JPG", "deep/c.webp", "ünï d.bmp")
SOUNDS = ("talk.wav", "deep/hum.flac", "deep/er/b.ogg")


@pytest.fixture
def folder(tmp_path):
    """Pictures of 40 x 30 pixels, stereo sounds of 0.5 s, and two files that are neither."""
    home, rng = tmp_path / "mine", np.random.default_rng(0)
    for name in (*PICTURES, *SOUNDS, "deep/notes.txt", ".hidden"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("none")
    for name in PICTURES:
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(home / name)
    for name in SOUNDS:
        soundfile.write(home / name, 0.1 * rng.standard_normal((4000, 2)).clip(-3, 3), 8000)
    return home


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"settings.json"}


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def corrupt(folder, out, modality, kind, severity, progress=None, **options):
    return corrupt_folder(folder, out, Corruption(modality, kind, severity), CorruptOptions(**options), progress)


def images(folder, out, **options):
    return corrupt(folder, out, "image", "shot_noise", 3, **{"size": 16, **options})


def test_images_keep_their_names_and_formats(folder, tmp_path):
    made = images(folder, tmp_path / "out")
    assert made.folder == tmp_path / "out" / "image" / "shot_noise" / "severity_3"
    assert names(made.folder) == set(PICTURES)
    assert (made.files, made.skipped) == (4, 5)
    for name in PICTURES:
        with Image.open(made.folder / name) as copy, Image.open(folder / name) as clean:
            assert (copy.format, copy.size) == (clean.format, (16, 16))
    with Image.open(folder / "a.png") as clean:  # a format that loses nothing shows the very corruption
        square = centre_square(clean.convert("RGB"), 16)
    expected = corrupt_image(square, "shot_noise", 3, sample_rng(0, Corruption("image", "shot_noise", 3), "a.png"))
    with Image.open(made.folder / "a.png") as copy:
        np.testing.assert_array_equal(np.asarray(copy), np.rint(expected * 255))


def test_sounds_keep_their_names_and_formats(folder, tmp_path):
    made = corrupt(folder, tmp_path / "out", "audio", "rain", 2)
    assert names(made.folder) == set(SOUNDS)
    assert (made.files, made.skipped) == (3, 6)
    for name in SOUNDS:
        copy, clean = soundfile.info(made.folder / name), soundfile.info(folder / name)
        assert (copy.format, copy.samplerate, copy.channels) == (clean.format, 8000, 1)
    wave, rate = soundfile.read(folder / "deep/hum.flac")
    rng = sample_rng(0, Corruption("audio", "rain", 2), "deep/hum.flac")
    expected = corrupt_audio(wave.mean(1), "rain", 2, rng, rate, None)
    np.testing.assert_allclose(soundfile.read(made.folder / "deep/hum.flac")[0], expected.clip(-1, 1), atol=2 / 32768)


def test_what_was_made_is_said_at_the_end(folder, tmp_path):
    made = images(folder, tmp_path / "out", seed=3)
    meta = json.loads((made.folder.parent / "severity_3.meta.json").read_text())
    assert meta["folder"] == "../mine"
    assert (meta["files"], meta["skipped"], meta["seed"]) == (4, 5, 3)


def test_an_interrupted_run_goes_on(folder, tmp_path):
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        images(folder, tmp_path / "out", progress=stop)
    made = tmp_path / "out" / "image" / "shot_noise" / "severity_3"
    first = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.suffix != ".json" and path.is_file()}
    assert len(first) == 2
    assert not made.with_name("severity_3.meta.json").exists()
    images(folder, tmp_path / "out")
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    images(folder, tmp_path / "again")
    assert contents(made) == contents(tmp_path / "again" / "image" / "shot_noise" / "severity_3")


@pytest.mark.slow
def test_workers_write_the_same_bytes(folder, tmp_path):
    one, two = (images(folder, tmp_path / str(workers), workers=workers) for workers in (1, 2))
    assert contents(one.folder) == contents(two.folder)


def test_other_settings_are_refused(folder, tmp_path):
    images(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="seed was 0 and is now 1"):
        images(folder, tmp_path / "out", seed=1)


def test_a_copy_inside_the_folder_is_not_copied_again(folder):
    first = images(folder, folder / "out")
    again = corrupt(folder, folder / "out", "image", "fog", 1, size=16)
    assert (first.files, again.files) == (4, 4)
    with pytest.raises(ValueError, match="Expected `out` to be another folder"):
        images(folder, folder)


def test_links_do_not_lead_out(folder, tmp_path):
    secret = tmp_path / "secret.png"
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(secret)
    (folder / "link.png").symlink_to(secret)
    (folder / "folder").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"to stay in .*mine, but got .*link\.png.*secret\.png"):
        images(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    made = images(folder, tmp_path / "out", allow_outside=True)
    assert (made.files, made.skipped) == (5, 6)  # the link to a folder is not followed
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "other" / "image").mkdir(parents=True)
    (tmp_path / "other" / "image" / "shot_noise").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="but it is a link, or in one"):
        images(folder, tmp_path / "other", allow_outside=True)


def test_a_broken_file_is_named(folder, tmp_path):
    (folder / "deep" / "c.webp").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"c\.webp \(in .*mine\) to be readable"):
        images(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 0}, ValueError, "`size`"),
        ({"severity": 6}, ValueError, "`severity`"),
        ({"modality": "audio", "kind": "fog"}, ValueError, "`kind` of audio"),
        ({"folder": "deep/notes.txt"}, NotADirectoryError, "to be a folder"),
        ({"folder": "empty"}, ValueError, r"to have image files \(.bmp, .* but it has none, and 0 others"),
    ],
)
def test_bad_arguments(folder, tmp_path, options, error, message):
    (folder / "empty").mkdir()
    given = {"folder": ".", "modality": "image", "kind": "fog", "severity": 1} | options
    with pytest.raises(error, match=message):
        corrupt(folder / given.pop("folder"), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["corrupt", str(folder), str(out), "--kind", "fog,rain", "--severity", "1,2", "--size", "16"]
    main([*words, "--workers", "1"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 image files, 5 others skipped" in shown
    assert "3 audio files, 6 others skipped" in shown
    made = {path.relative_to(out).as_posix() for path in out.glob("*/*/severity_?")}
    assert made == {f"{kind}/severity_{severity}" for kind in ("image/fog", "audio/rain") for severity in (1, 2)}
    with Image.open(io.BytesIO((out / "image/fog/severity_1/a.png").read_bytes())) as copy:
        assert copy.size == (16, 16)


def test_the_command_takes_no_root_with_a_folder(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["corrupt", str(folder), str(tmp_path / "out"), "--kind", "fog", "--severity", "1", "--root", "x"])
    assert "Expected no `--root` with a folder" in capsys.readouterr().err


@pytest.mark.parametrize("function", [corrupt_folder, corrupt_data_set])
def test_words_in_place_of_a_corruption(function, tmp_path):
    with pytest.raises(TypeError, match=r"Expected `corruption` to be a Corruption, .* but got 'audio'"):
        function(tmp_path, tmp_path / "out", "audio")
