"""What language models and vision-language models share: running, which tokens count, loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from corda_vlm.errors import CordaError, DataError
from corda_vlm.families.base import Batch, Masking, unwrap
from corda_vlm.families.generative.language import (
    IGNORED,
    LanguageProcessor,
    image_token_id,
    language_processor,
)
from corda_vlm.families.layers.quantized import is_readable
from corda_vlm.families.loading.hub import config_from, how_to_read, or_missing, tokenizer_of
from corda_vlm.families.loading.quantization import quantization_config
from corda_vlm.families.loading.trust import trusted

# ------------------------------------------------------------------ running


def forward(model: nn.Module, batch: Batch) -> object:
    """Run every block once, without a cache and without logits: the output layer over a vocabulary of 128,000
    tokens would cost more than many blocks, and no covariance needs it.
    """
    bare = unwrap(model)
    if batch.get("input_ids") is None:
        raise DataError(
            f"{type(bare).__name__} takes 'input_ids'; the batch has: {', '.join(batch) or 'nothing'}"
        )
    inputs = {
        key: value
        for key, value in batch.items()
        if isinstance(value, Tensor) and key not in ("labels", "use_cache")
    }
    inner = getattr(bare, bare.base_model_prefix, bare)
    return inner(**inputs, use_cache=False)


# ------------------------------------------------------------------ which tokens count


def choose_tokens(model: nn.Module, tokens: str) -> Masking:
    """See `base.token_masks`; of the language model alone.

    Raises:
        CordaError: image tokens of a model without images; later, response tokens of a batch without `labels`.
    """
    config = unwrap(model).config
    image = image_token_id(config)
    if tokens == "image" and image is None:
        raise CordaError(f"{type(unwrap(model)).__name__} reads text alone: no token is an image's")

    def chosen(batch: Batch) -> dict[str, Bool[Tensor, "b l"]]:
        kept = _kept(batch)
        return {} if kept is None else {"language": kept & _chosen(batch, tokens, image)}

    return chosen


def _kept(batch: Batch) -> Bool[Tensor, "b l"] | None:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None:
        return None
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _chosen(batch: Batch, tokens: str, image: int | None) -> Bool[Tensor, "b l"]:
    ids = batch["input_ids"]
    if tokens in ("prompt", "response"):
        labels = batch.get("labels")
        if labels is None:
            raise CordaError(
                f"tokens={tokens!r} needs labels, which say what the response is; the batch has: {', '.join(batch)}. "
                "Calibrate on data with responses, or with tokens='all'"
            )
        return (labels != IGNORED) == (tokens == "response")
    if tokens in ("image", "text") and image is not None:
        return (ids == image) == (tokens == "image")
    return torch.ones_like(ids, dtype=torch.bool)


# ------------------------------------------------------------------ refusals


def quantised(model: Any) -> str | None:
    """Why a quantised model cannot be adapted, or None: where its weights cannot be read as matrices."""
    unreadable = {
        type(module).__name__
        for module in model.modules()
        if isinstance(module, nn.Linear) and not is_readable(module)
    }
    method = _method(getattr(model.config, "quantization_config", None))
    if not unreadable and (method is None or method.split()[0] in _READABLE):
        return None
    return f"its base is quantised ({method or ', '.join(sorted(unreadable))}), {_QUANTISED}"


_READABLE = ("bitsandbytes", "torchao")
"""Methods whose layers are `nn.Linear`s with a weight that `layers.quantized` reads."""

_QUANTISED = (
    "so its weights are codes that cannot be read as matrices here. Read are those of bitsandbytes (NF4, FP4, int8) and of "
    'torchao. Load the original weights instead, e.g. load_model(NAME, dtype="bfloat16", quantization="nf4"); or calibrate, plan '
    "and train on them in 16 bits, and quantise the merged export"
)


def _method(quantization: Any) -> str | None:
    """What a configuration says of quantization, e.g. "bitsandbytes 4-bit"; None where it says nothing."""
    if not quantization:
        return None
    value = quantization if isinstance(quantization, dict) else vars(quantization)
    if value.get("dequantize"):
        return None  # unpacked to plain matrices while loading
    method = str(
        getattr(value.get("quant_method"), "value", value.get("quant_method") or "unknown")
    )
    for bits in ("4", "8"):
        if value.get(f"load_in_{bits}bit") or value.get(f"_load_in_{bits}bit"):
            return f"{method} {bits}-bit"
    return method


def how_to_quantize(
    source: str | Path, config: Any, quantization: str | None, dtype: torch.dtype
) -> dict[str, Any]:
    """What `from_pretrained` is told of quantization: nothing of weights that are to stay, or are stored, as they are.

    Raises:
        CordaError: the weights are stored in a way that is not known here, or another than asked for.
    """
    stored = _method(getattr(config, "quantization_config", None))
    if stored is not None and stored.split()[0] not in _READABLE:
        raise CordaError(f"{source} is quantised ({stored}), {_QUANTISED}")
    if quantization is None:
        return {}
    if stored is not None:
        raise CordaError(
            f"{source} is quantised already ({stored}), so quantization={quantization!r} has nothing to do; leave it out, or load "
            "the original model"
        )
    return {"quantization_config": quantization_config(quantization, dtype)}


# ------------------------------------------------------------------ loading


def loader(auto: str) -> Callable[..., tuple[nn.Module, LanguageProcessor]]:
    """The `load` of a family whose models transformers' class `auto` makes, e.g. "AutoModelForCausalLM"."""

    def load(
        source: str | Path,
        dtype: torch.dtype,
        device_map: Any = None,
        quantization: str | None = None,
    ) -> tuple[nn.Module, LanguageProcessor]:
        import transformers

        config = config_from(source)
        quantized = how_to_quantize(source, config, quantization, dtype)
        sees = getattr(config, "vision_config", None) is not None
        if sees and (now := transformers.__version__).startswith("4."):
            # its processors do not say where they put the images into a text, which labels need
            raise CordaError(
                f"{source} answers questions about images, which takes transformers 5, and this is {now}: "
                "`pip install -U transformers`. (CLIP and models of text alone work with 4.57 too.)"
            )
        model, report = getattr(transformers, auto).from_pretrained(
            source,
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
            **quantized,
            **how_to_read(source),
        )
        if missing := sorted(report["missing_keys"]):
            raise CordaError(
                f"{source} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]!r}; its files are "
                "incomplete, or of another model"
            )
        return model.eval(), processor(source, model)

    return load


def processor(source: str | Path, model: nn.Module) -> LanguageProcessor:
    """The tokenizer, and the image processor of a vision-language model, that lie beside the weights.

    What is not there is an error only when it is used: a model can be adapted without them.
    """
    import transformers

    def words() -> Any:
        return or_missing(
            lambda: tokenizer_of(source, transformers),
            f"{source} came without the files that this needs: for texts, tokenizer.json, or vocab.json and "
            "merges.txt, was looked for. Put them beside its weights.",
        )

    if getattr(unwrap(model).config, "vision_config", None) is None:
        return language_processor(model, words())
    hf_processor = or_missing(
        lambda: transformers.AutoProcessor.from_pretrained(source, trust_remote_code=trusted()),
        f"{source} came without the files that this needs: for images, processor_config.json (or "
        "preprocessor_config.json) was looked for. Put it beside its weights.",
    )
    tokenizer = getattr(hf_processor, "tokenizer", None)
    if tokenizer is None:  # a folder without an image processor still reads text
        tokenizer = words()
    return language_processor(model, tokenizer, hf_processor)
