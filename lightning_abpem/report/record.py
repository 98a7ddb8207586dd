"""The record of a run, which a report is made of: a JSON file, checked whole when it is read.

Its form is `_FORM`. A form that means something else has another version, and is refused by name.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "VERSION", "check_writable", "read_record", "write_text"]

FORMAT = "lightning_abpem report"
VERSION = 2
_BYTES, _WORDS, _ITEMS, _SHOWN = 32 << 20, 4000, 20_000, 80

Check = Callable[[Any, str], None]


def read_record(path: Path) -> dict[str, Any]:
    """Return a record, which a stranger may have written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no record, of another version, too large, or damaged; with the place and what is there.
    """
    with path.open("rb") as file:
        content = file.read(_BYTES + 1)
    if len(content) > _BYTES:
        raise ValueError(f"Expected {path} to be a record of at most {_BYTES} bytes, but it is larger.")
    try:
        record = json.loads(content, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"Expected {path} to be a record, but it is nested too deep for one.") from None
    except ValueError as error:  # of JSON, of UTF-8 and of numbers with thousands of digits
        raise ValueError(f"Expected {path} to be a record in JSON, but got: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"Expected {path} to be the record of a run, with {FORMAT!r} for its format, but it has none.")
    if record.get("version") != VERSION:
        raise ValueError(f"Expected {path} to be of version {VERSION}, but got {_shown(record.get('version'))}.")
    try:
        _FORM(record, "record")
        _check_lengths(record)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return record


def check_writable(path: Path) -> None:
    """Raise unless a file can be written there; nothing is left behind.

    Raises:
        ValueError: naming the folder or the file, and what is in the way.
    """
    if not path.parent.is_dir():
        raise ValueError(f"Expected the folder of the report to exist, but there is no '{path.parent}'. Make it first.")
    if path.exists() and not path.is_file():
        raise ValueError(f"Expected the report to be a file, but '{path}' is something else.")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".abpem"):
            pass
    except OSError as error:
        raise ValueError(f"Expected a report to be writable, but '{path.parent}' refuses: {error.strerror}.") from error


def write_text(path: Path, text: str) -> None:
    """Write a file, all of it or nothing.

    Raises:
        OSError: if it cannot be written; a file that was there before is still whole then.
    """
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8", errors="replace")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no number of JSON")


def _shown(value: object) -> str:
    words = repr(value) if not isinstance(value, int) or abs(value) < 1 << 63 else "a number of too many digits"
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."


# ------------------------------------------------------------------------------ checks, from which the form is built


def _text(value: object, at: str) -> None:
    if not isinstance(value, str) or len(value) > _WORDS or _has_surrogates(value):
        raise ValueError(f"expected {at} to be words of at most {_WORDS} characters, but got {_shown(value)}")


def _has_surrogates(words: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in words)


def _number(value: object, at: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ValueError(f"expected {at} to be a finite number, but got {_shown(value)}")


def _count(value: object, at: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 53:
        raise ValueError(f"expected {at} to be an integer >= 0, but got {_shown(value)}")


def _optional(check: Check) -> Check:
    def checked(value: object, at: str) -> None:
        if value is not None:
            check(value, at)

    return checked


def _listed(check: Check, most: int = _ITEMS) -> Check:
    def checked(value: object, at: str) -> None:
        if not isinstance(value, list) or len(value) > most:
            raise ValueError(f"expected {at} to be a list of at most {most}, but got {_shown(value)}")
        for i, item in enumerate(value):
            check(item, f"{at}[{i}]")

    return checked


def _named(check: Check, most: int = 500) -> Check:
    def checked(value: object, at: str) -> None:
        if not isinstance(value, dict) or len(value) > most:
            raise ValueError(f"expected {at} to map at most {most} names, but got {_shown(value)}")
        for name, item in value.items():
            _text(name, f"a name in {at}")
            check(item, f"{at}.{_shown(name)}")

    return checked


def _parts(**checks: Check) -> Check:
    def checked(value: object, at: str) -> None:
        if not isinstance(value, dict) or set(value) != set(checks):
            raise ValueError(f"expected {at} to hold {', '.join(checks)}, but got {_shown(value)}")
        for name, check in checks.items():
            check(value[name], f"{at}.{name}")

    return checked


_FIGURES = _named(_optional(_number))
_MAPS = _listed(_listed(_listed(_optional(_number), 64), 64), 16)
_FORM = _parts(
    format=_text,
    version=_count,
    run=_parts(
        method=_text, stage=_text, status=_text, error=_optional(_text), finished=_text, processes=_count, sync=_text
    ),
    versions=_named(_text),
    options=_named(_text),
    counts=_parts(steps=_count, resets=_count, updates=_count, skipped=_count, left_out=_count),
    skipped=_named(_count),
    steps=_parts(
        every=_count,
        first=_listed(_count),
        samples=_listed(_count),
        figures=_named(_listed(_optional(_number))),
    ),
    classes=_parts(first=_listed(_count), names=_listed(_count, 64), counts=_listed(_listed(_count), 65), used=_count),
    events=_listed(_parts(step=_count, action=_text, cause=_text)),
    resets=_listed(_count),
    dataloaders=_listed(_parts(index=_count, first=_count, samples=_count, figures=_FIGURES)),
    seconds=_parts(total=_number, adapting=_optional(_number)),
    blocks=_optional(
        _parts(
            pairs=_listed(
                _parts(query=_text, key=_text, attention=_text, queries=_count, keys=_count, before=_MAPS, after=_MAPS),
                100,
            )
        )
    ),
    no_blocks=_text,
    metrics=_FIGURES,
)


def _check_lengths(record: Mapping[str, Any]) -> None:
    """Hold lists that belong together against each other."""
    steps, classes = record["steps"], record["classes"]
    together = [steps["first"], steps["samples"], *steps["figures"].values()]
    if len({len(column) for column in together}) > 1 or steps["first"] != sorted(set(steps["first"])):
        raise ValueError("expected record.steps to have columns of one length, in the order of steps")
    rows = [classes["first"], *classes["counts"]]
    if len({len(row) for row in rows}) > 1 or len(classes["counts"]) != len(classes["names"]) + 1:
        raise ValueError("expected record.classes to have a row for each name, and one more, of one length")
    shapes = set()
    for pair in (record["blocks"] or {"pairs": []})["pairs"]:
        maps = [*pair["before"], *pair["after"]]
        sizes = {(len(rows), len(row)) for rows in maps for row in rows}
        if len(sizes) > 1 or not all(rows and rows[0] for rows in maps):
            raise ValueError("expected the maps of a pair in record.blocks to be of one shape, but they are not")
        shapes.add((len(pair["before"]), len(pair["after"])))
    if len(shapes) > 1 or any(before != after for before, after in shapes):
        raise ValueError("expected every pair of record.blocks to show the same samples, but they do not")
    if not all(math.isfinite(value) and value >= 0 for value in record["seconds"].values() if value is not None):
        raise ValueError("expected record.seconds to be >= 0")
