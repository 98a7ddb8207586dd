"""The engine on torch's own transformers: their fast path, nested tensors, decoders."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_abpem import ABPEM
from lightning_abpem.attention.capture import capture_attention
from lightning_abpem.attention.fusion import find_fusion
from lightning_abpem.attention.spans import select_tokens
from lightning_abpem.engine.adaptation import Adaptation
from lightning_abpem.modules.patches import Changes, encoders_around, without_nested_tensors
from tests import reference
from tests.toy import AUDIO, CLASSES, HEADS, PAPER, SPANS, VIDEO, WIDTH, HiddenKernel

LENGTH = AUDIO + VIDEO
PADDED = torch.zeros(3, LENGTH, dtype=torch.bool)
PADDED[0, LENGTH - 2 :] = PADDED[1, LENGTH - 1] = True  # at the end: then nn.TransformerEncoder packs the batch


class JointEncoder(nn.Module):
    """Pooled over what is not padded."""

    def __init__(self, batch_first=True, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=batch_first, **options)
        self.embed, self.fusion = nn.Linear(3, WIDTH), nn.TransformerEncoder(layer, 3)
        self.head, self.batch_first = nn.Linear(WIDTH, CLASSES), batch_first

    def forward(self, tokens, padded=None):
        x = self.embed(tokens)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.fusion(x, src_key_padding_mask=padded)
        x = x if self.batch_first else x.transpose(0, 1)
        if padded is None:
            return self.head(x.mean(1))
        kept = ~padded[:, : x.shape[1], None]
        return self.head((x * kept).sum(1) / kept.sum(1))


class CrossDecoder(nn.Module):
    """Text attends to the sound: self-attention and cross-attention in nn.TransformerDecoder."""

    def __init__(self, heads=HEADS):
        super().__init__()
        encoder = nn.TransformerEncoderLayer(WIDTH, heads, 2 * WIDTH, batch_first=True)
        decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True)
        self.sound, self.words = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH)
        self.encoder, self.decoder = nn.TransformerEncoder(encoder, 2), nn.TransformerDecoder(decoder, 2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, sound, words, padded=None):
        sound = self.encoder(self.sound(sound), src_key_padding_mask=padded)
        return self.head(self.decoder(self.words(words), sound, memory_key_padding_mask=padded).mean(1))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def abpem(fusion, modalities="auto", **options):
    return ABPEM(fusion, modalities, **(PAPER | options))


def captured(model, settings, *args):
    fusion = find_fusion(model, settings.patterns)
    watched = [attention.module for attention in fusion.watched]
    with Changes() as changes, capture_attention(fusion.watched) as calls:
        without_nested_tensors(changes, encoders_around(model, watched))
        model(*args)
    return calls, fusion.compare(calls, select_tokens(settings.spans, args, {}))


def naive(mha, query, key, heads, rows, columns, padded_rows, padded_columns, sample):
    """Statistics of one sample's block, from the attention's weights and its input."""
    (w_q, w_k, _), (b_q, b_k, _) = mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3)
    scores = reference.mean_scores(query @ w_q.T + b_q, key @ w_k.T + b_k, heads)[sample]
    block = scores[rows, columns][~padded_rows[sample, rows]][:, ~padded_columns[sample, columns]]
    return reference.block_statistics(block[None], slice(None), slice(None))[0]


def check(compared, naive_of):
    for pair, layers in compared.items():
        for layer, blocks in enumerate(layers):
            for (m, n), ours in zip((pair, (pair[1], pair[1])), blocks, strict=True):
                for sample in range(3):
                    mean, std = naive_of(layer, m, n, sample)
                    assert ours.mean[sample].item() == pytest.approx(mean, abs=1e-6)
                    assert ours.std[sample].item() == pytest.approx(std, abs=1e-6)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("padded", [PADDED, None], ids=["padded", "whole"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "tokens first"])
@pytest.mark.parametrize("layers", ["*", "2"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning", "ignore:The PyTorch API of nested tensors")
def test_encoder(layers, batch_first, padded, grad):
    model = JointEncoder(batch_first).eval()
    inputs: dict[str, Any] = {}
    for i, layer in enumerate(model.fusion.layers):
        layer.self_attn.register_forward_pre_hook(lambda m, args, i=i: inputs.__setitem__(i, args[0]))
    settings = abpem(f"fusion.layers.{layers}.self_attn", {"audio": AUDIO, "video": VIDEO}).settings
    tokens = torch.randn(3, LENGTH, 3)
    with torch.set_grad_enabled(grad):
        _, compared = captured(model, settings, tokens, padded)
    none = PADDED & False

    def naive_of(layer, m, n, sample):
        layer = 2 if layers == "2" else layer
        x = inputs[layer] if batch_first else inputs[layer].transpose(0, 1)
        gone = none if padded is None else padded
        return naive(model.fusion.layers[layer].self_attn, x, x, 2, SPANS[m], SPANS[n], gone, gone, sample)

    check(compared, naive_of)


@pytest.mark.parametrize("layers", ["*", "2"])
@pytest.mark.parametrize("padded", [PADDED, None], ids=["padded", "whole"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning", "ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("error:A frozen module gave another output")
def test_encoder_adapts(layers, padded):
    """With replay and without, under inference mode, where the prediction takes torch's fast path."""
    predictions = []
    for replay in (True, False):
        torch.manual_seed(0)
        model = JointEncoder().eval()
        stream = [torch.randn(3, LENGTH, 3) for _ in range(4)]
        options = {"replay": replay, "memory_batches": 2 if padded is None else 1}  # its head sees the mask
        modalities = {"audio": AUDIO, "video": VIDEO}
        callback = abpem(f"fusion.layers.{layers}.self_attn", modalities, **options)
        with torch.inference_mode(), callback.attach(model) as adaptation:
            predictions.append(torch.stack([model(tokens, padded) for tokens in stream]))
        assert adaptation.updates == 4
        losses = []
        with torch.inference_mode(), callback.attach(model) as adaptation:
            for _ in range(10):
                model(stream[0], padded)
                losses.append(adaptation.record["loss"].item())
        assert losses[-1] < losses[0]
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-6)


