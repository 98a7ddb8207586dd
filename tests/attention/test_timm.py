"""timm's attention, fused and not, with normalised q and k; skipped where timm is not installed."""

import pytest
import torch
from torch import nn

from lightning_abpem import ABPEM, inspect
from lightning_abpem.attention.capture import capture_attention
from lightning_abpem.attention.fusion import find_fusion
from lightning_abpem.attention.spans import select_tokens
from tests import reference
from tests.toy import CLASSES, HEADS, MODALITIES, SPANS, WIDTH, batches

timm_attention = pytest.importorskip("timm.layers.attention", reason="timm is an optional test group: '.[timm]'")


class Joint(nn.Module):
    def __init__(self, fused, **options):
        super().__init__()
        self.audio, self.video, self.head = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.attn = timm_attention.Attention(WIDTH, num_heads=HEADS, qkv_bias=True, **options)
        self.attn.fused_attn = fused

    def forward(self, audio, video):
        return self.head(self.attn(torch.cat([self.audio(audio), self.video(video)], 1)).mean(1))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "eager"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "norm_layer": nn.LayerNorm}], ids=["plain", "q/k norm"])
def test_timm(fused, options):
    torch.manual_seed(0)
    model = Joint(fused, **options).eval()
    for parameter in model.attn.parameters():
        nn.init.normal_(parameter)
    inputs = batches(1)[0]
    callback = ABPEM("attn", MODALITIES, k=2, restore=False)
    fusion = find_fusion(model, callback.settings.patterns or [])
    with capture_attention(fusion.watched) as calls:
        captured = model(*inputs)
    assert torch.equal(captured, model(*inputs))
    x = torch.cat([model.audio(inputs[0]), model.video(inputs[1])], 1)
    q, k, _ = (part.unflatten(-1, (HEADS, -1)) for part in model.attn.qkv(x).chunk(3, -1))
    q, k = model.attn.q_norm(q).flatten(2), model.attn.k_norm(k).flatten(2)
    scores = reference.mean_scores(q.detach(), k.detach(), HEADS)
    tokens = select_tokens(callback.settings.spans or {}, (), {})
    for (m, n), [(cross, target)] in fusion.compare(calls, tokens).items():
        for ours, rows in ((cross, m), (target, n)):
            expected = torch.tensor(reference.block_statistics(scores, SPANS[rows], SPANS[n]))
            torch.testing.assert_close(torch.stack(ours[:2], 1), expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad(), callback.attach(model):
        model(*inputs)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"attn.qkv.weight", "attn.qkv.bias"}
    losses = []
    with torch.no_grad(), callback.attach(model) as adaptation:
        for _ in range(10):
            model(*inputs)
            losses.append(adaptation.record["loss"].item())
    assert losses[-1] < losses[0]
    assert str(inspect(model, *inputs).line).startswith('ABPEM(fusion="attn", modalities={"audio": 6, "video": 4}')
