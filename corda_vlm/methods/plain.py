"""PEFT's own methods, on our sites: a plain LoRA whose B or A starts at zero."""

from __future__ import annotations

from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from corda_vlm.adapter.eva import attach_eva
from corda_vlm.adapter.full_modules import check_full_modules
from corda_vlm.adapter.paired import keep_a_frozen, start_from, trained
from corda_vlm.adapter.targets import check_wrapped, lora_targets, refuse_convolutions
from corda_vlm.adapter.wrap import wrapping
from corda_vlm.families.options import SiteOptions
from corda_vlm.methods.method import MethodRequest
from corda_vlm.options import as_keywords
from corda_vlm.plan import check_rank
from corda_vlm.sites import find_sites, site_shapes


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
    config = LoraConfig(
        **lora_targets(ranks),
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


def eva(model: nn.Module, request: MethodRequest) -> nn.Module:
    assert request.store is not None  # checked by `prepare`
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
            if request.a_norm is not None:
                B, A = (factor.detach() for factor in trained(layer, "default"))
                start_from(layer, "default", B, A * (request.a_norm / A.norm(dim=1, keepdim=True)))
            if request.freeze_a:
                keep_a_frozen(layer, "default")
    return peft_model
