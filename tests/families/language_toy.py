"""Tiny models that generate text, of the real classes with random weights, and what feeds them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers as t
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

IMAGE = 60  # the id of image tokens
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, **SPECIAL,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
QWEN_TEXT: dict[str, Any] = {
    **TEXT,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
}
PINPOINTS = [[32, 64], [64, 32]]


def _causal(name, config, kind="", **options):
    model = getattr(t, f"{name}{kind or 'ForCausalLM'}")
    return lambda: model(getattr(t, f"{config or name}Config")(**{**TEXT, **options}))


LANGUAGE: dict[str, Any] = {
    "llama": _causal("Llama", ""),
    "mistral": _causal("Mistral", ""),
    "qwen2": _causal("Qwen2", ""),
    "qwen3": _causal("Qwen3", "", head_dim=8),
    "gemma": _causal("Gemma", "", head_dim=8),
    "gemma2": _causal("Gemma2", "", head_dim=8),
    "gemma3_text": _causal("Gemma3", "Gemma3Text", head_dim=8),
    "smollm3": _causal("SmolLM3", ""),
    "olmo2": _causal("Olmo2", ""),
    "phi": _causal("Phi", ""),
    "phi3": _causal("Phi3", ""),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, n_inner=48, **SPECIAL)
    ),
}  # fmt: skip


def _vlm(name, text, vision, **options):
    kind, config = getattr(t, f"{name}ForConditionalGeneration"), getattr(t, f"{name}Config")
    return lambda: kind(
        config(text_config=text, vision_config=vision, image_token_id=IMAGE, **SPECIAL, **options)
    )


_SIGLIP = t.SiglipVisionConfig(**{**VISION, "vision_use_head": False, "projection_dim": 32})
_QWEN: dict[str, Any] = {
    "vision_start_token_id": 61,
    "vision_end_token_id": 62,
    "video_token_id": 63,
}
VLM: dict[str, Any] = {
    "llava": _vlm("Llava", t.LlamaConfig(**TEXT), t.CLIPVisionConfig(**VISION)),
    "llava_next": _vlm(
        "LlavaNext", t.MistralConfig(**TEXT), t.CLIPVisionConfig(**VISION), image_grid_pinpoints=PINPOINTS
    ),
    "llava_onevision": _vlm(
        "LlavaOnevision", t.Qwen2Config(**TEXT), _SIGLIP, image_grid_pinpoints=PINPOINTS
    ),
    "paligemma": _vlm(
        "PaliGemma", t.GemmaConfig(**{**TEXT, "vocab_size": 1200}, head_dim=8), _SIGLIP, projection_dim=32, hidden_size=32
    ),
    "gemma3": _vlm("Gemma3", t.Gemma3TextConfig(**TEXT, head_dim=8), _SIGLIP, mm_tokens_per_image=4),
    "internvl": _vlm(
        "InternVL",
        t.Qwen2Config(**TEXT),
        t.InternVLVisionConfig(**{**VISION, "image_size": [32, 32], "patch_size": [8, 8]}),
    ),
    "qwen2_vl": _vlm(
        "Qwen2VL", QWEN_TEXT, {**QWEN_VISION, "embed_dim": 32, "mlp_ratio": 2}, **_QWEN
    ),
    "qwen2_5_vl": _vlm(
        "Qwen2_5_VL",
        QWEN_TEXT,
        {**QWEN_VISION, "out_hidden_size": 32, "intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]},
        **_QWEN,
    ),
    "idefics3": _vlm("Idefics3", t.LlamaConfig(**TEXT), VISION, scale_factor=2),
    "smolvlm": _vlm("SmolVLM", t.LlamaConfig(**TEXT), VISION, scale_factor=2),
}  # fmt: skip


def make(name: str) -> Any:
    torch.manual_seed(0)
    return {**LANGUAGE, **VLM}[name]().eval()


def text_batch(size: int, length: int = 12) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the right; the last three of each are the response."""
    ids = torch.randint(3, 59, (size, length))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for row in range(size):
        end = length - 2 * row
        mask[row, end:] = 0
        labels[row, end - 3 : end] = ids[row, end - 3 : end]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def batch_for(name: str, size: int) -> dict[str, torch.Tensor]:
    """`text_batch`, with an image in each record where the model takes any."""
    if name in LANGUAGE:
        return text_batch(size)
    tokens = {"llava": 16, "paligemma": 16, "llava_next": 52, "llava_onevision": 52}.get(name, 4)
    batch = text_batch(size, tokens + 12)
    ids = batch["input_ids"]
    ids[:, 1 : 1 + tokens] = IMAGE
    pixels = torch.randn(size, 3, 32, 32)
    if name.startswith("llava_"):
        batch |= {
            "pixel_values": torch.randn(size, 3, 3, 32, 32),
            "image_sizes": torch.tensor([[32, 64]] * size),
        }
    elif name.startswith("qwen"):
        batch |= {
            "pixel_values": torch.randn(size * 16, 3 * 2 * 8 * 8),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * size),
            "mm_token_type_ids": (ids == IMAGE).long(),
        }
    elif name in ("idefics3", "smolvlm"):
        seen = torch.ones(size, 1, 32, 32, dtype=torch.bool)
        seen[0, 0, 24:] = False  # the last row of patches of the first image is padding
        batch |= {"pixel_values": pixels[:, None], "pixel_attention_mask": seen}
    else:
        batch["pixel_values"] = pixels
    if name in ("paligemma", "gemma3"):
        batch["token_type_ids"] = torch.zeros_like(ids)
    return batch


