"""One thread in each process of the tests, and in those that it starts; figures that nobody looks at are not drawn.

There are as many processes as cores. A forked child that computed with two threads would also wait for its parent's.
"""

import gc
import os

import pytest
from matplotlib.figure import Figure

os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported


def pytest_collection_finish():
    """Let garbage collections pass over all modules and tests: tests that collect would spend their time there."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def undrawn():
    """Figures are made and not drawn, which takes most of a page's time; `undrawn.undo()` has them drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", _save_nothing)
        yield patch


def _save_nothing(figure, file, **how):
    file.write('<svg viewBox="0 0 1 1"></svg>' if how["format"] == "svg" else b"undrawn")
