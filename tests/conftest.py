"""What several modules of tests ask for."""

import pytest


@pytest.fixture(params=["together", "apart"])
def batches_pass(request, monkeypatch):
    """How remembered batches pass the fusion block: all at once, as small ones do, or one by one, as large ones."""
    monkeypatch.setattr("lightning_abpem.engine.block_passes.LARGE", {"together": 2**62, "apart": 0}[request.param])
    return request.param
