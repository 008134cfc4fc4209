"""Bring home what another tool trained from an export of ours: its plain LoRA becomes our adapter again.

| what was exported    | what the tool trains                          | what comes home                        |
|----------------------|-----------------------------------------------|----------------------------------------|
| `residual`           | `B`, `A` on `W₀ = W − B₀A₀`, from `B₀`, `A₀`  | `B A − B₀A₀` on `W`, with that pair    |
| `lora`, untrained    | `P Q` on `W`, from `[0, B₀] [A₀; 0]` = 0      | `P Q` on `W`, with that pair           |
| `lora`, trained      | `P Q` on `W`, from what had been learned      | `P Q` on `W`, with a pair of product 0 |

So scaling, the anchor and recompression see the change of the original weights, whoever made it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from torch import Tensor, nn

from corda_vlm.adapter.base import (
    BASE_NOTE,
    absolute,
    base_fingerprint,
    check_fingerprint,
    noted_fingerprint,
    places_of,
)
from corda_vlm.adapter.exchange.factors import Factors
from corda_vlm.adapter.folder import (
    ADAPTER,
    AGAIN,
    REPORT,
    START,
    check_ranks,
    read_config,
    weights_folder,
)
from corda_vlm.adapter.paired import (
    PairedConfig,
    PairedLayer,
    PairedType,
    base_of,
    start_from,
    trained,
)
from corda_vlm.adapter.wrapped.carriers import Carrier, carriers
from corda_vlm.adapter.wrapped.parameters import from_peft
from corda_vlm.adapter.wrapped.targets import check_wrapped, lora_targets
from corda_vlm.adapter.wrapped.wrap import wrapping
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.families import any_family
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.families.layers.experts import STACKS, Slice
from corda_vlm.families.layers.matrix import matrix_of
from corda_vlm.families.loading import convert
from corda_vlm.files import read_json, shown
from corda_vlm.names import quoted
from corda_vlm.sites import site_slices
from corda_vlm.tensors import load_tensors

logger = logging.getLogger(__name__)

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<site>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight"
)


def import_adapter(
    original: nn.Module,
    *,
    trained: str | Path,
    start: str | Path | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """The original model with what another tool trained from an export of ours, as if it had been trained here.

    `at_scale`, `evaluate`, the anchor, `export_adapter(…, rank=)` and `save_pretrained` then work as for any adapter of ours.

    Args:
        original: the bare model that the export was made from; an open_clip one too where the export was written under
            transformers' names.
        trained: the folder of a plain LoRA as PEFT writes it, e.g. a checkpoint of the tool. Its `lora_alpha` is heeded.
        start: the export that the tool began with, or the folder of any adapter that PEFT saved before training, over the
            residual base that it then began with. None: it is looked for by the base model that `trained` names.

    Raises:
        ForeignFileError: no adapter there, damaged, of another model, or not trained from this start.
        CordaError: more than a LoRA was trained (DoRA, biases), or no start is found.
    """
    slices = site_slices(original)
    ours = _read(weights_folder(trained), slices)
    begun = _start_of(ours, start, slices)
    _check_belongs(original, ours, begun)
    names = _own_names(original, [*ours.factors])
    before = begun.pair(ours)
    ranks = {names[name]: A.shape[0] for name, (_, A) in ours.factors.items()}
    frozen = all(torch.equal(before[name][1], A) for name, (_, A) in ours.factors.items())
    config = PairedConfig(
        **lora_targets(ranks, slices=slices),
        init_lora_weights=False,  # the factors are copied in
        modules_to_save=ours.full_modules or None,
        freeze_a=frozen,
        origin={**begun.origin, "model_fingerprint": base_fingerprint(original)},
    )
    with wrapping(original):
        model = get_peft_model(original, config, adapter_name)
        assert isinstance(model, PeftModel)
        config.base_model_name_or_path = absolute(config.base_model_name_or_path)
        check_wrapped(model, ranks, adapter_name)
        in_files = {own: name for name, own in names.items()}
        for carrier in carriers(model, adapter_name):
            read = [in_files[site] for site in carrier.sites]
            _fill(
                carrier,
                adapter_name,
                carrier.joined([before[name] for name in read]),
                carrier.joined([ours.factors[name] for name in read]),
            )
        _fill_full(model, adapter_name, ours)
    return model


# ------------------------------------------------------------------ what lies in the folders


@dataclass(frozen=True)
class _Lora:
    """A plain LoRA of PEFT's.

    Attributes:
        factors: name of a layer -> B, A, each with half of the scaling.
        full: name of a parameter -> its value, of modules that were trained in full.
        full_modules: their names, as the configuration has them.
    """

    folder: Path
    config: dict[str, Any]
    factors: Factors
    full: dict[str, Tensor]
    full_modules: list[str]


@dataclass(frozen=True)
class _Start:
    """What a tool began with: a LoRA, over the residual base (or the original one), and what an export noted of it."""

    lora: _Lora
    on_original: bool
    report: Mapping[str, Any]

    @property
    def origin(self) -> dict[str, Any]:
        return dict(self.report.get("original") or {})

    def pair(self, ours: _Lora) -> Factors:
        """The frozen pair of every layer: what has to be taken off the trained product.

        Raises:
            ForeignFileError: the two are not of the same layers and ranks.
        """
        if different := sorted(self.lora.factors.keys() ^ ours.factors.keys()):
            raise ForeignFileError(
                f"{shown(ours.folder)} was not trained from {shown(self.lora.folder)}: {quoted(different)} are in one of them "
                "only. Give the start that it began with"
            )
        pairs = {}
        for name, (B0, A0) in self.lora.factors.items():
            B, A = ours.factors[name]
            if A.shape != A0.shape or B.shape != B0.shape:
                raise ForeignFileError(
                    f"{shown(ours.folder)} was not trained from {shown(self.lora.folder)}: {name!r} has rank {A.shape[0]} and "
                    f"{A0.shape[0]}. Give the start that it began with, and what was trained before it is recompressed"
                )
            if self.on_original and bool((B0.double() @ A0.double()).any()):
                B0 = torch.zeros_like(B0)
            pairs[name] = B0, A0
        return pairs


def _read(folder: Path, slices: Mapping[str, Slice]) -> _Lora:
    config = read_config(folder)
    if config["peft_type"] == PairedType.CORDA_VLM.value:
        raise CordaError(
            f"{shown(folder)} is an adapter of this package already; load_adapter(model, folder) loads it"
        )
    _check_plain(config, folder, slices)
    tensors = load_tensors(folder / ADAPTER, "adapter weights", AGAIN)
    check_ranks(config, {name: tuple(t.shape) for name, t in tensors.items()}, folder)
    halves: dict[str, dict[str, Tensor]] = {}
    full = {}
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            # those of a convolution have the axes of its kernel
            halves.setdefault(match["site"], {})[match["factor"]] = tensor.float().flatten(1)
        else:
            full[key.removeprefix("base_model.model.")] = tensor
    modules = config.get("modules_to_save") or []
    if strange := [k for k in full if not any(f"{m}." in k for m in modules)]:
        raise CordaError(
            f"{shown(folder)} holds {strange[0]!r}, which is no part of a plain LoRA; what was changed by it cannot be brought "
            "home. Load it with PEFT"
        )
    factors = {}
    for name, half in halves.items():
        if half.keys() != {"A", "B"}:
            raise ForeignFileError(
                f"{shown(folder)} lacks one of the two factors of {name!r}; {AGAIN}"
            )
        for site, key, B, A in _matrices_of(name, half, config, slices):
            root = math.sqrt(_scaling(config, key, A.shape[0]))
            factors[site] = B * root, A * root
    if not factors:
        raise ForeignFileError(f"{shown(folder)} holds no factors of a LoRA; {AGAIN}")
    return _Lora(folder, config, factors, full, modules)


def _matrices_of(
    layer: str, half: Mapping[str, Tensor], config: Mapping[str, Any], slices: Mapping[str, Slice]
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(site, what PEFT's patterns are matched with, B, A) of a layer in the files: one, or one for each expert.

    Wrappers of the parameters of one module are nested in the order of the parameters, so that the first is innermost.
    """
    module, depth = layer, 0
    while module.endswith(".base_layer"):
        module, depth = module.removesuffix(".base_layer"), depth + 1
    targets = tuple(config.get("target_parameters") or ())
    adapted = [
        path
        for name in STACKS
        if (path := f"{module}.{name}").endswith(tuple(f".{target}" for target in targets))
        or path in targets
    ]
    experts = (
        []
        if depth >= len(adapted)
        else [s for s in slices.values() if s.path == adapted[-1 - depth]]
    )
    if not experts:
        yield layer, layer, half["B"], half["A"]
        return
    for part, B, A in zip(
        experts, *from_peft(half["B"], half["A"], experts[0], len(experts)), strict=True
    ):
        yield f"{part.path}.{part.expert}", part.path, B, A


