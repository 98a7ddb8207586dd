"""Multi-modal test-time adaptation as a PyTorch Lightning callback: ABPEM (AAAI 2025)."""

from lightning_abpem.adaptation import Adaptation
from lightning_abpem.callback import ABPEM

__all__ = ["ABPEM", "Adaptation", "__version__"]

__version__ = "0.1.0"
