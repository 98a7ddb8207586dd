"""Blocks of scores to be looked at, against the scores written out."""

import torch

from lightning_abpem.attention.blocks import score_blocks
from lightning_abpem.attention.calls import AttentionCall, EagerCall, FusedCall
from lightning_abpem.attention.fusion import JointFusion, SeparateFusion
from lightning_abpem.attention.spans import Tokens

JOINT = JointFusion([], [("attn", None)])


def by_pair(blocks):
    return {(block.query, block.key): block for block in blocks}


def test_blocks_are_cut_from_the_last_call():
    torch.manual_seed(0)
    first, q, k = torch.randn(3, 5, 5), torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    bias = torch.randn(1, 5, 5)
    calls: list[AttentionCall] = [
        EagerCall("attn", first, torch.ones(1, 5, 5, dtype=torch.bool)),
        FusedCall("attn", q, k, 0.3, bias),
    ]
    tokens = {"a": Tokens(slice(0, 3)), "v": Tokens(slice(3, 5))}
    blocks = by_pair(score_blocks(JOINT, calls, tokens, samples=2))
    scores = torch.einsum("bid,bjd->bij", q, k) * 0.3 + bias
    assert list(blocks) == [("a", "a"), ("a", "v"), ("v", "a"), ("v", "v")]
    torch.testing.assert_close(blocks["a", "v"].scores, scores[:2, :3, 3:])
    torch.testing.assert_close(blocks["v", "v"].scores, scores[:2, 3:, 3:])
    assert (blocks["a", "v"].queries, blocks["a", "v"].keys) == (3, 2)


def test_masked_scores_are_nan_and_spoil_no_mean():
    scores = torch.arange(2 * 48 * 48.0).view(2, 48, 48)
    keep = torch.ones(2, 1, 48, dtype=torch.bool)
    keep[1, :, 46:] = False
    keep[0, :, 47] = False
    tokens = {"a": Tokens(slice(0, 24)), "v": Tokens(slice(24, 48))}
    call = EagerCall("attn", scores.masked_fill(~keep, -torch.inf), keep)
    block = by_pair(score_blocks(JOINT, [call], tokens, samples=2))["a", "v"]
    assert block.scores[0, :, 22].equal(scores[0, :24, 46])
    assert block.scores[0, :, 23].isnan().all()
    assert block.scores[1, :, 22:].isnan().all()
    one = {"a": Tokens(slice(0, 48)), "v": Tokens(slice(0, 48))}
    pooled = by_pair(score_blocks(JOINT, [call], one, samples=1))["a", "v"].scores
    assert pooled.shape == (1, 24, 24)
    torch.testing.assert_close(pooled[0, 0, 0], scores[0, :2, :2].mean())
    torch.testing.assert_close(pooled[0, 0, 23], scores[0, :2, 46].mean())


def test_attention_of_each_pair():
    fusion = SeparateFusion([], [], {("a", "v"): [("cross", 1)], ("v", "v"): [("own", None)]})
    full = torch.ones(1, 2, 3, dtype=torch.bool)
    cross = [EagerCall("cross", torch.full((1, 2, 3), float(i)), full, call_index=i) for i in range(2)]
    own = EagerCall("own", torch.full((1, 3, 3), 7.0), torch.ones(1, 3, 3, dtype=torch.bool))
    tokens = {"a": Tokens(slice(None)), "v": Tokens(slice(None))}
    blocks = by_pair(score_blocks(fusion, [*cross, own], tokens, samples=3))
    assert blocks["a", "v"].scores.unique().tolist() == [1.0]
    assert blocks["v", "v"].scores.unique().tolist() == [7.0]
    assert blocks["v", "v"].attention == "own"
