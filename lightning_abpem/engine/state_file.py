"""The file of a stream's state: written at once and whole, read only if it is as it was written."""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from lightning_abpem.engine.checkpoint import check_form
from lightning_abpem.engine.ranks import process

if sys.platform != "win32":
    import fcntl

__all__ = ["check_saved", "own_path", "read_state", "write_state"]

_MARK = b"\nsha256 "  # stands between what torch.save wrote and its digest; torch.load reads such a file all the same
_PARTIAL = ".abpem-partial"


def own_path(path: str | Path, rank: int, size: int) -> Path:
    """Return where this process's state lies: `path`, or one of several beside each other, as state-0-of-2.pt."""
    path = Path(path)
    return path if size == 1 else path.with_name(f"{path.stem}-{rank}-of-{size}{path.suffix}")


def write_state(state: Mapping[str, Any], path: str | Path) -> Path:
    """Write a state, all of it or nothing; with several processes, each its own.

    Raises:
        ValueError: if the state could not be loaded again, or there is something other than a file.
        OSError: if it cannot be written; a file that was there before is still whole then.
    """
    check_form(state, state["method"])
    path = own_path(path, *state["process"])
    _check_regular(path)
    content = io.BytesIO()
    torch.save(dict(state), content)
    try:
        _replace(Path(os.path.realpath(path)), content.getvalue())
    except OSError as error:
        raise OSError(error.errno, f"The state is not saved: {error.strerror or error}", str(path)) from error
    return path


def read_state(path: str | Path, method: str) -> dict[str, Any]:
    """Return this process's state from what `write_state` wrote.

    Raises:
        FileNotFoundError: if there is none, or none of this process.
        ValueError: if the file is damaged, or holds something else.
    """
    rank, size = process()
    path = own_path(path, rank, size)
    if not path.exists():
        each = f" Each process has a file of its own, and this is process {rank} of {size}." if size > 1 else ""
        raise FileNotFoundError(f"There is no '{path}' with the state of an adaptation.{each}")
    return _read(path, method)


def check_saved(path: str | Path, method: str) -> None:
    """Hold what `write_state` wrote against a method, before it is known which process this will be.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: see `read_state`.
    """
    path = Path(path)
    of_processes = sorted(path.parent.glob(f"{glob.escape(path.stem)}-*-of-*{glob.escape(path.suffix)}"))
    found = [path] if path.exists() else of_processes
    if not found:
        raise FileNotFoundError(f"There is no '{path}' with the state of an adaptation.")
    _read(found[0], method)


def _read(path: Path, method: str) -> dict[str, Any]:
    _check_regular(path)
    content, _, own = path.read_bytes().rpartition(_MARK)
    if not content:
        raise ValueError(
            f"Expected '{path}' to hold the state of an adaptation, as `save` writes it, but it has no digest: it is "
            "cut off, or something else. A state from elsewhere goes to `load_state_dict`."
        )
    if hashlib.sha256(content).hexdigest().encode() != own:
        raise ValueError(f"Expected '{path}' to hold the state of an adaptation, but it is damaged.")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: somebody else wrote this, with a digest
        raise ValueError(f"Expected '{path}' to hold the state of an adaptation, but it cannot be read.") from error
    check_form(state, method)
    return state


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "device or pipe"
        raise ValueError(f"Expected '{path}' to be a file, but it is a {kind}.")


def _replace(path: Path, content: bytes) -> None:
    """Put a file in the place of another at once, its content on disk before it has its name."""
    partial = path.with_name(f".{uuid4().hex}{_PARTIAL}")  # which no other thread or process has
    with _writing_in(path.parent):
        try:
            with partial.open("xb") as file:
                file.write(content + _MARK + hashlib.sha256(content).hexdigest().encode())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _writing_in(folder: Path) -> Iterator[None]:
    """Clear what dead writers left in a folder unless somebody writes there; afterwards, have its names on disk."""
    if sys.platform == "win32":  # where folders cannot be locked: what dead writers left stays
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # others write, or the file system has no locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.glob(f".*{_PARTIAL}"):
                left.unlink()
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno != errno.EINVAL:  # as of file systems that do so by themselves
                raise
    finally:
        os.close(handle)
