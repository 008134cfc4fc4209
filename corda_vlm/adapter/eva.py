"""EVA (arXiv 2410.07170) through PEFT's own entry point, fed from collected covariances.

PEFT finds the directions by an incremental PCA over a data loader, which centers the activations: they are the
eigenvectors of `C − μ μᵀ`, which a covariance store has in full. So the loader is not needed here, nor its
approximation; the ranks are shared out as PEFT does it, and PEFT initializes and re-ranks its layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import EvaConfig, initialize_lora_eva_weights
from torch import Tensor, nn

from corda_vlm.adapter.wrapped.targets import check_wrapped, lora_targets, refuse_convolutions
from corda_vlm.adapter.wrapped.wrap import wrapping
from corda_vlm.covariance import CovarianceStore
from corda_vlm.covariance.moments import SecondMoment
from corda_vlm.decompose.basis import fix_signs
from corda_vlm.errors import CordaError
from corda_vlm.plan import check_made_from, check_rank
from corda_vlm.sites import find_sites, site_shapes

RHO = 2.0
"""PEFT's default: a site gets at most twice the rank."""


def attach_eva(
    model: nn.Module,
    store: CovarianceStore,
    *,
    rank: int,
    rho: float | None = None,
    towers: Sequence[str] | str | None = None,
    roles: Sequence[str] | str | None = None,
    targets: Sequence[str] | str | None = None,
) -> PeftModel:
    """A plain LoRA of PEFT whose A holds the directions in which the new task's activations vary most, and B is zero.

    Args:
        model: bare; packed attention stays unpacked until `restore`.
        store: covariances of the new task.
        rank: on average over the sites. Sites of rank 0 carry no adapter.
        rho: a site gets at most `rho · rank`, by the share of variance that each direction explains; 1 gives all
            sites `rank`. None: `RHO`.

    Raises:
        UnknownNameError: unknown tower or role, or a site that the store did not calibrate.
        ForeignFileError: the store was made from another model.
        CordaError: a rank outside 1 to min(out, inp), or rho below 1.
    """
    rho = RHO if rho is None else rho
    if not rho >= 1:
        raise CordaError(
            f"rho is how often its rank a site may get at most, so 1 or more; got {rho!r}"
        )
    check_made_from(model, store, "covariances")
    names = [site.name for site in find_sites(model, towers=towers, roles=roles, targets=targets)]
    refuse_convolutions(model, names, "eva")
    check_rank(site_shapes(model, names), rank)
    directions, shares = _principal(store, names, round(rank * rho))
    ranks = share_out(shares, budget=rank * len(names))
    config = LoraConfig(
        **lora_targets(dict.fromkeys(names, rank)),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho),
    )
    kept = {name: r for name, r in ranks.items() if r > 0}
    with wrapping(model), torch.random.fork_rng(devices=[]):
        peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
        assert isinstance(peft_model, PeftModel)
        initialize_lora_eva_weights(
            peft_model,
            eva_state_dict={
                f"base_model.model.{name}": directions[name][:r] for name, r in ranks.items()
            },
        )
        # layers that PEFT made anew have the model's precision, where it trains the others in float32
        peft_model.base_model._cast_adapter_dtype("default", True)  # pyright: ignore[reportCallIssue]
        # PEFT lists names and patterns that match by suffix: on loading, other sites would be adapted too
        for field, value in lora_targets(kept, rank).items():
            setattr(peft_model.peft_config["default"], field, value)
        check_wrapped(peft_model, kept, "default")
    return peft_model


def share_out(shares: Mapping[str, Float[Tensor, " k"]], budget: int) -> dict[str, int]:
    """Site -> rank: the `budget` directions that explain the largest shares of their site's variance, as PEFT counts.

    Args:
        shares: site -> the share of variance that each of its directions explains, descending.

    Where shares are equal, as between the sites of one stream, the earlier site comes first.
    """
    owners = [name for name, values in shares.items() for _ in values]
    order = torch.cat(list(shares.values())).argsort(descending=True, stable=True)
    ranks = dict.fromkeys(shares, 0)
    for index in order[:budget].tolist():
        ranks[owners[index]] += 1
    return ranks


def _principal(
    store: CovarianceStore, names: Sequence[str], most: int
) -> tuple[dict[str, Float[Tensor, "k inp"]], dict[str, Float[Tensor, " k"]]]:
    """For each site, at most `most` principal directions of its inputs, and the share of variance of each."""
    streams: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        stream = store.stream_of(name)
        if stream not in streams:
            moment = reduce(SecondMoment.merged, store.moments(stream))
            mean = moment.shift.double() + moment.mean
            values, vectors = torch.linalg.eigh(moment.matrix().addr_(mean, mean, alpha=-1))
            values, vectors = values.clamp_min(0).flip(0), vectors.flip(1)  # descending
            total = values.sum().clamp_min(torch.finfo(values.dtype).tiny)
            rows = fix_signs(vectors[:, :most]).mT.to("cpu", torch.float32).contiguous()
            streams[stream] = rows, (values[:most] / total).cpu()
    return (
        {name: streams[store.stream_of(name)][0] for name in names},
        {name: streams[store.stream_of(name)][1] for name in names},
    )
