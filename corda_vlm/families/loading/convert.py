"""open_clip models as transformers `CLIPModel`: the same weights under other names, the same outputs.

A LoRA on open_clip's packed attention cannot be written as a plain PEFT adapter; on the converted model it can.
`site_name_open_to_hf` gives a site's name there.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.families.base import Processor, class_of, unwrap
from corda_vlm.families.layers.attention import PARTS, is_packed, packed_parts
from corda_vlm.families.loading.hub import without_bars
from corda_vlm.files import write_json, write_text
from corda_vlm.tensors import add_checksums_in

_LAYERS = {
    **{f"attn.{part}": f"self_attn.{part}" for part in PARTS},
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}
_BLOCK = re.compile(
    r"(?P<tower>visual\.|text\.|)transformer\.resblocks\.(?P<block>\d+)\.(?P<layer>.+)"
)
_BPE_SIZE = 49408  # open_clip's bundled byte-pair vocabulary, its two special tokens included


def site_name_open_to_hf(name: str) -> str:
    """The name in a transformers `CLIPModel` of a site of an open_clip model.

    Raises:
        UnknownNameError: the layer has no counterpart there.
    """
    if name in ("text_projection", "text.text_projection"):
        return "text_projection"
    match = _BLOCK.fullmatch(name)
    if match is None or match["layer"] not in _LAYERS:
        raise UnknownNameError(
            "layer of an open_clip vision transformer",
            name,
            [
                f"{tower}transformer.resblocks.<n>.{layer}"
                for tower in ("visual.", "")
                for layer in _LAYERS
            ],
        )
    tower = "vision" if match["tower"] == "visual." else "text"
    return f"{tower}_model.encoder.layers.{match['block']}.{_LAYERS[match['layer']]}"


# ------------------------------------------------------------------ which models convert


def converts(model: nn.Module) -> str | None:
    """None if `CLIPModel` of transformers can give this model's outputs, else the reason why not."""
    bare = unwrap(model)
    if not class_of(bare, "open_clip") & {"CLIP", "CustomTextCLIP"}:
        return f"{type(bare).__name__} is not open_clip's CLIP or CustomTextCLIP"
    return next(_obstacles(bare), None)


def _obstacles(model: Any) -> Iterator[str]:
    visual, text = model.visual, getattr(model, "text", model)
    if "VisionTransformer" not in class_of(visual, "open_clip"):
        yield f"its image tower is a {type(visual).__name__}, not open_clip's VisionTransformer"
        return  # the rest is about attributes that other towers do not have
    if text is not model and "TextTransformer" not in class_of(text, "open_clip"):
        yield f"its text tower is a {type(text).__name__}, not open_clip's TextTransformer"
        return
    if visual.attn_pool is not None or visual.pool_type != "tok":
        yield "its image tower pools by attention or by mean, transformers' CLIP takes the class token"
    if visual.proj is None:
        yield "its image tower has no projection"
    if isinstance(visual.ln_pre, nn.Identity):
        yield "its image tower has no norm before the blocks (no_ln_pre)"
    if visual.image_size[0] != visual.image_size[1] or visual.patch_size[0] != visual.patch_size[1]:
        yield "its images or patches are not square"
    if model.attn_mask is None if text is model else text.attn_mask is None:
        yield "its text tower is not causal (no_causal_mask)"
    if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        yield "its text tower has a class token or a padding mask of its own"
    pool, end = _text_pool(model)
    if pool not in ("argmax", "eos") or (pool == "eos" and end == 2):
        yield f"its text tower pools with pool_type={pool!r}, eos_id={end}"
    projection = text.text_projection
    if projection is None or (isinstance(projection, nn.Linear) and projection.bias is not None):
        yield "its text projection is missing or has a bias"
    if getattr(model, "logit_bias", None) is not None:
        yield "it has a logit bias"
    for tower, transformer in (("image", visual.transformer), ("text", text.transformer)):
        for block in transformer.resblocks:
            if "ResidualAttentionBlock" not in class_of(block, "open_clip"):
                yield f"its {tower} tower has blocks of {type(block).__name__}"
            elif not all(isinstance(scale, nn.Identity) for scale in (block.ls_1, block.ls_2)):
                yield f"its {tower} tower scales its residual branches (ls_init_value)"
            elif _activation(block) is None:
                yield f"its {tower} tower uses the activation {type(block.mlp.gelu).__name__}"
    for tower, norms in (("image", visual), ("text", text)):
        epsilons = {
            m.eps
            for name, m in norms.named_modules()
            if isinstance(m, nn.LayerNorm) and _own(name, tower)
        }
        if len(epsilons) > 1:
            yield f"the norms of its {tower} tower differ in epsilon"


