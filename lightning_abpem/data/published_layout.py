"""The layout of Kinetics50-C and VGGSound-C on disk: lists, where corrupted copies go, files written at once.

A data set is a list ``{"data": [{"video_id", "wav", "video_path", "labels"}, ...]}`` in JSON, with sound at `wav` and
frames at ``{video_path}/frame_{i}/{video_id}.jpg``, i from 0 to 9. Its paths are relative to a root, by default the
list's own folder. They may not lead out of it unless that is allowed.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_abpem.data.corruptions import Corruption
from lightning_abpem.data.roots import AllowOutside, Roots, is_inside

__all__ = ["File", "Layout", "as_json", "read_json", "read_list", "relative", "remove_partial", "write", "write_json"]

_FRAMES = tuple(f"frame_{i}" for i in range(10))
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # nor halves of characters, which are no UTF-8
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
    """Paths of one corruption's sources, files and list.

    Args:
        data_list: of the data set that is corrupted.
        out: folder of all its corruptions; links on the way to it are resolved, so that ``..`` in paths is right.
        corruption: which one.
        root: folder to which the list's relative paths are relative; None for the list's own.
        allow_outside: True lets the list's paths lead out of the root; a list of folders lets them lead there.
    """

    data_list: Path
    out: Path
    corruption: Corruption
    root: Path | None = None
    allow_outside: AllowOutside = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_list", Path(self.data_list))
        object.__setattr__(self, "out", Path(self.out).resolve())

    @property
    def home(self) -> Path:
        return self.data_list.parent if self.root is None else Path(self.root)

    @property
    def branch(self) -> Path:
        """Path of the corrupted files in `out`, and of their list in ``out/json``; images are in "video"."""
        top = "audio" if self.corruption.modality == "audio" else "video"
        return Path(top, self.corruption.kind, f"severity_{self.corruption.severity}")

    @property
    def folder(self) -> Path:
        return self.out / self.branch

    @property
    def new_list(self) -> Path:
        return self.out / "json" / self.branch.with_suffix(".json")

    def files(self, entries: list[dict[str, Any]]) -> list[File]:
        """Return all files to make. Entries may have any number of frames; a warning is given if they differ.

        Raises:
            ValueError: a path leads out of the root.
            FileNotFoundError: entries have no file.
        """
        found: list[File] = []
        absent: list[File] = []
        missing: list[str] = []
        roots = Roots(self.home, self.allow_outside)
        for i, entry in enumerate(entries):
            where = f"data[{i}] of {self.data_list}"
            for key in ("wav", "video_path"):
                roots.check(self.home / entry[key], entry[key], f"`{key}` of {where}")
            candidates = self._candidates(entry, where)
            there = [file for file in candidates if file.source.is_file()]
            for file in there:
                roots.check(file.source, str(file.source), f"the files of {where}")
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

    def check_output(self, files: Sequence[File]) -> None:
        """Refuse links in `out` through which files would be written elsewhere.

        Raises:
            ValueError: a folder of the copy leads out of `out`.
        """
        for folder in dict.fromkeys([self.folder, self.new_list.parent, *(file.target.parent for file in files)]):
            if not is_inside(real := os.path.realpath(folder), str(self.out)):
                raise ValueError(f"Expected {folder} to be in {self.out}, but it is a link, or in one, to {real}.")

    def relocate(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Return an entry of the data set's list with the paths of the new list."""
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
    """Return a path relative to a folder, with ``/`` on any system."""
    return Path(os.path.relpath(path, folder)).as_posix()


def read_json(path: Path) -> Any:
    """Return a JSON file's content.

    Raises:
        ValueError: it is not JSON in UTF-8, has a name twice in an object, or a number that is not finite.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_each_name_once)
    except ValueError as error:
        raise ValueError(f"Expected {path} to be JSON, but: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"Expected {path} to be JSON, but it is nested too deeply.") from error


def _finite(word: str) -> float:
    number = float(word)
    if not math.isfinite(number):
        raise ValueError(f"{word} is no finite number")
    return number


def _each_name_once(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is twice in an object")
    return found


def read_list(path: Path, keys: Sequence[str] = ("video_id", "wav", "video_path")) -> dict[str, Any]:
    """Return a data set's list: all entries have a string for each of the keys, and each `video_id` differs.

    Raises:
        ValueError: the list is something else.
    """
    document = read_json(path)
    if not isinstance(document, dict) or not isinstance(document.get("data"), list) or not document["data"]:
        raise ValueError(f'Expected {path} to be {{"data": [...]}}, not empty, but got {reprlib.repr(document)}.')
    first: dict[str, int] = {}
    for i, entry in enumerate(document["data"]):
        where = f"data[{i}] of {path}"
        _check_entry(entry, keys, where)
        name = entry["video_id"]
        if first.setdefault(name, i) != i:
            raise ValueError(f"Expected each `video_id` once, but {name!r} is in data[{first[name]}] and {where}.")
    return document


def _check_entry(entry: object, keys: Sequence[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"Expected {where} to be an object, but got {reprlib.repr(entry)}.")
    for key in keys:
        value = entry.get(key)
        if not isinstance(value, str) or not value:
            got = reprlib.repr(value) if key in entry else f"only {', '.join(entry)[:200] or 'an empty one'}"
            raise ValueError(f"Expected {where} to have `{key}`, a string, but got {got}.")
        if _CONTROL.search(value):
            raise ValueError(f"Expected `{key}` of {where} without control characters, but got {reprlib.repr(value)}.")
    if set(entry["video_id"]) & set("/\\"):
        raise ValueError(f"Expected `video_id` of {where} to be part of a file name, but got {entry['video_id']!r}.")


def write(path: Path, content: bytes) -> None:
    """Write a file atomically: under its name there is never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    partial.unlink(missing_ok=True)  # of a run that was killed, or a link to a file elsewhere
    with partial.open("xb") as file:
        file.write(content)
    os.replace(partial, path)


def as_json(content: object) -> bytes:
    """Return the JSON of a value, in UTF-8.

    Raises:
        ValueError: it is nested too deeply, or has strings that are no Unicode.
    """
    try:
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
    except (RecursionError, UnicodeEncodeError) as error:
        raise ValueError(f"Expected shallow values and strings of whole characters, but: {error}.") from error


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically."""
    write(path, as_json(content))


def remove_partial(folder: Path) -> None:
    """Remove the partial files under a folder that runs killed in `write` left behind."""
    for partial in list(folder.rglob(f".*{_PARTIAL}")):
        partial.unlink()
