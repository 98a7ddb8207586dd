"""The tutorial: its page runs, says what its code says, and is the notebook."""

import re

import pytest

from tests import tutorial


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The tutorial's cells as they ran, its names, and its folder."""
    folder = tmp_path_factory.mktemp("tutorial")
    width = pytest.MonkeyPatch()
    width.setenv("COLUMNS", "88")
    ran, namespace = tutorial.run(tutorial.cells(tutorial.PAGE.read_text(encoding="utf-8")), folder)
    width.undo()
    return ran, namespace, folder


@pytest.mark.slow
def test_the_tutorial_runs(taught):
    ran, namespace, folder = taught
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert namespace["abpem"].settings.learning_rate < 1e-2
    shown = "\n".join(cell.output for cell in ran)
    accuracies = re.findall(r"^(clean|fog|noise): ([\d.]+) -> ([\d.]+)", shown, flags=re.MULTILINE)
    gains = {name: float(after) - float(before) for name, before, after in accuracies}
    assert gains["clean"] > -0.05  # as the page says: sensors that fail gain, and clean data lose nothing to speak of
    assert gains["fog"] > 0.05
    assert gains["noise"] > 0.05


@pytest.mark.slow
def test_the_tutorials_outputs_are_those_of_its_code(taught):
    written = tutorial.cells(tutorial.PAGE.read_text(encoding="utf-8"))
    assert [bool(cell.output) for cell in written] == [bool(cell.output) for cell in taught[0]]
    for old, new in zip(written, taught[0], strict=True):
        first, *_ = old.output.splitlines() or [""]
        masked = [re.sub(r"[\d.]+", "0", line) for line in (first, (new.output.splitlines() or [""])[0])]
        assert masked[0] == masked[1]


def test_the_notebook_is_made_of_the_page():
    page = tutorial.PAGE.read_text(encoding="utf-8")
    assert tutorial.page(tutorial.cells(page)) == page
    assert tutorial.NOTEBOOK.read_text(encoding="utf-8") == tutorial.notebook(tutorial.cells(page))
