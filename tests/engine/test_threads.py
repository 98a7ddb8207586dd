"""One model, called from several threads while it adapts."""

import re
import threading
from collections.abc import Callable

import pytest
import torch

from tests.engine.interrupts import abpem
from tests.reference import same_state
from tests.toy import Toy, batches, make_toy

REFUSED: list[tuple[int, str]] = []  # out of the models' reach, whose state is put back


class Waits(Toy):
    """Its forward lets another thread go on, and waits for it."""

    pause: Callable[[], None] | None = None

    def forward(self, audio, video):
        if self.pause is not None:
            self.pause()
        return super().forward(audio, video)


def make():
    model = Waits().eval()
    model.load_state_dict(make_toy().state_dict())
    return model


def one_thread(**options):
    with torch.no_grad(), abpem(**options).attach(make_toy()) as adaptation:
        return [adaptation.model(*args) for args in batches(2)]


@pytest.mark.parametrize("memory_batches", [1, 2])
@pytest.mark.parametrize("steps", [0, 1])
def test_two_calls_at_once(memory_batches, steps):
    """The second is refused, the first gets what it would have got alone."""
    options = {"memory_batches": memory_batches, "steps": steps}
    model = make()
    source = {name: x.clone() for name, x in model.state_dict().items()}
    outputs = []
    REFUSED.clear()
    first, second = batches(2)

    def other():
        try:
            model(*second)
        except RuntimeError as error:
            REFUSED.append((threading.get_ident(), str(error)))

    def meanwhile():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with torch.no_grad(), abpem(**options).attach(model) as adaptation:
        Waits.pause = staticmethod(meanwhile)
        try:
            outputs.append(model(*first))
        finally:
            Waits.pause = None
        outputs.append(model(*second))
        assert adaptation.calls == 2
    assert all(map(torch.equal, outputs, one_thread(**options)))
    assert len(REFUSED) == 2  # in the adapting pass and in the prediction
    for name, error in REFUSED:
        assert re.search(rf"called from thread {name} while its call in thread {threading.get_ident()}", error)
    assert same_state(model.state_dict(), source)


@pytest.mark.parametrize("memory_batches", [1, 2])
def test_calls_one_after_another_from_different_threads(memory_batches):
    outputs = []

    def call(args):
        with torch.no_grad():
            outputs.append(model(*args))

    model = make()
    with abpem(memory_batches=memory_batches).attach(model) as adaptation:
        for args in batches(2):
            thread = threading.Thread(target=call, args=(args,))
            thread.start()
            thread.join()
        assert adaptation.updates == 2
    assert all(map(torch.equal, outputs, one_thread(memory_batches=memory_batches)))


@pytest.mark.parametrize("memory_batches", [1, 2])
def test_threads_that_do_not_know_of_each_other(memory_batches):
    """Every call gives a prediction for its own batch, or is refused."""
    model = make()
    source = {name: x.clone() for name, x in model.state_dict().items()}
    sizes, others = [], []

    def work(size):
        for args in batches(20, size):
            try:
                with torch.no_grad():
                    sizes.append((size, len(model(*args))))
            except RuntimeError as error:
                others.append(str(error))

    with abpem(memory_batches=memory_batches).attach(model) as adaptation:
        threads = [threading.Thread(target=work, args=(size,)) for size in (3, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert adaptation.updates == len(sizes)
    assert all(expected == got for expected, got in sizes)
    assert all("at a time: use one thread, or a lock" in error for error in others), others[:3]
    assert len(sizes) + len(others) == 40
    assert same_state(model.state_dict(), source)
