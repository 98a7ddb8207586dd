"""CAV-MAE: the published architecture, and loading its checkpoints."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_abpem.models import CAVMAE
from tests.golden_runs import Golden, published_weights
from tests.reference import same_state
from tests.toy import listed


def small():
    return CAVMAE(10, 24, 3)


def test_logits_of_the_published_program():
    golden = Golden("abpem_nocache")
    (audio, video), _ = golden[0]
    with torch.no_grad():
        torch.testing.assert_close(golden.model()(audio, video), golden.expected("before_0"), rtol=0, atol=1e-12)


def test_published_size():
    with torch.device("meta"):
        model = CAVMAE(50)
    width, tokens = 768, 512 + 196
    block = 12 * width**2 + 13 * width
    patches = (16 * 16 + 16 * 16 * 3 + 2) * width
    head = 2 * width + width * 50 + 50
    expected = 23 * block + patches + tokens * width + 2 * width + 2 * width + head
    assert sum(p.numel() for p in model.parameters()) == expected
    fusion: Any = model.blocks_u[0]
    assert fusion.attn.qkv.weight.shape == (3 * 768, 768)
    assert (len(model.blocks_a), len(model.blocks_v), len(model.blocks_u)) == (11, 11, 1)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("from_file", [False, True])
def test_loading(prefix, from_file, tmp_path):
    weights = {prefix + key: value for key, value in published_weights().items()}
    source = weights
    if from_file:
        source = tmp_path / "cav_mae.pth"
        torch.save(weights, source)
    model = small().load_published(source)
    own = model.state_dict()
    assert same_state(own, {key: weights[prefix + key] for key in own})
    assert {"norm_a.weight", "blocks_u.0.norm1_a.bias"} <= set(published_weights()) - set(own)


def test_wrong_keys_are_all_named():
    weights = published_weights()
    weights["extra.weight"] = weights.pop("norm.weight")
    weights["mlp_head.1.bias"] = torch.zeros(7)
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = (
        r"missing: norm.weight; unexpected: extra.weight; of another shape: mlp_head.1.bias \(7,\) instead of \(10,\)"
    )
    with pytest.raises(ValueError, match=message):
        model.load_published(weights)
    assert same_state(before, model.state_dict())


def test_a_pickle_that_runs_code_is_not_loaded(tmp_path):
    class Harm:
        def __reduce__(self):
            return (print, ("harm",))

    path = tmp_path / "bad.pth"
    torch.save({"norm.weight": Harm()}, path)
    with pytest.raises(ValueError, match="or holds more than tensors"):
        small().load_published(path)


def test_only_the_known_keys_are_ignored():
    weights = published_weights()
    for key in ("head.norm_a.weight", "norm1_v.weight", "blocks_a.0.norm1_a.scale"):
        with pytest.raises(ValueError, match=f"unexpected: {key}"):
            small().load_published({**weights, key: torch.zeros(24)})


def test_accuracy_is_per_dataloader_and_weighted_by_samples():
    class Fixed(CAVMAE):
        def forward(self, audio, video):
            return audio

    def loader(*batches):
        return listed([((torch.eye(10)[: len(b)], torch.zeros(len(b))), torch.tensor(b)) for b in batches])

    runner = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    loaders = [loader([0, 1, 2, 3], [0, 9]), loader([9])]
    first, second = runner.test(Fixed(10, 24, 3), loaders, verbose=False)
    assert first["accuracy/dataloader_idx_0"] == pytest.approx(5 / 6)
    assert second["accuracy/dataloader_idx_1"] == 0
