"""Paths of corrupted copies: relative ones, links, and what leads out of a folder."""

import json
import shutil

import pytest

from lightning_abpem.data.corrupt_files import corrupt_data_set
from lightning_abpem.data.corruptions import Corruption
from tests.data.clean import IDS, change, contents, images, leads_out, load, sounds


def test_paths_hold_through_links_and_from_any_folder(data, tmp_path, monkeypatch):
    (tmp_path / "disk" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep" / "er")
    monkeypatch.chdir(tmp_path / "clean")
    new = sounds("test.json", "../link/out")
    for entry in load(new)["data"]:
        assert (new.parent / entry["wav"]).is_file()
        assert (new.parent / entry["video_path"] / "frame_0" / f"{entry['video_id']}.jpg").is_file()


def test_paths_relative_to_a_root(data, tmp_path):
    moved = tmp_path / "lists" / "deep" / "severity_0.json"
    moved.parent.mkdir(parents=True)
    moved.write_bytes(data.read_bytes())
    made = corrupt_data_set(moved, tmp_path / "a", Corruption("audio", "wind", 3), root=data.parent)
    plain = corrupt_data_set(data, tmp_path / "b", Corruption("audio", "wind", 3))
    for one, other in zip(*(json.loads(path.read_text())["data"] for path in (made, plain)), strict=True):
        assert (made.parent / one["wav"]).read_bytes() == (plain.parent / other["wav"]).read_bytes()
        assert (made.parent / one["video_path"]).resolve() == (plain.parent / other["video_path"]).resolve()


def test_the_whole_can_be_moved(data, tmp_path):
    new = sounds(data, tmp_path / "clean" / "corrupted")
    shutil.move(tmp_path / "clean", tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / new.relative_to(tmp_path / "clean")
    for entry in load(moved)["data"]:
        assert (moved.parent / entry["wav"]).is_file()
        assert (moved.parent / entry["video_path"] / "frame_0" / f"{entry['video_id']}.jpg").is_file()


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