def _check_plain(config: Mapping[str, Any], folder: Path, slices: Mapping[str, Slice]) -> None:
    for option, usual in (
        ("use_dora", False),
        ("bias", "none"),
        ("lora_bias", False),
        ("trainable_token_indices", None),
        ("target_parameters", None),
    ):
        if option == "target_parameters" and slices:
            continue  # experts and routers, which are no more than a LoRA
        if config.get(option, usual) not in (usual, None):
            raise CordaError(
                f"{shown(folder)} was trained with {option}={config[option]!r}, which is more than a LoRA; train it with "
                f"{option}={usual!r} to bring it home"
            )


def _scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key([*patterns], name), config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not scaling > 0:
        raise CordaError(f"lora_alpha {alpha} of {name!r} leaves nothing of the adapter")
    return scaling


def _start_of(ours: _Lora, start: str | Path | None, slices: Mapping[str, Slice]) -> _Start:
    """The start that is given, or the export whose base the adapter names."""
    if start is not None:
        folder = weights_folder(start)
        folder = folder / START if (folder / START).is_dir() else folder
    else:
        folder = _found(ours)
    home = next((f for f in (folder, folder.parent) if (f / REPORT).is_file()), None)
    report = {} if home is None else read_json(home / REPORT, "export's report")
    if not isinstance(report, dict) or report.get("format", "residual") not in ("residual", "lora"):
        raise ForeignFileError(
            f"{shown(folder)} is no export to train from; give one of format 'residual' or 'lora'"
        )
    return _Start(_read(folder, slices), report.get("format") == "lora", report)


