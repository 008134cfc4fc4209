"""PEFT's `preprocess_corda`, with this package's moments and decomposition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from typing_extensions import Unpack

from corda_vlm.covariance import CovarianceStore
from corda_vlm.errors import CalibrationError, CordaError, ForeignFileError
from corda_vlm.files import shown
from corda_vlm.integrations.peft.layers import fingerprint, ranks_of, sites_of, target_layers
from corda_vlm.integrations.peft.starts import (
    Pairs,
    StartKeywords,
    StartOptions,
    computed,
    load_pairs,
    refuse_pickle,
    save_pairs,
)
from corda_vlm.integrations.peft.watch import watching
from corda_vlm.progress import showing


@dataclass
class Eigens:
    """What PEFT's `corda_init` reads from a layer: `A = S^½ Vᵀ`, `B = U S^½`.

    With S of ones it takes the pair as it is, apart from the scaling by `lora_alpha / r`, which it takes out again.
    """

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
    **options: Unpack[StartKeywords],
) -> None:
    """Give every target layer what `get_peft_model` with `init_lora_weights="corda"` starts from; PEFT's signature.

    Beside PEFT's own: any batch size, and padding does not count, where the model is called with an `attention_mask` of
    (batch, tokens). The mean over the tokens is taken, not the sum over the calls. No inverse is computed. Layers that read one
    input share one covariance, where the model's family is known. The model's mode (eval, train) is put back.

    The files of the configuration are safetensors. `covariance_file` is one of `CovarianceStore`, so that `corda-vlm plan` and
    the anchor read it too, and a file of `corda-vlm calibrate` is read here; `cache_file` has the pairs. Both are refused for
    another model, and the cache for another method, rank or setting as well. `use_float16_for_covariance` has no effect: half
    of a symmetric matrix is kept, which takes as little.

    Args:
        model: the one that `get_peft_model` is going to be called with, not quantized.
        lora_config: with its `corda_config`; without one that is PEFT's default, which is mode ipm.
        run_model: runs the model, or `hooked_model`, on calibration data. Not called where a file has what is needed.
        hooked_model: the model that is run, if it is another one, with layers of the same names.
        options: `a_norm` (10 keeps more than the paper's split), `damping`, `side`, `route` and `seed` of `PlanOptions`, with their
            defaults, and `precision` of `CollectOptions`.

    Raises:
        NoSitesError: no layer is a target.
        CordaError: a rank that a layer cannot have, a quantized weight, no `run_model` where one is needed.
        CalibrationError: a layer that `run_model` does not reach, NaN or Inf in its input; it is named.
        ForeignFileError: a file that is damaged, a pickle, or of something else.
    """
    corda = lora_config.corda_config
    if corda is None:
        raise CordaError(
            "lora_config has no corda_config: give LoraConfig(init_lora_weights='corda', corda_config=CordaConfig(...))"
        )
    asked = StartOptions.of(corda.corda_method, options)
    layers = target_layers(model, lora_config)
    ranks = ranks_of(layers, lora_config)
    about = {"model_fingerprint": fingerprint(model), **asked.about()}
    with showing(corda.verbose):
        if corda.cache_file is not None and _has_content(corda.cache_file):
            pairs = load_pairs(corda.cache_file, ranks, about)
        else:
            store = _covariances(model, layers, lora_config, run_model, hooked_model, asked)
            pairs = computed(layers, store, ranks, asked)
            if corda.cache_file is not None:
                save_pairs(corda.cache_file, pairs, about)
            if not corda.prune_temporary_fields:
                _leave_fields(layers, store, ranks, corda.corda_method)
    _set_eigens(layers, pairs)


def _has_content(path: str | Path) -> bool:
    """Is there a file? An empty one counts as none, as in PEFT."""
    return Path(path).is_file() and Path(path).stat().st_size > 0


def _set_eigens(layers: Mapping[str, nn.Module], pairs: Pairs) -> None:
    for name, (B, A) in pairs.items():
        device = next(layers[name].parameters()).device
        layers[name].eigens = Eigens(  # pyright: ignore[reportArgumentType]
            torch.ones(A.shape[0], device=device), B.to(device), A.mT.contiguous().to(device)
        )


def _covariances(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    config: LoraConfig,
    run_model: Callable[[], object] | None,
    hooked_model: nn.Module | None,
    asked: StartOptions,
) -> CovarianceStore:
    """From the configuration's file, or from a run, which writes it."""
    assert config.corda_config is not None  # see `preprocess_corda`
    path, pruned = config.corda_config.covariance_file, config.corda_config.prune_temporary_fields
    if path is not None and _has_content(path):
        return _loaded(path, fingerprint(model))
    if run_model is None:
        raise CordaError(
            "no run_model is given, and there is no covariance_file or cache_file yet to read from; give a function that runs "
            "the model on calibration data"
        )
    watched = layers if hooked_model in (None, model) else target_layers(hooked_model, config)
    if missing := [name for name in layers if name not in watched]:
        raise CalibrationError(
            f"hooked_model has no layer {missing[0]!r}, which is adapted in the model; name layers that both have"
        )
    sites = sites_of(model, layers)
    with watching(hooked_model or model, watched, sites, asked.precision) as watch:
        run_model()
    store = watch.store(fingerprint(model))
    if path is not None:
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
        store.save(path)
    if not pruned:
        for name in layers:
            layers[name].sample_count = watch.calls[name]  # pyright: ignore[reportArgumentType]
    return store


def _loaded(path: Any, model_fingerprint: str) -> CovarianceStore:
    refuse_pickle(path, "covariance_file", "delete it, or give another name")
    store = CovarianceStore.load(path)
    if store.model_fingerprint != model_fingerprint:
        raise ForeignFileError(
            f"{shown(path)} was made from the model {store.model_fingerprint}, and this one is {model_fingerprint}; load that "
            "model, or give another covariance_file"
        )
    return store


def _leave_fields(
    layers: Mapping[str, nn.Module],
    store: CovarianceStore,
    ranks: Mapping[str, int],
    method: str,
) -> None:
    """What PEFT leaves on a layer with `prune_temporary_fields=False`: its sum over calls, where those were counted."""
    for name, layer in layers.items():
        covariance = store[name]
        calls = getattr(layer, "sample_count", covariance.count)
        layer.covariance_matrix = (covariance.matrix * (covariance.count / calls)).float()  # pyright: ignore[reportArgumentType]
        layer.corda_method, layer.rank = method, ranks[name]  # pyright: ignore[reportArgumentType]
