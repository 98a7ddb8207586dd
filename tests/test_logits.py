"""Finding the logits in what a model returns."""

from types import SimpleNamespace

import pytest
import torch

from lightning_abpem.logits import read_logits


@pytest.mark.parametrize(
    ("wrap", "how"),
    [
        (lambda x: x, None),
        (lambda x: {"loss": 0.0, "logits": x}, None),
        (lambda x: SimpleNamespace(logits=x), None),
        (lambda x: (x, "hidden"), None),
        (lambda x: (torch.tensor(0.5), torch.zeros(2, 3, dtype=torch.long), x), None),
        (lambda x: {"scores": [x]}, lambda output: output["scores"][0]),
    ],
)
def test_forms_of_output(wrap, how):
    x = torch.randn(2, 3)
    assert read_logits(wrap(x), how) is x


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"scores": torch.ones(2, 3)}, "none in a dict with keys \\['scores'\\]. Pass `logits`"),
        (("text",), "none in a tuple"),
        (None, "none in a NoneType"),
        (torch.ones(2, 3, 4), r"shape \(batch, classes\) .* got \(2, 3, 4\)"),
        (torch.ones(2), r"got \(2,\)"),
        (torch.ones(2, 1), r"at least two classes, but got \(2, 1\)"),
        (torch.ones(2, 3, dtype=torch.long), "torch.int64"),
    ],
)
def test_no_logits(output, message):
    with pytest.raises(ValueError, match=message):
        read_logits(output)


def test_several_candidates_for_the_logits():
    with pytest.raises(ValueError, match="2 that could be"):
        read_logits((torch.ones(2, 7), torch.ones(2, 3)))
    assert read_logits((torch.ones(2, 7, 4), logits := torch.ones(2, 3))) is logits


def test_a_function_that_gives_no_tensor():
    with pytest.raises(ValueError, match="`logits` to return a .* tensor, but got a NoneType"):
        read_logits(torch.ones(2, 3), lambda output: None)