def _found(ours: _Lora) -> Path:
    name = ours.config.get("base_model_name_or_path") or ""
    for place in places_of(name, ours.folder):
        for folder in (place / START, place.parent):
            if (folder / ADAPTER).is_file() and any(
                (home / REPORT).is_file() for home in (folder, folder.parent)
            ):
                return folder
    raise CordaError(
        f"the start of {shown(ours.folder)} is not found: it names the base model {shown(repr(name))}, beside which there is no export of "
        "this package. Give start= (--start), the folder of the export that the training began with. A plain LoRA on the "
        "original model needs none: load_adapter loads it"
    )


# ------------------------------------------------------------------ does it belong together


def _check_belongs(original: nn.Module, ours: _Lora, begun: _Start) -> None:
    made_for = begun.origin.get("model_fingerprint")
    if made_for is None:
        logger.warning(
            "%s does not say which model it was made from: whether it was this one cannot be checked",
            shown(begun.lora.folder),
        )
    else:
        check_fingerprint(made_for, original, begun.lora.folder, of_export=True)
    note = begun.lora.folder / BASE_NOTE
    name = ours.config.get("base_model_name_or_path") or ""
    for place in places_of(name, ours.folder):
        if note.is_file() and (place / BASE_NOTE).is_file():
            if noted_fingerprint(place) != noted_fingerprint(begun.lora.folder):
                raise ForeignFileError(
                    f"{shown(ours.folder)} was trained on the model in {shown(place)}, which is not the one that belongs to "
                    f"{shown(begun.lora.folder)}. Give the start that it began with"
                )
            return


def _own_names(original: nn.Module, names: list[str]) -> dict[str, str]:
    """Name in the files -> name in this model: equal, or as another version of transformers or transformers for open_clip has it.

    Raises:
        ForeignFileError: the model has no such layer.
    """
    family = any_family(original)
    own: dict[str, str] = {}
    with unpacked(original):
        layers = [name for name, m in original.named_modules() if matrix_of(m) is not None]
    for name in layers:
        for alias in (*_converted(original, name), family.canonical(original, name), name):
            own[alias] = name
    found = {}
    for name in names:
        alias = name if name in own else family.canonical(original, name)
        if alias not in own:
            raise ForeignFileError(
                f"{type(original).__name__} has no layer {name!r}, which was trained; load the model that was exported"
            )
        found[name] = own[alias]
    return found


def _converted(original: nn.Module, name: str) -> Iterator[str]:
    if convert.converts(original) is None:
        try:
            yield convert.site_name_open_to_hf(name)
        except CordaError:  # a layer that no export has
            return


# ------------------------------------------------------------------ onto the model


def _fill(
    carrier: Carrier,
    adapter_name: str,
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
) -> None:
    layer, site = carrier.layer, carrier.sites[0]
    assert isinstance(layer, PairedLayer)  # see `check_wrapped`
    layer.set_pair(adapter_name, *before)
    for parameter, value in zip(trained(layer, adapter_name), after, strict=True):
        if parameter.shape != value.shape:
            raise ForeignFileError(
                f"{site!r} was trained with factors of {tuple(value.shape)}, and this model's are {tuple(parameter.shape)}: it "
                "is another model"
            )
    start_from(layer, adapter_name, *after)


def _fill_full(model: PeftModel, adapter_name: str, ours: _Lora) -> None:
    """The modules that were trained in full beside the adapter."""
    left = dict(ours.full)
    for name, module in base_of(model).named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            state = {
                key.removeprefix(f"{name}."): left.pop(key)
                for key in [*left]
                if key.startswith(f"{name}.")
            }
            copy = module.modules_to_save[adapter_name]
            try:
                copy.load_state_dict(state)
            except RuntimeError as error:
                raise ForeignFileError(
                    f"{shown(ours.folder)} does not fit {name!r} of this model, which was trained in full; load the model that "
                    "was exported"
                ) from error
    if left:
        raise ForeignFileError(
            f"{type(base_of(model)).__name__} has no {next(iter(left))!r}, which was trained; load the model that was exported"
        )
