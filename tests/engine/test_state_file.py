"""The file of a state is whole or not there, whatever ends its writer."""

import errno
import io
import os
import random
import re
import resource
import signal
import threading
from multiprocessing import Pipe, get_context
from pathlib import Path

import pytest
import torch

from lightning_abpem.engine import state_file
from lightning_abpem.engine.state_file import read_state, write_state
from lightning_abpem.methods import Tent
from tests.toy import batches, make_toy

PARTIAL = ".*" + state_file._PARTIAL


def made(updates=1):
    callback = Tent()
    with torch.no_grad(), callback.attach(make_toy()) as adaptation:
        for batch in batches(updates):
            adaptation.model(*batch)
    return callback


@pytest.fixture(scope="module")
def state():
    return made().state_dict()


def updates(path):
    return read_state(path, "Tent")["weights"]["counts"][0]


def test_there_and_back(state, tmp_path):
    assert write_state(state, tmp_path / "state.pt") == tmp_path / "state.pt"
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    again = read_state(tmp_path / "state.pt", "Tent")
    assert again["weights"]["counts"] == state["weights"]["counts"]
    assert torch.load(tmp_path / "state.pt", weights_only=True).keys() == state.keys()  # torch itself reads it


def test_a_damaged_file(state, tmp_path):
    path = write_state(state, tmp_path / "state.pt")
    content = path.read_bytes()
    for length in (*range(0, len(content), 97), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"Expected '.*state\.pt' to hold the state of an adaptation"):
            Tent().load(path)
    for at in (*range(0, len(content), 97), *range(len(content) - 80, len(content))):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(ValueError, match="but it is damaged|but it has no digest"):
            Tent().load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="but it is damaged"):
        Tent().load(path)


def test_what_is_no_state(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="it has no digest: .* A state from elsewhere goes to `load_state_dict`"):
        Tent().load(tmp_path / "model.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no '.*none\.pt'"):
        Tent().load(tmp_path / "none.pt")


class Dangerous:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-state",)


def test_no_code_of_a_file_runs(state, tmp_path, monkeypatch):
    """Also with the right digest, which anybody can compute."""
    monkeypatch.chdir(tmp_path)
    content = io.BytesIO()
    torch.save({**state, "measured": Dangerous()}, content)
    state_file._replace(tmp_path / "state.pt", content.getvalue())
    with pytest.raises(ValueError, match="but it cannot be read"):
        Tent().load(tmp_path / "state.pt")
    assert not Path("made-by-a-state").exists()


