"""Token spans: the forms they are given in, and the sequences that they are held against."""

from typing import Any

import numpy as np
import pytest
import torch

from lightning_abpem.attention.spans import Tokens, check_disjoint, own_spans, select_tokens, token_spans


def plain_spans(given) -> dict[str, Any]:
    return dict(token_spans(given))


@pytest.mark.parametrize(
    "given",
    [
        {"audio": 6, "video": 4},
        {"audio": (0, 6), "video": (6, 10)},
        {"audio": [0, 6], "video": range(6, 10)},
        {"video": slice(6, 10), "audio": slice(None, 6)},
        {"audio": np.int64(6), "video": np.int64(4)},
    ],
)
def test_forms(given):
    spans = {name: tokens.span for name, tokens in plain_spans(given).items()}
    assert spans == {"audio": slice(0, 6), "video": slice(6, 10)}


def test_lengths_say_how_long_the_sequence_is():
    assert {tokens.of for tokens in plain_spans({"audio": 6, "video": 4}).values()} == {10}
    assert {tokens.of for tokens in plain_spans({"audio": (0, 6), "video": (6, 10)}).values()} == {None}


def test_sequences_of_their_own():
    spans = own_spans({"audio": 6, "video": (1, 5)})
    assert spans == {"audio": Tokens(slice(0, 6), of=6), "video": Tokens(slice(1, 5))}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"audio": 6}, "at least two modalities"),
        ({}, "at least two modalities"),
        ({"audio": 6, "video": (6, 10)}, "all lengths or all"),
        ({"audio": 0, "video": 4}, "at least one token of modality 'audio'.* got 0"),
        ({"audio": (4, 4), "video": (6, 9)}, "at least one token of modality 'audio'"),
        ({"audio": (4, 2), "video": (6, 9)}, "at least one token of modality 'audio'"),
        ({"audio": (-1, 2), "video": (6, 9)}, "at least one token of modality 'audio'"),
        ({"audio": (0, 6), "video": (5, 9)}, "'audio' 0:6 and 'video' 5:9 overlap"),
        ({"audio": range(0, 6, 2), "video": (6, 9)}, "step 1"),
        ({"audio": (0, 2, 4), "video": (6, 9)}, r"a length, \(start, stop\) or a function"),
        ({"audio": "six", "video": (6, 9)}, r"a length, \(start, stop\) or a function"),
    ],
)
def test_bad_spans(given, message):
    with pytest.raises(ValueError, match=message):
        token_spans(given)


def is_text(ids, lengths):
    return torch.arange(ids.shape[1]) < lengths[:, None]


def test_masks_are_made_from_the_targets_arguments():
    spans = token_spans({"text": is_text, "image": (5, 8)})
    ids, lengths = torch.zeros(2, 8), torch.tensor([3, 5])
    tokens = select_tokens(spans, (ids,), {"lengths": lengths})
    assert tokens["image"] == Tokens(slice(5, 8))
    assert tokens["text"].keep is not None
    assert tokens["text"].keep.sum(1).tolist() == [3, 5]
    assert tokens["text"].of == 8
    check_disjoint(tokens)
    with pytest.raises(ValueError, match="one modality at most, but 'text' and 'image' share some"):
        check_disjoint(select_tokens(spans, (ids, torch.tensor([3, 6])), {}))


@pytest.mark.parametrize("made", [torch.zeros(2, 8), torch.zeros(8, dtype=torch.bool), [True], None])
def test_masks_of_another_form(made):
    with pytest.raises(ValueError, match=r"modality 'text' to make a \(batch, tokens\) bool tensor, but got"):
        select_tokens({"text": lambda: made}, (), {})


def kept(tokens):
    assert tokens.keep is not None
    return tokens.keep.tolist()


def test_padding_takes_tokens_out():
    visible = torch.tensor([[True, True, False, True]])
    assert kept(Tokens(slice(1, 4)).without(visible)) == [[True, False, True]]
    keep = torch.tensor([[False, True, True]])
    assert kept(Tokens(slice(1, 4), keep).without(visible)) == [[False, False, True]]
    assert Tokens(slice(1, 4)).without(None).keep is None
