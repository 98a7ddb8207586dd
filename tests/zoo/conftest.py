"""Fixtures of all tests of the zoo."""

import logging

import pytest


@pytest.fixture(autouse=True)
def quiet():
    """A zoo's two thousand runs say nothing: what is said is tested elsewhere."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
