"""Methods with options that a stream which is cut has to carry on, for the tests of their states."""

from collections.abc import Callable
from functools import partial

import torch

from lightning_abpem import ABPEM, TestTimeAdaptation
from lightning_abpem.methods import EATA, MMTTA, READ, SAR, Tent
from tests.toy import MODALITIES, batches

ADAM = partial(torch.optim.Adam, lr=1e-2)


CUT, LENGTH = 3, 6


METHODS: dict[str, Callable[..., TestTimeAdaptation]] = {
    "abpem": partial(ABPEM, "fusion.*.attn", MODALITIES, memory_batches=3),
    "abpem, momentum": partial(
        ABPEM, "fusion.*.attn", MODALITIES, optimizer=partial(torch.optim.SGD, lr=1e-2, momentum=0.9)
    ),
    "abpem, reset": partial(ABPEM, "fusion.*.attn", MODALITIES, reset=4),
    "abpem, reset by samples": partial(ABPEM, "fusion.*.attn", MODALITIES, reset="7 samples"),
    "abpem, several rates": partial(
        ABPEM, "fusion.*.attn", MODALITIES, learning_rate=(1e-3, 3e-2, 0.3), memory_batches=2
    ),
    "tent": Tent,
    "eata": partial(EATA, redundancy=1.0, entropy_margin=1.0, fisher_batches=batches(2, seed=7)),
    "sar": partial(SAR, entropy_margin=1.0),
    "mm-tta": partial(MMTTA, {"audio": 0, "video": 1}),
    "read": partial(READ, "fusion.*.attn"),
}


def predict(callback, model, stream):
    with torch.no_grad(), callback.attach(model):
        return [model(*batch) for batch in stream]


def made(name):
    return METHODS[name](**({"optimizer": ADAM} if "momentum" not in name else {}))
