"""Models that nobody here wrote, small and with random weights, and what is known of their fusion attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES, TEXT = 3, 7
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PADDED_TEXT = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 6 + [0]])  # 1 is a word, 0 is padding
AUDIO_TOKEN = 49


@dataclass
class Family:
    """A model, one batch for it, and how its fusion is named.

    Args:
        model: in eval mode.
        inputs: keyword arguments of its forward.
        options: ABPEM's `fusion`, `modalities` and `logits`.
        layers: for each layer, by pair, the names of the query and key linears and which of their calls is meant.
        spans: by modality, its tokens in what those linears put out.
        heads: of query and of key.
        padded: by modality, (B, tokens) True where padded.
        rotate: applied to what the linears put out, (B, H, N, D/H).
        hidden: (N, N) True where a query does not see a key.
        random: the model draws random numbers in eval mode.
    """

    model: nn.Module
    inputs: dict[str, Any]
    options: dict[str, Any]
    layers: list[dict[tuple[str, str], tuple[str, str, int]]]
    spans: dict[str, slice]
    heads: tuple[int, int] = (4, 4)
    padded: Mapping[str, Tensor] = field(default_factory=dict)
    rotate: Callable[[Tensor], Tensor] = lambda x: x
    hidden: Tensor | None = None
    random: bool = False


def text_inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 48, (SAMPLES, TEXT)), "attention_mask": PADDED_TEXT}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(SAMPLES, 3, 32, 32)}


def joint(template: str, modalities: list[str], layers: int = 2) -> list[dict[Any, Any]]:
    """Layers of one attention for all pairs; the template has {layer} and {linear}."""
    query, key = ([template.format(layer=i, linear=linear) for i in range(layers)] for linear in ("query", "key"))
    return [{(m, n): (query[i], key[i], 0) for m in modalities for n in modalities} for i in range(layers)]


LABELS: dict[str, Any] = {"num_labels": 5}


def vilt() -> Family:
    from transformers import ViltConfig, ViltForQuestionAnswering

    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 16, "vocab_size": 50, "max_position_embeddings": 16}
    config = ViltConfig(**SMALL, **sizes, **LABELS)
    return Family(
        ViltForQuestionAnswering(config).eval(),
        text_inputs() | pixels(),
        {"fusion": "vilt.encoder.layer.*.attention", "modalities": {"text": (0, 7), "image": (8, 12)}},
        joint("vilt.encoder.layer.{layer}.attention.attention.{linear}", ["text", "image"]),
        {"text": slice(0, 7), "image": slice(8, 12)},
        padded={"text": PADDED_TEXT == 0},
        random=True,
    )


class FlavaClassifier(nn.Module):
    def __init__(self, flava: nn.Module) -> None:
        super().__init__()
        self.flava, self.head = flava, nn.Linear(32, 5)

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.head(self.flava(**inputs).multimodal_embeddings[:, 0])


def flava() -> Family:
    from transformers import FlavaConfig, FlavaModel

    config = FlavaConfig(
        text_config={**SMALL, "vocab_size": 50, "max_position_embeddings": 16},
        image_config={**SMALL, "image_size": 32, "patch_size": 16},
        multimodal_config=SMALL,
        hidden_size=32,
        projection_dim=16,
    )
    return Family(
        FlavaClassifier(FlavaModel(config)).eval(),
        text_inputs() | pixels(),
        {
            "fusion": "flava.multimodal_model.encoder.layer.*.attention",
            "modalities": {"image": (2, 6), "text": (6, 13)},
        },
        joint("flava.multimodal_model.encoder.layer.{layer}.attention.attention.{linear}", ["image", "text"]),
        {"image": slice(2, 6), "text": slice(6, 13)},
        padded={"text": PADDED_TEXT == 0},
    )


def visual_bert() -> Family:
    from transformers import VisualBertConfig, VisualBertForQuestionAnswering

    sizes: dict[str, Any] = {"vocab_size": 50, "visual_embedding_dim": 20, "max_position_embeddings": 16}
    config = VisualBertConfig(**SMALL, **sizes, **LABELS)
    regions = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    return Family(
        VisualBertForQuestionAnswering(config).eval(),
        text_inputs() | {"visual_embeds": torch.randn(SAMPLES, 4, 20), "visual_attention_mask": regions},
        {"fusion": "visual_bert.encoder.layer.*.attention", "modalities": {"text": 7, "image": 4}},
        joint("visual_bert.encoder.layer.{layer}.attention.self.{linear}", ["text", "image"]),
        {"text": slice(0, 7), "image": slice(7, 11)},
        padded={"text": PADDED_TEXT == 0, "image": regions == 0},
    )


def lxmert() -> Family:
    from transformers import LxmertConfig, LxmertForQuestionAnswering

    sizes: dict[str, Any] = {"l_layers": 1, "x_layers": 2, "r_layers": 1, "num_qa_labels": 5}
    sizes |= {"vocab_size": 50, "visual_feat_dim": 20, "max_position_embeddings": 16}
    config = LxmertConfig(**{name: value for name, value in SMALL.items() if name != "num_hidden_layers"}, **sizes)
    layers = []
    for i in range(2):
        layer = f"lxmert.encoder.x_layers.{i}"
        cross = f"{layer}.visual_attention.att"
        layers.append(
            {
                ("text", "image"): (f"{cross}.query", f"{cross}.key", 0),
                ("image", "text"): (f"{cross}.query", f"{cross}.key", 1),
                ("text", "text"): (f"{layer}.lang_self_att.self.query", f"{layer}.lang_self_att.self.key", 0),
                ("image", "image"): (f"{layer}.visn_self_att.self.query", f"{layer}.visn_self_att.self.key", 0),
            }
        )
    return Family(
        LxmertForQuestionAnswering(config).eval(),
        text_inputs() | {"visual_feats": torch.randn(SAMPLES, 4, 20), "visual_pos": torch.rand(SAMPLES, 4, 4)},
        {
            "fusion": {
                ("text", "image"): "lxmert.encoder.x_layers.*.visual_attention.att[0]",
                ("image", "text"): "lxmert.encoder.x_layers.*.visual_attention.att[1]",
                ("text", "text"): "lxmert.encoder.x_layers.*.lang_self_att.self",
                ("image", "image"): "lxmert.encoder.x_layers.*.visn_self_att.self",
            },
            "logits": lambda output: output.question_answering_score,
        },
        layers,
        {"text": slice(0, 7), "image": slice(0, 4)},
        padded={"text": PADDED_TEXT == 0},
    )


def bridge_tower() -> Family:
    from transformers import BridgeTowerConfig, BridgeTowerForImageAndTextRetrieval

    size: dict[str, Any] = SMALL | {"hidden_size": 64}
    config = BridgeTowerConfig(
        **size,
        share_link_tower_layers=False,
        text_config={**size, "vocab_size": 50, "max_position_embeddings": 16, "pad_token_id": 0},
        vision_config={"hidden_size": 64, "num_hidden_layers": 2, "image_size": 32, "patch_size": 16},
    )
    layers = []
    for i in range(2):
        layer: dict[Any, Any] = {}
        for m in ("text", "image"):
            for n in ("text", "image"):
                kind = "attention" if m == n else "crossattention"
                name = f"bridgetower.cross_modal_{m}_layers.{i}.{kind}.self"
                layer[m, n] = (f"{name}.query", f"{name}.key", 0)
        layers.append(layer)
    return Family(
        BridgeTowerForImageAndTextRetrieval(config).eval(),
        text_inputs() | pixels(),
        {
            "fusion": {
                "self": "bridgetower.cross_modal_{query}_layers.*.attention.self",
                "cross": "bridgetower.cross_modal_{query}_layers.*.crossattention.self",
            },
            "modalities": ["text", "image"],
        },
        layers,
        {"text": slice(0, 7), "image": slice(0, 5)},
        padded={"text": PADDED_TEXT == 0},
    )


def qwen2_audio(implementation: str) -> Family:
    """Audio put into the places that the text keeps for it; causal, rotary, two query heads for a key head."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    config: Any = Qwen2AudioConfig(
        audio_config={
            **{"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64},
            **{"num_mel_bins": 16, "max_source_positions": 8},
        },
        text_config={**SMALL, "model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 50},
        audio_token_index=AUDIO_TOKEN,
    )
    model = Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()
    ids = torch.cat([torch.full((SAMPLES, 4), AUDIO_TOKEN), torch.randint(1, 48, (SAMPLES, 6))], 1)
    theta = config.text_config.rope_parameters["rope_theta"]

    def rotate(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[2]).double()[:, None] * theta ** (-torch.arange(half).double() / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    name = "model.language_model.layers.{layer}.self_attn.{linear}"
    layers = [
        {pair: (q.replace("query", "q_proj"), k.replace("key", "k_proj"), i) for pair, (q, k, i) in layer.items()}
        for layer in joint(name, ["audio", "text"])
    ]
    return Family(
        model,
        {
            "input_ids": ids,
            "attention_mask": torch.ones(SAMPLES, 10, dtype=torch.long),
            "input_features": torch.randn(SAMPLES, 16, 16),
            "feature_attention_mask": torch.ones(SAMPLES, 16, dtype=torch.long),
        },
        {
            "fusion": "model.language_model.layers.*.self_attn",
            "modalities": {
                "audio": lambda input_ids, **_: input_ids == AUDIO_TOKEN,
                "text": lambda input_ids, **_: input_ids != AUDIO_TOKEN,
            },
            "logits": lambda output: output.logits[:, -1],
        },
        layers,
        {"audio": slice(0, 4), "text": slice(4, 10)},
        heads=(4, 2),
        rotate=rotate,
        hidden=~torch.ones(10, 10).tril().bool(),
    )


FAMILIES: dict[str, Callable[[], Family]] = {
    "ViLT": vilt,
    "FLAVA": flava,
    "VisualBERT": visual_bert,
    "LXMERT": lxmert,
    "BridgeTower": bridge_tower,
    "Qwen2-Audio, sdpa": lambda: qwen2_audio("sdpa"),
    "Qwen2-Audio, eager": lambda: qwen2_audio("eager"),
}
