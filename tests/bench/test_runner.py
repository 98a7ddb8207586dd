"""Many cells: resuming, several processes, interrupts, errors."""

from functools import partial

import pytest

from lightning_abpem.bench.runner import list_cells, load_cells, run_cells
from lightning_abpem.bench.variants import VARIANTS
from tests.bench.runs import files, run
from tests.toybench import ToyBench


def test_cells_of_a_run():
    cells = list_cells(ToyBench(), ["iid", "mixed"], [3, 5], [1, 2], ["one"], [4], ["source", "abpem"])
    assert len(cells) == 3 * 2 * 2 * 2 + 1 * 2 * 2  # the mixed protocol has its own severities
    assert len({cell.key for cell in cells}) == len(cells)
    assert cells[0].method != cells[1].method  # on the same stream


def test_names_that_files_cannot_have():
    with pytest.raises(ValueError, match=r"Expected labels of letters, .* but got \['a/b', 'a b'\]"):
        list_cells(ToyBench(), ["iid"], [5], [1], ["one"], [8], ["source", "a/b", "a b", "a_b+1.e-3"])


def test_an_interrupt_loses_nothing_that_was_finished(tmp_path):
    cells = list_cells(ToyBench(), ["iid"], [5], [1], ["one"], [8], ["source", "read"])
    done = []

    def stop():
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells(ToyBench, cells, VARIANTS, tmp_path, 1, "cpu", stop)
    kept = files(tmp_path)
    assert len(kept) == 4
    (tmp_path / "iid.json.partial-1").write_text("{")  # of a process that was killed
    counted = []
    run_cells(ToyBench, cells, VARIANTS, tmp_path, 1, "cpu", lambda: counted.append(1))
    assert len(counted) == 2
    assert len(files(tmp_path)) == 6
    assert kept.items() <= files(tmp_path).items()


@pytest.mark.slow
def test_processes_agree(tmp_path):
    cells = list_cells(ToyBench(), ["iid", "skewed-1"], [5], [1], ["one", "two"], [8], ["source", "abpem"])
    found = []
    for workers in (1, 2):
        run_cells(ToyBench, cells, VARIANTS, tmp_path / str(workers), workers, "cpu", lambda: None)
        found.append([{**result, "seconds": 0} for result in load_cells(tmp_path / str(workers), cells)])
    for one, two in zip(*found, strict=True):
        assert one["hits"] == two["hits"]
        assert one["figures"] == pytest.approx(two["figures"], rel=1e-4)


@pytest.mark.slow
def test_an_interrupt_stops_all_processes(tmp_path):
    """Cells under way are finished, cells that wait are not begun."""
    cells = list_cells(ToyBench(), ["iid"], [5], range(40), ["one"], [8], ["source"])

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells(ToyBench, cells, VARIANTS, tmp_path, 2, "cpu", stop)
    assert 1 <= len(files(tmp_path)) < len(cells) / 2


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_in_a_cell_is_shown_and_the_rest_kept(tmp_path, workers):
    cells = list_cells(ToyBench(), ["iid"], [5], [1], ["one"], [8], ["source"])
    with pytest.raises(ValueError, match="sample 3 is broken"):
        run_cells(partial(ToyBench, fail_at=3), cells, VARIANTS, tmp_path, workers, "cpu", lambda: None)
    assert not files(tmp_path)


def test_a_damaged_cell_is_named(tmp_path):
    run(tmp_path)
    path = next((tmp_path / "cells").iterdir())
    path.write_text(path.read_text()[:20])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged .* Delete it, and run again"):
        run(tmp_path)
