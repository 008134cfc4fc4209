"""open_clip: `CLIP` and `CustomTextCLIP`, with its own transformers and ResNets, timm image towers and Hugging Face text towers.

Its own transformers pack q, k and v in one `nn.MultiheadAttention`: the rules name the parts
(`….attn.q_proj`), which exist as modules while `attention.unpacked` is in force. So do those of a ResNet's attention pool.

What reads the image itself is no site: the patch embedding of a transformer, and the stem of a convolutional tower. Its inputs are
pixels, of which there is no direction that knowledge leaves unused, it has few of them (27 for a 3×3 convolution, which would
bound the rank of all layers), and every later layer reads what it made. Neither are the gates of squeeze-and-excitation, which see
one token an image and have a few units.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from corda_vlm.errors import CordaError, ForeignFileError, UnknownNameError
from corda_vlm.families.base import (
    Batch,
    Contrastive,
    Family,
    Layers,
    Processor,
    Rule,
    block_rules,
    class_of,
    part_rules,
    pictures_and_texts,
    run_towers,
    token_mask,
    unwrap,
)
from corda_vlm.families.loading.hub import PICKLED
from corda_vlm.families.loading.open_clip_config import open_clip_config
from corda_vlm.families.loading.trust import check_config
from corda_vlm.files import read_json, write_json
from corda_vlm.tensors import save_tensors

# ------------------------------------------------------------------ rules


def _attention(path: str, names: tuple[str, str, str], out: str) -> Layers:
    """Attention of three linear layers and its output: their paths, and their streams beside each other."""
    roles = zip(("q", "k", "v"), names, strict=True)
    return (
        *((f"{path}.{name}", role, "attn.in") for role, name in roles),
        (out, "o", "attn.out"),
    )


_QKV = ("q_proj", "k_proj", "v_proj")

# open_clip's own transformers, and its `AttentionalPooler`, whose q reads learned queries, k and v the tokens
_OWN: Layers = (
    *_attention("attn", _QKV, "attn.out_proj"),
    ("mlp.c_fc", "up", "mlp.in"),
    ("mlp.c_proj", "down", "mlp.mid"),
)
_POOL: Layers = (
    ("attn.q_proj", "q", "attn.probe"),
    ("attn.k_proj", "k", "attn.in"),
    ("attn.v_proj", "v", "attn.in"),
    ("attn.out_proj", "o", "attn.out"),
)

# the attention pool of a ResNet: what it gives out is the embedding of one query, the mean of the tokens
_RESNET_POOL: Layers = (
    ("q_proj", "q", "attn.probe"),
    ("k_proj", "k", "attn.in"),
    ("v_proj", "v", "attn.in"),
    ("c_proj", "o", "attn.out"),
)

# timm: plain, EVA and ViTamin transformers; the stages of Swin, ConvNeXt and FastViT; the latent pooling head
_TIMM_MLP: Layers = (
    *((f"mlp.{name}", "gate", "mlp.in") for name in ("fc1_g", "w0")),
    *((f"mlp.{name}", "up", "mlp.in") for name in ("fc1", "fc1_x", "w1")),
    *((f"mlp.{name}", "down", "mlp.mid") for name in ("fc2", "w2")),
)
_TIMM: Layers = (
    ("attn.qkv", "qkv", "attn.in"),
    ("token_mixer.qkv", "qkv", "attn.in"),
    *_attention("attn", _QKV, "attn.proj"),
    ("token_mixer.proj", "o", "attn.out"),
    *_TIMM_MLP,
)
_TIMM_POOL: Layers = (
    ("q", "q", "attn.probe"),
    ("kv", "kv", "attn.in"),
    ("proj", "o", "attn.out"),
    *_TIMM_MLP,
)

# Hugging Face text towers: BERT, RoBERTa, XLM-R; T5 and mT5 encoders; M2M-100 encoders
_BERT: Layers = (
    *_attention("attention.self", ("query", "key", "value"), "attention.output.dense"),
    ("intermediate.dense", "up", "mlp.in"),
    ("output.dense", "down", "mlp.mid"),
)
_T5: Layers = (
    *_attention("layer.0.SelfAttention", ("q", "k", "v"), "layer.0.SelfAttention.o"),
    ("layer.1.DenseReluDense.wi_0", "gate", "mlp.in"),
    ("layer.1.DenseReluDense.wi", "up", "mlp.in"),
    ("layer.1.DenseReluDense.wi_1", "up", "mlp.in"),
    ("layer.1.DenseReluDense.wo", "down", "mlp.mid"),
)
_M2M: Layers = (
    *_attention("self_attn", _QKV, "self_attn.out_proj"),
    ("fc1", "up", "mlp.in"),
    ("fc2", "down", "mlp.mid"),
)


def timm_rules(trunk: str) -> tuple[Rule, ...]:
    """The rules of a vision tower of timm whose dotted path is `trunk`, a regular expression."""
    return (
        *block_rules(rf"{trunk}\.blocks", "vision", _TIMM),
        *part_rules(rf"{trunk}\.(?:stages|layers)\.\d+\.blocks\.\d+", "vision", _TIMM),
        *part_rules(rf"{trunk}\.attn_pool", "vision", _TIMM_POOL),
        *_stage_rules(trunk),
        Rule(rf"(?P<path>{trunk}\.conv_head)", "vision", "conv", "{path}.in", only="conv"),
        Rule(rf"(?P<prefix>{trunk})\.head(?:\.fc)?", "vision", "proj", "{prefix}.head.in"),
    )


def _stage_rules(trunk: str) -> tuple[Rule, ...]:
    """What else is a convolution in the stages of a ResNet, ConvNeXt, EfficientNet or FastViT (MobileCLIP)."""
    stages = rf"(?P<path>{trunk}\.(?:layer\d+|stages|blocks)\.(?:(?!se\.)[^.]+\.)*[^.]+)"
    return (Rule(stages, "vision", "conv", "{path}.in", only="conv"),)


_RULES = (
    *block_rules(r"visual\.transformer\.resblocks", "vision", _OWN),
    *part_rules(r"visual\.attn_pool(?:_contrastive)?", "vision", _POOL),
    *_stage_rules("visual"),
    *part_rules(r"visual\.attnpool", "vision", _RESNET_POOL),
    *timm_rules(r"visual\.trunk"),
    Rule(r"visual\.head\.proj", "vision", "proj", "visual.head.in"),
    Rule(r"visual\.head\.mlp\.fc1", "vision", "proj", "visual.head.in"),
    Rule(r"visual\.head\.mlp\.fc2", "vision", "proj", "visual.head.mid"),
    *block_rules(r"(?:text\.)?transformer\.resblocks", "text", _OWN),
    # A bare parameter unless the model was made with a bias on it; only the nn.Linear is a site.
    Rule(r"(?:text\.)?text_projection", "text", "proj", "text_projection.in"),
    *block_rules(r"text\.transformer\.encoder\.layer", "text", _BERT),
    *block_rules(r"text\.transformer\.block", "text", _T5),
    *block_rules(r"text\.transformer\.(?:encoder\.)?layers", "text", _M2M),
    Rule(r"text\.transformer\.pooler\.dense", "text", "proj", "text.pooler.in"),
    Rule(r"text\.proj(?:\.0)?", "text", "proj", "text.proj.in"),
    Rule(r"text\.proj\.2", "text", "proj", "text.proj.mid"),
)


def refuses(model: Any) -> str | None:
    """Why a model of open_clip cannot be adapted, or None."""
    if "CoCa" in class_of(model, "open_clip"):
        return (
            "CoCa's text tower appends a class token and its captioner decodes from the image tokens, neither "
            "of which this family runs; load a CLIP or CustomTextCLIP model"
        )
    if getattr(getattr(model, "text", None), "cls_emb", None) is not None:
        return "its text tower appends a class token (embed_cls), so text masks would not line up"
    return None


# ------------------------------------------------------------------ running


def encode_image(model: nn.Module, pixels: Tensor | Batch) -> Float[Tensor, "b d"]:
    """Image embeddings (B, D), not normalized, from `pixel_values` (B, 3, H, W) or a whole batch."""
    visual = unwrap(model).visual
    images: Any = pixels if isinstance(pixels, Tensor) else pixels["pixel_values"]
    embedded = visual(_as_weights(images, visual))
    return (
        embedded[0] if isinstance(embedded, tuple) else embedded
    )  # output_tokens=True adds the tokens


def encode_text(model: nn.Module, batch: Batch) -> Float[Tensor, "n d"]:
    """Text embeddings (n, D), not normalized. Rows shorter than the context are padded to it."""
    bare = unwrap(model)
    ids = batch["input_ids"]
    tower = getattr(bare, "text", bare)  # `CLIP` has its text layers at the top
    if "HFTextEncoder" not in class_of(tower, "open_clip"):
        short = bare.context_length - ids.shape[-1]
        if short < 0:
            raise CordaError(
                f"texts of {ids.shape[-1]} tokens; {type(bare).__name__} reads {bare.context_length}"
            )
        ids = F.pad(ids, (0, short), value=getattr(tower, "pad_id", 0)) if short > 0 else ids
    embedded = bare.encode_text(ids) if tower is bare else tower(ids)
    return embedded[0] if isinstance(embedded, tuple) else embedded


def _as_weights(pixels: Tensor, tower: nn.Module) -> Tensor:
    """Pixels in the tower's dtype: unlike transformers, open_clip leaves the cast to its caller."""
    first = next(tower.parameters(), None)
    return (
        pixels
        if first is None or torch.is_autocast_enabled(pixels.device.type)
        else pixels.to(first.dtype)
    )


