"""The fusion attention: which modules it is, whose tokens they see, and the statistics of their scores."""

from lightning_abpem.attention.calls import EagerCall, FusedCall
from lightning_abpem.attention.capture import capture_attention
from lightning_abpem.attention.fusion import JointFusion, SeparateFusion, find_fusion
from lightning_abpem.attention.projections import FusionAttention, find_attention
from lightning_abpem.attention.spans import Tokens, token_spans
from lightning_abpem.attention.statistics import score_statistics
from lightning_abpem.attention.trace import trace_attention

__all__ = [
    "EagerCall",
    "FusedCall",
    "FusionAttention",
    "JointFusion",
    "SeparateFusion",
    "Tokens",
    "capture_attention",
    "find_attention",
    "find_fusion",
    "score_statistics",
    "token_spans",
    "trace_attention",
]
