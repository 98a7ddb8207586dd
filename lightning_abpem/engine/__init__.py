"""The engine: adapts a model at its call. It needs torch alone, never Lightning."""

from lightning_abpem.engine.adaptation import Adaptation
from lightning_abpem.engine.method import Edit, Gradients, Method, Predicts, Record, Rerun, Step, record_of

__all__ = ["Adaptation", "Edit", "Gradients", "Method", "Predicts", "Record", "Rerun", "Step", "record_of"]
