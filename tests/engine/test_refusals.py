"""Refusals through `attach`: models, options, batches and methods that do not fit, by name."""

import pickle
from collections import OrderedDict
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.engine.method import Method
from tests.engine.attached import abpem, fingerprint, predictions
from tests.reference import same_state
from tests.toy import (
    AUDIO,
    CLASSES,
    VIDEO,
    WIDTH,
    FusedAttention,
    batches,
    make_toy,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "blocks_u.*.attn"}, "matches none of its"),
        ({"fusion": "head"}, "'head' to be an attention module"),
        ({"fusion": "fusion"}, "it holds 2"),
        ({"target": "modle"}, "`target` to name a module of Toy, but got 'modle'. Its children: audio"),
        ({"memory_batches": 2, "memory_at": "blok"}, "`memory_at` to name a module of Toy, but got 'blok'"),
        ({"reset": "dataloader"}, "needs a Trainer"),
    ],
)
def test_what_does_not_fit_the_model(changes, message):
    model = make_toy(depth=2)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message), abpem(**changes).attach(model):
        pass
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": {"audio": AUDIO, "video": VIDEO + 1}}, "but got 11 .* and 10 tokens"),
        ({"modalities": {"audio": AUDIO - 1, "video": VIDEO}}, "but got 9 .* and 10 tokens"),
        ({"k": CLASSES + 1}, f"got {CLASSES + 1} and logits of {CLASSES} classes"),
        ({"logits": lambda output: output.mean(1)}, "shape"),
        ({"fusion": "unused"}, "attention calls inside unused.*Seen elsewhere: fusion.0.attn .10 query and 10 key"),
    ],
)
def test_what_shows_at_the_first_batch(changes, message):
    model = make_toy()
    model.unused = FusedAttention().eval()
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, fingerprint(model)
    with pytest.raises(ValueError, match=message), abpem(**changes).attach(model):
        try:
            model(*batches(1)[0])
        finally:
            assert same_state(state, model.state_dict())
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_batches": 0}, "`memory_batches` to be an integer >= 1, but got 0"),
        ({"steps": -1}, "`steps` to be an integer in .0, 10000., but got -1"),
        ({"reset": "sometimes"}, "`reset` to be .*'sometimes'"),
        ({"reset": 0}, "`reset` to be .*0"),
        ({"reset": True}, "`reset` to be .*True"),
        ({"reset": "batch", "memory_batches": 2}, "`memory_batches` to be 1"),
        ({"optimizer": "adam"}, "`optimizer` to be None or a function .*'adam'"),
        ({"k": 0}, "`k`"),
        ({"attention_weight": -1.0}, "`attention_weight`"),
        ({"modalities": {"audio": 3}}, "two modalities"),
        ({"stages": ("fit",)}, "`stages` to hold some of"),
        ({"stages": "test"}, "`stages` to hold some of"),
    ],
)
def test_options_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        abpem(**changes)


def test_training_mode_with_dropout():
    model = make_toy()
    model.head.insert(0, nn.Dropout(0.1).train())
    with pytest.raises(ValueError, match=r"eval mode, but 1 of its modules .*: head.0. Call model.eval\(\)"):
        predictions(model, batches(1))
    assert torch.equal(predictions(model.eval(), batches(1))[0], predictions(make_toy(), batches(1))[0])


def test_tied_parameters_are_named():
    model = make_toy()
    model.audio.tied = model.fusion[0].attn.qkv
    with torch.no_grad(), abpem().attach(model) as adaptation:
        assert "audio.tied.weight is the same tensor, so it moves as well" in adaptation.describe()
        model(*batches(1)[0])
        assert adaptation.updates == 1


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        model = make_toy()
    with pytest.raises(ValueError, match="made inside torch.inference_mode"), abpem().attach(model):
        pass


def test_spans_are_held_against_every_batch():
    model = make_toy()
    good, (audio, video) = batches(2)
    with pytest.raises(ValueError, match="but got 10 .* and 12 tokens"):
        predictions(model, [good, (audio, torch.cat((video, video[:, :2]), dim=1))], on_error="raise")


def test_attention_that_is_not_batch_first_is_refused():
    class Folded(FusedAttention):
        """Heads folded into the batch, of q, k and v that are changed after their projection."""

        def forward(self, x):
            parts = self.qkv(x).tanh().chunk(3, -1)
            q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2).flatten(0, 1) for part in parts)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(y.unflatten(0, (-1, 3)).transpose(1, 2).flatten(2))

    with pytest.raises(ValueError, match="'fusion.0.attn' to attend with 4 samples, .* got 12"):
        predictions(make_toy(Folded()), batches(1))


def test_every_matched_attention_must_be_called():
    model = make_toy(depth=2)
    model.unused = FusedAttention().eval()
    with pytest.raises(ValueError, match="attention calls inside unused, but .* Seen elsewhere: fusion.0.attn"):
        predictions(model, batches(1), fusion=["fusion.*.attn", "unused"])


