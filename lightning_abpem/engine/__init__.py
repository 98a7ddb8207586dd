"""The engine: adapts a model at its call. It needs torch alone, never Lightning."""

from lightning_abpem.engine.adaptation import Adaptation
from lightning_abpem.engine.method import Again, Edit, Gradients, Method, Predicts, Record, Step, record_of

__all__ = ["Adaptation", "Again", "Edit", "Gradients", "Method", "Predicts", "Record", "Step", "record_of"]
