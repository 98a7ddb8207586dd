"""The engine on models of Hugging Face transformers: what is captured, what moves, what stays."""

from collections import defaultdict
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_abpem import ABPEM
from lightning_abpem.attention.capture import capture_attention
from lightning_abpem.attention.fusion import find_fusion
from lightning_abpem.attention.spans import select_tokens
from lightning_abpem.engine.adaptation import Adaptation
from tests import reference
from tests.families import FAMILIES
from tests.toy import PAPER

pytestmark = pytest.mark.filterwarnings("ignore:A frozen module gave another output")  # ViLT draws its patches
SGD = partial(torch.optim.SGD, lr=1e-2)


@pytest.fixture(params=FAMILIES)
def family(request):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    family = FAMILIES[request.param]()
    torch.manual_seed(1)
    for parameter in family.model.parameters():  # far enough from the usual 0.02 for scores that tell layers apart
        torch.nn.init.normal_(parameter, std=0.15)
    return family


def abpem(family, **changes):
    return ABPEM(**(PAPER | {"optimizer": SGD} | family.options | changes))


def run(family):
    torch.manual_seed(2)
    return family.model(**family.inputs)


def logits_of(family, output):
    how = family.options.get("logits", lambda output: output if isinstance(output, torch.Tensor) else output.logits)
    return how(output)


class Linears:
    """Outputs of every linear, call by call."""

    def __init__(self, model):
        self.outputs: defaultdict[str, list[Tensor]] = defaultdict(list)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda m, args, out, name=name: self.outputs[name].append(out))


def naive_scores(family, linears, query, key, call_index):
    """Scores averaged over heads, in float64, one head after the other; -inf where hidden."""
    q, k = linears.outputs[query][call_index].double(), linears.outputs[key][call_index].double()
    heads_q, heads_k = family.heads
    q, k = (family.rotate(x.unflatten(-1, (heads, -1)).transpose(1, 2)) for x, heads in ((q, heads_q), (k, heads_k)))
    maps = [q[:, h] @ k[:, h * heads_k // heads_q].mT / q.shape[-1] ** 0.5 for h in range(heads_q)]
    scores = sum(maps) / heads_q
    return scores if family.hidden is None else scores.masked_fill(family.hidden, float("-inf"))


def naive_block(family, scores, m, n):
    """Per sample, mean and deviation over the tokens that are neither padded nor hidden; None if there are not two."""
    result = []
    for sample, block in enumerate(scores[:, family.spans[m], family.spans[n]]):
        for side, name in ((0, m), (1, n)):
            padded = family.padded.get(name)
            if padded is not None:
                block = block.index_select(side, (~padded[sample]).nonzero().squeeze(1))
        values = block[block.isfinite()].view(1, 1, -1)
        whole = slice(None)
        result.append(reference.block_statistics(values, whole, whole)[0] if values.numel() > 1 else None)
    return result


def test_captured_statistics_are_the_naive_ones(family):
    linears = Linears(family.model)
    settings = abpem(family).settings
    fusion = find_fusion(family.model, settings.patterns)
    with capture_attention(fusion.watched) as calls:
        run(family)
    tokens = select_tokens(settings.spans, (), family.inputs)
    fusion.check(calls, tokens)
    compared = fusion.compare(calls, tokens)
    assert set(compared) == {pair for pair in family.layers[0] if pair[0] != pair[1]}
    for (m, n), layers in compared.items():
        assert len(layers) == len(family.layers)
        for ours, names in zip(layers, family.layers, strict=True):
            for pair, statistics in zip(((m, n), (n, n)), ours, strict=True):
                expected = naive_block(family, naive_scores(family, linears, *names[pair]), *pair)
                seen = [statistics.seen is None or bool(statistics.seen.expand(3)[i]) for i in range(3)]
                assert seen == [value is not None for value in expected]
                for i, value in enumerate(expected):
                    if value is not None:
                        assert statistics.mean.expand(3)[i].item() == pytest.approx(value[0], abs=1e-6)
                        assert statistics.std.expand(3)[i].item() == pytest.approx(value[1], abs=1e-6)


def test_capturing_leaves_the_output_as_it_is(family):
    fusion = find_fusion(family.model, abpem(family).settings.patterns)
    plain = logits_of(family, run(family))
    with capture_attention(fusion.watched):
        captured = logits_of(family, run(family))
    assert torch.equal(captured, plain)


def test_the_projections_of_q_k_and_v_move_and_nothing_else(family):
    projections = {
        linear.replace(*kinds)
        for layer in family.layers
        for (m, n), (linear, _, _) in layer.items()
        if len(family.spans) and (m != n or isinstance(family.options["fusion"], str))
        for kinds in (
            ("query", "query"),
            ("query", "key"),
            ("query", "value"),
            ("q_proj", "k_proj"),
            ("q_proj", "v_proj"),
        )
    }
    expected = {name for name, _ in family.model.named_parameters() if name.rpartition(".")[0] in projections}
    before = {name: p.detach().clone() for name, p in family.model.named_parameters()}
    with torch.no_grad(), abpem(family, restore=False).attach(family.model) as adaptation:
        run(family)
    assert set(adaptation.params) == expected
    moved = {name for name, p in family.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == expected


def test_adaptation_lowers_the_loss(family):
    losses = []
    settings = abpem(family, optimizer=partial(torch.optim.Adam, lr=1e-3)).settings
    with torch.no_grad(), Adaptation(family.model, settings, lambda record, _: losses.append(record["loss"].item())):
        for _ in range(11):
            run(family)
    assert losses[10] < losses[0]


def test_everything_returns(family):
    before = {name: value.clone() for name, value in family.model.state_dict().items()}
    plain = logits_of(family, run(family))
    with torch.inference_mode(), abpem(family, memory_batches=1).attach(family.model):
        adapted = logits_of(family, run(family))
    assert not torch.equal(adapted, plain)
    assert reference.same_state(before, family.model.state_dict())
    assert torch.equal(logits_of(family, run(family)), plain)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("ViLT", "VisualBERT")])
def test_memory(name):
    """Two halves of a batch, the first in memory: the figures are those of the whole batch."""
    pytest.importorskip("transformers")

    def recorded(memory_batches, *parts):
        torch.manual_seed(0)
        family = FAMILIES[name]()
        still = partial(torch.optim.SGD, lr=0.0)
        callback = abpem(family, memory_batches=memory_batches, optimizer=still)
        with torch.no_grad(), callback.attach(family.model) as adaptation:
            for part in parts:
                family.model(**{key: value[part] for key, value in family.inputs.items()})
        return adaptation.record

    whole, halves = recorded(1, slice(None)), recorded(2, slice(0, 2), slice(2, 3))
    for figure, value in whole.items():
        torch.testing.assert_close(halves[figure], value, rtol=1e-4, atol=1e-4, equal_nan=True, msg=figure)


def test_memory_where_the_head_uses_the_batch_once_more():
    """VisualBERT's head picks its token by the batch's own mask."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    family = FAMILIES["VisualBERT"]()
    with (
        pytest.raises(ValueError, match="'visual_bert.encoder' is not where .* or set memory_batches=1"),
        abpem(family, memory_batches=2).attach(family.model),
    ):
        for part in (slice(0, 2), slice(2, 3)):
            family.model(**{key: value[part] for key, value in family.inputs.items()})
