"""Fixtures that the benchmark's tests have in common."""

import pytest


@pytest.fixture(autouse=True)
def _undrawn(undrawn):
    """A test that looks at figures takes this back by `undrawn.undo()`."""
