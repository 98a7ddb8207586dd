"""Multi-modal test-time adaptation as a PyTorch Lightning callback: ABPEM (AAAI 2025)."""

from lightning_abpem.adaptation import Adaptation
from lightning_abpem.callback import ABPEM
from lightning_abpem.inspection import Inspection, inspect

__all__ = ["ABPEM", "Adaptation", "Inspection", "__version__", "inspect"]

__version__ = "0.1.0"
