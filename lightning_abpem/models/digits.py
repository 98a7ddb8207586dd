"""A small model of digits seen and heard, in plain Lightning style: it knows nothing of adaptation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["DigitsModel", "Encoder", "transformer_layer"]

PATCH = 8
DIGITS = 10


def transformer_layer(width: int, heads: int) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


class Encoder(nn.Module):
    """A small transformer over 8 x 8 patches: (B, H, W) -> tokens (B, H W / 64, width)."""

    def __init__(self, tokens: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, PATCH, PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.layers = nn.Sequential(*(transformer_layer(width, heads) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.embed(x.unsqueeze(1)).flatten(2).mT + self.position)


class DigitsModel(LightningModule):
    """Classifier of the digit that was seen and heard: an encoder per modality, one fusion block, a linear head.

    In training each encoder has a head of its own too, so that it is good by itself.
    """

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 2, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.audio = Encoder(32, width, heads, depth)
        self.image = Encoder(16, width, heads, depth)
        self.fusion = transformer_layer(width, heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, DIGITS)
        self.head_audio, self.head_image = nn.Linear(width, DIGITS), nn.Linear(width, DIGITS)
        self.accuracy = MulticlassAccuracy(DIGITS, average="micro")

    def forward(self, audio: Tensor, image: Tensor) -> Tensor:
        """Logits (B, 10) from filterbanks (B, 64, 32) and images (B, 1, 32, 32)."""
        return self.fuse(self.audio(audio), self.image(image.squeeze(1)))

    def fuse(self, audio_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.fusion(torch.cat((audio_tokens, image_tokens), dim=1))).mean(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        audio, image, digit = batch
        audio_tokens, image_tokens = self.audio(audio), self.image(image.squeeze(1))
        all_logits = (
            self.fuse(audio_tokens, image_tokens),
            self.head_audio(audio_tokens.mean(1)),
            self.head_image(image_tokens.mean(1)),
        )
        return torch.stack([F.cross_entropy(logits, digit) for logits in all_logits]).sum()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        audio, image, digit = batch
        self.accuracy(self(audio, image), digit)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"], weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams["learning_rate"], steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
