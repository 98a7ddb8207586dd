"""Finding the logits in what a model returns."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MultilabelAccuracy

from lightning_abpem import ABPEM
from lightning_abpem.engine.logits import check_head, read_logits, refuse_probabilities
from tests.toy import MODALITIES, Toy, batches, make_toy


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
        (("text",), r"none in a tuple of \['str'\]"),
        ((torch.ones(2, 3, 4), "text"), r"none in a tuple of \['\(2, 3, 4\) torch.float32', 'str'\]. Pass `logits`"),
        (None, "none in a NoneType"),
        (torch.ones(2, 3, 4), r"shape \(batch, classes\) .* got \(2, 3, 4\)"),
        ({"logits": torch.ones(2, 7, 5)}, r"got \(2, 7, 5\) .* lambda output: output\[:, 0\], or the tokens' mean"),
        (torch.ones(2, 5, 8, 8), r"got \(2, 5, 8, 8\) .* output.flatten\(2\).mean\(2\)"),
        (torch.ones(()), r"got \(\) torch.float32"),
        (torch.ones(2), r"got \(2,\).* One number for a sample is a regression, .* or a binary logit z"),
        (torch.ones(2, 1), r"at least two classes, but got \(2, 1\) .* regression"),
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


def test_a_function_that_gives_no_logits():
    with pytest.raises(ValueError, match=r"`logits` to return logits of shape \(batch, classes\).* got \(2, 3, 4\)"):
        read_logits({"scores": torch.ones(2, 3, 4)}, lambda output: output["scores"])


class PerToken(nn.Module):
    """Logits of every token, the classes last, second or behind the batch."""

    def __init__(self, order):
        super().__init__()
        self.toy, self.order = make_toy(), order

    def forward(self, audio, video):
        tokens = self.toy.fusion(torch.cat((self.toy.audio(audio), self.toy.video(video)), 1))
        return self.toy.head(tokens).permute(self.order)


@pytest.mark.parametrize(
    ("order", "way_out"),
    [
        ((0, 1, 2), lambda output: output[:, 0]),
        ((0, 1, 2), lambda output: output.mean(1)),
        ((0, 2, 1), lambda output: output.flatten(2).mean(2)),
        ((1, 0, 2), lambda output: output[0]),
    ],
)
def test_logits_of_every_token(order, way_out):
    """They are refused with the shape, and the ways out that the error names are ways out."""
    model, args = PerToken(order).eval(), batches(1)[0]
    options: dict[str, Any] = {"fusion": "toy.fusion.*.attn", "modalities": MODALITIES, "k": 2}
    shape = tuple(model(*args).shape)
    with pytest.raises(ValueError, match=rf"but got \({shape[0]}, {shape[1]}, {shape[2]}\) torch.float32"):
        adapted(ABPEM(**options), model, args)
    assert adapted(ABPEM(**options, logits=way_out), model, args).updates == 1


def adapted(method, model, args):
    with torch.no_grad(), method.attach(model) as adaptation:
        model(*args)
    return adaptation


def with_module(module):
    model = make_toy()
    model.extra = module
    return model.eval()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.BCEWithLogitsLoss(), "its BCEWithLogitsLoss is for several labels at once"),
        (nn.MultiLabelSoftMarginLoss(), "its MultiLabelSoftMarginLoss is for several labels at once"),
        (MultilabelAccuracy(num_labels=5), "its MultilabelAccuracy is for several labels at once"),
        (nn.MSELoss(), "its MSELoss is for regression"),
        (nn.SmoothL1Loss(), "its SmoothL1Loss is for regression"),
    ],
)
def test_heads_that_are_no_distribution(module, message):
    model = with_module(module)
    with pytest.raises(ValueError, match=f"{message}: ABPEM minimises the entropy of one distribution"):
        check_head(model)
    options: dict[str, Any] = {"fusion": "fusion.*.attn", "modalities": MODALITIES, "k": 2}
    with pytest.raises(ValueError, match=message), ABPEM(**options).attach(model):
        pass
    with torch.no_grad(), ABPEM(**options, logits=lambda output: output).attach(model) as adaptation:  # one's own word
        model(*batches(1)[0])
    assert adaptation.updates == 1


@pytest.mark.parametrize("module", [nn.CrossEntropyLoss(), MulticlassAccuracy(num_classes=5)])
def test_a_reconstruction_loss_beside_a_classification(module):
    model = with_module(module)
    model.reconstruction = nn.MSELoss()
    check_head(model)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_the_problem_type_of_hugging_face(problem):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        **{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    )
    model = nn.Sequential(transformers.BertForSequenceClassification(config))
    check_head(model)
    config.problem_type = problem
    with pytest.raises(ValueError, match=f"its problem_type='{problem}' is for"):
        check_head(model)


def test_probabilities_are_no_logits():
    refuse_probabilities(torch.tensor([[0.5, 0.4], [0.5, 0.5]]))
    refuse_probabilities(torch.tensor([[1.5, -0.5]]))
    for rows in ([[0.5, 0.5, -torch.inf]], [[0.0, -torch.inf, -torch.inf]], [[1.0, 0.0], [-torch.inf, 1.0]]):
        refuse_probabilities(torch.tensor(rows))
    refuse_probabilities(torch.full((2, 3), -torch.inf))
    with pytest.raises(ValueError, match="these are probabilities"):
        refuse_probabilities(torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0]]))  # of which some are 0
    model = make_toy()
    options: dict[str, Any] = {"fusion": "fusion.*.attn", "modalities": MODALITIES, "k": 2}
    with (
        pytest.raises(ValueError, match="adds up to 1: these are probabilities"),
        ABPEM(**options, logits=lambda output: output.softmax(-1)).attach(model),
    ):
        model(*batches(1)[0])


def test_a_function_that_takes_the_output_apart_leaves_the_callers_whole():
    class Named(Toy):
        def forward(self, *inputs):
            return {"logits": super().forward(*inputs), "extra": [1, 2]}

    model = Named().eval()
    callback = ABPEM("fusion.*.attn", MODALITIES, k=2, logits=lambda output: output.pop("logits"))
    with torch.no_grad(), callback.attach(model):
        assert [list(model(*batch)) for batch in batches()] == 4 * [["logits", "extra"]]


@pytest.mark.parametrize("memory", [1, 4])
def test_a_function_that_edits_the_output_leaves_the_callers_alone(memory):
    class Tempered(Toy):
        def forward(self, *inputs):
            return {"scores": super().forward(*inputs), "temperature": torch.tensor(1.5)}

    seen = []
    for how in (lambda x: x["scores"] / x["temperature"], lambda x: x["scores"].div_(x["temperature"])):
        torch.manual_seed(0)
        model = Tempered().eval()
        callback = ABPEM("fusion.*.attn", MODALITIES, k=2, logits=how, memory_batches=memory)
        with torch.no_grad(), callback.attach(model):
            seen.append(torch.cat([model(*batch)["scores"] for batch in batches(6)]))
    assert torch.equal(*seen)
