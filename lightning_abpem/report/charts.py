"""Charts of a report, drawn by matplotlib as SVG that takes its colours and its font from the page.

Matplotlib writes fixed colours. Here each is a token of `_TOKENS`, which becomes a CSS variable of the page. So one
picture is readable in light and in dark. Sizes are left to the page too: an SVG is as wide as its column.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_abpem.display import visible
from lightning_abpem.report.labels import figure_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Marks",
    "bars_chart",
    "blocks_chart",
    "check_matplotlib",
    "classes_chart",
    "course_chart",
    "scale_of",
]

_SERIES = 6  # colours of their own
_INK, _MUTED, _GRID, _HARM = "#010203", "#010204", "#010205", "#010206"
_COLOURS = [f"#0102{0x10 + i:02x}" for i in range(_SERIES)]
_TOKENS = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _HARM: "harm"} | {c: f"s{i}" for i, c in enumerate(_COLOURS)}
_DASHES = ("-", "--", "-.", ":")
_SIZE, _FONT = (3.9, 2.5), 9.0  # inches and points, for a column of 340 to 400 px

Column = Sequence[float | None]


class Marks(NamedTuple):
    """Steps that every course marks.

    Args:
        events: at which the guard acted.
        resets: before which the source model came back.
        skipped: that were not taken.
        dataloaders: with which a new dataloader begins.
    """

    events: Sequence[int] = ()
    resets: Sequence[int] = ()
    skipped: Sequence[int] = ()
    dataloaders: Sequence[int] = ()


def check_matplotlib() -> None:
    """Raise unless matplotlib can be imported.

    Raises:
        ImportError: with the way to get it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("A report needs matplotlib, which is not installed: pip install 'lightning_abpem[report]'")


