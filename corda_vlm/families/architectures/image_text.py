"""Models of transformers that compare images with texts, beside CLIP and SigLIP."""

from __future__ import annotations

from corda_vlm.families.architectures.decoders import SWIGLU
from corda_vlm.families.architectures.vision import CLIP, LLAMA4
from corda_vlm.families.base import Layers, Rule, block_rules, part_rules

BERT: Layers = (
    *((f"attention.self.{name}", name[0], "attn.in") for name in ("query", "key", "value")),
    ("attention.output.dense", "o", "attn.out"),
    ("intermediate.dense", "up", "mlp.in"),
    ("output.dense", "down", "mlp.mid"),
)
AIMV2: Layers = (
    *((f"attention.{role}_proj", role, "attn.in") for role in ("q", "k", "v")),
    ("attention.out_proj", "o", "attn.out"),
    ("ffn.gate_proj", "gate", "mlp.in"),
    ("ffn.up_proj", "up", "mlp.in"),
    ("ffn.down_proj", "down", "mlp.mid"),
)
# The pooling head: a learned token attends to the patches, without a layer for q.
_AIMV2_HEAD: Layers = (
    ("k_proj", "k", "attn.in"),
    ("v_proj", "v", "attn.in"),
    ("output_proj", "o", "attn.out"),
)
# The largest has a gate.
_DINO: Layers = tuple(
    (layer.replace("self_attn", "attention"), role, stream) for layer, role, stream in LLAMA4
)

_PROJECTIONS = (
    Rule(r"visual_projection", "vision", "proj", "visual_projection.in"),
    Rule(r"text_projection", "text", "proj", "text_projection.in"),
)
_CLIP_VISION = block_rules(r"vision_model\.encoder\.layers", "vision", CLIP)
_CLIP_TEXT = block_rules(r"text_model\.encoder\.layers", "text", CLIP)

# model_type -> how the names of its classes begin, and its rules
IMAGE_TEXT: dict[str, tuple[str, tuple[Rule, ...]]] = {
    "altclip": (
        "AltCLIP",
        (
            *block_rules(r"text_model\.roberta\.encoder\.layers?", "text", BERT),
            Rule(r"text_model\.transformation", "text", "proj", "text_model.transformation.in"),
            *_CLIP_VISION,
            *_PROJECTIONS,
        ),
    ),
    "aimv2": (
        "Aimv2",
        (
            *block_rules(r"vision_model\.encoder\.layers", "vision", AIMV2),
            *part_rules(r"vision_model\.head", "vision", _AIMV2_HEAD),
            *block_rules(r"text_model\.encoder\.layers", "text", AIMV2),
            *_PROJECTIONS,
        ),
    ),
    "chinese_clip": (
        "ChineseCLIP",
        (
            *block_rules(r"text_model\.encoder\.layer", "text", BERT),
            *_CLIP_VISION,
            *_PROJECTIONS,
        ),
    ),
    "metaclip_2": ("MetaClip2", (*_CLIP_TEXT, *_CLIP_VISION, *_PROJECTIONS)),
    "tipsv2": (
        "Tipsv2",
        (
            *_CLIP_TEXT,
            *block_rules(r"vision_model\.encoder\.layer", "vision", (*_DINO, *SWIGLU)),
        ),
    ),
}
