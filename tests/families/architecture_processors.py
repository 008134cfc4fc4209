"""Tiny processors of the real classes, for the models of `architecture_toy`."""

from __future__ import annotations

from typing import Any

import transformers as t

from tests.families.language_toy import tokenizer

_QWEN: dict[str, Any] = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
_GLM = {"shortest_edge": 256, "longest_edge": 2048}


def _qwen3() -> Any:
    words = tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    images = t.Qwen2VLImageProcessor(**_QWEN, min_pixels=256, max_pixels=1024)
    return t.Qwen3VLProcessor(images, words, t.Qwen3VLVideoProcessor())


def _glm(name: str) -> Any:
    edges = (f"<|{end}_of_{kind}|>" for end in ("begin", "end") for kind in ("image", "video"))
    words = tokenizer("<|image|>", "<|video|>", *edges)
    images = getattr(t, f"{name}ImageProcessor")(**_QWEN, size=_GLM)
    return getattr(t, f"{name}Processor")(images, words, getattr(t, f"{name}VideoProcessor")())


def _pixtral(merge: int) -> Any:
    words = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    images = t.PixtralImageProcessor(
        patch_size={"height": 8, "width": 8}, size={"longest_edge": 32}
    )
    return t.PixtralProcessor(images, words, patch_size=8, spatial_merge_size=merge)


def _molmo2() -> Any:
    kinds = ("im_patch", "im_col", "im_start", "im_end", "low_res_im_start", "frame_start", "frame_end", "im_low")  # fmt: skip
    words = tokenizer("<|image|>", "<|video|>", *(f"<{kind}>" for kind in kinds))
    images = t.Molmo2ImageProcessor(
        patch_size=8, size={"height": 32, "width": 32}, max_crops=1, overlap_margins=[1, 1]
    )
    return t.Molmo2Processor(images, t.Molmo2VideoProcessor(), words)


def _lfm2() -> Any:
    words = tokenizer("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
    small: dict[str, Any] = {
        "tile_size": 32,
        "min_image_tokens": 4,
        "max_image_tokens": 4,
        "max_num_patches": 16,
    }
    images = t.Lfm2VlImageProcessor(encoder_patch_size=8, do_image_splitting=False, **small)
    return t.Lfm2VlProcessor(images, words)


def _gemma4() -> Any:
    named = {f"{kind}_token": f"<{kind}>" for kind in ("image", "boi", "eoi", "audio", "boa", "eoa")}  # fmt: skip
    images = t.Gemma4ImageProcessor(patch_size=8, pooling_kernel_size=2, max_soft_tokens=70)
    return t.Gemma4Processor(
        t.Gemma4AudioFeatureExtractor(), images, tokenizer(extra_special_tokens=named), t.Gemma4VideoProcessor(),
        image_seq_length=70,
    )  # fmt: skip


def _perception_lm() -> Any:
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    images = t.PerceptionLMImageProcessor(
        tile_size=32, max_num_tiles=1, vision_input_type="vanilla"
    )
    return t.PerceptionLMProcessor(
        t.PerceptionLMVideoProcessor(), images, tokenizer(extra_special_tokens=named), patch_size=16, pooling_ratio=1
    )  # fmt: skip


PROCESSORS: dict[str, Any] = {
    "gemma4": _gemma4,
    "glm4v": lambda: _glm("Glm4v"),
    "glm46v": lambda: _glm("Glm46V"),
    "lfm2_vl": _lfm2,
    "mistral3": lambda: _pixtral(2),
    "molmo2": _molmo2,
    "perception_lm": _perception_lm,
    "pixtral": lambda: _pixtral(1),
    "qwen3_vl": _qwen3,  # Qwen3.5's as well, whose tokenizer is made anew by its own class, of its own vocabulary
}