def test_what_could_not_be_loaded_is_not_saved(state, tmp_path):
    path = write_state(state, tmp_path / "state.pt")
    before = path.read_bytes()
    for name, value, message in [
        ("seen", {1, 2}, "`state.seen` .* got a set"),
        ("mean", torch.tensor([torch.nan]), "`state.mean` .* finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_state({**state, "state": {name: value}}, path)
    assert path.read_bytes() == before


def test_links_are_followed(state, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "state.pt", tmp_path / "elsewhere" / "target.pt"
    link.symlink_to(target)
    for _ in range(2):  # at first it leads to nothing
        assert write_state(state, link) == link
        assert link.is_symlink()
        assert target.is_file()
        assert updates(link) == 1
    assert not list(tmp_path.rglob(PARTIAL))


@pytest.mark.parametrize("what", ["a folder", "a pipe", "a link to a device"])
def test_what_is_no_file_stays(state, tmp_path, what):
    path = tmp_path / "state.pt"
    {
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a link to a device": lambda: path.symlink_to(os.devnull),
    }[what]()
    with pytest.raises(ValueError, match=r"Expected '.*state\.pt' to be a file, but it is a (folder|device)"):
        write_state(state, path)
    with pytest.raises(ValueError, match=r"Expected '.*state\.pt' to be a file"):
        Tent().load(path)
    assert not path.is_file()


def test_a_folder_that_is_not_there(state, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"The state is not saved: No such file or directory: '.*none/state\.pt'"
    ):
        write_state(state, tmp_path / "none" / "state.pt")


class FullDisk(io.FileIO):
    """A file on a disk that is full after some bytes."""

    def write(self, content):
        super().write(memoryview(content)[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("full", ["in writing", "in syncing"])
def test_a_full_disk(state, tmp_path, monkeypatch, full):
    path = write_state(state, tmp_path / "state.pt")
    before = path.read_bytes()

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if full == "in writing":
            patch.setattr(Path, "open", lambda self, mode: FullDisk(self, mode.replace("b", "")))
        else:
            patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match=r"The state is not saved: No space left on device: '.*state\.pt'") as raised:
            write_state(state, path)
    assert raised.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_on_disk_before_it_has_its_name_and_its_name_follows(state, tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, Path.replace

    def fsync(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.replace(tmp_path.name, "the folder"))
        sync(handle)

    def replace(self, target):
        done.append(f"{self.name} to {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_state(state, tmp_path / "state.pt")
    assert done == [done[0], f"{done[0]} to state.pt", "the folder"]


def test_threads_that_write_at_once(state, tmp_path):
    """Every one has a partial file of its own, and what is read meanwhile is whole."""
    path, errors = write_state(state, tmp_path / "state.pt"), []

    def write():
        try:
            for _ in range(20):
                write_state(state, path)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert updates(path) == 1
    assert not errors
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_lives_keeps_its_partial_file(state, tmp_path):
    """While it writes, another one's save leaves it alone; the next after it clears what it left."""
    left = tmp_path / f".left{state_file._PARTIAL}"
    with state_file._writing_in(tmp_path):
        left.write_bytes(b"half of a")
        write_state(state, tmp_path / "state.pt")
        assert left.exists()
    write_state(state, tmp_path / "state.pt")
    assert not left.exists()


def in_a_child(function, *args):
    """Start a child process, by fork: to import torch would take longer than all else."""

    def runs():
        torch.set_num_threads(1)  # a fork has none of its parent's threads, and OpenMP would wait for them for ever
        function(*args)

    child = get_context("fork").Process(target=runs, daemon=True)
    child.start()
    return child


def dies_at(point, state, path):
    """Save, and die by SIGKILL at a point of it."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    class DiesInWriting(io.FileIO):
        def write(self, content):
            super().write(memoryview(content)[: len(content) // 2])
            die()

    if point == "in writing":
        Path.open = lambda self, mode: DiesInWriting(self, mode.replace("b", ""))  # type: ignore[assignment]
    elif point == "before it is on disk":
        os.fsync = die
    elif point == "before it has its name":
        Path.replace = die
    elif point == "with its name":
        Path.unlink = die  # as is called next
    write_state(state, path)


POINTS = {"in writing": 1, "before it is on disk": 1, "before it has its name": 1, "with its name": 2}


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(state, tmp_path, point):
    path = write_state(state, tmp_path / "state.pt")
    child = in_a_child(dies_at, point, made(2).state_dict(), path)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert updates(path) == POINTS[point]
    assert len(list(tmp_path.glob(PARTIAL))) == (POINTS[point] == 1)
    write_state(state, path)
    assert list(tmp_path.iterdir()) == [path]


def saves_on(pipe, states, path):
    while True:
        for state in states:
            write_state(state, path)
            pipe.send(None)


def saves_in_little_room(pipe, state, path):
    """Save where the system refuses to let a file grow, after it took the first bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        write_state(state, path)
    except OSError as error:
        pipe.send(str(error))


def test_a_file_that_may_not_grow(state, tmp_path):
    """The system's own refusal in the middle of a file, where a full disk is simulated above."""
    path = write_state(state, tmp_path / "state.pt")
    ours, theirs = Pipe()
    child = in_a_child(saves_in_little_room, theirs, made(2).state_dict(), path)
    assert ours.poll(60)
    assert re.search(r"The state is not saved: File too large: '.*state\.pt'", ours.recv())
    child.join()
    assert updates(path) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kills", [10, pytest.param(150, marks=pytest.mark.slow)])
def test_killed_at_any_time(state, tmp_path, kills):
    """After some of its saves and a part of one: an old state or a new one, and whole."""
    path, generator = tmp_path / "state.pt", random.Random(0)
    states = [{**state, "state": {"mean": torch.full((10**5,), float(i))}} for i in range(2)]
    for _ in range(kills):
        ours, theirs = Pipe()
        child = in_a_child(saves_on, theirs, states, path)
        for _ in range(generator.randint(1, 4)):
            assert ours.poll(60)
            ours.recv()
        for _ in range(generator.randrange(10**5)):
            pass
        child.kill()
        child.join()
        values = read_state(path, "Tent")["state"]["mean"]
        assert any(torch.equal(values, own["state"]["mean"]) for own in states)
    write_state(state, path)
    assert list(tmp_path.iterdir()) == [path]