def forward(model: nn.Module, batch: Batch) -> object:
    """Run every tower that the batch feeds."""
    return run_towers(
        unwrap(model),
        batch,
        vision=lambda: encode_image(model, batch),
        text=lambda: encode_text(model, batch),
    )


def masks(batch: Batch) -> dict[str, Bool[Tensor, "b l"]]:
    """Text tokens up to and including the end of text."""
    mask = token_mask(batch)
    return {} if mask is None else {"text": mask}


def logit_scale(model: nn.Module) -> Float[Tensor, ""]:
    """The scalar that multiplies cosine similarities, exponentiated."""
    return unwrap(model).logit_scale.exp().reshape(())


# ------------------------------------------------------------------ loading


def load(source: str | Path, dtype: torch.dtype) -> tuple[nn.Module, Processor]:
    """Load a folder with `open_clip_config.json`, `"<model>/<pretrained tag>"`, or `"hf-hub:<org>/<name>"`."""
    import open_clip

    source = str(source)
    if Path(source).is_dir():
        _check_folder(Path(source))
        name, tag = f"local-dir:{source}", None
    elif source.startswith(("hf-hub:", "local-dir:")):
        name, tag = source, None
        check_config(open_clip.get_model_config(name), source)
    else:
        name, _, tag = source.partition("/")
        if name not in open_clip.list_models():
            raise UnknownNameError("open_clip model", name, open_clip.list_models())
        if Path(tag).is_file():
            if Path(tag).suffix != ".safetensors":
                raise CordaError(f"{tag} {PICKLED}")
        elif tag not in (tags := open_clip.list_pretrained_tags_by_model(name)):
            raise UnknownNameError(f"pretrained tag of {name}", tag, tags)
    # OpenAI's weights want QuickGELU also where the model's name does not say so; open_clip would only warn.
    quick = bool(tag and open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
    model = open_clip.create_model(
        name, pretrained=tag, require_pretrained=True, force_quick_gelu=quick
    )
    model = model.to(dtype).eval()
    return model, processor(model, open_clip.get_tokenizer(name))


def processor(model: Any, tokenizer: Any) -> Processor:
    """A `Processor` from open_clip's inference transform and tokenizer."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(
        **getattr(model.visual, "preprocess_cfg", None) or {"size": model.visual.image_size}
    )
    transform: Any = image_transform_v2(config, is_train=False)
    height, width = (config.size, config.size) if isinstance(config.size, int) else config.size

    tower = getattr(model, "text", model)
    # SigLIP's text tower reads its embedding off the last position, padding or not: that one counts.
    pooled = -1 if getattr(tower, "pool_type", None) == "last" else 0

    def image(picture: Any) -> Float[Tensor, "3 h w"]:
        return transform(picture.convert("RGB"))  # before the resize: PIL cannot smooth a palette

    def text(texts: Sequence[str]) -> dict[str, Tensor]:
        ids = tokenizer(list(texts))
        mask = _ids_mask(ids, tokenizer)
        mask[:, pooled] = True
        return {"input_ids": ids, "attention_mask": mask}

    return Processor(image=image, text=text, image_size=(height, width))  # type: ignore[arg-type]


def _ids_mask(ids: Tensor, tokenizer: Any) -> Bool[Tensor, "n l"]:
    """True up to and including the end of text; open_clip's tokenizers return ids only."""
    positions = torch.arange(ids.shape[-1])
    end = getattr(tokenizer, "eot_token_id", None)
    if end is not None:
        return positions <= (ids == end).int().argmax(dim=-1, keepdim=True)
    words = tokenizer.tokenizer  # a Hugging Face tokenizer
    pad, ends = words.pad_token_id, {words.eos_token_id, words.sep_token_id}
    last = torch.where(ids != pad, positions, -1).amax(dim=-1, keepdim=True)  # (n, 1)
    # Where the end of text doubles as padding, the first one still is the end of text.
    return positions <= last + (pad in ends)


def _check_folder(folder: Path) -> None:
    path = folder / "open_clip_config.json"
    config = read_json(path, "model configuration")
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise ForeignFileError(f"{path} has no 'model_cfg': it is not open_clip's")
    check_config(config, str(folder))
    vision = config["model_cfg"].get("vision_cfg")
    timm_name = vision.get("timm_model_name") if isinstance(vision, dict) else None
    if isinstance(timm_name, str) and ":" in timm_name:
        raise CordaError(
            f"{path} names a vision tower elsewhere ({timm_name[:100]}), which is not fetched; name one of timm's own"
        )
    kinds = {file.suffix for file in folder.iterdir()}
    if ".safetensors" not in kinds:
        if kinds & {".bin", ".pt", ".pth"}:
            raise CordaError(f"{folder} {PICKLED}")
        raise CordaError(f"{folder} holds no weights; expected open_clip_model.safetensors")


def save(model: nn.Module, folder: Path, source: str | Path | None) -> str:
    """Write a model as `open_clip.create_model` loads it; `source` as of `open_clip_config`."""
    write_json(folder / "open_clip_config.json", open_clip_config(model, source))
    save_tensors(folder / "open_clip_model.safetensors", model.state_dict())
    return "open_clip.create_model('local-dir:HERE')"


CLIP_OPEN = Family(
    name="clip_open",
    matches=lambda model: bool(class_of(model, "open_clip") & {"CLIP", "CustomTextCLIP", "CoCa"}),
    rules=_RULES,
    forward=forward,
    masks=masks,
    contrastive=Contrastive(encode_image, encode_text, logit_scale),
    load=load,
    reads=lambda folder: (folder / "open_clip_config.json").is_file(),
    classes=("CLIP", "CustomTextCLIP"),
    towers=lambda model: ("vision", "text"),
    refuses=refuses,
    save=save,
    as_mapping=pictures_and_texts,
)
