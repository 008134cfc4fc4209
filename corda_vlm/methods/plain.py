"""PEFT's own methods, on our sites: a plain LoRA whose B or A starts at zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from corda_vlm.adapter.eva import attach_eva
from corda_vlm.adapter.paired import keep_a_frozen, start_from, takes_out_for_in, trained
from corda_vlm.adapter.wrapped.full_modules import check_full_modules
from corda_vlm.adapter.wrapped.targets import (
    as_parameters,
    check_wrapped,
    lora_targets,
    refuse_convolutions,
)
from corda_vlm.adapter.wrapped.wrap import wrapping
from corda_vlm.errors import CordaError
from corda_vlm.families.layers.experts import Slice
from corda_vlm.families.options import SiteOptions
from corda_vlm.methods.method import MethodRequest
from corda_vlm.options import as_keywords
from corda_vlm.plan import check_rank
from corda_vlm.plan.experts import stacks_of
from corda_vlm.same_model import is_quantized
from corda_vlm.sites import find_sites, site_shapes, site_slices


def plain(
    model: nn.Module,
    request: MethodRequest,
    *,
    use_dora: bool = False,
    init: Literal["mica"] | bool = True,
) -> nn.Module:
    """PEFT's LoRA on every site, with alpha equal to the rank."""
    sites = find_sites(model, **as_keywords(request, SiteOptions))
    ranks = {site.name: request.rank for site in sites}
    check_rank(site_shapes(model, ranks), request.rank)
    if init == "mica":
        refuse_convolutions(model, ranks, "mica")
        _refuse_quantized(model)
    slices = site_slices(model)
    stacks_of(model, sites)  # all experts of one parameter, or none
    if use_dora or init == "mica":
        _refuse_parameters(ranks, slices, "dora" if use_dora else "mica")
    config = LoraConfig(
        **lora_targets(ranks, slices=slices, plain=True),
        use_dora=use_dora,
        init_lora_weights=init,
        modules_to_save=check_full_modules(model, request.modules_to_save, ranks) or None,
    )
    # unpacked first: PEFT's LoRA on nn.MultiheadAttention applies the delta of out_proj twice
    with wrapping(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        peft_model = get_peft_model(model, config)
        assert isinstance(peft_model, PeftModel)
        check_wrapped(peft_model, ranks, "default")
        return _finished(peft_model, request)


def _refuse_quantized(model: nn.Module) -> None:
    if is_quantized(model):
        raise CordaError(
            "mica takes its directions from the weights, and PEFT reads none of a quantised base; load the model without "
            "quantization, or take another method, such as milora"
        )


def _refuse_parameters(ranks: Mapping[str, int], slices: Mapping[str, Slice], method: str) -> None:
    _, parameters = as_parameters(ranks, slices, plain=True)
    if parameters:
        raise CordaError(
            f"PEFT adapts {next(iter(parameters))!r} as a parameter, which {method} is not for; take another method, or leave experts, "
            "shared experts and routers out, e.g. with roles=q,k,v,o (--roles)"
        )


def eva(model: nn.Module, request: MethodRequest) -> nn.Module:
    assert request.store is not None  # checked by `prepare`
    sites = find_sites(model, **as_keywords(request, SiteOptions))
    _refuse_parameters({site.name: request.rank for site in sites}, site_slices(model), "eva")
    peft_model = attach_eva(
        model,
        request.store,
        rank=request.rank,
        rho=request.rho,
        **as_keywords(request, SiteOptions),
    )
    return _finished(peft_model, request)


def _finished(peft_model: PeftModel, request: MethodRequest) -> PeftModel:
    """With A's rows at the norm asked for, and frozen if asked for; B is zero."""
    for layer in peft_model.modules():
        if isinstance(layer, LoraLayer):
            B, A = (factor.detach() for factor in trained(layer, "default"))
            if takes_out_for_in(layer):  # PEFT drew what is our B, and put zeros for A
                drawn = nn.init.kaiming_uniform_(torch.empty(A.shape).flatten(0, 1), a=5**0.5)
                B, A = torch.zeros_like(B), drawn.view_as(A).to(A)
                start_from(layer, "default", B, A)
            if request.a_norm is not None:
                A = A * (request.a_norm / A.norm(dim=-1, keepdim=True))
                start_from(layer, "default", B, A)
            if request.freeze_a:
                keep_a_frozen(layer, "default")
    return peft_model
