"""Limits on a list's paths: with links followed, they lead into the data's folder, or where it is allowed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["AllowOutside", "Roots", "is_inside"]

AllowOutside = bool | Sequence[str | Path]


class Roots:
    """The folders that a list's paths may lead to.

    Args:
        home: the data's folder.
        allow_outside: True allows any folder; a list of folders allows those too.
    """

    def __init__(self, home: Path, allow_outside: AllowOutside = False) -> None:
        self._anywhere = allow_outside is True
        more: Iterable[str | Path] = () if isinstance(allow_outside, bool) else allow_outside
        self.folders = [os.path.realpath(folder) for folder in (home, *more)]
        self._real: dict[str, str] = {}  # of folders: few, where files are many

    def check(self, path: Path, value: str, where: str) -> None:
        """Raise unless a path stays in the allowed folders.

        Args:
            path: of a file or folder.
            value: the path as the list has it, for the message.
            where: the path's place, such as "`wav` of data[3] of list.json".

        Raises:
            ValueError: it leads out, or can be no path.
        """
        if self._anywhere:
            return
        try:
            real = self._resolve(str(path))
        except ValueError as error:  # a character that no path can have
            raise ValueError(f"Expected {where} to be a path, but got {value!r}: {error}.") from error
        if not any(is_inside(real, folder) for folder in self.folders):
            leads = f", which leads to {real!r}" if real != value else ""
            raise ValueError(
                f"Expected {where} to stay in {' or '.join(self.folders)}, but got {value!r}{leads}. "
                "If the list is to be trusted, allow it: `allow_outside`, or --allow-outside."
            )

    def _resolve(self, path: str) -> str:
        folder, name = os.path.split(path)
        if name in ("", ".", ".."):
            return os.path.realpath(path)
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        joined = os.path.join(self._real[folder], name)
        return os.path.realpath(joined) if os.path.islink(joined) else joined


def is_inside(path: str, folder: str) -> bool:
    """Return True if `path`, which has no links, is the folder or inside it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
