"""DigitsAV-C's kept models: what is damaged or another's is told, and none of its code runs."""

import re
from pathlib import Path

import pytest
import torch

from lightning_abpem.bench import digits
from lightning_abpem.models.digits import DigitsModel


class Evil:
    """A pickle of it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("RAN"),)


@pytest.mark.parametrize("content", [b"", b"text", Evil(), {"state_dict": {}}, [1]])
def test_a_kept_model_that_is_none(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "kept.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    monkeypatch.setattr(digits, "train_digits_model", lambda **options: path)
    with pytest.raises(ValueError, match=rf"Expected {re.escape(str(path))} to be the model .* Delete it, and it is"):
        digits.DigitsAVC(pairs=2).source("small-0")
    assert not (tmp_path / "RAN").exists()


def test_a_kept_model(tmp_path, monkeypatch):
    path, model = tmp_path / "kept.ckpt", DigitsModel()
    state = {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "pytorch-lightning_version": "2.5",
    }
    torch.save(state, path)
    monkeypatch.setattr(digits, "train_digits_model", lambda **options: path)
    found = digits.DigitsAVC(pairs=2).source("small-0").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
