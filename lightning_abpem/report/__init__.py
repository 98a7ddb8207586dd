"""Figures of a run. Needs matplotlib (the `demo` extra)."""

from lightning_abpem.report.severity import severity_figure

__all__ = ["severity_figure"]