def test_decoder():
    model = CrossDecoder().eval()
    inputs: dict[str, Any] = {}
    for i, layer in enumerate(model.decoder.layers):
        layer.multihead_attn.register_forward_pre_hook(lambda m, args, i=i: inputs.__setitem__(i, args[:2]))
    model.encoder.layers[1].self_attn.register_forward_pre_hook(lambda m, args: inputs.__setitem__("self", args[0]))
    settings = abpem(
        {"words->sound": "decoder.layers.*.multihead_attn", "sound->sound": "encoder.layers.1.self_attn"}
    ).settings
    padded = PADDED[:, -AUDIO:]
    sound, words = torch.randn(3, AUDIO, 3), torch.randn(3, VIDEO, 3)
    _, compared = captured(model, settings, sound, words, padded)
    none = torch.zeros(3, VIDEO, dtype=torch.bool)

    def naive_of(layer, m, n, sample):
        if m == n:
            mha, (query, key), gone = model.encoder.layers[1].self_attn, (inputs["self"], inputs["self"]), padded
        else:
            mha, (query, key), gone = model.decoder.layers[layer].multihead_attn, inputs[layer], none
        return naive(mha, query, key, HEADS, slice(None), slice(None), gone, padded, sample)

    assert list(compared) == [("words", "sound")]
    check(compared, naive_of)


def test_decoder_adapts():
    model = CrossDecoder().eval()
    callback = abpem(
        {"words->sound": "decoder.layers.*.multihead_attn", "sound->sound": "encoder.layers.1.self_attn"},
        steps=2,
    )
    losses = []
    args = torch.randn(3, AUDIO, 3), torch.randn(3, VIDEO, 3)
    with (
        torch.inference_mode(),
        Adaptation(model, callback.settings, lambda record, _: losses.append(record["loss"].item())) as adaptation,
    ):
        for _ in range(10):
            model(*args)
    assert adaptation.updates == 20
    assert losses[-1] < losses[0]
    assert all(name.startswith("decoder.") and "multihead_attn" in name for name in adaptation.params)
    assert set(adaptation.record) >= {"attention_gap/words_to_sound", "divergence/words_to_sound"}


@pytest.mark.filterwarnings("error:A frozen module gave another output")
def test_watched_self_attention_in_torchs_fast_path():
    """It is taken in the prediction and not where it is watched: the last bits differ, and nothing is wrong."""
    fusion = {"words->sound": "decoder.layers.*.multihead_attn", "sound->sound": "encoder.layers.1.self_attn"}
    predictions = []
    for replay in (True, False):
        torch.manual_seed(0)
        model = CrossDecoder(heads=2).eval()
        stream = [(torch.randn(3, AUDIO, 3), torch.randn(3, VIDEO, 3)) for _ in range(4)]
        with torch.inference_mode(), abpem(fusion, replay=replay, steps=2).attach(model) as adaptation:
            predictions.append(torch.stack([model(*args) for args in stream]))
        assert adaptation.updates == 8
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-6)


def test_memory_needs_all_attentions_inside():
    fusion = {"words->sound": "decoder.layers.*.multihead_attn", "sound->sound": "encoder.layers.1.self_attn"}
    with (
        pytest.raises(ValueError, match="'encoder.layers.1.self_attn' to attend over stored .* outside 'decoder'"),
        abpem(fusion, memory_batches=2, memory_at="decoder").attach(CrossDecoder().eval()),
    ):
        pass


def test_kernels_that_hide_q_and_k():
    model = nn.Sequential(HiddenKernel()).eval()
    with (
        pytest.raises(ValueError, match="'0' was called, but neither .* its kernel hides q and k. Use the attention"),
        abpem("0", {"audio": AUDIO, "video": VIDEO}).attach(model),
    ):
        model(torch.randn(3, LENGTH, WIDTH))
