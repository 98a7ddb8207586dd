"""Projections of one attention module, which adapt, found by their names."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.experiments.attention_names import count
from lightning_abpem import ABPEM, Adaptation
from lightning_abpem.attention.fusion import find_fusion
from lightning_abpem.attention.projections import find_attention
from tests.attention.variants import VARIANTS
from tests.toy import MODALITIES, WIDTH, FusedAttention, GroupedAttention, TorchAttention, batches, make_toy


@pytest.mark.parametrize(
    ("make", "names"),
    [
        *((variant.make, variant.adapting) for variant in VARIANTS.values()),
        (lambda: TorchAttention(kdim=5), VARIANTS["torch, separate weights"].adapting),
        (lambda: nn.Sequential(nn.LayerNorm(3), FusedAttention()), {"1.qkv.weight", "1.qkv.bias"}),
    ],
)
def test_what_adapts(make, names):
    module = make()
    parameters = find_attention(module, "fusion.attn").parameters
    assert set(parameters) == {f"fusion.attn.{name}" for name in names}
    own = dict(module.named_parameters(prefix="fusion.attn"))
    assert all(parameters[name] is own[name] for name in parameters)


def test_no_attention():
    with pytest.raises(ValueError, match="'head' to be an attention module.* Linear .*its children: none"):
        find_attention(nn.Linear(3, 3), "head")


def test_several_attentions():
    with pytest.raises(ValueError, match="'fusion' to be one attention module, but it holds 2: 'fusion.0', 'fusion.1'"):
        find_attention(nn.Sequential(FusedAttention(), FusedAttention()), "fusion")


def test_scripted_modules_are_refused():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="'fusion' to be an attention module written in Python, but .* TorchScript"):
        find_attention(scripted, "fusion")


class Named(nn.Module):
    """Linears of these names, and two others."""

    def __init__(self, *names):
        super().__init__()
        for name in (*names, "o_proj", "gate"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH))


class Conv1D(nn.Module):
    """As transformers has it: the weight is (in, out)."""

    def __init__(self, out, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out) / width), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return x @ self.weight + self.bias


class LowRank(nn.Module):
    """As peft wraps a linear."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Clipping(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear, self.bounds = linear, nn.Parameter(torch.full((2,), 10.0))

    def forward(self, x):
        return self.linear(x).clamp(-self.bounds[0], self.bounds[1])


@pytest.mark.parametrize(
    "names",
    [
        *("qkv", "Wqkv", "in_proj", "c_attn", "att_proj", "query_key_value", "queries_keys_values"),
        *("q kv", "to_q to_kv", "q_proj kv_proj", "Wq Wkv", "linear_q linear_kv", "query_key value", "q_attn c_attn"),
        *("query_proj key_proj value_proj", "project_q project_k project_v", "wq wk wv", "w_qs w_ks w_vs"),
        *("q_proj k_proj", "to_query to_key", "q_content_proj k_content_proj v_proj", "q_head k_head v_head"),
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj",
    ],
)
def test_names_that_tell(names):
    module = Named(*names.split(), "pos_key_proj", "out_proj")
    expected = {f"attn.{name}.{p}" for name in names.split() for p in ("weight", "bias")}
    assert set(find_attention(module, "attn").parameters) == expected


@pytest.mark.parametrize("names", ["key value receptance", "q_proj", "vision_proj text_proj", "queue keys"])
def test_names_that_do_not_tell(names):
    with pytest.raises(ValueError, match="no query, key and value projections were found in this Named"):
        find_attention(Named(*names.split()), "attn")


def wrapped():
    module: Any = GroupedAttention()
    module.q_proj, module.v_proj = LowRank(module.q_proj), Clipping(module.v_proj)
    return module


def test_of_a_wrapped_projection_the_linear_inside_adapts():
    names = ("q_proj.base_layer", "k_proj", "v_proj.linear")
    found = find_attention(wrapped(), "attn").parameters
    assert set(found) == {f"attn.{name}.{p}" for name in names for p in ("weight", "bias")}


def test_an_embedding_is_no_projection():
    module = Named("k_proj")
    module.query = nn.Embedding(3, WIDTH)
    with pytest.raises(ValueError, match="no query, key and value projections"):
        find_attention(module, "attn")


def test_an_attention_inside_an_attention_is_part_of_it():
    module = Named("q_proj", "k_proj", "v_proj")
    module.indexer = Named("wq_b", "wk")
    assert {name.split(".")[1] for name in find_attention(module, "attn").parameters} == {"q_proj", "k_proj", "v_proj"}


def test_quantised_linears_without_a_parameter_are_named():
    module = Named("k_proj", "v_proj")
    module.q_proj = nn.Identity()
    with pytest.raises(ValueError, match=r"Without a weight as a parameter: q_proj \(Identity\)"):
        find_attention(module, "attn")


