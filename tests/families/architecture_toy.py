"""Tiny models of the real classes, random weights: one of each architecture beyond those of `language_toy`.

A row makes its model, what goes with a text of `size` records into a batch, and says what is counted and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as t

from tests.families.language_toy import (
    IMAGE,
    QWEN_TEXT,
    QWEN_VISION,
    SPECIAL,
    TEXT,
    VISION,
    text_batch,
)

Extra = Callable[[int, torch.Tensor], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Toy:
    """One architecture.

    Attributes:
        make: its model.
        streams: of each tower, how many sites and streams.
        image: places of an image in the text, 0 for a model of text alone.
        extra: (records, input_ids) -> what belongs to the images.
        left_out: its linear layers that are no sites, numbers as `*`, beside `lm_head`.
        rows: for a batch of three, of a tower or stream, how many rows count: of others, those that are there.
        blockwise: can its blocks run one by one?
        exact: are outputs the same to the bit with an adapter at its start? Not where a layer of the base reads a tensor
            that lies otherwise than in order, and is rounded by where in memory it is.
    """

    make: Callable[[], Any]
    streams: Mapping[str, tuple[int, int]]
    image: int = 0
    extra: Extra = lambda size, ids: {}
    left_out: frozenset[str] = frozenset()
    rows: Mapping[str, int] = field(default_factory=dict)
    blockwise: bool = True
    exact: bool = True


def _text(name: str, per_layer: tuple[int, int] = (7, 4), *, kind: str = "", config: str = "", **options: Any) -> Toy:  # fmt: skip
    """A language model of two blocks, of which each has so many sites and streams."""

    def make() -> Any:
        model, of = getattr(t, f"{name}{kind or 'ForCausalLM'}"), f"{config or name}Config"
        return model(getattr(t, of)(**{**TEXT, **options}))

    left_out = frozenset(options.pop("left_out", ()))
    blockwise = options.pop("blockwise", True)
    sites, streams = per_layer
    return Toy(make, {"language": (2 * sites, 2 * streams)}, left_out=left_out, blockwise=blockwise)


def _sees(name: str, text: Any, vision: Any, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = getattr(t, f"{name}Config")
        told = {"image_token_id": IMAGE, **SPECIAL, **options}
        return getattr(t, f"{name}ForConditionalGeneration")(
            config(text_config=text, vision_config=vision, **told)
        )

    return make


# ------------------------------------------------------------------ language models

_DELTA: dict[str, Any] = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_GEMMA_EXTRAS = ("per_layer_input_gate", "per_layer_projection")
_GEMMA4 = {
    **TEXT, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64,
}  # fmt: skip
_GEMMA3N = {
    **TEXT, "head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "laurel_rank": 4,
    "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.5, 0.0],
}  # fmt: skip
_LFM2 = {**TEXT, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}


def _gemma_left_out(prefix: str, *more: str) -> frozenset[str]:
    in_blocks = (f"{prefix}.layers.*.{layer}" for layer in (*_GEMMA_EXTRAS, *more))
    return frozenset((*in_blocks, f"{prefix}.per_layer_model_projection"))


def _gemma3n_left_out(prefix: str) -> frozenset[str]:
    altup = ("correction_coefs", "prediction_coefs", "modality_router")
    in_blocks = (
        *(f"altup.{layer}" for layer in altup),
        "laurel.linear_left",
        "laurel.linear_right",
    )
    outside = (f"{prefix}.altup_{way}projections.*" for way in ("", "unembed_"))
    return _gemma_left_out(prefix, *in_blocks) | frozenset(outside)


TEXT_TOYS: dict[str, Toy] = {
    "olmo3": _text("Olmo3"),
    "ministral": _text("Ministral", head_dim=8),
    "ministral3": _text("Ministral3", head_dim=8),
    "granite": _text("Granite"),
    "glm": _text("Glm", (6, 4), head_dim=8),
    "glm4": _text("Glm4", (6, 4), head_dim=8),
    "cohere": _text("Cohere", (7, 3)),
    "cohere2": _text("Cohere2", (7, 3), layer_types=["sliding_attention", "full_attention"]),
    "exaone4": _text("Exaone4", layer_types=["sliding_attention", "full_attention"], sliding_window=64),
    "hunyuan": _text("HunYuanDenseV1", head_dim=8),
    "ernie4_5": _text("Ernie4_5", head_dim=8),
    "helium": _text("Helium", head_dim=8),
    "seed_oss": _text("SeedOss", head_dim=8),
    "arcee": _text("Arcee", (6, 4)),
    "nemotron": _text("Nemotron", (6, 4)),
    "stablelm": _text("StableLm"),
    "starcoder2": _text("Starcoder2", (6, 4)),
    "opt": _text("OPT", (6, 4), ffn_dim=48, word_embed_proj_dim=32),
    "gpt_neox": _text("GPTNeoX", (4, 4)),
}  # fmt: skip
TEXT_TOYS |= {
    "lfm2": Toy(
        lambda: t.Lfm2ForCausalLM(t.Lfm2Config(**_LFM2)), {"language": (5 + 7, 4 + 4)}
    ),
    "qwen3_next": Toy(
        lambda: t.Qwen3NextForCausalLM(
            t.Qwen3NextConfig(
                **TEXT, **_DELTA, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
                shared_expert_intermediate_size=24, mlp_only_layers=[1],
            )
        ),
        {"language": (3 + 3 + 7 + 4, 4 + 4 + 4)},
        left_out=frozenset({"model.layers.*.mlp.shared_expert_gate"}),
    ),
    "gemma3n_text": Toy(
        lambda: t.Gemma3nForCausalLM(t.Gemma3nTextConfig(**_GEMMA3N)),
        {"language": (14, 8)},
        left_out=_gemma3n_left_out("model"),
        blockwise=False,
    ),
    "gemma4_text": Toy(
        lambda: t.Gemma4ForCausalLM(t.Gemma4TextConfig(**_GEMMA4)),
        {"language": (14, 8)},
        left_out=_gemma_left_out("model"),
        blockwise=False,
    ),
}  # fmt: skip

# ------------------------------------------------------------------ models that see


def _whole(size: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(size, 3, 32, 32)}


def _sized(size: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**_whole(size, ids), "image_sizes": torch.tensor([[32, 32]] * size)}


def _types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).long()}


def _packed(size: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    grid = torch.tensor([[1, 4, 4]] * size)
    return {
        "pixel_values": torch.randn(size * 16, 3 * 2 * 8 * 8),
        "image_grid_thw": grid,
        **_types(ids),
    }


def _placed(size: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gemma 4: sixteen patches of each image, and four places without one."""
    at = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
    at = torch.cat([at, torch.full((4, 2), -1)])
    return {
        "pixel_values": torch.rand(size, 20, 192),
        "image_position_ids": at.repeat(size, 1, 1),
        **_types(ids),
    }


