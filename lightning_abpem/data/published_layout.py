"""The layout of Kinetics50-C and VGGSound-C on disk: lists, where corrupted copies go, files written at once.

A data set is a list ``{"data": [{"video_id", "wav", "video_path", "labels"}, ...]}`` in JSON, with sound at `wav` and
frames at ``{video_path}/frame_{i}/{video_id}.jpg``, i from 0 to 9. Paths in it are relative to the list's own
folder, if no other root is given.
"""

from __future__ import annotations

import json
import os
import reprlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_abpem.data.corruptions import Corruption

__all__ = ["File", "Layout", "read_json", "read_list", "relative", "remove_partial", "write", "write_json"]

_FRAMES = tuple(f"frame_{i}" for i in range(10))
_PARTIAL = ".partial"  # how temporary names end


@dataclass(frozen=True)
class File:
    """A file to make; `key` names its random numbers, and `where` its entry in the list, for messages."""

    source: Path
    target: Path
    key: str
    where: str


@dataclass(frozen=True)
class Layout:
    """Where everything of one corruption is.

    Args:
        data_list: of the data set that is corrupted.
        out: folder of all its corruptions; links in it are followed, since a path ``..`` leaves where they lead.
        corruption: which one.
        root: what the list's relative paths are relative to; None for its own folder.
    """

    data_list: Path
    out: Path
    corruption: Corruption
    root: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_list", Path(self.data_list))
        object.__setattr__(self, "out", Path(self.out).resolve())

    @property
    def home(self) -> Path:
        return self.data_list.parent if self.root is None else Path(self.root)

    @property
    def branch(self) -> Path:
        """Where the corrupted files are in `out`, and their list in ``out/json``; images are in "video"."""
        top = "audio" if self.corruption.modality == "audio" else "video"
        return Path(top, self.corruption.kind, f"severity_{self.corruption.severity}")

    @property
    def folder(self) -> Path:
        return self.out / self.branch

    @property
    def new_list(self) -> Path:
        return self.out / "json" / self.branch.with_suffix(".json")

    def files(self, entries: list[dict[str, Any]]) -> list[File]:
        """All files to make; an entry may have any number of frames, and a warning says if others have more.

        Raises:
            FileNotFoundError: entries have no file.
        """
        found: list[File] = []
        absent: list[File] = []
        missing: list[str] = []
        for i, entry in enumerate(entries):
            candidates = self._candidates(entry, f"data[{i}] of {self.data_list}")
            there = [file for file in candidates if file.source.is_file()]
            found += there
            absent += [file for file in candidates if file not in there]
            if not there:
                frames = " or in another frame_0..9" if len(candidates) > 1 else ""
                missing.append(f"{candidates[0].source}{frames} (data[{i}])")
        if missing:
            shown = ", ".join((*missing[:5], "...")[: len(missing)])
            raise FileNotFoundError(
                f"Expected all {len(entries)} entries of {self.data_list} to have their files, but "
                f"{len(missing)} have none: {shown}."
            )
        made = {file.target.parent for file in found}
        if gaps := [file for file in absent if file.target.parent in made]:
            warnings.warn(
                f"{len(gaps)} frames are missing that other entries of {self.data_list} have, so the copy will lack "
                f"them too. The first: {gaps[0].source} ({gaps[0].where}).",
                stacklevel=3,
            )
        return found

    def relocate(self, entry: dict[str, Any]) -> dict[str, Any]:
        """An entry of the data set's list, as it is in the new list."""
        home = self.home.resolve()
        wav, video = home / entry["wav"], home / entry["video_path"]
        if self.corruption.modality == "audio":
            wav = self.folder / f"{entry['video_id']}.wav"
        else:
            video = self.folder
        at = self.new_list.parent
        return {**entry, "wav": relative(wav, at), "video_path": relative(video, at)}

    def _candidates(self, entry: dict[str, Any], where: str) -> list[File]:
        name, home = entry["video_id"], self.home
        if self.corruption.modality == "audio":
            return [File(home / entry["wav"], self.folder / f"{name}.wav", name, where)]
        video, picture = home / entry["video_path"], f"{name}.jpg"
        return [
            File(video / frame / picture, self.folder / frame / picture, f"{name}/{frame}", where) for frame in _FRAMES
        ]


def relative(path: Path, folder: Path) -> str:
    """A path as seen from a folder, with ``/`` on any system."""
    return Path(os.path.relpath(path, folder)).as_posix()


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is not JSON in UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"Expected {path} to be JSON, but: {error}.") from error


def read_list(path: Path, keys: Sequence[str] = ("video_id", "wav", "video_path")) -> dict[str, Any]:
    """A data set's list: all entries have a string for each of the keys, and each `video_id` differs.

    Raises:
        ValueError: the list is something else.
    """
    document = read_json(path)
    if not isinstance(document, dict) or not isinstance(document.get("data"), list) or not document["data"]:
        raise ValueError(f'Expected {path} to be {{"data": [...]}}, not empty, but got {reprlib.repr(document)}.')
    first: dict[str, int] = {}
    for i, entry in enumerate(document["data"]):
        where = f"data[{i}] of {path}"
        if not isinstance(entry, dict):
            raise ValueError(f"Expected {where} to be an object, but got {reprlib.repr(entry)}.")
        for key in keys:
            if not isinstance(entry.get(key), str) or not entry[key]:
                got = repr(entry[key]) if key in entry else f"only {', '.join(entry) or 'an empty one'}"
                raise ValueError(f"Expected {where} to have `{key}`, a string, but got {got}.")
        name = entry["video_id"]
        if set(name) & set("/\\\0"):
            raise ValueError(f"Expected `video_id` of {where} to be part of a file name, but got {name!r}.")
        if first.setdefault(name, i) != i:
            raise ValueError(f"Expected each `video_id` once, but {name!r} is in data[{first[name]}] and {where}.")
    return document


def write(path: Path, content: bytes) -> None:
    """Write a file at once: under its name there is never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    partial.write_bytes(content)
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON at once."""
    write(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def remove_partial(folder: Path) -> None:
    """Remove what runs that were killed in `write` left under a folder."""
    for partial in list(folder.rglob(f".*{_PARTIAL}")):
        partial.unlink()
