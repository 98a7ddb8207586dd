"""What is shown: tables as text, figures as pictures."""

import io

import pytest
from rich.console import Console

from lightning_abpem.display import comparison_table
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
