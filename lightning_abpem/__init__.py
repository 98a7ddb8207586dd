"""Multi-modal test-time adaptation as a PyTorch Lightning callback: ABPEM (AAAI 2025)."""

from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.engine.adaptation import Adaptation
from lightning_abpem.inspection import Inspection, inspect
from lightning_abpem.methods.abpem import ABPEM

__all__ = ["ABPEM", "Adaptation", "Inspection", "TestTimeAdaptation", "__version__", "inspect"]

__version__ = "0.1.0"
