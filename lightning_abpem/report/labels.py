"""Names in figures, as they are."""

from __future__ import annotations

__all__ = ["figure_text"]


def figure_text(words: str) -> str:
    """Return words that matplotlib shows as they are: no formulas, and no label that a legend leaves out."""
    return f"{' ' if words.startswith('_') else ''}{words}".replace("$", r"\$")
