"""The page of a run, from its record: key numbers, courses, attention, tables. Only what the run has is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_abpem.report.attention import attention
from lightning_abpem.report.courses import PER_PAIR, courses, further, key, stride
from lightning_abpem.report.html import document, number, section, shown, table, tiles

__all__ = ["run_page"]

Json = Mapping[str, Any]

_MOST_ROWS = 200
_MONITORED = ("flip_rate", "source_entropy", "information", "class_share")


def run_page(record: Json) -> str:
    """Return the HTML of a run's report.

    Args:
        record: as `read_record` gives it.
    """
    run = record["run"]
    title = f"{run['method']}: {run['stage']}"
    return document(
        title,
        [
            f"<header><h1>{shown(title)}</h1>{_state(run)}</header>",
            _tiles(record),
            section("Over the stream", key(record), courses(record), stride(record)),
            section("Attention before and after", *attention(record)),
            section("By dataloader", _dataloaders(record)),
            section("Guard events", _events(record)),
            section("Skipped steps", _skipped(record)),
            section("Further figures", further(record)),
            section("Not in this report", _missing(record)),
            section("Options", _pairs("option", record["options"])),
            section("Versions", _pairs("package", record["versions"])),
        ],
    )


def _state(run: Json) -> str:
    words = f"{run['status']}, {run['finished']}"
    if run["processes"] > 1:
        whose = "figures of all processes" if run["sync"] == "global" else "figures of the first process's own stream"
        words += f", {run['processes']} processes: {whose}"
    error = f'<p class="harm">Ended early by <code>{shown(run["error"])}</code></p>' if run["error"] else ""
    return f'<p class="muted">{shown(words)}</p>{error}'


def _tiles(record: Json) -> str:
    counts, seconds = record["counts"], record["seconds"]
    values = [
        ("samples", number(sum(record["steps"]["samples"]))),
        ("steps computed", number(counts["steps"])),
        ("updates", number(counts["updates"])),
        ("steps skipped", number(counts["skipped"])),
        *([("samples left out of steps", number(counts["left_out"]))] if counts["left_out"] else []),
        ("guard events", number(len(record["events"]))),
        ("resets to the source", number(counts["resets"])),
    ]
    if seconds["adapting"] is not None and seconds["total"] > 0:
        share = min(seconds["adapting"] / seconds["total"], 1)
        values.append((f"of {_time(seconds['total'])} spent adapting: {_time(seconds['adapting'])}", f"{share:.0%}"))
    return tiles(values)


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _dataloaders(record: Json) -> str:
    """Return a table of what the user logged, then of the method's means, with a column for each dataloader."""
    loaders = record["dataloaders"]
    places: list[int | None] = [own["index"] for own in loaders]
    rows: dict[str, dict[int | None, float | None]] = {}
    for name, value in record["metrics"].items():
        plain, place = _placed(name, places)
        rows.setdefault(plain, {})[place] = value
    for own in loaders:
        for name, value in own["figures"].items():
            rows.setdefault(f"{record['run']['method']}: {name}", {})[own["index"]] = value
    if any(None in values for values in rows.values()):
        places.append(None)
    heads = ["whole run" if i is None else f"dataloader {i}" if len(loaders) > 1 else "mean" for i in places]
    cells = [[shown(name), *(number(values.get(i)) for i in places)] for name, values in rows.items()]
    return table(["figure", *heads], cells, range(1, len(heads) + 1)) if rows else ""


def _placed(name: str, places: Sequence[int | None]) -> tuple[str, int | None]:
    """Return a metric's name without Lightning's ending, and its dataloader; None for one of the whole run."""
    plain, _, index = name.rpartition("/dataloader_idx_")
    if plain and index.isdecimal() and len(index) < 9 and int(index) in places:
        return plain, int(index)
    return name, places[0] if len(places) == 1 else None


def _events(record: Json) -> str:
    events = record["events"]
    rows = [[number(e["step"]), shown(e["action"]), shown(e["cause"])] for e in events[:_MOST_ROWS]]
    more = f'<p class="muted">And {len(events) - _MOST_ROWS:,} more.</p>' if len(events) > _MOST_ROWS else ""
    return table(["before step", "action", "what it saw"], rows, [0]) + more if rows else ""


def _skipped(record: Json) -> str:
    return _pairs("reason", {reason: number(count) for reason, count in record["skipped"].items()})


def _missing(record: Json) -> str:
    figures, words = record["steps"]["figures"], []
    if not any(name in figures for name in _MONITORED):
        words.append(
            'Flip rate, the source\'s entropy and information: set monitor="source", which compares with the source '
            "model on every batch."
        )
    if not any(name.partition("/")[0] in PER_PAIR for name in figures):
        words.append("Attention gap and divergence: methods that watch the fusion attention, as ABPEM, have them.")
    if record["blocks"] is None:
        words.append(f"Attention blocks: {record['no_blocks']}")
    if not record["metrics"] and record["run"]["stage"] in ("test", "validate"):
        words.append("Accuracy: log a metric in your step, with self.log, and it is shown by dataloader.")
    if record["seconds"]["adapting"] is None:
        words.append("The time spent adapting: the device could not be read when the run ended.")
    return f'<ul class="missing">{"".join(f"<li>{shown(own)}</li>" for own in words)}</ul>' if words else ""


def _pairs(head: str, values: Mapping[str, str]) -> str:
    rows = [[f"<code>{shown(name)}</code>", f"<code>{shown(value)}</code>"] for name, value in values.items()]
    return table([head, "value"], rows) if rows else ""
