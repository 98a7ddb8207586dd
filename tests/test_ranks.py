"""Two processes that are kept from test to test: one that fails, dies or hangs does so in its own test alone."""

import os
import threading

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.ranks import WORLD, in_two_processes


def what_they_are(rank):
    """Their ids, as they tell each other, their threads, and a variable that no other test may leave."""
    ids = torch.zeros(WORLD, dtype=torch.long)
    ids[rank] = os.getpid()
    dist.all_reduce(ids)
    left = os.environ.get("LEFT_BY_A_TEST")
    os.environ["LEFT_BY_A_TEST"] = "1"
    return ids.tolist(), torch.get_num_threads(), left


def fails(rank):
    if rank:
        raise ValueError("of the second")
    dist.barrier()


def dies(rank):
    if rank:
        os._exit(3)
    dist.barrier()


def hangs(rank):
    if rank:
        threading.Event().wait()


def ids():
    (first, one, left), (second, other, also_left) = in_two_processes(what_they_are)
    assert first == second
    assert one == other == 1
    assert left is also_left is None
    return first


def test_they_are_kept():
    own = ids()
    assert os.getpid() not in own
    assert ids() == own


@pytest.mark.slow
def test_others_take_their_place_after_a_failure(monkeypatch):
    own = ids()
    first, second = in_two_processes(fails)
    assert isinstance(first, RuntimeError)  # the other is gone
    assert isinstance(second, ValueError)
    assert not set(own) & set(own := ids())
    with pytest.raises(RuntimeError, match="process 1 to answer, but it died with exit code 3"):
        in_two_processes(dies)
    assert not set(own) & set(own := ids())
    monkeypatch.setattr(ranks, "TIMEOUT", 5)
    with pytest.raises(RuntimeError, match=r"process \d to answer, but it hangs(.|\n)* in hangs\n"):
        in_two_processes(hangs)
    monkeypatch.undo()
    assert not set(own) & set(ids())
