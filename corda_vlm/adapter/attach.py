"""Attach a plan to a model with PEFT as the carrier, load it again, and take it off again.

What a model shows while an adapter is attached, by base mode (see `corda_vlm.adapter.paired`):

|                          | "untouched"             | "residual"                    |
|--------------------------|-------------------------|-------------------------------|
| at the start             | the original, exactly   | the original, up to rounding  |
| `disable_adapter()`      | the original, exactly   | the residual `W₀ = W − B₀A₀`  |
| `restore`, `unload()`    | the original, exactly   | the original, up to rounding  |
| several adapters         | yes                     | no, refused                   |
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from typing_extensions import Unpack

from corda_vlm.adapter.base import absolute, check_base, check_fingerprint
from corda_vlm.adapter.folder import (
    ADAPTER,
    AGAIN,
    CONFIG,
    check_ranks,
    read_config,
    weights_folder,
)
from corda_vlm.adapter.options import AttachKeywords, AttachOptions
from corda_vlm.adapter.paired import (
    PairedConfig,
    PairedLinear,
    PairedType,
    base_of,
    paired_layers,
    refuse_second_residual,
    trained,
)
from corda_vlm.covariance import CovarianceStore, collect_covariance
from corda_vlm.covariance.options import CollectKeywords, CollectOptions
from corda_vlm.covariance.tokens import Masks
from corda_vlm.errors import CordaError, ForeignFileError, UnknownNameError, first_line
from corda_vlm.families import Batch
from corda_vlm.families.layers.attention import pack, unpack
from corda_vlm.files import shown
from corda_vlm.options import option_names, options_from
from corda_vlm.plan import AdapterPlan, plan_adapter
from corda_vlm.plan.options import PlanKeywords, PlanOptions
from corda_vlm.sites import lies_in
from corda_vlm.tensors import load_tensors

logger = logging.getLogger(__name__)

# Which parameters of a bare model were frozen before an adapter froze them all.
_FROZEN_BEFORE: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


def attach_adapter(
    model: nn.Module,
    plan: AdapterPlan,
    *,
    adapter_name: str = "default",
    **options: Unpack[AttachKeywords],
) -> PeftModel:
    """Attach the planned adapter. The model's outputs stay the same; only A, B and `modules_to_save` are trainable.

    `model` itself is changed: packed attention stays unpacked, and the planned layers wrapped, until `restore`.

    Args:
        model: the bare model the plan was made for, or a `PeftModel` of ours, which then gets a further adapter.
        adapter_name: PEFT's name for it.
        options: of `AttachOptions`. The table above compares the two choices of `base`. Of `modules_to_save` copies are
            trained; the originals return with `restore`.

    Raises:
        ForeignFileError: the plan was made for another model or family; both are named.
        UnknownNameError: unknown base mode.
        CordaError: what PEFT wrapped is not what was planned.
    """
    asked = options_from(AttachOptions, options, "attach_adapter")
    if isinstance(model, PeftModel):  # first: a residual base has another fingerprint
        refuse_second_residual([*_bases(model), asked.base])
    plan.check(model)
    if missing := [s.site.name for s in plan.sites if s.site.name not in plan.factors]:
        raise CordaError(f"the plan has no factors for {missing[0]!r}; make it with plan_adapter")
    if asked.freeze_a:
        _warn_blind_basis(plan)
    ranks = {s.site.name: s.rank for s in plan.sites}
    whole = whole_modules(model, asked.modules_to_save, ranks)
    config = PairedConfig(
        **lora_targets(ranks),
        # the pair is copied in below
        init_lora_weights=False,
        modules_to_save=whole or None,
        base=asked.base,
        freeze_a=asked.freeze_a,
        origin={
            "method": plan.method,
            "mode": plan.mode,
            "family": plan.family,
            "model_fingerprint": plan.model_fingerprint,
            "data_fingerprint": plan.data_fingerprint,
            "rank": plan.rank,
            "damping": plan.damping,
            "a_norm": plan.a_norm,
        },
    )
    with wrapping(model):
        if isinstance(model, PeftModel):
            if adapter_name in model.peft_config:
                raise CordaError(
                    f"the model carries an adapter named {adapter_name!r} already; restore(model) first, or give this one "
                    "another adapter_name"
                )
            model.add_adapter(adapter_name, config)
            peft_model = model
        else:
            peft_model = get_peft_model(model, config, adapter_name)
            assert isinstance(peft_model, PeftModel)
        config.base_model_name_or_path = absolute(config.base_model_name_or_path)
        check_wrapped(peft_model, ranks, adapter_name)
        for name, layer in paired_layers(peft_model).items():
            if name in ranks:
                factor = plan.factors[name]
                layer.set_pair(adapter_name, factor.B, factor.A)
                for mine, start in zip(
                    trained(layer, adapter_name), layer.pair(adapter_name), strict=True
                ):
                    mine.data.copy_(start)
    return peft_model


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    is_trainable: bool = False,
    adapter_name: str = "default",
) -> PeftModel:
    """Reload what a training or `save_pretrained` (or a Trainer's checkpoint) wrote, on the *original* base model.

    Takes checkpoints of ours in both base modes, and those of PEFT's own LoRA and DoRA on an unpacked model.

    Args:
        model: the original bare model, in a new process too; or a `PeftModel` of ours, for a further adapter.
        directory: the folder of a training, its `weights/`, a checkpoint, or any folder with an adapter as PEFT saves it.
        is_trainable: leave A and B trainable.

    Raises:
        ForeignFileError: no adapter there, corrupt or truncated, or of another model; the message says which.
    """
    folder = weights_folder(directory)
    config = read_config(folder)
    weights = folder / ADAPTER
    shapes = {
        name: tuple(t.shape) for name, t in load_tensors(weights, "adapter weights", AGAIN).items()
    }
    check_ranks(config, shapes, folder)
    if config["peft_type"] == PairedType.CORDA_VLM.value:
        if isinstance(model, PeftModel):
            refuse_second_residual([*_bases(model), config.get("base", "untouched")])
        check_fingerprint(config.get("origin", {}).get("model_fingerprint"), model, folder)
    check_base(model, folder, weights, config)
    with wrapping(model), _fitting(model, folder, adapter_name):
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
            peft_model = model
        else:
            peft_model = PeftModel.from_pretrained(
                model, str(folder), adapter_name=adapter_name, is_trainable=is_trainable
            )
        expected = set(get_peft_model_state_dict(peft_model, adapter_name=adapter_name))
        if expected != set(shapes):
            odd = sorted(expected ^ set(shapes))
            raise ForeignFileError(
                f"{folder} does not fit this model: {odd[0]} is only in the "
                f"{'file' if odd[0] in shapes else 'model'} ({len(odd)} such tensors)"
            )
        _check_pairs(peft_model, adapter_name, folder)
    return peft_model


def restore(peft_model: nn.Module) -> nn.Module:
    """Take the adapter off: the original bare model, attention packed again; what was trained is dropped.

    The weights are the original ones to the bit where the base was left untouched (our "untouched" mode, and
    PEFT's LoRA and DoRA unless they were merged). In residual mode they are `W₀ + B₀A₀`, the original up to
    rounding in the model's precision: for the exact ones, load the model again. A log line says which.

    Raises:
        CordaError: not a `PeftModel`.
    """
    if not isinstance(peft_model, PeftModel) or not isinstance(peft_model.base_model, BaseTuner):
        raise CordaError(
            f"restore takes a model with an adapter (a PeftModel), not a {type(peft_model).__name__}"
        )
    bare = base_of(peft_model)
    exact = "residual" not in _bases(peft_model)
    for layer in bare.modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer, PairedLinear) and layer.merged:
            layer.unmerge()
            exact = False
    unwrap_whole(bare)  # first: peft would leave the trained copies in place
    peft_model.base_model.unload()
    _tidy(bare)
    logger.info(
        "the original model is back, %s",
        "to the bit" if exact else "up to rounding; load it again for the exact weights",
    )
    return bare


class AdaptKeywords(CollectKeywords, PlanKeywords, AttachKeywords, total=False):
    """`CollectOptions`, `PlanOptions` and `AttachOptions` as keywords of a function."""


def adapt(
    model: nn.Module,
    batches: Iterable[Batch | torch.Tensor | Sequence[Any]],
    *,
    forward: Callable[[nn.Module, Batch], object] | None = None,
    masks: Callable[[Batch], Masks] | None = None,
    path: str | Path | None = None,
    device: torch.device | str | None = None,
    task_store: CovarianceStore | None = None,
    adapter_name: str = "default",
    show_progress: bool = True,
    **options: Unpack[AdaptKeywords],
) -> PeftModel:
    """Calibrate on `batches`, plan and attach, in one call.

    Args:
        model: bare.
        batches: what the knowledge to keep ("kpm") or the new task ("ipm") looks like: a few hundred samples.
        forward, masks, path, device: as of `collect_covariance`.
        task_store: as of `plan_adapter`.
        adapter_name: as of `attach_adapter`.
        options: of `CollectOptions`, `PlanOptions` and `AttachOptions`.

    Raises:
        UnknownNameError: an option that none of them has; the message lists those there are.
        CordaError: as the three functions raise it.
    """
    kinds = (CollectOptions, PlanOptions, AttachOptions)
    names = [option_names(kind) for kind in kinds]
    for option in options:
        if not any(option in of for of in names):
            raise UnknownNameError("option of adapt", option, set().union(*names))
    given: dict[str, Any] = dict(options)
    collecting, planning, attaching = ({k: v for k, v in given.items() if k in of} for of in names)
    options_from(PlanOptions, planning, "adapt")  # before a long calibration
    options_from(AttachOptions, attaching, "adapt")
    store = collect_covariance(
        model, batches, forward=forward, masks=masks, path=path, device=device, show_progress=show_progress, **collecting
    )  # fmt: skip
    plan = plan_adapter(
        model, store, task_store=task_store, show_progress=show_progress, **planning
    )
    return attach_adapter(model, plan, adapter_name=adapter_name, **attaching)


def whole_modules(model: nn.Module, names: Sequence[str], sites: Iterable[str]) -> list[str]:
    """`names`, once each is a module of its own that holds no site of the plan."""
    bare = base_of(model)
    modules = [name for name, _ in bare.named_modules()]
    for name in names:
        if name not in modules:
            raise CordaError(
                f"modules_to_save: {type(bare).__name__} has no module {name!r}; give the whole dotted path, such as "
                "'model.multi_modal_projector'"
            )
        # peft matches by suffix
        if others := [other for other in modules if other.endswith(name) and other != name]:
            raise CordaError(
                f"modules_to_save: peft would take {others[0]!r} for {name!r} as well, which ends alike"
            )
        inside = [site for site in sites if lies_in(site, [name])]
        if inside:
            raise CordaError(
                f"{inside[0]} has an adapter in the plan and would be trained whole as well, as a part of {name!r}; plan "
                "without it (towers=, roles=) or leave it out of modules_to_save"
            )
    return list(names)


def anchored(names: Iterable[str]) -> str:
    """A regular expression that matches exactly these dotted names.

    PEFT matches a *list* of targets by suffix: on open_clip `transformer.resblocks.0.mlp.c_fc`, the text
    tower's, would adapt `visual.transformer.…` too.
    """
    return "^(?:" + "|".join(re.escape(name) for name in names) + ")$"


def unwrap_whole(bare: nn.Module, adapter_name: str | None = None) -> None:
    """Put the modules that were trained whole back in place: the originals, or an adapter's trained copies."""
    for parent in list(bare.modules()):
        for key, child in list(parent._modules.items()):
            if isinstance(child, ModulesToSaveWrapper):
                copies = dict(child.modules_to_save.items())
                parent._modules[key] = copies.get(adapter_name or "", child.original_module)


def lora_targets(ranks: Mapping[str, int], rank: int | None = None) -> dict[str, Any]:
    """The fields of a `LoraConfig` that give each site its rank, alpha equal to it (so scaling 1), no dropout.

    `rank` is the config's own, from which patterns differ; None takes the most common.
    """
    rank = rank or Counter(ranks.values()).most_common(1)[0][0]
    odd = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": anchored(ranks),
        "rank_pattern": odd,
        "alpha_pattern": dict(odd),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def check_wrapped(peft_model: PeftModel, ranks: Mapping[str, int], adapter_name: str) -> None:
    """Raise unless exactly these modules carry the adapter, with these ranks and scaling 1."""
    layers = {
        name: module
        for name, module in base_of(peft_model).named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }
    wrapped = {name: layer.r[adapter_name] for name, layer in layers.items()}
    for name in sorted(wrapped.keys() | ranks.keys()):
        if wrapped.get(name) != ranks.get(name):
            raise CordaError(
                f"PEFT wrapped {name!r} with rank {wrapped.get(name)} (None: not at all) where the plan says "
                f"{ranks.get(name)}; nothing was attached. Please report this with the model's class."
            )
        if (scaling := layers[name].scaling[adapter_name]) != 1:
            raise CordaError(
                f"PEFT scales the adapter of {name!r} by {scaling} where the plan says 1; nothing was attached. Please "
                "report this with the model's class."
            )


@contextmanager
def wrapping(model: nn.Module) -> Iterator[None]:
    """Unpack, remember what was frozen, and leave the bare model as it was when the block raises."""
    with warnings.catch_warnings():
        # PEFT asks transformers for a name that is going away; nobody who attaches an adapter can help it
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        # a module that is trained whole and tied is saved, exported and loaded as what it has become
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying")
        yield from _wrapping(model)


def _wrapping(model: nn.Module) -> Iterator[None]:
    if isinstance(model, PeftModel):
        yield  # PEFT takes a further adapter back by itself
        return
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise CordaError(
            "this model carries an adapter already; pass the PeftModel, or restore it first"
        )
    remember_frozen(model)
    unpack(model)
    try:
        yield
    except BaseException:
        for parent in list(model.modules()):
            for key, child in list(parent._modules.items()):
                if isinstance(child, BaseTunerLayer):
                    if isinstance(child, PairedLinear):
                        for name in list(child.lora_init_A):
                            child.drop_pair(name)
                    parent._modules[key] = child.get_base_layer()
        _tidy(model)
        raise


def remember_frozen(bare: nn.Module) -> None:
    """Note which parameters are frozen, for `forget_frozen`."""
    frozen = (name for name, p in bare.named_parameters() if not p.requires_grad)
    _FROZEN_BEFORE[bare] = frozenset(frozen)


def forget_frozen(bare: nn.Module) -> None:
    """Set `requires_grad` as it was at `remember_frozen`; all trainable if that was not called."""
    frozen = _FROZEN_BEFORE.pop(bare, frozenset())
    for name, parameter in bare.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name not in frozen)


def _tidy(bare: nn.Module) -> None:
    """Pack attention, and set `requires_grad` as it was before the adapter."""
    pack(bare)
    if "peft_config" in bare.__dict__:
        del bare.peft_config
    forget_frozen(bare)


@contextmanager
def _fitting(model: nn.Module, folder: Path, adapter_name: str) -> Iterator[None]:
    """Turn what PEFT raises over an adapter that does not fit into a `ForeignFileError`, and take its pieces back."""
    before = set(model.peft_config) if isinstance(model, PeftModel) else set()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # raised by us
            yield
    except Exception as error:
        if isinstance(model, PeftModel) and adapter_name in set(model.peft_config) - before:
            with suppress(Exception):  # the first error is the one to tell
                model.delete_adapter(adapter_name)
        if isinstance(error, (CordaError, torch.OutOfMemoryError, MemoryError)):
            raise
        raise ForeignFileError(
            f"the adapter in {folder} does not fit this {type(base_of(model)).__name__}, or its {CONFIG} is damaged "
            f"({type(error).__name__}: {shown(first_line(error))}). Load the model it was trained on, or train again."
        ) from error


def _check_pairs(peft_model: PeftModel, adapter_name: str, folder: Path) -> None:
    """Raise unless each layer of ours does what its training did, whatever the configuration says."""
    for name, layer in paired_layers(peft_model).items():
        if adapter_name not in layer.scaling:
            continue
        if layer.scaling[adapter_name] != 1:
            raise ForeignFileError(
                f"{folder / CONFIG} scales the adapter of {name!r} by {layer.scaling[adapter_name]:g}, where it was trained "
                "at 1: the file was changed. Set lora_alpha to r, or train again."
            )
        _, A = trained(layer, adapter_name)
        if layer.a_is_frozen(adapter_name) and not torch.equal(
            A, layer.pair(adapter_name)[1].to(A)
        ):
            raise ForeignFileError(
                f"{folder / CONFIG} says that A was frozen, and that of {name!r} was trained: the file was changed. Set "
                "freeze_a to false, or train again."
            )


def _bases(model: PeftModel) -> list[str]:
    """The base modes of a model's adapters; PEFT's own leave the base untouched."""
    return [getattr(config, "base", "untouched") for config in model.peft_config.values()]


def _warn_blind_basis(plan: AdapterPlan) -> None:
    wide = [s for s in plan.sites if s.side == "output" and s.shape[1] > s.shape[0]]
    if wide:
        warnings.warn(
            f"freeze_a bounds the damage by how little A sees of the knowledge, but the output-side basis of "
            f"{plan.method!r} cannot reach the inputs' null space where a layer has more inputs than outputs: "
            f"{len(wide)} sites, first {wide[0].site.name!r} ({wide[0].shape[0]}×{wide[0].shape[1]}). Leave them out "
            "with roles=, or take the input side there: side='auto' with corda, or lora-null.",
            stacklevel=3,
        )
