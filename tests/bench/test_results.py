"""From cells to numbers and tables: against hand computation and scipy's paired test."""

import csv
import io
import re
from statistics import fmean, stdev
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

from lightning_abpem.bench.results import Score, compare, flatten, summarise
from lightning_abpem.bench.tables import comparison_markdown, latex, markdown, terminal

ROWS = ("image: fog", "image: jpeg compression", "audio: wind")


def line(method="read", row="image: fog", seed=1, source="a", accuracy=50.0, **other):
    fixed = {"protocol": "iid", "severity": 5, "batch_size": 8, "condition": row, "samples": 10}
    return {
        **fixed,
        "method": method,
        "row": row,
        "seed": seed,
        "source": source,
        "accuracy": accuracy,
        "batch_accuracy": accuracy - 1,
        **other,
    }


def grid(offset=0.0):
    """Two methods, three rows, two seeds, two sources; every accuracy another."""
    return [
        line(method, row, seed, source, 10.0 * i + 3 * j + k + 0.5 * n + offset * (j + 1))
        for i, method in enumerate(("source", "abpem"), start=4)
        for j, row in enumerate(ROWS)
        for k, seed in enumerate((111, 222))
        for n, source in enumerate(("a", "b"))
    ]


def accuracies(lines, **wanted):
    return [one["accuracy"] for one in lines if all(one[name] == value for name, value in wanted.items())]


def test_a_line_per_cell_and_row():
    cell: dict[str, Any] = {
        "cell": {"method": "abpem", "seed": 111},
        "rows": [{"row": "image: fog", "samples": 4, "accuracy": 50.0}, {"row": "image: snow", "accuracy": 25.0}],
        "updates": 7,
        "skipped": 1,
        "seconds": 0.12345,
        "figures": {"entropy": 0.5, "loss": None},
    }
    first, second = flatten([cell])
    assert first == {
        **cell["cell"],
        **cell["rows"][0],
        "updates": 7,
        "skipped": 1,
        "seconds": 0.123,
        "entropy": 0.5,
        "loss": None,
    }
    assert second["row"] == "image: snow"


def test_means_and_deviations_over_seeds():
    lines = grid()
    (summary,) = summarise(lines)
    assert (summary.protocol, summary.severity, summary.batch_size) == ("iid", 5, 8)
    assert summary.groups == {"image": ["image: fog", "image: jpeg compression"], "audio": ["audio: wind"]}

    def by_seed(**wanted):
        return [fmean(accuracies(lines, seed=seed, **wanted)) for seed in (111, 222)]

    for method in ("source", "abpem"):
        values = by_seed(method=method)
        assert summary.average[method] == pytest.approx((fmean(values), stdev(values)))
        values = by_seed(method=method, row="audio: wind")
        assert summary.scores[method]["audio: wind"] == pytest.approx((fmean(values), stdev(values)))
        assert summary.by_group[method]["audio"] == summary.scores[method]["audio: wind"]
        values = by_seed(method=method, source="b")
        assert summary.by_source[method]["b"] == pytest.approx((fmean(values), stdev(values)))


def test_published_averaging_and_one_seed():
    lines = [one for one in grid() if one["seed"] == 111]
    assert summarise(lines, "batches")[0].average["source"].mean == summarise(lines)[0].average["source"].mean - 1
    assert summarise(lines)[0].average["source"].deviation is None


def test_tables_of_several_protocols_and_sizes_stay_apart():
    lines = [line(), line(severity=3), line(batch_size=1), line(protocol="mixed", severity=0, row="image: mixed")]
    found = [(s.protocol, s.severity, s.batch_size) for s in summarise(lines)]
    assert found == [("iid", 5, 8), ("iid", 3, 8), ("iid", 5, 1), ("mixed", 0, 8)]


def test_two_runs_are_paired():
    a, b = grid(), grid(offset=1.0)
    b = [one | {"accuracy": one["accuracy"] + 0.1 * (one["seed"] == 222)} for one in reversed(b)]
    b.append(line("abpem", "image: snow", accuracy=0.0))  # which a has not
    (found,) = compare([x for x in a if x["method"] == "abpem"], [x for x in b if x["method"] == "abpem"])
    assert found.pairs == 12
    differences = [1.05, 2.05, 3.05]  # by row
    assert found.difference == pytest.approx(fmean(differences))
    assert found.b - found.a == pytest.approx(fmean(differences))
    test = stats.ttest_rel([10 + d for d in differences], [10.0] * 3)
    assert found.p == pytest.approx(test.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval()))


def test_no_test_where_there_is_one_row():
    (found,) = compare([line()], [line(accuracy=52.0)])
    assert (found.difference, found.low, found.p, found.pairs) == (2.0, None, None, 1)


def test_nothing_in_common():
    with pytest.raises(ValueError, match="Expected two runs with streams in common"):
        compare([line(seed=1)], [line(seed=2)])


def test_markdown():
    (summary,) = summarise(grid())
    text = markdown(summary, {"image": {"READ": 62.5}})
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3  # images, audio, averages
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in tables[0].splitlines()]
    assert rows[0] == ["image", "Fog", "JPEG", "average"]
    assert all(len(row) == 4 for row in rows)
    assert rows[2][0] == "source"
    assert rows[2][1] == f"{summary.scores['source']['image: fog'].mean:.1f}"
    assert rows[3][1].startswith("**")  # the best
    assert re.fullmatch(r"\*\*\d\d\.\d ± \d\.\d\*\*", rows[3][3])
    assert rows[4] == ["READ (published)", "", "", "62.5"]
    assert tables[2].splitlines()[0] == "| mean ± sd over seeds | a | b | all |"
    assert "### iid, severity 5, batch size 8" in text


def test_latex():
    lines = [{**one, "method": one["method"].replace("abpem", "my_own")} for one in grid()]
    (summary,) = summarise(lines)
    text = latex(summary)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert r"Image & Fog & JPEG & Avg. \\" in text
    for row in [row for row in text.splitlines() if row.startswith(("source", "my"))]:
        assert row.endswith(r" \\")
        assert r"$\pm$" in row
    assert r"my\_own & " in text


def test_terminal_and_comparison():
    (summary,) = summarise(grid())
    written = io.StringIO()
    Console(file=written, width=80).print(terminal(summary))
    shown = written.getvalue()
    assert "iid, severity 5, batch size 8" in shown
    best = summary.average["abpem"]
    assert f"{best.mean:.1f} ± {best.deviation:.1f} %" in shown
    text = comparison_markdown("x: read", "y: read", compare(grid(), grid(1.0)))
    header, _, row = text.splitlines()
    assert len(next(csv.reader([header], delimiter="|"))) == len(next(csv.reader([row], delimiter="|")))
    assert "| +2.00 |" in row


def test_rows_of_several_modalities_or_none_are_one_group():
    (summary,) = summarise([line(row="image: fog + audio: wind"), line(row="audio missing")])
    assert summary.groups == {"": ["image: fog + audio: wind", "audio missing"]}
    assert summary.average["read"] == Score(50.0, None)
