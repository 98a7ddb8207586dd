"""Tables as text, figures as pictures."""

import io

import pytest
from rich.console import Console

from lightning_abpem.display import comparison_table, inspection_table, literal, plain_text, visible
from lightning_abpem.report.labels import figure_text
from lightning_abpem.report.severity import severity_figure

ROW = {
    "name": "image: fog",
    "source_accuracy": 33.21,
    "adapted_accuracy": 65.44,
    "change": 32.23,
    "spread": 1.0,
    "source_entropy": 0.78,
    "adapted_entropy": 1.07,
    "source_gap": 1.48,
    "adapted_gap": 0.11,
}


def test_comparison_table():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison_table("Severity 5", [ROW, ROW | {"name": "clean", "change": -0.5}]))
    lines = console.export_text().splitlines()
    assert lines[0].strip() == "Severity 5"
    fog = next(line for line in lines if "fog" in line)
    assert [cell.strip() for cell in fog.split("│")[1:-1]] == [
        "image: fog",
        "33.2 %",
        "65.4 %",
        "+32.2 ± 1.0",
        "0.78 → 1.07",
        "1.48 → 0.11",
    ]
    assert "-0.5 ± 1.0" in next(line for line in lines if "clean" in line)


ODD = ["[red]x[/red]", "[/]", "a_b", "<script>", "a|b", r"\textbf{x}", ":smile:", "x\\", "[link=http://a]b[/link]"]


@pytest.mark.parametrize("name", ODD)
def test_names_are_shown_as_they_are(name):
    row = {"name": name, "kind": name, "queries": 1, "keys": 2, "heads": 3, "tokens": name, "fusion": True, "values": 4}
    for table, times in (
        (comparison_table(name, [ROW | {"name": name}]), 2),
        (inspection_table([row], name, [name]), 5),
        (literal(name), 1),
    ):
        assert plain_text(table, 200).count(name) == times


def test_what_would_move_the_cursor_or_turn_text_around_is_escaped():
    assert visible("a\x1b[2Jb\rc\n\u202ed é\N{NO-BREAK SPACE}e") == r"a\x1b[2Jb\rc\n\u202ed é" + "\N{NO-BREAK SPACE}e"
    assert visible("a\nb\x07", lines=True) == "a\nb" + r"\x07"
    assert plain_text(inspection_table([], None, ["one\ntwo\x1b[2J"])).splitlines()[-2:] == ["one", r"two\x1b[2J"]


def test_hidden_calls_are_called_so():
    row = {
        "name": "a",
        "kind": "hidden",
        "queries": 0,
        "keys": 0,
        "heads": 0,
        "tokens": "",
        "fusion": False,
        "values": 0,
    }
    assert "hidden" in plain_text(inspection_table([row], None, []))


@pytest.mark.parametrize("words", ["a$b$c", "$\\notatexcommand$", "_a", "a_b", "a^b", r"\$", "{x}"])
def test_figures_show_words_as_they_are(words):
    text = pytest.importorskip("matplotlib.text").Text(0, 0, figure_text(words))
    drawn, is_formula = text._preprocess_math(text.get_text())
    assert not is_formula
    assert drawn.strip() == words
    assert not figure_text(words).startswith("_")


def test_severity_figure(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    rows = [
        {"corruption": kind, "severity": s, "method": method, "accuracy": 90 - 5 * s, "gap/a": 0.1 * s}
        for kind in ("image: fog", "audio: rain")
        for s in range(6)
        for method in ("source", "adapted")
    ]
    severity_figure(rows, {"gap/a": "audio asks image"}, tmp_path / "figure.png")
    pixels = image.imread(tmp_path / "figure.png")
    assert pixels.shape[1] == pytest.approx(150 * (1.9 * 2 + 0.6), abs=2)
    green = (abs(pixels[..., :3] - [0x0B / 255, 0x6E / 255, 0x4F / 255]) < 0.02).all(-1)
    assert green.mean() > 1e-3
