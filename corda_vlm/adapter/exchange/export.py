"""Write what was trained in forms that need nothing of this package.

| format     | what is written                                                        | loads with           |
|------------|------------------------------------------------------------------------|----------------------|
| `lora`     | plain LoRA on the *original* base, alpha = rank everywhere             | peft                 |
| `residual` | the base with `W₀ = W − B₀A₀` in `base/`, and the adapter `B`, `A`     | peft                 |
|            | `layout="peft"`: the base at the root, the pair in `corda_init/`       | peft                 |
| `merged`   | the whole model with the change merged into its weights                | transformers, open_clip |

The model in memory stays as it is. A folder appears whole or not at all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from corda_vlm.adapter.base import absolute, base_fingerprint, origin_of, save_base
from corda_vlm.adapter.exchange.card import write_export_card
from corda_vlm.adapter.exchange.factors import Factors, changes, plain, recompress
from corda_vlm.adapter.exchange.plain_lora import LoraBase, save_lora
from corda_vlm.adapter.exchange.serving import BASE, Written, check_served, served
from corda_vlm.adapter.exchange.twin import less_pair, original, twin_of, with_change
from corda_vlm.adapter.folder import (
    REPORT,
    START,
    located,
    new_folder,
    save_converted,
    save_model,
)
from corda_vlm.adapter.paired import PairedLayer, base_of, trained
from corda_vlm.adapter.wrapped.carriers import carriers
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.families import any_family
from corda_vlm.families.layers.attention import is_packed
from corda_vlm.families.loading import convert
from corda_vlm.files import write_json
from corda_vlm.sites import model_fingerprint
from corda_vlm.tensors import not_finite

logger = logging.getLogger(__name__)


def export_adapter(
    peft_model: nn.Module,
    directory: str | Path,
    *,
    format: str = "lora",
    rank: int | None = None,
    source: str | Path | None = None,
    layout: str = "ours",
    serve: str | None = None,
) -> Path:
    """Write the active adapter to `directory` so that plain peft, transformers or open_clip loads it.

    - "lora": each site's change `B A − B₀A₀` as `[B − B₀, B₀] [A; A − A₀]`, of rank 2r (r with A frozen), which
      equals `[B, −B₀] [A; A₀]` and rounds better; or its best approximation of the `rank` asked for. Ranks are
      the same everywhere (zero rows fill up), and alpha too, so that tools which ignore patterns
      load it right. Where sites are parts of packed attention (open_clip's), which a plain LoRA cannot
      address, an open_clip CLIP is written under transformers' names, with the converted original in `base/`.
    - "residual": to go on training with plain PEFT from where the adapter is now; right after attaching
      that is the initial pair. `W₀` is rounded to the model's precision. With `layout="peft"` the base is at the root of the
      folder, as in PEFT's examples, and the initial pair in `corda_init/`: PEFT turns what is trained from there into a LoRA on the
      original model by `save_pretrained(…, path_initial_model_for_weight_conversion="FOLDER/corda_init")`. What has been learned
      already is in `corda_trained/` then.
    - "merged": rounded to the model's precision, attention packed.

    `corda_export.json` beside it says what was written, how to load it, and the error of a recompression.

    Args:
        directory: new or empty, or an export of ours, which is replaced.
        rank: of "lora"; None keeps it exact.
        source: what the model was loaded from (a folder, a built-in name, an open_clip name): its configuration and
            its tokenizer's and processor's files are copied. Without it the configuration is read off the model.
        layout: of "residual": "ours" or "peft".
        serve: "vllm" or "llama.cpp": what that server would refuse, or leave out of what was learned, is refused here, and
            `corda_export.json` and the card have the commands that serve the folder. See `corda_vlm.adapter.exchange.serving`.

    Returns:
        `directory`.

    Raises:
        UnknownNameError: unknown format, layout or server.
        CordaError: no `PeftModel`; the folder holds something else; a plain LoRA cannot express the sites (take
            "merged"), or its server does not take them; a rank that is not positive; NaN or Inf among what was learned; not enough space.
    """
    if format not in EXPORTS:
        raise UnknownNameError("export format", format, EXPORTS)
    if not isinstance(peft_model, PeftModel):
        raise CordaError(f"export takes a model with an adapter, not a {type(peft_model).__name__}")
    if rank is not None and format != "lora":
        raise CordaError(f"rank= recompresses format 'lora' only, not {format!r}")
    if layout not in LAYOUTS:
        raise UnknownNameError("layout", layout, LAYOUTS)
    if layout == "peft" and format != "residual":
        raise CordaError(f"layout='peft' is of format 'residual', not {format!r}")
    active = peft_model.active_adapters
    if len(active) != 1:
        raise CordaError(f"{len(active)} adapters are active ({active}); choose one by set_adapter")
    trained_ones = get_peft_model_state_dict(
        peft_model, adapter_name=active[0], save_embedding_layers=False
    )
    if strange := not_finite(trained_ones.items()):
        raise CordaError(
            f"{strange} holds NaN or Inf, so that there is nothing to export; train again with a lower learning rate"
        )
    if serve is not None:
        check_served(serve, peft_model, active[0], format, layout)
    directory = Path(directory) if Path(directory).name else Path(directory).resolve()
    with new_folder(directory) as folder:
        write = _residual_as_peft if layout == "peft" else EXPORTS[format]
        report = write(peft_model, active[0], folder, directory, rank, located(source))
        report = _about(peft_model, active[0], source) | {
            "format": format, "layout": layout, "name": directory.name, **report,
        }  # fmt: skip
        if serve is not None:
            report |= served(serve, _written(report, directory, peft_model, active[0], source))
        write_json(folder / REPORT, report)
        write_export_card(folder, report)
    return directory


def _written(
    report: dict[str, Any], final: Path, model: PeftModel, name: str, source: str | Path | None
) -> Written:
    """What an export has written, as a server sees it."""
    place, format = final.resolve(), report["format"]
    if format == "residual":
        base = str(place / "base")
    else:
        named = located(model.peft_config[name].base_model_name_or_path or source)
        base = absolute(named) or BASE
    return Written(place, format, base, report.get("rank"))


def _about(model: PeftModel, name: str, source: str | Path | None) -> dict[str, Any]:
    """What a card says of any export: the model that it began with, and what that is for."""
    bare = base_of(model)
    family, task = any_family(bare), None
    if family.generative is not None:
        task = "image-text-to-text" if "vision" in family.towers(bare) else "text-generation"
    elif family.contrastive is not None:
        task = "zero-shot-image-classification"
    named = str(source or model.peft_config[name].base_model_name_or_path or "")
    # the hub takes ids alone
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", named) is not None and not Path(named).exists()
    return {
        "original": origin_of(model, name),
        "base_model": named if is_id else None,
        "pipeline_tag": task,
    }


def _lora(
    model: PeftModel, name: str, folder: Path, final: Path, rank: int | None, source: Any
) -> dict[str, Any]:
    factors, error = changes(model, name), 0.0
    if rank is not None:
        factors, error = recompress(factors, rank)
        logger.info("recompressed to rank %d: relative error %.2g", rank, error)

    bare = twin_of(model, original)
    renamed = _renamed(bare, factors, "lora")
    if renamed:
        save_converted(bare, folder / "base")
        factors = {renamed[site]: pair for site, pair in factors.items()}
        fingerprint = model_fingerprint(convert.open_clip_to_hf(bare))
        base_name = str((final / "base").resolve())
    else:
        fingerprint = base_fingerprint(model)
        base_name = absolute(model.peft_config[name].base_model_name_or_path or source)
    lora_base = LoraBase(bare, base_name, fingerprint, converted=bool(renamed))
    width = save_lora(factors, folder, lora_base, model, name)
    return {"rank": width, "relative_error": error, "load": _how_to_load(bool(renamed))}


def _residual(
    model: PeftModel, name: str, folder: Path, final: Path, rank: int | None, source: Any
) -> dict[str, Any]:
    _, now = _pairs(model, name)
    renamed, lora_base = _less_pair(model, now, folder / "base", final / "base", source)
    width = save_lora(_under(renamed, now), folder, lora_base, model, name)
    return {"rank": width, "load": _how_to_load(True)}


def _residual_as_peft(
    model: PeftModel, name: str, folder: Path, final: Path, rank: int | None, source: Any
) -> dict[str, Any]:
    start, now = _pairs(model, name)
    renamed, lora_base = _less_pair(model, now, folder, final, source)
    save_base(lora_base.fingerprint, folder)  # for what is trained on it and lies elsewhere
    (folder / START).mkdir()
    width = save_lora(_under(renamed, start), folder / START, lora_base, model, name)
    go_on = START
    if any(not torch.equal(a, b) for s in now for a, b in zip(start[s], now[s], strict=True)):
        (folder / (go_on := NOW)).mkdir()
        save_lora(_under(renamed, now), folder / NOW, lora_base, model, name)
    load = f"peft.PeftModel.from_pretrained(base, HERE, subfolder={go_on!r}, is_trainable=True), where base is loaded from HERE"
    convert_with = f"save_pretrained(…, path_initial_model_for_weight_conversion='HERE/{START}')"
    return {"rank": width, "load": load, "as_lora_on_the_original": convert_with}


def _less_pair(
    model: PeftModel, now: Factors, folder: Path, final: Path, source: Any
) -> tuple[dict[str, str], LoraBase]:
    """The base `W − B₀A₀`, saved in the folder; site name -> the name that it has there, where names change."""
    base = twin_of(model, less_pair)
    renamed = _renamed(base, now, "residual")
    return renamed, _save_residual(base, folder, final, source, bool(renamed))


def _pairs(model: PeftModel, name: str) -> tuple[Factors, Factors]:
    """The initial pair of every site, and the trained one."""
    start: Factors = {}
    now: Factors = {}
    for carrier in carriers(model, name):
        layer = carrier.layer
        if not isinstance(layer, PairedLayer):
            raise CordaError(
                "this adapter has no initial pair, so its base has no residual; take format 'lora'"
            )
        if layer.scaling[name] != 1:
            raise CordaError(
                f"site {carrier.sites[0]!r} is scaled by {layer.scaling[name]:g}; set it to 1 first"
            )
        for into, (B, A) in ((start, layer.pair(name)), (now, trained(layer, name))):
            for site, (one_B, one_A) in carrier.split(B, A).items():
                into[site] = plain(one_B), plain(one_A)
    return start, now


def _save_residual(
    base: nn.Module, folder: Path, final: Path, source: Any, converted: bool
) -> LoraBase:
    if converted:
        save_converted(base, folder)
        fingerprint = model_fingerprint(convert.open_clip_to_hf(base))
    else:
        save_model(base, folder, source)
        fingerprint = model_fingerprint(base)
    return LoraBase(base, str(final.resolve()), fingerprint, converted)


def _under(renamed: Mapping[str, str], factors: Factors) -> Factors:
    """The factors under the names that the model is written with."""
    return {renamed.get(site, site): pair for site, pair in factors.items()}


def _merged(
    model: PeftModel, name: str, folder: Path, final: Path, rank: int | None, source: Any
) -> dict[str, Any]:
    merged = twin_of(model, with_change, name)
    return {"load": save_model(merged, folder, source)}


EXPORTS: dict[str, Callable[..., dict[str, Any]]] = {
    "lora": _lora,
    "residual": _residual,
    "merged": _merged,
}
"""What `export_adapter` writes, by format."""

LAYOUTS = ("ours", "peft")
NOW = "corda_trained"
"""Where in it what has been learned already is, if anything has."""


def _how_to_load(with_base: bool) -> str:
    base = "loaded from the folder `base` in here" if with_base else "the original model"
    return f"peft.PeftModel.from_pretrained(base, HERE), where base is {base}"


def _renamed(bare: nn.Module, factors: Mapping[str, Any], format: str) -> dict[str, str]:
    """Site name -> transformers' name if the model has to be converted; empty where the names hold as they are.

    Raises:
        CordaError: some sites are parts of packed attention, and the model does not convert.
    """
    packed = [name for name, module in bare.named_modules() if is_packed(module)]
    inside = [s for s in factors if any(s.startswith(f"{name}.") for name in packed)]
    if not inside:
        return {}
    if (reason := convert.converts(bare)) is not None:
        raise CordaError(
            f"format {format!r} cannot express {len(inside)} sites of {type(bare).__name__}, first {inside[0]!r}: "
            "plain peft cannot address the parts of packed attention, and the model does not convert to "
            f"transformers' CLIPModel ({reason}). Take format='merged', or leave those sites out when planning."
        )
    return {site: convert.site_name_open_to_hf(site) for site in factors}