def _own(name: str, tower: str) -> bool:
    # `CLIP` keeps its text layers at the top, beside the image tower
    return tower == "image" or not name.startswith("visual.")


def _text_pool(model: Any) -> tuple[str, int | None]:
    if hasattr(model, "text"):
        return model.text.pool_type, getattr(model.text, "eos_id", None)
    return model.text_pool_type, getattr(model, "text_eos_id", None)


def _activation(block: Any) -> str | None:
    """transformers' name of a block's activation."""
    act = block.mlp.gelu
    if "QuickGELU" in class_of(act, "open_clip"):
        return "quick_gelu"
    if type(act) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[act.approximate]
    return None


# ------------------------------------------------------------------ weights


@torch.no_grad()
def open_clip_to_hf(model: nn.Module) -> Any:
    """A transformers `CLIPModel` with copies of the model's weights, in its dtype and on its device, in eval mode.

    Args:
        model: packed or unpacked; not changed.

    Raises:
        CordaError: the model does not convert (`converts` says why), or still wears an adapter.
    """
    import transformers

    if (reason := converts(model)) is not None:
        raise CordaError(
            f"{type(unwrap(model)).__name__} does not convert to transformers' CLIPModel: {reason}"
        )
    bare = unwrap(model)
    weights = dict(_weights(bare))
    some = weights["visual_projection.weight"]
    converted: Any = transformers.CLIPModel(_config(bare, transformers))
    converted = converted.to(device=some.device, dtype=some.dtype)
    converted.load_state_dict(weights, strict=True)
    return converted.eval()


def _config(model: Any, transformers: Any) -> Any:
    visual, text = model.visual, getattr(model, "text", model)
    pool, end = _text_pool(model)
    vocabulary = text.token_embedding.num_embeddings
    shared = {"projection_dim": visual.proj.shape[1]}
    return transformers.CLIPConfig(
        vision_config={
            **_tower_config(visual.transformer, visual.ln_post),
            **shared,
            "image_size": visual.image_size[0],
            "patch_size": visual.patch_size[0],
        },
        text_config={
            **_tower_config(text.transformer, text.ln_final),
            **shared,
            "vocab_size": vocabulary,
            "max_position_embeddings": text.positional_embedding.shape[0],
            # 2 makes transformers pool at the highest id, which is open_clip's "argmax"; OpenAI's configs say 2 too
            "eos_token_id": 2 if pool == "argmax" else end,
            "bos_token_id": vocabulary - 2,
            "pad_token_id": vocabulary - 1,
        },
        **shared,
    )


def _tower_config(transformer: Any, norm: nn.LayerNorm) -> dict[str, Any]:
    block = transformer.resblocks[0]
    return {
        "hidden_size": transformer.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _activation(block),
        "layer_norm_eps": norm.eps,
    }


def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """`CLIPModel`'s state dict."""
    visual, text = model.visual, getattr(model, "text", model)
    yield "logit_scale", model.logit_scale.reshape(())
    yield "visual_projection.weight", visual.proj.T.contiguous()  # x @ P in open_clip
    projection = text.text_projection
    yield (
        "text_projection.weight",
        projection.weight if isinstance(projection, nn.Linear) else projection.T.contiguous(),
    )
    yield "vision_model.embeddings.class_embedding", visual.class_embedding
    yield "vision_model.embeddings.patch_embedding.weight", visual.conv1.weight
    yield "vision_model.embeddings.position_embedding.weight", visual.positional_embedding
    yield "text_model.embeddings.token_embedding.weight", text.token_embedding.weight
    yield "text_model.embeddings.position_embedding.weight", text.positional_embedding
    for name, norm in (
        ("vision_model.pre_layrnorm", visual.ln_pre),  # transformers' own spelling
        ("vision_model.post_layernorm", visual.ln_post),
        ("text_model.final_layer_norm", text.ln_final),
    ):
        yield from _pair(name, norm.weight, norm.bias)
    for tower, transformer in (("visual.", visual.transformer), ("", text.transformer)):
        for number, block in enumerate(transformer.resblocks):
            for layer in _LAYERS:
                name = site_name_open_to_hf(f"{tower}transformer.resblocks.{number}.{layer}")
                yield from _pair(name, *_layer(block, layer, name))