def course_chart(key: str, steps: Sequence[int], lines: Mapping[str, Column], unit: str, marks: Marks) -> str:
    """Draw figures over the steps of a stream.

    Args:
        key: a word that no other chart of the page has.
        steps: the points' steps.
        lines: by label, a value for each point; None where there is none.
        unit: of the values.
        marks: what happened when.

    Returns:
        an SVG element.
    """
    figure, axes = _figure(_SIZE)
    few = "o" if len(steps) <= 40 else None
    for i, (label, values) in enumerate(lines.items()):
        known = [float("nan") if value is None else value for value in values]
        style: Any = {"color": _COLOURS[i % _SERIES], "ls": _DASHES[i // _SERIES % len(_DASHES)], "lw": 1.5, "ms": 2.5}
        axes.plot(steps, known, marker=few, label=_label(label), **style)
    for step in marks.dataloaders:
        axes.axvline(step - 0.5, color=_MUTED, lw=0.7)
    for step in marks.resets:
        axes.axvline(step - 0.5, color=_MUTED, lw=0.9, ls=":")
    for step in marks.events:
        axes.axvline(step - 0.5, color=_HARM, lw=1.1, ls="--")
    if marks.skipped:
        below = axes.get_xaxis_transform()
        axes.plot(marks.skipped, [0.03] * len(marks.skipped), "x", color=_HARM, ms=4, transform=below)
    axes.set_ylabel(unit)
    _finish(figure, axes, legend=len(lines) > 1)
    return _svg(figure, key)


def classes_chart(key: str, steps: Sequence[int], rows: Mapping[str, Sequence[int]], others: str | None = None) -> str:
    """Draw how the predictions divide over classes along the stream: one broad band is a collapse.

    Args:
        key: a word that no other chart of the page has.
        steps: the parts' first steps.
        rows: by label, how many predictions in each part.
        others: the label of all classes together that have no row; None if there are none.
    """
    figure, axes = _figure(_SIZE)
    totals = [max(sum(column), 1) for column in zip(*rows.values(), strict=True)]
    edges = [*steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1]
    floor = [0.0] * len(steps)
    for i, (label, counts) in enumerate(rows.items()):
        top = [low + count / total for low, count, total in zip(floor, counts, totals, strict=True)]
        colour = _GRID if label == others else _COLOURS[i % _SERIES]
        shown: Any = {
            "facecolor": colour,
            "alpha": 1.0 if i < _SERIES or colour == _GRID else 0.55,
            "label": _label(label),
        }
        axes.stairs(top, edges, baseline=floor, fill=True, lw=0, **shown)
        floor = top
    axes.set_ylim(0, 1)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylabel("share")
    _finish(figure, axes, legend=True, grid=False)
    return _svg(figure, key)


def bars_chart(key: str, values: Mapping[str, float], unit: str) -> str:
    """Draw a bar for each value, with the value beside it.

    Args:
        key: a word that no other chart of the page has.
        values: by label.
        unit: of the values.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0], 0.7 + 0.27 * len(values)), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    bars = axes.barh(range(len(values)), list(values.values()), color=_COLOURS[0], height=0.65)
    axes.set_yticks(range(len(values)), [_label(name) for name in values])
    axes.invert_yaxis()
    for words in axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=_FONT - 0.5):
        words.set_color(_INK)
    axes.margins(x=0.12)
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    _colour(axes)
    return _svg(figure, key)


def blocks_chart(
    key: str, maps: Mapping[tuple[str, str], Sequence[Column]], scale: tuple[float, float], is_change: bool = False
) -> str:
    """Draw the score blocks of one sample, a row for each query modality, a column for each key modality.

    Args:
        key: a word that no other chart of the page has.
        maps: by (query, key) modality, the scores; None where there is none.
        scale: the least and the largest score of the colours.
        is_change: the values are differences, whose colours part at 0.
    """
    queries, keys = (list(dict.fromkeys(pair[side] for pair in maps)) for side in (0, 1))
    figure, grid = _grid(len(queries), len(keys))
    image, colours = None, "RdBu_r" if is_change else "cividis"
    for i, query in enumerate(queries):
        for j, own in enumerate(keys):
            axes = grid[i][j]
            values = [[float("nan") if x is None else x for x in row] for row in maps.get((query, own), [[None]])]
            low, high = scale
            image = axes.imshow(values, colours, aspect="auto", interpolation="none", vmin=low, vmax=high)
            axes.set_xticks([])
            axes.set_yticks([])
            if i + 1 == len(queries):
                axes.set_xlabel(_label(own))
            if j == 0:
                axes.set_ylabel(_label(query))
            _colour(axes, image_only=True)
    figure.supxlabel("keys", color=_MUTED, fontsize=_FONT)
    figure.supylabel("queries", color=_MUTED, fontsize=_FONT)
    if image is not None:
        bar = figure.colorbar(image, ax=[axes for row in grid for axes in row], fraction=0.05, pad=0.03)
        bar.outline.set_visible(False)
        _colour(bar.ax, image_only=True)
    return _svg(figure, key)


def scale_of(maps: Sequence[Sequence[Column]]) -> tuple[float, float]:
    """Return the least and the largest score of maps that are compared; 0 and 1 where there is none."""
    known = [x for rows in maps for row in rows for x in row if x is not None]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    return figure, figure.subplots()


def _grid(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.9, 0.4 + 3.2 * rows / max(columns, 1)), layout="constrained")
    figure.patch.set_alpha(0)
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _finish(figure: Figure, axes: Axes, legend: bool, grid: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(color=_GRID, lw=0.6)
        axes.set_axisbelow(True)
    _colour(axes)
    if legend:
        count = len(axes.get_legend_handles_labels()[1])
        shown = figure.legend(
            loc="outside upper left", ncols=min(count, 3 if count > 4 else 2), frameon=False, fontsize=_FONT - 0.5
        )
        for words in shown.get_texts():
            words.set_color(_INK)


def _colour(axes: Axes, image_only: bool = False) -> None:
    """Give all words and lines of the axes the page's colours."""
    axes.patch.set_alpha(0)
    axes.tick_params(colors=_INK, labelsize=_FONT - 0.5, length=0 if image_only else 3)
    for spine in axes.spines.values():
        spine.set_color(_GRID if image_only else _MUTED)
    for words in (axes.xaxis.label, axes.yaxis.label):
        words.set_color(_INK)
        words.set_fontsize(_FONT)


def _label(words: str) -> str:
    """Return a label as it is, but short: matplotlib would make a formula of $, and a long one would push the axes."""
    words = visible(words)
    return figure_text(words if len(words) <= 36 else f"{words[:35]}…")


def _svg(figure: Figure, key: str) -> str:
    """Return a figure as an SVG element for a page: no fixed colours, sizes, fonts or names that others have too."""
    import matplotlib

    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": key, "font.size": _FONT}
    with matplotlib.rc_context(options):
        figure.savefig(file, format="svg", metadata=metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    rest = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = re.sub(r"#0102[0-9a-f]{2}", lambda found: f"var(--{_TOKENS[found[0]]})", rest)
    # In tags alone: words of the user's are text, in which < and > are escaped.
    rest = re.sub(r"<[^>]*>", lambda found: _own_names(found[0], key), rest)
    return f'<svg {box[0]} role="img" aria-hidden="true">{rest.strip()}'


def _own_names(tag: str, key: str) -> str:
    tag = re.sub(r'\bid="', f'id="{key}-', tag)
    tag = re.sub(r"url\(#", f"url(#{key}-", tag)
    tag = re.sub(r'xlink:href="#', f'xlink:href="#{key}-', tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    return re.sub(r"font: [^;\"]*;?", _font_size, tag)  # as older versions write it


def _font_size(found: re.Match[str]) -> str:
    size = re.search(r"([\d.]+)px", found[0])
    return f"font-size: {size[1] if size else _FONT}px;"
