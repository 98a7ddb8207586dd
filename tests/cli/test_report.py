"""``abpem report``: records, folders, and what cannot be read."""

import re
import subprocess
import sys

import pytest

from lightning_abpem.cli import main
from lightning_abpem.report.page import run_page
from tests.report.records import record, written
from tests.report.test_page import lines

HEAD = "protocol,severity,batch_size,row,method,source,seed,accuracy,batch_accuracy,seconds,updates,skipped"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["report.json", "."])
def test_the_page_of_a_record(tmp_path, name, capsys):
    written(tmp_path, record())
    main(["report", str(tmp_path / name), "-o", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_text() == run_page(record())
    assert "page.html" in capsys.readouterr().out.replace("\n", "")  # a long path is wrapped


@pytest.mark.usefixtures("undrawn")
def test_the_page_of_a_benchmark(tmp_path):
    rows = [{**line, "batch_accuracy": line["accuracy"], "skipped": 0} for line in lines("abpem")]
    text = [HEAD, *(",".join(str(row[name]) for name in HEAD.split(",")) for row in rows)]
    (tmp_path / "results.csv").write_text("\n".join(text))
    main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "iid, severity 5, batches of 8" in page
    assert "61.0" in page


@pytest.mark.parametrize(
    ("run", "out", "words"),
    [
        ("none", "page.html", "there is no '.*none'"),
        (".", "page.html", "to hold report.json, .* or results.csv, .* but it has neither"),
        ("damaged.json", "page.html", "damaged.json to be a record in JSON"),
        ("report.json", "none/page.html", "Make it first"),
    ],
)
def test_errors_are_one_line(tmp_path, run, out, words, capsys):
    (tmp_path / "damaged.json").write_text("{")
    if run == "report.json":
        written(tmp_path, record())
    with pytest.raises(SystemExit) as caught:
        main(["report", str(tmp_path / run), "-o", str(tmp_path / out)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("abpem report: Expected")
    assert error.count("\n") == 1
    assert re.search(words, error)
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.slow
def test_it_needs_matplotlib_and_no_other_extra(tmp_path):
    hidden = ["jsonargparse", "sklearn", "soundfile", "timm"]
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden})); from lightning_abpem.cli import main; main()"
    path = written(tmp_path, record())
    words = [sys.executable, "-c", code, "report", str(path), "-o", str(tmp_path / "page.html")]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