@pytest.mark.parametrize(
    "make", [lambda: nn.LSTM(3, 3, 2, dropout=0.5), lambda: nn.LayerNorm(3), lambda: nn.Dropout(0.1)]
)
def test_any_module_in_training_mode_is_refused(make):
    model = make_toy()
    model.more = make().train()
    with pytest.raises(ValueError, match=r"eval mode, but 1 of its modules .*: more. Call model.eval\(\)"):
        predictions(model, batches(1))


def test_attaching_twice():
    model = make_toy()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="being adapted already"), abpem().attach(model), abpem().attach(model):
        pass
    assert fingerprint(model) == before


def test_a_forward_without_gradients():
    model = make_toy()
    model.forward = torch.no_grad()(model.forward)
    with pytest.raises(ValueError, match="the scores of 'fusion.0.attn' to carry gradients .* torch.no_grad"):
        predictions(model, batches(1))
    assert len(predictions(model, batches(1), steps=0)) == 1


def by_functional_call(model, batch):
    return torch.func.functional_call(model, {name: 1.02 * p.detach() for name, p in model.named_parameters()}, batch)


def by_new_parameters(model, batch):
    model.load_state_dict(deepcopy(model.state_dict()), assign=True)
    return model(*batch)


@pytest.mark.parametrize("step", [by_functional_call, by_new_parameters])
def test_other_tensors_in_the_place_of_what_adapts(step):
    model, refusal = make_toy().requires_grad_(False), "'fusion.0.attn.qkv.weight' is not there in this call"
    with pytest.raises(ValueError, match=refusal), torch.no_grad(), abpem().attach(model):
        step(model, batches(1)[0])


def test_gradients_that_pass_the_parameters_by():
    """The logits have a graph, but it leads elsewhere."""
    model = make_toy()
    model.head.register_forward_hook(lambda module, args, output: output.detach() + torch.zeros(1, requires_grad=True))
    with pytest.raises(ValueError, match="no gradient reaches fusion.0.attn.qkv.weight"):
        predictions(model, batches(1), attention_weight=0.0)


@pytest.mark.parametrize("factory", [lambda params: None, torch.optim.LBFGS])
def test_a_factory_of_something_else(factory):
    with pytest.raises(ValueError, match="`optimizer` to make a torch optimizer that steps without a closure"):
        predictions(make_toy(), batches(1), optimizer=factory)


def test_attaching_to_a_part_of_what_adapts():
    outer = nn.Module().eval()
    outer.model = make_toy()
    first = abpem(fusion="model.fusion.*.attn", target="model")
    with pytest.raises(ValueError, match="being adapted already"), first.attach(outer), abpem().attach(outer.model):
        pass
    assert len(predictions(outer.model, batches(1))) == 1


def test_nothing_was_called():
    model = make_toy()
    with pytest.warns(UserWarning, match="nothing was adapted"), abpem().attach(model):
        model.head(torch.zeros(1, WIDTH))


class Wrong(Method):
    name = "Wrong"

    def __init__(self, collected, made):
        self.collected, self.made = collected, made

    def collect(self, model, fusion):
        return super().collect(model, fusion) if self.collected is None else self.collected

    def loss(self, step):
        return self.made(step.logits.square().mean())


@pytest.mark.parametrize(
    ("collected", "made", "message"),
    [
        ([], None, "Expected `collect` of Wrong to give parameters by their names, but got a list"),
        (None, lambda loss: loss, "Expected Wrong to give a pair, .* but got Tensor"),
        (None, lambda loss: (loss, {"loss": 0.5}), "a dict of tensors to record, but got {'loss': 0.5}"),
        (None, lambda loss: (loss, {}), r"Expected Wrong to record its `loss`, but got \[\]"),
    ],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_what_a_method_of_ones_own_may_get_wrong(collected, made, message, steps):
    callback = TestTimeAdaptation(Wrong(collected, made), "fusion.*.attn", steps=steps)
    model = make_toy()
    with pytest.raises(ValueError, match=message), callback.attach(model), torch.no_grad():
        model(*batches(1)[0])


def test_a_method_with_a_loss_moves_something():
    callback = TestTimeAdaptation(Wrong({}, lambda loss: (loss, {"loss": loss.detach()})), "fusion.*.attn")
    model = make_toy()
    message = "Expected `collect` to give the parameters that move, .* but got none"
    with pytest.raises(ValueError, match=message), callback.attach(model), torch.no_grad():
        model(*batches(1)[0])


def test_a_method_is_an_instance_with_a_name():
    methods: tuple[Any, ...] = (Wrong, Method(), "tent")
    for method in methods:
        with pytest.raises(ValueError, match="Expected `method` to be an instance of a Method with a `name`"):
            TestTimeAdaptation(method, "fusion.*.attn")


@pytest.mark.parametrize("copy", [deepcopy, pickle.dumps])
@pytest.mark.parametrize("target", [None, "inner"])
def test_a_model_is_not_copied_while_it_adapts(copy, target):
    model: Any = nn.Sequential(OrderedDict(inner=make_toy())).eval()
    model.forward = model.inner.forward
    with abpem(fusion="inner.fusion.*.attn", target=target).attach(model) as adaptation:
        model.inner(*batches(1)[0]) if target else model(*batches(1)[0])
        with pytest.raises(TypeError, match="A model cannot be copied or pickled while it adapts"):
            copy(model)
        assert adaptation.updates == 1