def _layer(block: Any, layer: str, name: str) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of one layer of a block, attention packed or not."""
    outer, _, inner = layer.partition(".")
    module = getattr(block, outer)
    if inner and is_packed(module):
        return packed_parts(module)[inner]
    module = getattr(module, inner) if inner else module
    if hasattr(module, "get_base_layer"):
        raise CordaError(f"{name} still has an adapter: merge or restore it before converting")
    return module.weight, module.bias


def _pair(name: str, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", weight
    yield f"{name}.bias", torch.zeros_like(weight[..., 0]) if bias is None else bias


# ------------------------------------------------------------------ files


def save_hf(model: nn.Module, directory: str | Path, *, tokenizer: bool = True) -> Path:
    """Write an open_clip model as a folder that transformers loads offline: `CLIPModel`, `CLIPTokenizer`,
    `CLIPImageProcessor`.

    Token ids equal open_clip's up to and including the end of text; padding repeats the end of text, as in
    OpenAI's tokenizer, where open_clip writes zeros. Text that open_clip would repair first (HTML entities,
    mis-decoded bytes, curly quotes) is taken as it is.

    Args:
        tokenizer: False writes the model and the image processor only, for a model that does not use
            open_clip's bundled vocabulary.

    Raises:
        CordaError: the model, its vocabulary or its image preprocessing does not convert.
    """
    directory = Path(directory)
    converted = open_clip_to_hf(model)
    bare = unwrap(model)
    # Asked before anything is written, so that a refusal leaves no half of a folder.
    images = image_processor_config(bare)
    if tokenizer:
        _check_vocabulary(bare)
    directory.mkdir(parents=True, exist_ok=True)
    with without_bars():
        converted.save_pretrained(directory)
    add_checksums_in(directory)
    write_json(directory / "preprocessor_config.json", images)
    if tokenizer:
        save_tokenizer(directory, bare.context_length)
    return directory


def convert_loaded(model: nn.Module) -> tuple[Any, Processor]:
    """An open_clip model as a `CLIPModel` with its processor, through no more than a temporary folder."""
    from corda_vlm.families.clip_hf import processor

    converted = open_clip_to_hf(model)
    bare = unwrap(model)
    _check_vocabulary(bare)
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "preprocessor_config.json", image_processor_config(bare))
        save_tokenizer(Path(folder), bare.context_length)
        return converted, processor(folder, converted)


def image_processor_config(model: Any) -> dict[str, Any]:
    """`preprocessor_config.json` of a `CLIPImageProcessor` that does what open_clip's inference transform does.

    Raises:
        CordaError: it cannot (`resize_mode` "longest").
    """
    from open_clip.transform import PreprocessCfg

    visual = unwrap(model).visual
    config = PreprocessCfg(
        **(getattr(visual, "preprocess_cfg", None) or {"size": visual.image_size})
    )
    height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
    if config.resize_mode not in ("shortest", "squash"):
        raise CordaError(
            f"open_clip's resize_mode {config.resize_mode!r} pads images, which CLIPImageProcessor cannot do"
        )
    squash = config.resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width}
        if squash
        else {"shortest_edge": min(height, width)},
        "resample": {"bilinear": 2, "bicubic": 3}.get(config.interpolation, 3),  # PIL's numbers
        "do_center_crop": not squash,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def save_tokenizer(directory: str | Path, context_length: int) -> None:
    """Write open_clip's bundled byte-pair vocabulary as the files of a `CLIPTokenizer`."""
    from open_clip.tokenizer import SimpleTokenizer

    directory = Path(directory)
    bundled = SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    renamed = {"<start_of_text>": start, "<end_of_text>": end}
    vocabulary = {renamed.get(token, token): number for token, number in bundled.encoder.items()}
    merges = "".join(f"{first} {second}\n" for first, second in bundled.bpe_ranks)
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    write_text(directory / "vocab.json", json.dumps(vocabulary, ensure_ascii=False) + "\n")
    write_text(directory / "merges.txt", "#version: 0.2\n" + merges)
    write_json(directory / "special_tokens_map.json", special)
    write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, **special},
    )


def _check_vocabulary(model: Any) -> None:
    if model.vocab_size != _BPE_SIZE:
        raise CordaError(
            f"the model has {model.vocab_size} tokens, open_clip's bundled vocabulary {_BPE_SIZE}: its tokenizer "
            "is another one and cannot be written; save without it (tokenizer=False)"
        )
