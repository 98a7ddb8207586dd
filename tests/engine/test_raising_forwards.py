"""A forward that raises leaves the state, and gives the error, that it does in a plain call."""

import pytest
import torch

from lightning_abpem import ABPEM
from tests.toy import MODALITIES, Toy, batches


class Left(BaseException):
    """Not an Exception: a way out that some streams take."""


class Raising(Toy):
    """Counts its calls, and raises in one of them, after the count has moved."""

    def __init__(self, at, error):
        super().__init__()
        self.calls_made, self.at, self.error = 0, at, error

    def forward(self, *inputs):
        self.calls_made += 1
        if self.calls_made == self.at:
            raise self.error("not yet")
        return super().forward(*inputs) + self.calls_made


def run(model, stream):
    outputs = []
    for batch in stream:
        try:
            outputs.append(model(*batch))
        except (RuntimeError, Left) as error:
            outputs.append(str(error))
    return outputs


@pytest.mark.parametrize("on_error", ["predict", "raise"])
@pytest.mark.parametrize("error", [RuntimeError, Left])
@pytest.mark.parametrize("at", [1, 3])
def test_it_moves_on_as_in_a_plain_loop(at, error, on_error):
    torch.manual_seed(0)
    plain = Raising(at, error).eval()
    torch.manual_seed(0)
    adapted = Raising(at, error).eval()
    with torch.no_grad():
        expected = run(plain, batches())
        with ABPEM("fusion.*.attn", MODALITIES, k=2, steps=0, on_error=on_error).attach(adapted):
            seen = run(adapted, batches())
    assert adapted.calls_made == plain.calls_made == 4
    for ours, theirs in zip(seen, expected, strict=True):
        assert type(ours) is type(theirs)
        assert ours == theirs == "not yet" if isinstance(ours, str) else torch.equal(ours, theirs)


def test_an_error_that_only_the_pass_meets_is_raised_after_the_call():
    class UnderGradients(Toy):
        def forward(self, *inputs):
            if torch.is_grad_enabled():
                raise RuntimeError("no gradients here")
            return super().forward(*inputs)

    model = UnderGradients().eval()
    callback = ABPEM("fusion.*.attn", MODALITIES, k=2)
    with torch.no_grad(), callback.attach(model), pytest.raises(RuntimeError, match="no gradients here"):
        model(*batches()[0])
