"""Write what was trained in forms that need nothing of this package.

| format     | what is written                                                        | loads with           |
|------------|------------------------------------------------------------------------|----------------------|
| `lora`     | plain LoRA on the *original* base, alpha = rank everywhere             | peft                 |
| `residual` | the base with `W₀ = W − B₀A₀` in `base/`, and the adapter `B`, `A`     | peft                 |
| `merged`   | the whole model with the change merged into its weights                | transformers, open_clip |

The model in memory stays as it is. A folder appears whole or not at all.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import MiCALinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from corda_vlm.adapter.attach import anchored, unwrap_whole
from corda_vlm.adapter.base import HEADER, absolute, base_fingerprint, save_base
from corda_vlm.adapter.folder import (
    ADAPTER,
    REPORT,
    STATE,
    is_transformers,
    located,
    new_folder,
    save_converted,
    save_model,
)
from corda_vlm.adapter.paired import PairedLinear, base_of, base_weight, trained
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.families import any_family
from corda_vlm.families.generic import GENERIC
from corda_vlm.families.layers.attention import is_packed, pack
from corda_vlm.families.layers.conv1d import is_conv1d
from corda_vlm.families.loading import convert
from corda_vlm.files import write_json
from corda_vlm.sites import model_fingerprint
from corda_vlm.tensors import not_finite, save_tensors

logger = logging.getLogger(__name__)

Factors = dict[str, tuple[Tensor, Tensor]]  # site name -> B (out, r), A (r, inp)


def export_adapter(
    peft_model: nn.Module,
    directory: str | Path,
    *,
    format: str = "lora",
    rank: int | None = None,
    source: str | Path | None = None,
) -> Path:
    """Write the active adapter to `directory` so that plain peft, transformers or open_clip loads it.

    - "lora": each site's change `B A − B₀A₀` as `[B − B₀, B₀] [A; A − A₀]`, of rank 2r (r with A frozen), which
      equals `[B, −B₀] [A; A₀]` and rounds better; or its best approximation of the `rank` asked for. Ranks are
      the same everywhere (zero rows fill up), and alpha too, so that tools which ignore patterns
      load it right. Where sites are parts of packed attention (open_clip's), which a plain LoRA cannot
      address, an open_clip CLIP is written under transformers' names, with the converted original in `base/`.
    - "residual": to go on training with plain PEFT from where the adapter is now; right after attaching
      that is the initial pair. `W₀` is rounded to the model's precision.
    - "merged": rounded to the model's precision, attention packed.

    `corda_export.json` beside it says what was written, how to load it, and the error of a recompression.

    Args:
        directory: new or empty, or an export of ours, which is replaced.
        rank: of "lora"; None keeps it exact.
        source: what the model was loaded from (a folder, a built-in name, an open_clip name): its configuration and
            its tokenizer's and processor's files are copied. Without it the configuration is read off the model.

    Returns:
        `directory`.

    Raises:
        UnknownNameError: unknown format.
        CordaError: no `PeftModel`; the folder holds something else; a plain LoRA cannot express the sites (take
            "merged"); a rank that is not positive; NaN or Inf among what was learned; not enough space.
    """
    if format not in EXPORTS:
        raise UnknownNameError("export format", format, EXPORTS)
    if not isinstance(peft_model, PeftModel):
        raise CordaError(f"export takes a model with an adapter, not a {type(peft_model).__name__}")
    if rank is not None and format != "lora":
        raise CordaError(f"rank= recompresses format 'lora' only, not {format!r}")
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
    directory = Path(directory) if Path(directory).name else Path(directory).resolve()
    with new_folder(directory) as folder:
        report = EXPORTS[format](peft_model, active[0], folder, directory, rank, located(source))
        write_json(folder / REPORT, {"format": format, **report})
    return directory


def _lora(
    model: PeftModel, name: str, folder: Path, final: Path, rank: int | None, source: Any
) -> dict[str, Any]:
    factors, error = _changes(model, name), 0.0
    if rank is not None:
        factors, error = recompress(factors, rank)
        logger.info("recompressed to rank %d: relative error %.2g", rank, error)

    original = _twin(model, _original)
    renamed = _renamed(original, factors, "lora")
    if renamed:
        save_converted(original, folder / "base")
        factors = {renamed[site]: pair for site, pair in factors.items()}
        fingerprint = model_fingerprint(convert.open_clip_to_hf(original))
        base_name = str((final / "base").resolve())
    else:
        fingerprint = base_fingerprint(model)
        base_name = absolute(model.peft_config[name].base_model_name_or_path or source)
    width = _save_lora(
        factors,
        folder,
        base_name,
        original,
        model,
        name,
        converted=bool(renamed),
        fingerprint=fingerprint,
    )
    return {"rank": width, "relative_error": error, "load": _how_to_load(bool(renamed))}


def _residual(
    model: PeftModel, name: str, folder: Path, final: Path, rank: int | None, source: Any
) -> dict[str, Any]:
    factors: Factors = {}
    for site, layer in _layers(model, name).items():
        if not isinstance(layer, PairedLinear):
            raise CordaError(
                "this adapter has no initial pair, so its base has no residual; take format 'lora'"
            )
        if layer.scaling[name] != 1:
            raise CordaError(
                f"site {site!r} is scaled by {layer.scaling[name]:g}; set it to 1 first"
            )
        B, A = trained(layer, name)
        factors[site] = (_plain(B), _plain(A))

    base = _twin(model, _less_pair)
    renamed = _renamed(base, factors, "residual")
    if renamed:
        save_converted(base, folder / "base")
        factors = {renamed[site]: pair for site, pair in factors.items()}
        fingerprint = model_fingerprint(convert.open_clip_to_hf(base))
    else:
        save_model(base, folder / "base", source)
        fingerprint = model_fingerprint(base)
    base_name = str((final / "base").resolve())
    width = _save_lora(
        factors,
        folder,
        base_name,
        base,
        model,
        name,
        converted=bool(renamed),
        fingerprint=fingerprint,
    )
    return {"rank": width, "load": _how_to_load(True)}


def _merged(
    model: PeftModel, name: str, folder: Path, final: Path, rank: int | None, source: Any
) -> dict[str, Any]:
    merged = _twin(model, _with_change, name)
    save_model(merged, folder, source)
    loader = "open_clip.create_model('local-dir:HERE')"
    if is_transformers(merged):
        loader = f"transformers.{type(merged).__name__}.from_pretrained(HERE)"
    elif any_family(merged) is GENERIC:
        loader = f"model.load_state_dict(safetensors.torch.load_file('HERE/{STATE}'))"
    return {"load": loader}


EXPORTS: dict[str, Callable[..., dict[str, Any]]] = {
    "lora": _lora,
    "residual": _residual,
    "merged": _merged,
}


# ------------------------------------------------------------------ the factors


def _layers(model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    return {
        site: layer
        for site, layer in base_of(model).named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A
    }


def _changes(model: PeftModel, name: str) -> Factors:
    """The change of every site, scaling included, float32 on the CPU."""
    factors = {}
    for site, layer in _layers(model, name).items():
        if isinstance(layer, PairedLinear):
            B, A = layer.change(name)
        elif name in layer.lora_variant and not isinstance(
            layer.lora_variant[name],
            MiCALinearVariant,  # a plain LoRA whose B is not trained
        ):
            raise CordaError(
                f"{type(layer.lora_variant[name]).__name__} is no plain LoRA; take format 'merged', or "
                "save_pretrained, which plain peft loads"
            )
        else:
            B, A = trained(layer, name)
        factors[site] = (_plain(B * layer.scaling[name]), _plain(A))
    return factors


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def recompress(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximations of the products `B A` by rank `rank`, from thin QRs; no full matrix is formed.

    Returns:
        the factors, `B = U Σ^½`, `A = Σ^½ Vᵀ`, and the relative error over all sites (Frobenius).

    Raises:
        CordaError: `rank` is not positive, or more than any site's change has.
    """
    most = max((A.shape[0] for _, A in factors.values()), default=1)
    if not 1 <= rank <= most:
        raise CordaError(
            f"rank {rank} is outside 1 to {most}, the rank of what was learned; leave rank out to keep all of it"
        )
    small, lost, whole = {}, 0.0, 0.0
    for site, (B, A) in factors.items():
        Q_b, R_b = torch.linalg.qr(B.double())  # (out, k), (k, r)
        Q_a, R_a = torch.linalg.qr(A.double().mT)  # (inp, k'), (k', r)
        U, S, Vh = torch.linalg.svd(R_b @ R_a.mT, full_matrices=False)
        root = S[:rank].sqrt()
        small[site] = (
            _plain(Q_b @ (U[:, :rank] * root)),
            _plain((root[:, None] * Vh[:rank]) @ Q_a.mT),
        )
        lost += float(S[rank:].square().sum())
        whole += float(S.square().sum())
    return small, math.sqrt(lost / whole) if whole > 0 else 0.0


def _save_lora(
    factors: Factors,
    folder: Path,
    base_name: str | None,
    base: nn.Module,
    model: PeftModel,
    name: str,
    *,
    converted: bool,
    fingerprint: str,
) -> int:
    """Write a plain LoRA with one rank everywhere, and the modules trained whole beside it; returns the rank.

    `fingerprint` is that of the model it belongs on, and is noted.
    """
    width = max(A.shape[0] for _, A in factors.values())
    tensors = {}
    for site, (B, A) in factors.items():
        spare = width - A.shape[0]
        prefix = f"base_model.model.{site}"
        tensors[f"{prefix}.lora_A.weight"] = F.pad(A, (0, 0, 0, spare)).contiguous()  # (width, inp)
        tensors[f"{prefix}.lora_B.weight"] = F.pad(B, (0, spare)).contiguous()  # (out, width)
    whole: list[str] = list(getattr(model.peft_config[name], "modules_to_save", None) or ())
    if whole and converted:
        raise CordaError(
            f"the names of {whole[0]!r} are not converted to transformers'; take format='merged'"
        )
    stored = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    for key, value in stored.items() if whole else ():
        if any(key.startswith(f"base_model.model.{module}.") for module in whole):
            tensors[key] = _plain(value)
    config = LoraConfig(
        r=width,
        lora_alpha=width,
        target_modules=sorted(factors) if converted else _targets(factors, base),
        lora_dropout=0.0,
        bias="none",
        # GPT-2's layers keep their weights transposed; peft warns, and only then sets it by itself
        fan_in_fan_out=any(
            is_conv1d(base.get_submodule(site)) for site in factors if not converted
        ),
        init_lora_weights=True,
        inference_mode=True,
        modules_to_save=whole or None,
        base_model_name_or_path=base_name,
    )
    config.save_pretrained(
        str(folder),
        auto_mapping_dict={
            "base_model_class": "CLIPModel" if converted else type(base).__name__,
            "parent_library": "transformers" if converted else type(base).__module__,
        },
    )
    save_tensors(folder / ADAPTER, tensors, {HEADER: fingerprint})
    save_base(fingerprint, folder)
    if (folder / "base").is_dir():  # for adapters that other tools train on it and write elsewhere
        save_base(fingerprint, folder / "base")
    return width


def _targets(factors: Mapping[str, Any], base: nn.Module) -> list[str] | str:
    """Full paths, which every tool reads; as one anchored pattern where PEFT's suffix match would catch more."""
    suffixes = tuple(f".{site}" for site in factors)
    ambiguous = any(name.endswith(suffixes) for name, _ in base.named_modules())
    return anchored(factors) if ambiguous else sorted(factors)


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


# ------------------------------------------------------------------ the model


def _twin(
    model: PeftModel, change: Callable[[LoraLayer], None], whole: str | None = None
) -> nn.Module:
    """The bare, packed model with `change` made to each adapted layer, sharing every other tensor with `model`.

    Modules that were trained whole are the originals, or those of the adapter named by `whole`.

    So an export takes the memory of the adapted weights, not of the model, and cannot touch the original.
    """
    base = base_of(model)
    private: set[int] = set()
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            private |= {id(p) for p in module.parameters()}
        packed = module.__dict__.get("packed")  # `attention.pack` writes into these
        if isinstance(packed, nn.Module):
            private |= {id(p) for p in packed.parameters()}
    tensors = [*base.parameters(), *base.buffers()]
    twin = copy.deepcopy(base, {id(t): t for t in tensors if id(t) not in private})
    with torch.no_grad():
        for parent in list(twin.modules()):
            for key, child in list(parent._modules.items()):
                if isinstance(child, LoraLayer):
                    if child.merged:
                        child.unmerge()
                    change(child)
                    parent._modules[key] = child.get_base_layer()
    twin.__dict__.pop("peft_config", None)
    unwrap_whole(twin, whole)
    pack(twin)
    return twin


def _with_change(layer: LoraLayer) -> None:
    try:
        layer.merge(safe_merge=True)  # pyright: ignore[reportAttributeAccessIssue]
    except ValueError as error:
        raise CordaError(
            "a merged weight holds NaN or Inf: the base model is damaged, or its precision too low for what was learned; "
            "load it again, in float32"
        ) from error


def _original(layer: LoraLayer) -> None:
    if isinstance(layer, PairedLinear):
        for name in list(layer.lora_init_A):
            layer.drop_pair(name)


def _less_pair(layer: LoraLayer) -> None:
    assert isinstance(layer, PairedLinear)
    name = layer.active_adapters[0]
    if not layer.is_residual(name):
        B0, A0 = layer.pair(name)
        weight = base_weight(layer)
        weight.data.copy_(weight.double() - B0.double() @ A0.double())
