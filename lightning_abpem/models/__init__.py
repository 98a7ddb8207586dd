"""Models to adapt, as LightningModules."""

from lightning_abpem.models.cavmae import CAVMAE

__all__ = ["CAVMAE"]
