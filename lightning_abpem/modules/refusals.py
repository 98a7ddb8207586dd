"""The error of a model that does not fit, whatever batch comes."""

from __future__ import annotations

__all__ = ["ModelError"]


class ModelError(ValueError):
    """A forward left a trace that cannot be taken back, or breaks what a memory needs: no matter of one batch."""
