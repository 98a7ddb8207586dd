"""Choice of a learning rate: candidates on the first batches of a stream, without labels."""

from lightning_abpem.tuning.result import Candidate, Tuning
from lightning_abpem.tuning.runs import Labels
from lightning_abpem.tuning.search import RATES, tune

__all__ = ["RATES", "Candidate", "Labels", "Tuning", "tune"]
