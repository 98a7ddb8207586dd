"""The results of `benchmarks.costs.gpu` as Markdown: targets, timed rows, checks, and what has no result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.costs.token_sweep import growth

__all__ = ["as_markdown", "verdicts"]

Entries = Mapping[str, Mapping[str, Any]]

RATIOS = {1: 1.20, 4: 1.80}
"""The most that adapting may cost, in times of plain inference, by memory, at batch 32 and in each precision."""

EXPONENT = 1.1
"""The most that added memory may grow by, as a power of the number of tokens; 1 is linear."""

_COLUMNS = "| program | memory | ms | of plain | peak, MB | added, MB | operations | host waits | targets |"
_WORDS = (
    "Medians per batch. `of plain` and `added` are against plain inference in the same call of the program. Operations "
    "are kernels launched in a step; on a CPU, operators of torch. Host waits are those of a step."
)
_ENGINE = ("ABPEM attached", "ABPEM in a Trainer", "defaults attached")


def as_markdown(environment: Mapping[str, Any], entries: Entries, left_out: Sequence[str]) -> str:
    """Return the page: entries by name, in the order in which they were planned."""
    lines = ["# On a GPU", "", ", ".join(f"{key} {value}" for key, value in environment.items()), ""]
    if environment.get("tiny"):
        lines += ["A dry run: models and batches are tiny, so that times, memory and targets mean nothing.", ""]
    lines += [_WORDS, "", "## Targets", "", *_targets(entries), ""]
    lines += ["## Checks", "", "| check | result |", "|---|---|"]
    checks = {name: entry for name, entry in entries.items() if entry["kind"] != "row"}
    lines += [f"| {name} | {_outcome(entry)} |" for name, entry in checks.items()]
    for heading, group in _groups(entries).items():
        lines += ["", f"## {heading}", "", _COLUMNS, "|---" * 9 + "|"]
        lines += [_row(entry, entries) for entry in group]
    waits = {place for entry in entries.values() for place in entry.get("waits_from", ())}
    lines += ["", "## Host waits come from", "", *(f"- `{place}`" for place in sorted(waits))] if waits else []
    rows = {name: entry for name, entry in entries.items() if entry["kind"] == "row"}
    missing = [f"{name}: {entry['reason']}" for name, entry in rows.items() if entry["status"] != "done"]
    lines += ["", "## No result", "", *(f"- {line}" for line in missing)] if missing else []
    lines += ["", "## Left out for want of time", "", *(f"- {name}" for name in left_out)] if left_out else []
    return "\n".join(lines) + "\n"


def verdicts(entry: Mapping[str, Any], entries: Entries) -> dict[str, bool]:
    """Return the targets that apply to a row, each with True if the row meets it."""
    row, plain, met = entry["settings"], entry.get("plain"), {}
    if entry["status"] != "done" or row["program"] not in _ENGINE or plain is None:
        return {}
    if entry["waits"] is not None and plain["waits"] is not None:
        met["no host wait more than plain"] = entry["waits"] <= plain["waits"]
    if (row["model"], row["batch"], row["compiled"]) == ("cavmae", 32, False):
        limit = RATIOS[row["memory"]]
        met[f"at most {limit:.2f} of plain with memory {row['memory']}"] = entry["seconds"] <= limit * plain["seconds"]
        published = _published(row, entries)
        if row["program"] == "ABPEM attached" and published is not None:
            above = published["seconds"] - published["plain"]["seconds"]
            met["at most half of the published way's time above plain"] = (
                entry["seconds"] - plain["seconds"] <= above / 2
            )
    return met


def _published(row: Mapping[str, Any], entries: Entries) -> Mapping[str, Any] | None:
    wanted = {**row, "program": "published way"}
    found = (entry for entry in entries.values() if entry["settings"] == wanted and entry.get("plain"))
    return next(found, None)


def _targets(entries: Entries) -> Iterator[str]:
    """A line for each target: how many rows meet it."""
    met: dict[str, list[bool]] = {}
    for entry in entries.values():
        if entry["kind"] == "row":
            for target, holds in verdicts(entry, entries).items():
                met.setdefault(target, []).append(holds)
    yield "| target | rows that meet it | met |"
    yield "|---|---|---|"
    for target, rows in met.items():
        yield f"| {target} | {sum(rows)} of {len(rows)} | {_word(all(rows))} |"
    exponent = _exponent(entries)
    if exponent is not None:
        target = f"added memory grows as tokens to the power of at most {EXPONENT}"
        yield f"| {target} | {exponent:.2f} | {_word(exponent <= EXPONENT)} |"


def _exponent(entries: Entries) -> float | None:
    """Return the exponent x of ABPEM's added memory, tokens ** x, where no score map is made."""
    sizes = {}
    for entry in entries.values():
        row = entry["settings"]
        if entry["kind"] == "row" and row["program"] == "ABPEM attached" and row["tokens"] > 512:
            added = _added(entry)
            if added is not None:
                sizes[row["tokens"]] = added
    return growth(sizes) if len(sizes) > 1 else None


def _groups(entries: Entries) -> dict[str, list[Mapping[str, Any]]]:
    """Return the finished rows, grouped by the settings that they share."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries.values():
        row = entry["settings"]
        if entry["kind"] == "row" and entry["status"] == "done":
            tokens = f", {row['tokens']} tokens" if row["tokens"] else ""
            compiled = ", encoders compiled" if row["compiled"] else ""
            heading = f"{row['model']}{tokens}, {row['precision']}, batch {row['batch']}{compiled}"
            groups.setdefault(heading, []).append(entry)
    return groups


def _row(entry: Mapping[str, Any], entries: Entries) -> str:
    row, plain = entry["settings"], entry.get("plain")
    added = _added(entry)
    cells = [
        row["program"],
        row["memory"] or "-",
        f"{1e3 * entry['seconds']:.2f}",
        "-" if plain is None else f"{entry['seconds'] / plain['seconds']:.3f}",
        "-" if entry["peak"] is None else f"{entry['peak'] / 2**20:.0f}",
        "-" if added is None else f"{added:.0f}",
        entry["operations"],
        "-" if entry["waits"] is None else entry["waits"],
        "; ".join(f"{target}: {_word(holds)}" for target, holds in verdicts(entry, entries).items()),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _added(entry: Mapping[str, Any]) -> float | None:
    """Peak memory over plain inference, in MB."""
    plain = entry.get("plain")
    if plain is None or entry.get("peak") is None or plain["peak"] is None:
        return None
    return float(entry["peak"] - plain["peak"]) / 2**20


def _outcome(entry: Mapping[str, Any]) -> str:
    return entry["figure"] if entry["status"] == "done" else f"{entry['status']}: {entry['reason']}"


def _word(holds: bool) -> str:
    return "met" if holds else "missed"