def inputs_of(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


# ------------------------------------------------------------------ processors

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "USER",
    ":",
    "ASSISTANT",
    "What",
    "is",
    "this",
    "?",
    "A",
    "cat",
    ".",
    "dog",
    "red",
    "blue",
    "it",
    "and",
]


def tokenizer(*special: str, extra_special_tokens=None, **tokens):
    """Words, split at spaces and punctuation."""
    words = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    named = {key: value for key, value in (named | tokens).items() if value is not None}
    # transformers 4 takes a dict of names alone as `extra_special_tokens`
    if extra_special_tokens:
        named["extra_special_tokens"] = extra_special_tokens
    else:
        named["additional_special_tokens"] = list(special)
    return t.PreTrainedTokenizerFast(tokenizer_object=words, **named)


def _clip_images(kind, **options):
    return kind(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **options)


def _llava(processor, images):
    return processor(
        images,
        tokenizer("<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _paligemma():
    images: Any = t.SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    return t.PaliGemmaProcessor(images, tokenizer("<image>"))


def _qwen2_vl():
    words = tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    images = t.Qwen2VLImageProcessor(
        patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=256, max_pixels=1024
    )
    return t.Qwen2VLProcessor(images, words, t.Qwen2VLVideoProcessor())


def _idefics3():
    pieces = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    words = tokenizer(
        "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *pieces
    )
    images = t.Idefics3ImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    return t.Idefics3Processor(images, words, image_seq_len=4)


def _internvl():
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<ctx>",
        "video_token": "<video>",
    }
    words = tokenizer(extra_special_tokens=named)
    images = t.GotOcr2ImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=2
    )
    return t.InternVLProcessor(images, words, t.InternVLVideoProcessor(), image_seq_length=4)


PROCESSORS: dict[str, Any] = {
    "llava": lambda: _llava(t.LlavaProcessor, _clip_images(t.CLIPImageProcessor)),
    "llava_next": lambda: _llava(
        t.LlavaNextProcessor, _clip_images(t.LlavaNextImageProcessor, image_grid_pinpoints=PINPOINTS)
    ),
    "paligemma": _paligemma,
    "qwen2_vl": _qwen2_vl,
    "idefics3": _idefics3,
    "internvl": _internvl,
}  # fmt: skip


def with_processor(name: str) -> SimpleNamespace:
    """A model and transformers' processor for it, which agree on the image token."""
    model, whole = make(name), PROCESSORS[name]()
    model.config.image_token_id = whole.image_token_id
    assert len(whole.tokenizer) <= model.get_input_embeddings().num_embeddings
    return SimpleNamespace(model=model, whole=whole)


def picture(width: int = 32, height: int = 32):
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")
