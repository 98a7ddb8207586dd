"""Names of any characters, shown as they are: in a terminal, in Markdown, in HTML made of it, and in LaTeX."""

import io
import re
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pytest
from rich.console import Console
from rich.markdown import Markdown

from lightning_abpem.bench.figures import accuracy_figure
from lightning_abpem.bench.results import Comparison, summarise
from lightning_abpem.bench.tables import comparison_markdown, latex, markdown, terminal

NAMES = [
    "[red]x[/red]",
    "a_b",
    "_a_",
    "<script>alert(1)</script>",
    "a|b",
    r"\textbf{x}",
    r"a\|b",
    "a&amp;b",
    "a & b",
    "100 %",
    "*a*",
    "**a**",
    "`a`",
    "[a](http://b)",
    "![a](b)",
    ":smile:x",
    "~~a~~",
    "$x^2$",
    "{x}",
    "x#",
    "[",
    "a--b",
    "x\\",
    "a\x1b[31mb",
    "a\nb",
]
SHOWN = {"a\x1b[31mb": r"a\x1b[31mb", "a\nb": r"a\nb"}


def summary_of(name):
    """One whose protocol, group, row, source and method have this name."""
    common = {"protocol": name, "severity": 5, "batch_size": 8, "seed": 1}
    every = product((name, "b"), (name, "m"), (f"image: {name}", "audio: z"))
    lines = [
        {**common, "source": source, "method": method, "row": row, "accuracy": 50.0 + bonus}
        for bonus, (source, method, row) in enumerate(every)
    ]
    (summary,) = summarise(lines)
    return summary


class Cells(HTMLParser):
    """The text of every cell and heading, and the tags that are there."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.tags, self.is_open = [], set(), False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag in ("td", "th", "h3"):
            self.texts.append("")
            self.is_open = True

    def handle_endtag(self, tag):
        self.is_open &= tag not in ("td", "th", "h3")

    def handle_data(self, data):
        if self.is_open:
            self.texts[-1] += data


def with_markdown_it(text):
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)


def with_python_markdown(text):
    return pytest.importorskip("markdown").markdown(text, extensions=["tables"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("render", [with_markdown_it, with_python_markdown])
def test_markdown_and_html(name, render):
    shown = SHOWN.get(name, name)
    text = markdown(summary_of(name), {"image": {name: 62.5}}, note=f"Note: {name}")
    page = Cells(render(text))
    assert page.tags <= {"h3", "table", "thead", "tbody", "tr", "th", "td", "strong", "p"}
    assert page.texts[0] == f"{shown}, severity 5, batch size 8"
    assert page.texts.count(shown) >= 4  # two tables' methods, and sources; the row's begins with a capital
    assert f"{shown} (published)" in page.texts
    assert shown[:1].upper() + shown[1:] in page.texts
    comparison = Comparison(name, 5, 8, 1.0, 2.0, 1.0, None, None, None, 3)
    page = Cells(render(comparison_markdown(f"x: {name}", f"y: {name}", [comparison])))
    assert page.tags <= {"table", "thead", "tbody", "tr", "th", "td"}
    assert page.texts[1:3] == [f"x: {shown}", f"y: {shown}"]
    assert page.texts[7] == f"{shown}, severity 5, batch size 8"
    assert len(page.texts) == 14


@pytest.mark.parametrize("name", NAMES)
def test_terminal(name):
    written = io.StringIO()
    console = Console(file=written, width=200, force_terminal=True, color_system=None)
    console.print(terminal(summary_of(name), {"image": {name: 62.5}}))
    shown = written.getvalue()
    known = SHOWN.get(name, name)
    assert shown.count(known) >= 3
    assert f"{known} (published)" in shown
    assert "\x1b[31m" not in shown
    written = io.StringIO()
    console = Console(file=written, width=200)
    comparison = Comparison(name, 5, 8, 1.0, 2.0, 1.0, None, None, None, 3)
    console.print(Markdown(comparison_markdown(f"x: {name}", "y", [comparison])))
    assert f"x: {known}" in written.getvalue()


COMMANDS = {
    r"\textbackslash{}": "\\",
    r"\textasciitilde{}": "~",
    r"\textasciicircum{}": "^",
    r"\textasciigrave{}": "`",
    r"\textless{}": "<",
    r"\textgreater{}": ">",
    r"\textbar{}": "|",
    "{[}": "[",
    "{]}": "]",
    "{*}": "*",
    "-{}": "-",
    **{f"\\{character}": character for character in "{}$&#%_"},
}


def typeset(cell):
    """Return the text that LaTeX shows for a cell of these tables; anything else is an error."""
    found, rest = "", cell
    while rest:
        command = next((command for command in COMMANDS if rest.startswith(command)), None)
        assert command or rest[0] not in "\\{}$&#%_^~[]*`<>|", f"{rest!r} of {cell!r}"
        found += COMMANDS[command] if command else rest[0]
        rest = rest[len(command or rest[0]) :]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_latex(name):
    shown = SHOWN.get(name, name)
    text = latex(summary_of(name), note=f"Note: {name}")
    comments = [line for line in text.splitlines() if line.startswith("%")]
    assert comments == [f"% {shown}, severity 5, batch size 8. Note: {shown}"] * 2
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(rows) == 2 * 3
    cells = [[typeset(cell) for cell in re.split(r"(?<!\\) & ", row[: -len(r" \\")])] for row in rows]
    assert all(len(row) == 3 for row in cells)
    assert cells[0] == ["Image", shown[:1].upper() + shown[1:], "Avg."]
    assert [row[0] for row in cells[1:3]] == [shown, "m"]
    others = [line for line in text.splitlines() if line not in (*comments, *rows, "")]
    assert set(others) == {r"\begin{tabular}{lcc}", r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"}


def test_marks_of_a_corruption_are_closer_together_than_to_its_neighbours(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **kwargs: seen.append(figure))
    methods, rows = [f"m{n}" for n in range(9)], [f"image: k{n}" for n in range(21)]
    common = {"protocol": "iid", "severity": 5, "batch_size": 8, "seed": 1, "source": "a", "accuracy": 50.0}
    (summary,) = summarise([{**common, "method": method, "row": row} for method, row in product(methods, rows)])
    accuracy_figure(summary, tmp_path / "a.png")
    (figure,) = seen
    figure.canvas.draw()
    (axes,) = figure.axes
    places = [axes.transData.transform(container[0].get_xydata()) for container in axes.containers]
    along = max((0, 1), key=lambda axis: abs(places[0][-1][axis] - places[0][0][axis]))  # the axis of the corruptions
    marks = np.sort([[place[row][along] for place in places] for row in range(len(rows))])
    marks = marks[np.argsort(marks[:, 0])]
    assert (marks[1:, 0] - marks[:-1, -1]).min() > 1.2 * (marks[:, -1] - marks[:, 0]).max()


@pytest.mark.parametrize("name", NAMES)
def test_figures_show_names_as_they_are(name, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **kwargs: seen.append(figure))
    accuracy_figure(summary_of(name), tmp_path / "a.png")
    (figure,) = seen
    figure.canvas.draw()  # a formula that is none would be an error
    (axes,) = figure.axes
    (first, *_) = figure.legends[0].get_texts()
    for label, expected in ((first, name), (axes.get_yticklabels()[0], f"image: {name}")):
        drawn, is_formula = label._preprocess_math(label.get_text())
        assert not is_formula
        assert drawn.strip() == expected
