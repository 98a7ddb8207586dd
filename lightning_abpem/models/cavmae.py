"""CAV-MAE, fine-tuned: the source model of the Kinetics50-C and VGGSound-C benchmarks (Gong et al., ICLR 2023)."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

__all__ = ["CAVMAE"]

PATCH = 16
AUDIO_FRAMES, MEL_BINS, IMAGE_SIZE = 1024, 128, 224
AUDIO_TOKENS = (AUDIO_FRAMES // PATCH) * (MEL_BINS // PATCH)
VIDEO_TOKENS = (IMAGE_SIZE // PATCH) ** 2
# The norms of its pre-training's separate streams, which the fine-tuned model never uses.
_UNUSED = re.compile(r"(norm_[av]|blocks_[avu]\.\d+\.norm[12]_[av])\.(weight|bias)")


class PatchEmbed(nn.Module):
    """Non-overlapping 16 x 16 patches, each projected to one token: (B, channels, H, W) -> (B, N, D)."""

    def __init__(self, channels: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, embed_dim, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, fused: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # Taken apart before the heads are: backward, that puts the gradients together in one copy instead of three.
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CAVMAE(LightningModule):
    """Two ViT encoders, of a spectrogram and of a video frame, and joint blocks over the tokens of both.

    A batch is ((audio, video), label) in test, with the label (B,) of class indices, and (audio, video) in predict.

    Args:
        num_classes: C.
        embed_dim: D, the width; 768 as published.
        num_heads: heads of every attention; 12 as published.
        encoder_depth: blocks of each encoder; 11 as published.
        fusion_depth: joint blocks; 1 as published.

    Example:
        ABPEM(fusion="blocks_u.*.attn", modalities=CAVMAE.modalities, k=7) adapts it.
    """

    modalities: ClassVar = {"audio": AUDIO_TOKENS, "video": VIDEO_TOKENS}

    def __init__(
        self,
        num_classes: int,
        embed_dim: int = 768,
        num_heads: int = 12,
        encoder_depth: int = 11,
        fusion_depth: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

        def blocks(depth: int) -> nn.Sequential:
            return nn.Sequential(*(Block(embed_dim, num_heads) for _ in range(depth)))

        self.patch_embed_a = PatchEmbed(1, embed_dim)
        self.patch_embed_v = PatchEmbed(3, embed_dim)
        self.pos_embed_a = nn.Parameter(0.02 * torch.randn(1, AUDIO_TOKENS, embed_dim))
        self.pos_embed_v = nn.Parameter(0.02 * torch.randn(1, VIDEO_TOKENS, embed_dim))
        self.modality_a = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.modality_v = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.blocks_a = blocks(encoder_depth)
        self.blocks_v = blocks(encoder_depth)
        self.blocks_u = blocks(fusion_depth)
        self.norm = nn.LayerNorm(embed_dim)
        self.mlp_head = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, num_classes))

    def forward(self, audio: Tensor, video: Tensor) -> Tensor:
        """Logits (B, C) from log-mel filterbanks (B, 1024, 128) and frames (B, 3, 224, 224), both normalised."""
        a = self.patch_embed_a(audio.unsqueeze(1).transpose(2, 3)) + self.pos_embed_a + self.modality_a
        v = self.patch_embed_v(video) + self.pos_embed_v + self.modality_v
        x = self.blocks_u(torch.cat((self.blocks_a(a), self.blocks_v(v)), dim=1))
        return self.mlp_head(self.norm(x).mean(dim=1))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        inputs, label = batch
        hits = self(*inputs).argmax(-1) == label
        self.log("accuracy", hits.float().mean(), on_step=False, on_epoch=True, batch_size=len(label))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(*batch)

    def load_published(self, source: Mapping[str, Tensor] | str | Path) -> CAVMAE:
        """Load a published checkpoint: a state dict, or the path of one, with or without the "module." prefix.

        Raises:
            ValueError: the file holds no state dict; or, naming every key, one with keys that are missing, unexpected
                or of another shape; nothing is loaded then.
        """
        state = source if isinstance(source, Mapping) else _read_state(source)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        state = {key: value for key, value in state.items() if not _UNUSED.fullmatch(key)}
        own = self.state_dict()
        problems = {
            "missing": [key for key in own if key not in state],
            "unexpected": [key for key in state if key not in own],
            "of another shape": [
                f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
                for key in own
                if key in state and state[key].shape != own[key].shape
            ],
        }
        if any(problems.values()):
            listed = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
            raise ValueError(f"Expected a state dict of CAV-MAE as published, fine-tuned, but got keys {listed}.")
        self.load_state_dict(state)
        return self


def _read_state(path: str | Path) -> Mapping[str, Tensor]:
    expected = f"Expected {path} to be a state dict saved by torch, but"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{expected} it is no file of torch.save's, or holds more than tensors.") from error
    except Exception as error:  # torch reads words that are no pickle as far as they go
        raise ValueError(f"{expected} it cannot be read: {str(error) or type(error).__name__}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{expected} it holds a {type(state).__name__}.")
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{expected} it holds a {type(state).__name__} of other things than tensors.")
    return state
