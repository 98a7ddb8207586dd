"""Metrics inside a LightningModule, logged as torchmetrics' own are, with and without a callback."""

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_abpem.attention import capture_attention, find_fusion
from lightning_abpem.engine.watch import Watch
from lightning_abpem.methods import Tent
from lightning_abpem.metrics import AttentionDivergence, AttentionGap, ClassShare, Entropy, FlipRate, Information
from tests.toy import CLASSES, MODALITIES, Toy, loader, make_toy

NAMES = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
QUIET: dict[str, Any] = dict.fromkeys(NAMES, False)


class Measured(Toy):
    """A user's own module: figures of its predictions and of its fusion attention."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.entropy, self.information = Entropy(), Information(CLASSES)
        self.gap, self.divergence = AttentionGap(MODALITIES), AttentionDivergence(MODALITIES, average="none")
        self.outputs = []

    def test_step(self, batch, batch_idx):
        with capture_attention(find_fusion(self, ["fusion.*.attn"]).watched) as calls:
            logits = self(*batch[:2])
        self.outputs.append(logits.float())
        for name in ("entropy", "information"):
            getattr(self, name)(logits)
            self.log(name, getattr(self, name))
        self.gap(calls)
        self.log("gap", self.gap, on_step=False, on_epoch=True)
        self.divergence.update(calls)

    def on_test_epoch_end(self):
        pairs = self.divergence.compute()
        assert isinstance(pairs, dict)
        self.log_dict(pairs)
        self.divergence.reset()


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-true"])
def test_logged_by_a_module_of_ones_own(inference_mode, precision):
    model = Measured()
    trainer = Trainer(accelerator="cpu", inference_mode=inference_mode, precision=precision, **QUIET)
    for _ in range(2):  # Lightning resets them in between
        model.outputs.clear()
        [results] = trainer.test(model, loader(3, 5), verbose=False)
        logits = torch.cat(model.outputs)
        assert results["entropy"] == pytest.approx(Entropy()(logits).item(), abs=1e-5)
        assert results["information"] == pytest.approx(Information(CLASSES)(logits).item(), abs=1e-5)
        pairs = {"audio_to_video", "video_to_audio"}
        assert set(results) == {"entropy", "information", "gap"} | pairs
        assert all(results[name] > 0 for name in pairs)


def test_the_callback_s_figures_are_those_of_the_classes():
    """A stream's first batch, on which the model is the source: the running means have nothing before it."""
    model, batch = make_toy(), next(iter(loader(1, 8)))[:2]
    with torch.no_grad():
        plain = model(*batch)
        with Tent(monitor="source", optimizer=partial(torch.optim.SGD, lr=0.5)).attach(model) as adaptation:
            moved = model(*batch)
    for name, metric in {"class_share": ClassShare(CLASSES), "information": Information(CLASSES)}.items():
        assert metric(plain).item() == pytest.approx(adaptation.record[name].item(), abs=1e-6)
    assert FlipRate()(moved, plain).item() == pytest.approx(Watch().see(moved, plain)["flip_rate"].item(), abs=1e-6)
