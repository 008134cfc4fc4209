"""What a model gives out, as far as a change of it counts, and random scalars of it whose gradients are taken."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from corda_vlm.errors import CalibrationError, CordaError
from corda_vlm.families import Batch, Family, token_masks, unwrap
from corda_vlm.families.base import run_towers
from corda_vlm.families.generative.next_token import next_token_logits
from corda_vlm.sites import Site


@dataclass(frozen=True)
class Output:
    """What a batch gives out.

    Attributes:
        towers: those that it comes from; None for all.
        count: how many embeddings, or next tokens, there are.
        draw: a generator on the CPU -> `Σ ⟨v, f⟩` over them, each v drawn anew; differentiable.
    """

    towers: tuple[str, ...] | None
    count: int
    draw: Callable[[torch.Generator], Float[Tensor, ""]]


Outputs = Callable[[nn.Module, Batch], list[Output]]
"""(model, batch) -> what it gives out; runs the model."""


def outputs_of(family: Family, model: nn.Module, sites: Sequence[Site], tokens: str) -> Outputs:
    """What models of a family give out, that changes with these sites.

    Args:
        tokens: as in `token_masks`: with "response" the next tokens are those of the responses alone, else all that
            stand for text.

    Raises:
        CordaError: nothing is known of what models of this family give out.
    """
    if family.contrastive is not None:
        towers = {site.tower for site in sites}
        return lambda model, batch: _embeddings(family, unwrap(model), batch, towers)
    if family.generative is not None:
        chosen = token_masks(family, model, "response" if tokens == "response" else "text")
        return lambda model, batch: [_next_tokens(unwrap(model), batch, chosen(batch)["language"])]
    raise CordaError(
        f"{type(unwrap(model)).__name__} has no output side: what counts of what a model gives out is known of models that "
        "compare images with texts (their embeddings) and of models that generate text (the next token). Leave "
        "output_side out, or give its Family contrastive=Contrastive(...)"
    )


def generator_of(data: str, batch: int, draw: int) -> torch.Generator:
    """What v is drawn with: the same for the same data, batch and draw, so that a resumed calibration repeats nothing."""
    digest = hashlib.sha256(f"{data};{batch};{draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _embeddings(family: Family, model: nn.Module, batch: Batch, towers: set[str]) -> list[Output]:
    """The unit embeddings of the towers that have sites and inputs."""
    encode = family.need_contrastive(model)
    found = run_towers(
        model,
        batch,
        vision=(lambda: encode.encode_image(model, batch)) if "vision" in towers else None,
        text=(lambda: encode.encode_text(model, batch)) if "text" in towers else None,
    )
    return [_embedding(tower, embedded) for tower, embedded in found.items()]  # pyright: ignore[reportArgumentType]


def _embedding(tower: str, embedded: Float[Tensor, "b d"]) -> Output:
    f = F.normalize(embedded.float(), dim=-1)

    return Output((tower,), len(f), lambda generator: along_random(f, generator))


def _next_tokens(model: nn.Module, batch: Batch, chosen: Tensor) -> Output:
    """The distributions of the tokens that are chosen, each given those before it."""
    counted = chosen[:, 1:]  # position i predicts token i + 1
    if not bool(counted.any()):
        raise CalibrationError("a batch holds no next token that counts, so it has no output side")
    inputs = {
        name: value
        for name, value in batch.items()
        if isinstance(value, Tensor) and name not in ("labels", "use_cache")
    }
    picked = next_token_logits(model, inputs, counted).float()  # (n, V)

    return Output(None, len(picked), lambda generator: log_likelihood_drawn(picked, generator))


def along_random(f: Float[Tensor, "b d"], generator: torch.Generator) -> Float[Tensor, ""]:
    """`Σ ⟨v, f⟩` with random directions v: the mean of its squared gradients is `Σ JᵀJ` of f."""
    return (f * torch.randn(f.shape, generator=generator).to(f.device)).sum()


def log_likelihood_drawn(
    logits: Float[Tensor, "n v"], generator: torch.Generator
) -> Float[Tensor, ""]:
    """`Σ log p` of tokens drawn from p: the mean of its squared gradients is the Fisher information."""
    with (
        torch.no_grad()
    ):  # by the inverse of the distribution function: one number a token from the CPU
        shares = logits.softmax(-1).cumsum(-1)
        at = torch.rand(len(logits), 1, generator=generator).to(shares) * shares[:, -1:]
        tokens = torch.searchsorted(shares, at).clamp_max_(shares.shape[1] - 1)[:, 0]
    return -F.cross_entropy(logits, tokens, reduction="sum")