def test_projections_by_name():
    names = {"attn.q_proj.lora_A.default.weight", "attn.q_proj.lora_B.default.weight"}
    assert set(find_attention(wrapped(), "attn", "**.lora_*").parameters) == names
    assert set(find_attention(wrapped(), "attn", ["q_proj.lora_A", "q_proj.lora_B"]).parameters) == names
    with pytest.raises(ValueError, match="`projections` to match parameters of 'attn', but 'to_q' matches none"):
        find_attention(wrapped(), "attn", ["q_proj", "to_q"])


def test_projections_by_a_function():
    found = find_attention(Gpt2Like(), "attn", lambda module: {"bias": module.c_attn.bias})
    assert list(found.parameters) == ["attn.c_attn.bias"]
    wrong: list[tuple[Any, str]] = [
        (lambda module: [module.k_proj.bias], "but got a list"),
        (lambda module: {}, r"but got \{\}"),
        (lambda module: {"mine": nn.Parameter(torch.ones(1))}, r"but \['mine'\] are not in it"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            find_attention(wrapped(), "attn", given)


class Gpt2Like(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj, self.num_heads = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH), 3

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2).flatten(0, 1) for part in self.c_attn(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.c_proj(y.unflatten(0, (-1, 3)).transpose(1, 2).flatten(2))


def test_transposed_weights():
    """Heads folded into the batch, out of a Conv1D, whose weight is transposed."""
    model = make_toy(Gpt2Like())
    with ABPEM("fusion.0.attn", MODALITIES, k=2).attach(model) as adaptation:
        model(*batches(1)[0])
    assert set(adaptation.params) == {"fusion.0.attn.c_attn.weight", "fusion.0.attn.c_attn.bias"}
    assert adaptation.updates == 1


def test_the_weight_below_an_adapter_moves_as_the_merged_one():
    torch.manual_seed(0)
    low_rank = make_toy(wrapped()).double()
    merged = copy.deepcopy(low_rank)
    attention = merged.fusion[0].attn
    with torch.no_grad():
        a, b = (attention.q_proj.get_submodule(f"lora_{part}.default").weight for part in "AB")
        attention.q_proj = attention.q_proj.base_layer
        attention.q_proj.weight += b @ a
    batch = [x.double() for x in batches(1)[0]]
    logits = [low_rank(*batch)]
    for model in (low_rank, merged):
        with ABPEM("fusion.0.attn", MODALITIES, k=2).attach(model), torch.no_grad():
            logits.append(model(*batch))
    torch.testing.assert_close(logits[1], logits[2], rtol=0, atol=1e-12)
    assert (logits[0] - logits[1]).abs().max() > 1e-6


class Int8(nn.Linear):
    def __init__(self, old):
        super().__init__(old.in_features, old.out_features)
        self.weight = nn.Parameter((old.weight.detach() * 50).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x) / 50, self.bias)


def test_what_cannot_move_is_refused_by_name():
    model = make_toy(wrapped())
    attention = model.fusion[0].attn
    attention.q_proj.base_layer = Int8(attention.q_proj.base_layer).eval()
    with pytest.raises(ValueError, match="'fusion.0.attn.q_proj.base_layer.weight' to adapt, but it holds torch.int8"):
        Adaptation(model, ABPEM("fusion.0.attn", MODALITIES, k=2).settings)
    adapters = ABPEM("fusion.0.attn", MODALITIES, k=2, projections="**.lora_*")
    with adapters.attach(model) as adaptation, torch.no_grad():
        model(*batches(1)[0])
    assert adaptation.updates == 1
    attention.k_proj.to("meta")
    attention.q_proj = GroupedAttention().q_proj.eval()
    with pytest.raises(ValueError, match="'fusion.0.attn.k_proj.weight' to adapt, but it is on the meta device"):
        Adaptation(model, ABPEM("fusion.0.attn", MODALITIES, k=2).settings)


@pytest.mark.parametrize("given", [[], "", 3, ["q", 1]])
def test_projections_are_names_or_a_function(given):
    with pytest.raises(ValueError, match="`projections` to be names inside the fusion attention, or a function"):
        ABPEM("attn", MODALITIES, projections=given)


def test_the_attention_of_a_self_pair_needs_no_names():
    model = nn.ModuleDict({"cross": Named("to_q", "to_kv"), "own": Named("a_proj", "b_proj")})
    fusion = find_fusion(model, {("a", "v"): ["cross"], ("v", "v"): ["own"]}, "to_*")
    assert [(x.name, len(x.parameters)) for x in fusion.watched] == [("cross", 4), ("own", 0)]
    assert [x.name for x in fusion.adapting] == ["cross"]


def test_unknown_attention_of_transformers_is_listed():
    """All but the listed ones are found by their names, in the source text of the version that the docs name."""
    version = pytest.importorskip("transformers").__version__
    if not version.startswith("5.23."):
        pytest.skip("the list is that of transformers 5.23")
    known, unknown = count()
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert len(unknown) <= 25
    assert [name for name in unknown if name.partition(".")[2] not in page] == []
    assert f"{len(unknown)} of {len(known)}" in page
