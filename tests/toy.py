"""Small models for the tests: two encoders, a fusion block whose attention is written in one of many ways, a head."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

WIDTH, HEADS, CLASSES = 12, 3, 5
AUDIO, VIDEO = 6, 4
PAPER: dict[str, Any] = {"k": 2, "attention_weight": 1.0, "balance": "marginal"}
"""ABPEM's options that make its loss the same function in every step."""
MODALITIES = {"audio": AUDIO, "video": VIDEO}
SPANS = {"audio": slice(0, AUDIO), "video": slice(AUDIO, AUDIO + VIDEO)}


def heads_first(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class FusedAttention(nn.Module):
    """One qkv linear and F.scaled_dot_product_attention."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.qkv, self.proj, self.scale = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_first(part) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


class EagerFusedAttention(nn.Module):
    """One qkv linear and a softmax written out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), HEADS

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_first(part) for part in self.qkv(x).chunk(3, dim=-1))
        p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((p @ v).transpose(1, 2).flatten(2))


class EagerSplitAttention(nn.Module):
    """Separate query, key and value linears and a softmax written out."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.num_attention_heads = HEADS

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads_first(self.query(x)), heads_first(self.key(x)), heads_first(self.value(x))
        return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


class GroupedAttention(nn.Module):
    """Three query heads share one key head."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH // HEADS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads_first(self.q_proj(x)), heads_first(self.k_proj(x), 1), heads_first(self.v_proj(x), 1)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


class TorchAttention(nn.Module):
    """nn.MultiheadAttention, with options."""

    def __init__(self, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, **({"batch_first": True} | options))
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        if self.mha.batch_first:
            return self.mha(x, x, x, need_weights=self.need_weights)[0]
        x = x.transpose(0, 1)
        return self.mha(x, x, x, need_weights=self.need_weights)[0].transpose(0, 1)


class HiddenKernel(nn.Module):
    """An attention whose kernel is no function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.exp(q @ k.mT) @ v


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


_RUNS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # outside the models, whose state is put back


class Encoder(nn.Module):
    """(B, N, 3) -> (B, N, WIDTH); counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.runs = nn.Linear(3, WIDTH), nn.LayerNorm(WIDTH), 0

    @property
    def runs(self) -> int:
        return _RUNS.get(self, 0)  # none of a copy

    @runs.setter
    def runs(self, runs: int) -> None:
        _RUNS[self] = runs

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # whose guards are on all entries, which may die meanwhile
            self.runs += 1
        return self.norm(self.embed(x).tanh())


class Toy(LightningModule):
    """Batches are (audio (B, 6, 3), video (B, 4, 3), label (B,))."""

    def __init__(self, attention: nn.Module | None = None, depth: int = 1) -> None:
        super().__init__()
        self.audio, self.video = Encoder(), Encoder()
        layers = [attention] if attention is not None else [FusedAttention() for _ in range(depth)]
        self.fusion: Any = nn.Sequential(*(Block(layer) for layer in layers))
        self.head: Any = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))
        self.seen: list[Tensor] = []

    def forward(self, audio: Tensor, video: Tensor) -> Tensor:
        return self.head(self.fusion(torch.cat((self.audio(audio), self.video(video)), dim=1)).mean(1))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self(*batch[:2])
        self.seen.append(logits.clone())
        self.log("hits", (logits.argmax(-1) == batch[2]).float().mean(), batch_size=len(logits))

    validation_step = test_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(*batch[:2])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(*batch[:2]), batch[2])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_toy(attention: nn.Module | None = None, depth: int = 1) -> Toy:
    torch.manual_seed(0)
    return Toy(attention, depth).eval()


def batches(count: int = 4, size: int = 4, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    audio, video = ((size, AUDIO, 3), (size, VIDEO, 3))
    return [(torch.randn(audio, generator=generator), torch.randn(video, generator=generator)) for _ in range(count)]


def listed(batches: Any, batch_size: int | None = None) -> DataLoader[Any]:
    """Return a loader of what a list holds; whole batches by default."""
    return DataLoader(batches, batch_size=batch_size)


def loader(count: int = 4, size: int = 4, seed: int = 1) -> DataLoader[Any]:
    audio, video = (torch.cat(parts) for parts in zip(*batches(count, size, seed), strict=True))
    labels = torch.arange(len(audio)) % CLASSES
    return DataLoader(TensorDataset(audio, video, labels), batch_size=size)
