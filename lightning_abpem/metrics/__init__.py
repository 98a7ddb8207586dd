"""The figures of test-time adaptation as torchmetrics classes, for any LightningModule or loop, without the callback.

Each has a function of its name in snake case: of predictions in `lightning_abpem.functional`, of attention in
`lightning_abpem.metrics.functional`. `ExpectedCalibrationError` is torchmetrics' own `MulticlassCalibrationError`.
"""

from torchmetrics.classification import MulticlassCalibrationError as ExpectedCalibrationError

from lightning_abpem.metrics.attention import AttentionDivergence, AttentionGap
from lightning_abpem.metrics.predictions import ClassShare, Entropy, FlipRate, Information, PrincipalEntropy

__all__ = [
    "AttentionDivergence",
    "AttentionGap",
    "ClassShare",
    "Entropy",
    "ExpectedCalibrationError",
    "FlipRate",
    "Information",
    "PrincipalEntropy",
]