def _padded(size: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """LFM2-VL: sixteen patches of each image, and four that are padding."""
    mask = torch.ones(size, 20, dtype=torch.long)
    mask[:, 16:] = 0
    return {
        "pixel_values": torch.randn(size, 20, 192),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[4, 4]] * size),
    }


def _tiled(size: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mllama: two tiles of each image, but one of the first."""
    there = torch.ones(size, 1, 2, dtype=torch.long)
    there[0, 0, 1] = 0
    ratio = torch.full((size, 1), 2)
    ratio[0] = 1
    return {
        "pixel_values": torch.randn(size, 1, 2, 3, 32, 32),
        "aspect_ratio_ids": ratio,
        "aspect_ratio_mask": there,
        "cross_attention_mask": there[:, None].expand(-1, ids.shape[1], -1, -1).clone(),
    }


def _pooled(size: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Molmo 2: each image token is pooled of four patches, the very first of three."""
    patches = torch.arange(16 * size).reshape(-1, 4)
    patches[0, 3] = -1
    return {
        "pixel_values": torch.randn(size, 16, 192),
        "image_token_pooling": patches,
        "image_grids": torch.tensor([[2, 2, 0, 0]] * size),
        "image_num_crops": torch.ones(size, dtype=torch.long),
        **_types(ids),
    }


_QWEN: dict[str, Any] = {
    "vision_start_token_id": 61,
    "vision_end_token_id": 62,
    "video_token_id": 63,
}
_QWEN3 = {
    **QWEN_VISION,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
_GLM_TEXT = {**TEXT, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}}
_GLM = {
    **QWEN_VISION,
    "out_hidden_size": 32,
    "intermediate_size": 48,
    "image_size": 32,
    "image_start_token_id": 61,
}
_SIGLIP2 = {"model_type": "siglip2_vision_model", **VISION, "num_patches": 16}
_PE: dict[str, Any] = {
    "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [32, 32], "global_pool": "", "init_values": 0.1,
    "use_post_transformer_norm": False, "ref_feat_shape": [2, 2],
}  # fmt: skip
_PLAIN = {"vision": (12, 8), "projector": (2, 2), "language": (14, 8)}
_COHERE2 = {"model_type": "cohere2", **TEXT, "layer_types": ["sliding_attention", "full_attention"]}
_OF_COHERE2 = {**_PLAIN, "language": (14, 6)}
_SIGLIP = {"model_type": "siglip_vision_model", **VISION}
_SIGLIP_HEAD = frozenset(
    f"model.vision_tower.head.{layer}" for layer in ("attention.out_proj", "mlp.fc1", "mlp.fc2")
)


def _gemma4(clipped: bool) -> Toy:
    vision = {
        **VISION, "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2, "position_embedding_size": 64,
        "use_clipped_linears": clipped,
    }  # fmt: skip
    make = _sees("Gemma4", _GEMMA4, vision, audio_config=None, video_token_id=63, audio_token_id=62)

    def clamped() -> Any:
        model = make()
        # released models were clamped to what was seen in training: each layer to its own bounds
        for number, module in enumerate(m for m in model.modules() if hasattr(m, "input_max")):
            module.input_max.fill_(0.5 + 0.1 * number)
        return model

    return Toy(
        clamped,
        {"vision": (14, 14 if clipped else 8), "projector": (1, 1), "language": (14, 8)},
        4,
        _placed,
        _gemma_left_out("model.language_model") | {"model.vision_tower.patch_embedder.input_proj"},
        {"vision": 48},
        blockwise=False,
    )


SEEING_TOYS: dict[str, Toy] = {
    "vipllava": Toy(
        _sees("VipLlava", t.LlamaConfig(**TEXT), {"model_type": "clip_vision_model", **VISION}, vision_feature_layers=[-1, -2]),
        _PLAIN, 16, _whole,
    ),
    "aya_vision": Toy(_sees("AyaVision", _COHERE2, _SIGLIP, downsample_factor=2), _OF_COHERE2, 4, _whole, _SIGLIP_HEAD),
    "cohere2_vision": Toy(
        _sees("Cohere2Vision", _COHERE2, _SIGLIP, downsample_factor=2, alignment_intermediate_size=48), _OF_COHERE2, 4, _whole,
        _SIGLIP_HEAD, exact=False,  # its projector reads a transposed tensor
    ),
    "qwen3_vl": Toy(
        _sees("Qwen3VL", {**QWEN_TEXT, "head_dim": 8}, {**_QWEN3, "deepstack_visual_indexes": [0, 1]}, **_QWEN),
        {"vision": (8, 8), "projector": (6, 6), "language": (14, 8)}, 4, _packed, blockwise=False,
    ),
    "qwen3_vl_moe": Toy(
        _sees(
            "Qwen3VLMoe",
            {**QWEN_TEXT, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
            {**_QWEN3, "deepstack_visual_indexes": [0, 1]},
            **_QWEN,
        ),
        {"vision": (8, 8), "projector": (6, 6), "language": (2 * (4 + 4), 2 * (2 + 4))}, 4, _packed, blockwise=False,
    ),
    "qwen3_5": Toy(
        _sees("Qwen3_5", {**TEXT, **_DELTA, "head_dim": 16, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25}},
              _QWEN3, **_QWEN),
        {"vision": (8, 8), "projector": (2, 2), "language": (8 + 7, 8)}, 4, _packed,
    ),
    "gemma3n": Toy(
        _sees(
            "Gemma3n", _GEMMA3N,
            # not the trunk that it comes with, MobileNetV5, which has 80 million weights at least
            {"model_type": "gemma3n_vision", "architecture": "test_efficientnet", "hidden_size": 256, "vocab_size": 8,
             "vocab_offset": 64, "do_pooling": False},
            audio_config={"hidden_size": 32, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1,
                          "input_feat_size": 16, "sscp_conv_channel_size": [4, 4], "vocab_size": 4, "vocab_offset": 72},
            vision_soft_tokens_per_image=4, audio_token_id=62,
        ),
        {"vision": (10, 10), "language": (14, 8)}, 4,
        lambda size, ids: {"pixel_values": torch.randn(size, 3, 64, 64)},
        _gemma3n_left_out("model.language_model")
        | {f"model.embed_{kind}.embedding_projection" for kind in ("audio", "vision")},
        blockwise=False,
    ),
    "gemma4": _gemma4(False),
    "gemma4_clipped": _gemma4(True),
    "mistral3": Toy(
        _sees("Mistral3", t.MistralConfig(**TEXT, head_dim=8), t.PixtralVisionConfig(**VISION)),
        {"vision": (14, 8), "projector": (3, 3), "language": (14, 8)}, 4, _sized,
    ),
    "pixtral": Toy(
        _sees("Llava", t.MistralConfig(**TEXT), t.PixtralVisionConfig(**VISION), vision_feature_layer=-1,
              vision_feature_select_strategy="full"),
        {"vision": (14, 8), "projector": (2, 2), "language": (14, 8)}, 16, _sized,
    ),
    "mllama": Toy(
        _sees(
            "Mllama", {**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
            {**VISION, "num_global_layers": 1, "attention_heads": 2, "max_num_tiles": 2, "vision_output_dim": 64,
             "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "intermediate_layers_indices": [1]},
        ),
        {"vision": (18, 12), "projector": (1, 1), "language": (4 * 7, 4 * 4 + 1)}, 1, _tiled,
        rows={"vision": 5 * 17, "projector": 5 * 17, "vision_states": 5 * 17},
    ),
    "llama4": Toy(
        _sees(
            "Llama4",
            {**TEXT, "head_dim": 8, "intermediate_size_mlp": 48, "moe_layers": [1], "num_local_experts": 2,
             "no_rope_layers": [1, 1]},
            {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
             "intermediate_size": 128},
        ),
        {"vision": (12, 8), "projector": (3, 3), "language": (14 + 4, 8 + 4)}, 4, _whole,
        frozenset({"vision_model.patch_embedding.linear", "language_model.model.layers.*.feed_forward.router"}),
    ),
    "glm4v": Toy(
        _sees("Glm4v", _GLM_TEXT, _GLM, video_token_id=63),
        {"vision": (10, 8), "projector": (4, 3), "language": (12, 8)}, 4, _packed,
    ),
    "glm46v": Toy(
        _sees("Glm46V", {**_GLM_TEXT, "model_type": "glm4v_text"}, {**_GLM, "model_type": "glm4v_vision"},
              video_token_id=63),
        {"vision": (10, 8), "projector": (4, 3), "language": (12, 8)}, 4, _packed,
    ),
    "molmo2": Toy(
        _sees(
            "Molmo2", {**TEXT, "head_dim": 8, "additional_vocab_size": 4},
            {**VISION, "image_size": [32, 32], "num_key_value_heads": 2, "head_dim": 16}, image_patch_id=IMAGE,
            adapter_config={"vision_feature_layer": [1, 0], "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16,
                            "num_key_value_heads": 2, "intermediate_size": 48, "text_hidden_size": 32},
        ),
        {"vision": (12, 8), "projector": (7, 5), "language": (14, 8)}, 4, _pooled,
        frozenset({"model.vision_tower.patch_embedding"}), {"multi_modal_projector.image_pooling_2d.in": 47},
    ),
    "lfm2_vl": Toy(
        _sees("Lfm2Vl", {"model_type": "lfm2", **_LFM2}, _SIGLIP2, projector_hidden_size=48),
        {"vision": (12, 8), "projector": (2, 2), "language": (12, 8)}, 4, _padded,
        _SIGLIP_HEAD | {"model.vision_tower.embeddings.patch_embedding"},
        {"vision": 48, "projector": 12},
    ),
    "fast_vlm": Toy(
        _sees(
            "FastVlm", {"model_type": "qwen2", **TEXT},
            {"model_type": "timm_wrapper", "architecture": "fastvit_mci3", "do_pooling": True, "global_pool": "avg",
             "hidden_size": 128,
             "model_args": {"inference_mode": True, "layers": [1] * 5, "embed_dims": [16, 16, 32, 32, 64]}},
        ),
        {"vision": (18, 18), "projector": (2, 2), "language": (14, 8)}, 1,
        lambda size, ids: {"pixel_values": torch.randn(size, 3, 64, 64)},
    ),
    "perception_lm": Toy(
        _sees(
            "PerceptionLM", t.LlamaConfig(**TEXT),
            {"model_type": "timm_wrapper", "architecture": "vit_pe_core_tiny_patch16_384", "do_pooling": False,
             "model_args": _PE},
            video_token_id=63, projector_pooling_ratio=1,
        ),
        {"vision": (8, 8), "projector": (2, 2), "language": (14, 8)}, 4,
        lambda size, ids: {"pixel_values": torch.randn(size, 1, 3, 32, 32)}, exact=False,
    ),
}  # fmt: skip

TOYS = TEXT_TOYS | SEEING_TOYS


def batch_of(toy: Toy, size: int) -> dict[str, torch.Tensor]:
    """`text_batch`, with an image in each record where the model takes any."""
    batch = text_batch(size, toy.image + 12)
    ids = batch["input_ids"]
    ids[:, 1 : 1 + toy.image] = IMAGE
    return batch | toy.extra(size, ids)
