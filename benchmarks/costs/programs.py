"""The programs whose cost per batch is compared: loops over batches that yield the logits they predict.

All adapt the same weights by the same loss, ABPEM's as published, so that they predict the same:
`tests/test_benchmarks.py` holds them against each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_abpem import ABPEM
from lightning_abpem.functional import dense_score_statistics, gaussian_kl, marginal_balance, principal_entropy
from lightning_abpem.models import CAVMAE
from lightning_abpem.models.cavmae import Block
from lightning_abpem.models.digits import DigitsModel

__all__ = [
    "Anatomy",
    "FusionAlone",
    "Inputs",
    "anatomy",
    "by_hand",
    "engine",
    "loss_by_hand",
    "only_moving",
    "published_way",
]

Inputs = tuple[Tensor, Tensor]
K, WEIGHT = 7, 1.0


class FusionAlone(nn.Module):
    """One fusion block over the tokens of two modalities, which come as they are, and a head."""

    def __init__(self, tokens: int, width: int = 256, heads: int = 4, classes: int = 20) -> None:
        super().__init__()
        self.tokens = tokens
        self.block, self.head = Block(width, heads), nn.Linear(width, classes)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits (B, classes) from half of the tokens each, (B, tokens / 2, width)."""
        return self.head(self.block(torch.cat((first, second), 1)).mean(1))


