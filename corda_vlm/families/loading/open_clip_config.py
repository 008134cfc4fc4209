"""The `open_clip_config.json` of a model in memory: open_clip models do not keep the configuration they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from corda_vlm.errors import CordaError
from corda_vlm.files import read_json


def open_clip_config(model: nn.Module, source: str | Path | None = None) -> dict[str, Any]:
    """`{"model_cfg": …, "preprocess_cfg": …}`, from which `open_clip.create_model` makes this model.

    Args:
        model: a bare, packed open_clip `CLIP` or `CustomTextCLIP`.
        source: the folder (with its `open_clip_config.json`) or the open_clip name ("ViT-B-32",
            "ViT-B-32/laion2b_s34b_b79k") it was loaded from. Without it the configuration is read off the modules
            of open_clip's own transformers, and kept only if a model made from it gives the same outputs.

    Raises:
        CordaError: a timm or Hugging Face tower, or a part that cannot be read off; the message asks for `source`.
    """
    import open_clip

    if source is not None and (Path(source) / "open_clip_config.json").is_file():
        return read_json(Path(source) / "open_clip_config.json", "open_clip configuration")
    preprocess = _preprocess(model)
    if source is not None and (named := open_clip.get_model_config(str(source).split("/")[0])):
        return {"model_cfg": named, "preprocess_cfg": preprocess}
    found = _read_off(model)
    if not _is_same(model, found):
        raise CordaError(
            f"the configuration of this {type(model).__name__} cannot be read off its modules; "
            "pass source=, the folder or open_clip name it was loaded from"
        )
    return {"model_cfg": found, "preprocess_cfg": preprocess}


def _preprocess(model: nn.Module) -> dict[str, Any]:
    visual: Any = model.visual
    kept = dict(getattr(visual, "preprocess_cfg", None) or {})
    for key in ("mean", "std"):
        if (value := getattr(visual, f"image_{key}", None)) is not None:
            kept.setdefault(key, value)
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in kept.items()
        if key in ("mean", "std", "interpolation", "resize_mode", "fill_color")
    }


def _read_off(model: Any) -> dict[str, Any]:
    """Only what the modules show; what they do not show is left at open_clip's defaults."""
    visual, text = model.visual, getattr(model, "text", model)
    _check_blocks(text)
    own = getattr(text, "pool_type", None) or model.text_pool_type
    projection = text.text_projection
    if projection is None:
        embed_dim, proj = text.ln_final.weight.shape[0], {"proj_type": "none"}
    elif isinstance(projection, nn.Linear):
        embed_dim, proj = projection.out_features, {"proj_bias": True}
    else:
        embed_dim, proj = projection.shape[1], {}
    config: dict[str, Any] = {
        "embed_dim": embed_dim,
        "vision_cfg": _resnet(visual) if hasattr(visual, "attnpool") else _transformer(visual),
        "text_cfg": {
            "context_length": model.context_length,
            "vocab_size": model.vocab_size,
            **_blocks(text),
            "heads": text.transformer.resblocks[0].attn.num_heads,
            "pool_type": own,
            "no_causal_mask": text.attn_mask is None,
            "pad_id": getattr(text, "pad_id", 0),
            "eos_id": getattr(text, "eos_id", None) or getattr(model, "text_eos_id", 2),
            **proj,
        },
    }
    if type(text.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU":
        config["quick_gelu"] = True
    if hasattr(model, "text"):
        config["custom_text"] = True
    if getattr(model, "logit_bias", None) is not None:
        config["init_logit_bias"] = 0.0  # the weights bring its value
    if model.logit_scale.ndim:
        config["nonscalar_logit_scale"] = True
    return config


def _check_blocks(tower: Any) -> None:
    """Raise a `CordaError` of what is none of open_clip's own transformers."""
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    if not blocks or not hasattr(tower, "positional_embedding"):
        raise CordaError(
            f"the configuration of a {type(tower).__name__} cannot be read off its modules; "
            "pass source=, the folder or open_clip name it was loaded from"
        )


def _transformer(visual: Any) -> dict[str, Any]:
    _check_blocks(visual)
    first = visual.transformer.resblocks[0]
    return {
        "image_size": _scalar(visual.image_size),
        "patch_size": _scalar(visual.patch_size),
        **_blocks(visual),
        "head_width": visual.transformer.width // first.attn.num_heads,
        "no_ln_pre": isinstance(visual.ln_pre, nn.Identity),
        "pool_type": visual.pool_type,
        "final_ln_after_pool": visual.final_ln_after_pool,
    }


def _resnet(visual: Any) -> dict[str, Any]:
    """Of a `ModifiedResNet`, whose pool has 32 times the channels of its stem."""
    width = visual.conv3.out_channels
    return {
        "image_size": visual.image_size,
        "layers": [len(getattr(visual, f"layer{stage}")) for stage in (1, 2, 3, 4)],
        "width": width,
        "head_width": width * 32 // visual.attnpool.num_heads,
        "patch_size": None,
    }


def _blocks(tower: Any) -> dict[str, Any]:
    first = tower.transformer.resblocks[0]
    shown: dict[str, Any] = {
        "width": tower.transformer.width,
        "layers": len(tower.transformer.resblocks),
        "mlp_ratio": first.mlp.c_fc.out_features / tower.transformer.width,
    }
    if hasattr(first.ls_1, "gamma"):
        shown["ls_init_value"] = 1.0  # the weights bring its value
    return shown


def _scalar(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


@torch.no_grad()
def _is_same(model: Any, config: dict[str, Any]) -> bool:
    """Does open_clip make a model of equal outputs from `config` and the model's weights?"""
    from open_clip.model import CLIP, CustomTextCLIP

    kind = CustomTextCLIP if hasattr(model, "text") else CLIP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            other: Any = kind(**{k: v for k, v in config.items() if k != "custom_text"}).eval()
            other.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
        except (RuntimeError, TypeError, ValueError, AssertionError):
            return False
        size = model.visual.image_size
        size = (size, size) if isinstance(size, int) else size  # a ResNet has one number
        device, dtype = next((p.device, p.dtype) for p in model.parameters())
        image = torch.randn(1, 3, *size)
        text = torch.randint(1, model.vocab_size, (2, model.context_length))
    training = model.training
    model.eval()
    try:
        pairs = (
            (model.encode_image(image.to(device, dtype)), other.encode_image(image)),
            (model.encode_text(text.to(device)), other.encode_text(text)),
        )
    finally:
        model.train(training)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    return all(
        a.shape == b.shape and bool((a.cpu().float() - b).norm() <= tolerance * b.norm())
        for a, b in pairs
    )
