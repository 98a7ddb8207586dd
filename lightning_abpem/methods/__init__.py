"""Test-time adaptation methods on one engine, each from its paper's equations."""

from lightning_abpem.methods.abpem import ABPEM
from lightning_abpem.methods.eata import EATA
from lightning_abpem.methods.mmtta import MMTTA
from lightning_abpem.methods.objective import Objective
from lightning_abpem.methods.read import READ
from lightning_abpem.methods.sar import SAR
from lightning_abpem.methods.source import Source
from lightning_abpem.methods.sumi import SuMi
from lightning_abpem.methods.tent import Tent

__all__ = ["ABPEM", "EATA", "MMTTA", "READ", "SAR", "Objective", "Source", "SuMi", "Tent"]
