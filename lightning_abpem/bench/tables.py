"""A benchmark's tables in Markdown, in LaTeX and for the terminal; nothing is computed here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from lightning_abpem.bench.results import Comparison, Score, Summary
from lightning_abpem.display import literal, visible

__all__ = ["comparison_markdown", "latex", "markdown", "terminal", "title"]

_SHORT = {
    "gaussian noise": "Gauss.",
    "shot noise": "Shot",
    "impulse noise": "Impul.",
    "defocus blur": "Defoc.",
    "glass blur": "Glass",
    "motion blur": "Motion",
    "zoom blur": "Zoom",
    "brightness": "Brit.",
    "contrast": "Contr.",
    "elastic transform": "Elast.",
    "pixelate": "Pixel",
    "jpeg compression": "JPEG",
}


def title(summary: Summary | Comparison) -> str:
    """Return a table's title: protocol, severity, batch size."""
    severity = f", severity {summary.severity}" if summary.severity else ""
    return f"{summary.protocol}{severity}, batch size {summary.batch_size}"


def markdown(summary: Summary, published: Mapping[str, Mapping[str, float]] | None = None, note: str = "") -> str:
    """Return a table per failing modality, a line per method, the best of each column in bold.

    Args:
        summary: the numbers.
        published: published averages by modality, then by method; each gets a line.
        note: text below the tables.
    """
    parts = [f"### {_escaped(title(summary))}"]
    for group, rows in summary.groups.items():
        lines = _head([group or "method", *map(_short, rows), "average"])
        best = {row: max(scores[row].mean for scores in summary.scores.values()) for row in rows}
        best_average = max(scores[group].mean for scores in summary.by_group.values())
        for method, scores in summary.scores.items():
            cells = [_bold(f"{scores[row].mean:.1f}", scores[row].mean == best[row]) for row in rows]
            average = summary.by_group[method][group]
            lines.append(_line(method, [*cells, _bold(_show(average), average.mean == best_average)]))
        for method, value in (published or {}).get(group, {}).items():
            lines.append(_line(f"{method} (published)", [*[""] * len(rows), f"{value:.1f}"]))
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, _averages(summary), *filter(None, [_escaped(note)])]) + "\n"


def latex(summary: Summary, note: str = "") -> str:
    """Return LaTeX (booktabs), one tabular per failing modality; the note is a comment."""
    parts = []
    comment = visible(f"% {title(summary)}{f'. {note}' if note else ''}")
    for group, rows in summary.groups.items():
        head = [_tex(word) for word in (group.capitalize() or "Method", *map(_short, rows), "Avg.")]
        lines = [f"\\begin{{tabular}}{{l{'c' * (len(rows) + 1)}}}", "\\toprule", _tex_line(head), "\\midrule"]
        for method, scores in summary.scores.items():
            numbers = [f"{scores[row].mean:.1f}" for row in rows] + [_show(summary.by_group[method][group])]
            lines.append(_tex_line([_tex(method), *map(_tex, numbers)]))
        parts.append("\n".join([comment, *lines, "\\bottomrule", "\\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def terminal(summary: Summary, published: Mapping[str, Mapping[str, float]] | None = None) -> Table:
    """Return a table of averages for a terminal, the published ones below, as in `markdown`."""
    words = literal(title(summary), "table.title")
    table = Table(title=words, title_justify="left", box=box.SIMPLE_HEAD, header_style="bold", min_width=len(words) + 1)
    table.add_column("method")
    groups = list(summary.groups) if len(summary.groups) > 1 else []
    for heading in [*(group or "other" for group in groups), "average"]:
        table.add_column(literal(heading), justify="right")
    best = max(score.mean for score in summary.average.values())
    for method, score in summary.average.items():
        cells = [f"{summary.by_group[method][group].mean:.1f}" for group in groups]
        table.add_row(literal(method), *cells, f"{_show(score)} %", style="bold green" if score.mean == best else None)
    beside = [(published or {}).get(group, {}) for group in summary.groups]
    if any(beside):
        table.add_section()
    for method in dict.fromkeys(name for own in beside for name in own):
        values = [f"{own[method]:.1f}" if method in own else "" for own in beside]
        table.add_row(literal(f"{method} (published)"), *values, style="dim")
    return table


def comparison_markdown(a: str, b: str, comparisons: Sequence[Comparison]) -> str:
    """Return a Markdown table of comparisons."""
    lines = _head(["protocol", a, b, "difference", "95 %", "p", "pairs"])
    for c in comparisons:
        interval = "" if c.low is None else f"{c.low:+.2f} to {c.high:+.2f}"
        p = "" if c.p is None else "< 0.001" if c.p < 0.001 else f"{c.p:.3f}"
        cells = [f"{c.a:.2f}", f"{c.b:.2f}", f"{c.difference:+.2f}", interval, p, str(c.pairs)]
        lines.append(_line(title(c), cells))
    return "\n".join(lines) + "\n"


def _averages(summary: Summary) -> str:
    """Return a table of averages over all rows: for each source model, and over all of them."""
    sources = list(next(iter(summary.by_source.values())))
    shown = sources if len(sources) > 1 else []
    lines = _head(["mean ± sd over seeds", *shown, "all"])
    best = max(score.mean for score in summary.average.values())
    for method, score in summary.average.items():
        cells = [_show(summary.by_source[method][source]) for source in shown]
        lines.append(_line(method, [*cells, _bold(_show(score), score.mean == best)]))
    return "\n".join(lines)


def _head(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(map(_escaped, names))} |", "|---" * len(names) + "|"]


def _line(name: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([_escaped(name), *cells])} |"


_MARKDOWN = re.compile(r"[\\`*\[\]#]|(?<![^\W_])_|_(?![^\W_])")  # underscores within words are none
_HTML = re.compile(r"[&<>|~$]|:(?=\w+:)")  # by their numbers, since not every dialect takes a backslash before them


def _escaped(words: str) -> str:
    """Escape text so that Markdown, and HTML made from it, shows it literally."""
    marked = _MARKDOWN.sub(lambda found: f"\0{found[0]}", visible(words))  # \0 is in no visible words
    return _HTML.sub(lambda found: f"&#{ord(found[0])};", marked).replace("\0", "\\")


_TEX = {
    **{character: f"\\{character}" for character in "{}$&#%_"},
    **{character: f"{{{character}}}" for character in "[]*"},  # which after the end of a line are its arguments
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "`": r"\textasciigrave{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
}


def _tex(words: str) -> str:
    """Escape text so that LaTeX shows it literally."""
    text = "".join(_TEX.get(character, character) for character in visible(words))
    return re.sub("-(?=-)", "-{}", text)  # two are a dash


def _tex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _short(row: str) -> str:
    kind = row.partition(": ")[2] if row.count(": ") == 1 else row
    return _SHORT.get(kind, kind[:1].upper() + kind[1:])


def _show(score: Score) -> str:
    return f"{score.mean:.1f}" if score.deviation is None else f"{score.mean:.1f} ± {score.deviation:.1f}"


def _bold(words: str, is_best: bool) -> str:
    return f"**{words}**" if is_best else words
