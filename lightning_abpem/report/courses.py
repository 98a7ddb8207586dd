"""The courses of a run's page: figures over the steps of its stream, with marks for what happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_abpem.report.charts import Marks, classes_chart, course_chart
from lightning_abpem.report.html import chart, shown

__all__ = ["PER_PAIR", "courses", "further", "key", "stride"]

Json = Mapping[str, Any]

_MOST_MARKS = 60
PER_PAIR = {
    "attention_gap": (
        "Attention gap",
        "scores",
        "a → b: mean score of b's own block minus that of the block in which a's queries ask b's keys. Near 0, b is "
        "asked by a as by itself.",
    ),
    "divergence": (
        "Divergence",
        "nats",
        "a → b: KL of the scores of a's queries and b's keys from those of b's own block. Bootstrapping makes it "
        "smaller.",
    ),
}
_COURSES: Sequence[tuple[str, Mapping[str, str], str, str]] = (
    (
        "Entropy",
        {"entropy": "adapted model", "source_entropy": "source model"},
        "nats",
        "Mean entropy of the predictions, before each step. Lower is surer, not righter.",
    ),
    (
        "Flip rate",
        {"flip_rate": "flip rate"},
        "share of samples",
        "Samples for which the adapted and the source model predict different classes.",
    ),
    (
        "Information",
        {"class_share": "entropy of the mean prediction", "information": "information"},
        "nats",
        "What a prediction tells of its sample, over the last samples. If both fall towards 0, the model collapses to "
        "few classes.",
    ),
)
_ELSEWHERE = {"entropy", "updated", *(name for _, names, _, _ in _COURSES for name in names)}


def _marks(record: Json) -> Marks:
    """Return what the courses mark; too many resets or skips would hide the curves."""
    steps, events = record["steps"], [event["step"] for event in record["events"]]
    updated = steps["figures"].get("updated", [])
    is_counted = record["counts"]["skipped"] > 0
    skipped = [i for i, share in zip(steps["first"], updated, strict=False) if is_counted and share not in (None, 1)]
    resets = record["resets"]
    loaders = [own["first"] for own in record["dataloaders"][1:]]
    return Marks(*(own if len(own) <= _MOST_MARKS else () for own in (events, resets, skipped, loaders)))


def key(record: Json) -> str:
    """Return what the marks mean, those that there are."""
    marks = _marks(record)
    items = {
        '<i class="event"></i>the guard acted': marks.events,
        '<i class="reset"></i>the source model came back': marks.resets,
        "<b>&times;</b>step skipped": marks.skipped,
        "<i></i>a new dataloader": marks.dataloaders,
    }
    known = "".join(f"<li>{words}</li>" for words, steps in items.items() if steps)
    note = ""
    if len(record["resets"]) > _MOST_MARKS:
        note = f"<li>The source model came back {record['counts']['resets']:,} times, too often to mark.</li>"
    return f'<ul class="key">{known}{note}</ul>' if known or note else ""


def stride(record: Json) -> str:
    """Return a sentence if points stand for several steps."""
    every = record["steps"]["every"]
    return f'<p class="muted">Each point is the mean of {every} steps.</p>' if every > 1 else ""


def courses(record: Json) -> str:
    """Return the charts of what every method, or several, have."""
    figures, charts = record["steps"]["figures"], []
    for title, names, unit, caption in _COURSES:
        lines = {label: figures[name] for name, label in names.items() if name in figures}
        charts.append(_course(record, title, lines, unit, caption))
    for prefix, (title, unit, caption) in PER_PAIR.items():
        lines = {
            name.removeprefix(f"{prefix}/").replace("_to_", " → "): values
            for name, values in figures.items()
            if name.startswith(f"{prefix}/")
        }
        charts.append(_course(record, title, lines, unit, caption))
    charts.insert(1, _classes(record))
    body = "".join(charts)
    return f'<div class="charts">{body}</div>' if body else ""


def _course(record: Json, title: str, lines: Mapping[str, Any], unit: str, caption: str) -> str:
    if not any(value is not None for values in lines.values() for value in values):
        return ""
    name = "c-" + "".join(f"{ord(x):x}" for x in title)
    svg = course_chart(name, record["steps"]["first"], lines, unit, _marks(record))
    return chart(title, shown(caption), svg)


def _classes(record: Json) -> str:
    classes = record["classes"]
    if not any(map(any, classes["counts"])):
        return ""
    rows = {f"class {name}": counts for name, counts in zip(classes["names"], classes["counts"][:-1], strict=True)}
    others = "all others" if any(classes["counts"][-1]) else None
    if others is not None:
        rows[others] = classes["counts"][-1]
    caption = f"Predicted classes, before each step; {classes['used']} were predicted. One broad band is a collapse."
    return chart("Class share", shown(caption), classes_chart("classes", classes["first"], rows, others))


def further(record: Json) -> str:
    """Return small charts of what else the method recorded."""
    figures = record["steps"]["figures"]
    rest = [name for name in figures if name not in _ELSEWHERE and name.partition("/")[0] not in PER_PAIR]
    charts = [_course(record, name, {name: figures[name]}, "", "") for name in rest]
    if record["counts"]["skipped"]:
        taken = {"updated": figures.get("updated", [])}
        charts.append(_course(record, "Steps taken", taken, "share", "1 where the step was taken, 0 where it was not."))
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""
