"""Errors about a model that does not fit, and notes on the errors of others."""

from __future__ import annotations

import logging

__all__ = ["ModelError", "add_note"]

log = logging.getLogger(__name__)


class ModelError(ValueError):
    """A forward left a trace that cannot be taken back, or breaks what a memory needs: no matter of one batch."""


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an error that is on its way; Python 3.10 has no notes, so there it is logged."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        log.warning(note)
