"""Token spans: the forms they are given in, and the sequences that they are held against."""

import numpy as np
import pytest
import torch

from lightning_abpem.attention import FusedCall
from lightning_abpem.spans import check_spans, token_spans


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
    assert token_spans(given) == {"audio": slice(0, 6), "video": slice(6, 10)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"audio": 6}, "at least two modalities"),
        ({}, "at least two modalities"),
        ({"audio": 6, "video": (6, 10)}, "all lengths or all"),
        ({"audio": 0, "video": 4}, "at least two tokens of modality 'audio'.* got 0"),
        ({"audio": 6, "video": 1}, "at least two tokens of modality 'video'.* got 1"),
        ({"audio": (4, 2), "video": (6, 9)}, "at least two tokens of modality 'audio'"),
        ({"audio": (-1, 2), "video": (6, 9)}, "at least two tokens of modality 'audio'"),
        ({"audio": (0, 6), "video": (5, 9)}, "overlap"),
        ({"audio": range(0, 6, 2), "video": (6, 9)}, "step 1"),
        ({"audio": (0, 2, 4), "video": (6, 9)}, "a length or"),
        ({"audio": "six", "video": (6, 9)}, "a length or"),
    ],
)
def test_bad_spans(given, message):
    with pytest.raises(ValueError, match=message):
        token_spans(given)


def call(n_q, n_k):
    return FusedCall("fusion.attn", torch.zeros(1, n_q, 4), torch.zeros(1, n_k, 4), 1.0)


def test_spans_against_the_tokens():
    spans = token_spans({"audio": (1, 6), "video": (6, 10)})
    check_spans(spans, call(10, 10), cover=False)
    check_spans(spans, call(12, 12), cover=False)
    with pytest.raises(ValueError, match=r"'fusion.attn', but got 10 \(audio 1:6, video 6:10\) and 9 tokens"):
        check_spans(spans, call(9, 9), cover=False)
    with pytest.raises(ValueError, match="but got 10 .* and 12 tokens"):
        check_spans(spans, call(12, 12), cover=True)
    with pytest.raises(ValueError, match="one joint sequence, but got 4 query and 6 key tokens"):
        check_spans(spans, call(4, 6), cover=False)
