"""What an adapter has learned, as two factors a site, and their best approximation of a lower rank."""

from __future__ import annotations

import math

import torch
from peft import PeftModel
from peft.tuners.lora.variants import MiCALinearVariant
from torch import Tensor

from corda_vlm.adapter.paired import PairedLayer, trained
from corda_vlm.adapter.wrapped.carriers import carriers
from corda_vlm.errors import CordaError

Factors = dict[str, tuple[Tensor, Tensor]]  # site name -> B (out, r), A (r, inp)


def changes(model: PeftModel, name: str) -> Factors:
    """The change of every site, scaling included, float32 on the CPU."""
    factors = {}
    for carrier in carriers(model, name):
        layer = carrier.layer
        if isinstance(layer, PairedLayer):
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
        for site, (one_B, one_A) in carrier.split(B * layer.scaling[name], A).items():
            factors[site] = plain(one_B), plain(one_A)
    return factors


def plain(tensor: Tensor) -> Tensor:
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
            plain(Q_b @ (U[:, :rank] * root)),
            plain((root[:, None] * Vh[:rank]) @ Q_a.mT),
        )
        lost += float(S[rank:].square().sum())
        whole += float(S.square().sum())
    return small, math.sqrt(lost / whole) if whole > 0 else 0.0