@dataclass(frozen=True)
class _Block:
    """A pre-norm transformer block taken apart: x + out(attention(norm1(x))), then x + mlp(norm2(x))."""

    norm1: nn.Module
    weight: Tensor
    bias: Tensor
    out: nn.Module
    norm2: nn.Module
    mlp: Callable[[Tensor], Tensor]
    heads: int

    @classmethod
    def of(cls, block: Any) -> _Block:
        if isinstance(block, Block):
            qkv, heads = block.attn.qkv, block.attn.num_heads
            return cls(block.norm1, qkv.weight, qkv.bias, block.attn.proj, block.norm2, block.mlp, heads)
        assert isinstance(block, nn.TransformerEncoderLayer)
        attn = block.self_attn
        assert attn.in_proj_weight is not None
        return cls(
            block.norm1,
            attn.in_proj_weight,
            attn.in_proj_bias,
            attn.out_proj,
            block.norm2,
            lambda x: block.linear2(F.gelu(block.linear1(x))),
            attn.num_heads,
        )

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, N, D), heads side by side."""
        q, k, v = F.linear(self.norm1(x), self.weight, self.bias).chunk(3, -1)
        return q, k, v

    def fused(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block's output, and q and k, with fused attention."""
        q, k, v = self.qkv(x)
        heads = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v)]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), q, k

    def eager(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and the scores averaged over heads, (B, N, N), all materialised."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), scores.mean(1)


@dataclass(frozen=True)
class Anatomy:
    """A model with one fusion block, taken apart by somebody who writes the loop by hand.

    Args:
        fusion: the name of the fusion attention.
        modalities: its tokens.
        embed: from the two inputs to the tokens that enter the two encoders.
        encoders: the encoders' blocks.
        block: the fusion block.
        head: from the tokens that leave it to the logits.
    """

    fusion: str
    modalities: dict[str, int]
    embed: Callable[..., Inputs]
    encoders: tuple[nn.Sequential, nn.Sequential]
    block: _Block
    head: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def encode(self, inputs: Inputs) -> Tensor:
        """The joint tokens (B, N, D), by the model's own blocks."""
        return torch.cat([blocks(x) for blocks, x in zip(self.encoders, self.embed(*inputs), strict=True)], 1)

    @torch.no_grad()
    def encode_eagerly(self, inputs: Inputs) -> Tensor:
        """Return the joint tokens as `encode` does, with every block's attention materialised."""
        tokens = []
        for blocks, x in zip(self.encoders, self.embed(*inputs), strict=True):
            for block in blocks:
                x, _ = _Block.of(block).eager(x)
            tokens.append(x)
        return torch.cat(tokens, 1)


def anatomy(model: nn.Module) -> Anatomy:
    """Take apart one of the package's two models, or `FusionAlone`."""
    if isinstance(model, FusionAlone):
        half = {"first": model.tokens // 2, "second": model.tokens // 2}
        nothing = nn.Sequential(), nn.Sequential()
        block = _Block.of(model.block)
        return Anatomy("block.attn", half, lambda *inputs: inputs, nothing, block, lambda x: model.head(x.mean(1)))
    if isinstance(model, CAVMAE):
        return Anatomy(
            "blocks_u.0.attn",
            CAVMAE.modalities,
            lambda audio, video: (
                model.patch_embed_a(audio.unsqueeze(1).transpose(2, 3)) + model.pos_embed_a + model.modality_a,
                model.patch_embed_v(video) + model.pos_embed_v + model.modality_v,
            ),
            (model.blocks_a, model.blocks_v),
            _Block.of(model.blocks_u[0]),
            lambda x: model.mlp_head(model.norm(x).mean(dim=1)),
        )
    assert isinstance(model, DigitsModel)
    encoders = (model.audio, model.image)
    return Anatomy(
        "fusion.self_attn",
        {"audio": 32, "image": 16},
        lambda audio, image: tuple(
            encoder.embed(x.unsqueeze(1)).flatten(2).mT + encoder.position
            for encoder, x in zip(encoders, (audio, image.squeeze(1)), strict=True)
        ),
        (model.audio.layers, model.image.layers),
        _Block.of(model.fusion),
        lambda x: model.head(model.norm(x).mean(1)),
    )


def engine(model: nn.Module, memory: int, **options: Any) -> ABPEM:
    """Return the package's callback, with the other programs' loss unless `options` say otherwise."""
    own = anatomy(model)
    published: dict[str, Any] = {"k": K, "attention_weight": WEIGHT, "balance": "marginal"}
    return ABPEM(own.fusion, own.modalities, memory_batches=memory, **(published | options))


def by_hand(model: nn.Module, batches: Iterable[Inputs], memory: int) -> Iterator[Tensor]:
    """A loop for this model alone: the engine's arithmetic without its hooks, checks and records.

    Attention is fused, and statistics come from q and k. The difference to the engine is the price of generality.
    """
    own = anatomy(model)
    moving = only_moving(model, own.block)
    optimizer = torch.optim.Adam(moving, lr=1e-4, fused=True)
    stored: deque[Tensor] = deque(maxlen=memory - 1)
    for inputs in batches:
        tokens = own.encode(inputs)
        output, q, k = own.block.fused(torch.cat((*stored, tokens)) if stored else tokens)
        loss = loss_by_hand(own, own.head(output), q, k)
        del output, q, k
        for parameter, gradient in zip(moving, torch.autograd.grad(loss, moving), strict=True):
            parameter.grad = gradient
        optimizer.step()
        stored.append(tokens)
        with torch.no_grad():
            yield own.head(own.block.fused(tokens)[0])


def loss_by_hand(own: Anatomy, logits: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Return ABPEM's loss as published, from the logits of all samples and the fusion block's queries and keys."""
    bootstrapping = _bootstrapping(own, q, k) / len(logits)
    return principal_entropy(logits, K).mean() - marginal_balance(logits) + WEIGHT * bootstrapping


def _bootstrapping(own: Anatomy, q: Tensor, k: Tensor) -> Tensor:
    """The sum of both directions' divergences over the samples of q and k, (B, N, D)."""
    block = own.block
    scale = (block.weight.shape[1] // block.heads) ** -0.5 / block.heads
    (q_a, q_v), (k_a, k_v) = (x.split(tuple(own.modalities.values()), 1) for x in (q, k))
    with torch.no_grad():
        targets = [dense_score_statistics(*parts, scale) for parts in ((q_v, k_v), (q_a, k_a))]
    divergences = []
    for queries, keys, target in ((q_a, k_v, targets[0]), (q_v, k_a, targets[1])):
        cross = dense_score_statistics(queries, keys, scale)
        divergences.append(gaussian_kl(cross.mean, cross.std, target.mean, target.std).sum())
    return divergences[0] + divergences[1]


def published_way(model: nn.Module, batches: Iterable[Inputs], memory: int) -> Iterator[Tensor]:
    """A loop as the paper describes it: every block materialises its attention for each head.

    Scores are averaged over heads, and statistics are those of slices of the N x N maps. The encoders' tokens are kept
    from the adapting pass for the prediction, and in the memory for later batches.
    """
    own = anatomy(model)
    split = own.modalities[next(iter(own.modalities))]
    first, second = slice(0, split), slice(split, None)
    moving = only_moving(model, own.block)
    optimizer = torch.optim.Adam(moving, lr=1e-4)
    stored: deque[Tensor] = deque(maxlen=memory)
    for inputs in batches:
        tokens = own.encode_eagerly(inputs)
        stored.append(tokens)
        output, scores = own.block.eager(torch.cat(tuple(stored)))
        logits = own.head(output)
        bootstrapping = torch.zeros(())
        for rows, columns in ((first, second), (second, first)):
            cross, target = scores[:, rows, columns].flatten(1), scores[:, columns, columns].detach().flatten(1)
            divergence = gaussian_kl(cross.mean(1), cross.std(1), target.mean(1), target.std(1))
            bootstrapping = bootstrapping + divergence.mean()
        p = logits.softmax(-1)
        top = p.topk(K, dim=-1).values
        mean = p.mean(0)
        loss = -(top * (top + 1e-6).log()).sum(-1).mean() + (mean * mean.log()).sum() + WEIGHT * bootstrapping
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            output, _ = own.block.eager(tokens)
            yield own.head(output)


def only_moving(model: nn.Module, block: _Block) -> list[Tensor]:
    """Freeze all but the block's q, k and v projections, and return those."""
    model.requires_grad_(False)
    moving = [block.weight, block.bias]
    for parameter in moving:
        parameter.requires_grad_(True)
    return moving
