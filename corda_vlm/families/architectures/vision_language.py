"""Models of transformers that see and answer, by the `model_type` of their configuration: a row for each.

Each is a vision tower, a projector and a language model. What is in a block of the first and the last, `vision` and
`decoders` say; a row says where they are, what the projector is made of, and which rows of an image are padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from corda_vlm.families.base import Layers, Masking
from corda_vlm.families.generative.patches import (
    none_padded,
    padded_patches,
    padded_pixels,
    padded_tiles,
    placed_patches,
    pooled_patches,
)


def chain(path: str, *names: str) -> Layers:
    """Layers one after another, each of which reads its own input."""
    return tuple((layer := f"{path}.{name}", "proj", f"{layer}.in") for name in names)


@dataclass(frozen=True)
class Layout:
    """Where a class keeps its parts, as dotted paths within `model.` (or within the class itself, as Llama 4 does).

    Attributes:
        vision: path of the vision tower.
        projector: its weight matrices: path, in which `*` is any number, role and stream; the number is put in the place
            of `*` in the stream. Empty if it has none.
        home: paths of the modules that are the projector.
        language: path of the language model.
        patches: which rows of images are padding.
    """

    vision: str
    projector: Layers
    home: tuple[str, ...]
    language: str = "language_model"
    patches: Callable[[Any], Masking] = none_padded


_HOME = "multi_modal_projector"


def _llava(*linears: str, **fields: Any) -> Layout:
    return Layout("vision_tower", chain(_HOME, *linears), (_HOME,), **fields)


_TWO = _llava("linear_1", "linear_2")
_QWEN2 = Layout("visual", chain("visual.merger.mlp", "0", "2"), ("visual.merger",))
_QWEN3 = Layout("visual", chain("visual.merger", "linear_fc1", "linear_fc2"), ("visual.merger",))
_IDEFICS = Layout(
    "vision_model",
    chain("connector.modality_projection", "proj"),
    ("connector",),
    "text_model",
    padded_pixels,
)
_GLM = Layout(
    "visual",
    (
        *chain("visual.merger", "proj"),
        ("visual.merger.gate_proj", "gate", "visual.merger.mlp.in"),
        ("visual.merger.up_proj", "up", "visual.merger.mlp.in"),
        ("visual.merger.down_proj", "down", "visual.merger.mlp.mid"),
    ),
    ("visual.merger",),
)
_POOL = f"{_HOME}.image_pooling_2d"

# Further mergers read the outputs of some blocks on the way, and are added to the first blocks of the language model.
_QWEN3_VL = Layout(
    "visual",
    (
        *_QWEN3.projector,
        *chain("visual.deepstack_merger_list.*", "linear_fc1", "linear_fc2"),
    ),
    ("visual.merger", "visual.deepstack_merger_list"),
)

LAYOUTS: dict[str, Layout] = {
    "aya_vision": _TWO,
    "cohere2_vision": _TWO,
    "fast_vlm": _TWO,
    "gemma3": _llava(),  # its projection is a bare parameter
    # its projection also reads, in place of each token of text, the embedding of a placeholder, which no mask tells apart
    "gemma3n": Layout("vision_tower", (), ("embed_vision",)),
    "gemma4": Layout(
        "vision_tower",
        chain("embed_vision", "embedding_projection"),
        ("embed_vision",),
        patches=placed_patches,
    ),
    "glm46v": _GLM,
    "glm4v": _GLM,
    "idefics3": _IDEFICS,
    "internvl": _TWO,
    "lfm2_vl": _llava("linear_1", "linear_2", patches=padded_patches),
    "llama4": Layout(
        "vision_model",
        # after the last block, the patches are shuffled together and projected, then projected again
        (*chain("vision_model.vision_adapter.mlp", "fc1", "fc2"), *chain(_HOME, "linear_1")),
        (_HOME, "vision_model.vision_adapter"),
    ),
    "llava": _TWO,
    "llava_next": _TWO,
    "llava_onevision": _TWO,
    "mistral3": _llava("patch_merger.merging_layer", "linear_1", "linear_2"),
    "mllama": Layout(
        "vision_model", ((_HOME, "proj", f"{_HOME}.in"),), (_HOME,), patches=padded_tiles
    ),
    "molmo2": Layout(
        "vision_tower",
        (
            # each image token attends from the mean of its patches to them
            (f"{_POOL}.q_proj", "q", f"{_POOL}.mean"),
            (f"{_POOL}.k_proj", "k", f"{_POOL}.in"),
            (f"{_POOL}.v_proj", "v", f"{_POOL}.in"),
            (f"{_POOL}.o_proj", "o", f"{_POOL}.out"),
            (f"{_HOME}.image_projector.gate_proj", "gate", f"{_HOME}.image_projector.in"),
            (f"{_HOME}.image_projector.up_proj", "up", f"{_HOME}.image_projector.in"),
            (f"{_HOME}.image_projector.down_proj", "down", f"{_HOME}.image_projector.mid"),
        ),
        (_HOME,),
        patches=pooled_patches,
    ),
    "paligemma": _llava("linear"),
    "perception_lm": _TWO,
    "qwen2_5_vl": _QWEN2,
    "qwen2_vl": _QWEN2,
    "qwen3_5": _QWEN3,
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
    "smolvlm": _IDEFICS,
    "vipllava": _TWO,
}
