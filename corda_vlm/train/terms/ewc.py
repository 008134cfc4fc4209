"""Elastic weight consolidation: a change of the weights, weighed by the diagonal of the Fisher information on the knowledge."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from corda_vlm.adapter.base import base_fingerprint
from corda_vlm.adapter.paired import base_of
from corda_vlm.covariance.model_output import along_random, log_likelihood_drawn
from corda_vlm.errors import CordaError
from corda_vlm.families import detect_family, unwrap
from corda_vlm.families.base import Batch, Family, device_of, on_device, requiring
from corda_vlm.families.layers.quantized import storage_of
from corda_vlm.train.next_token import answer_logits
from corda_vlm.train.terms.knowledge import Batches, Knowledge, as_knowledge
from corda_vlm.train.terms.teacher import Outputs, kept_outputs, steady

_SEED = 0
"""Of the outputs that are drawn."""


class Consolidation:
    """`½ Σ F (W − W₀)²` over the weights that training changes, of which F is the diagonal Fisher information.

    For an adapter W is the weight that it adapts, and its change `B A − B₀A₀`; what is trained itself is its own weight. To
    second order, and as if no two weights acted together, this is what `distillation` gives: half the squared distance of
    unit embeddings, or the KL divergence of an answer's token. It takes one number for each of these weights, and a dense
    change of each layer a step.

    Attributes:
        identity: what decides about its values, as JSON.
    """

    def __init__(self, model: nn.Module, knowledge: Knowledge, cache: Path | None) -> None:
        self.model, self.knowledge = model, knowledge
        self.identity = {"data": knowledge.fingerprint}
        self._layers = _adapted(model)
        self._own = {
            name: parameter
            for name, parameter in unwrap(model).named_parameters()
            if parameter.requires_grad and "lora_" not in name
        }
        with torch.no_grad():
            self._first = {n: change(layer) for n, layer in self._layers.items()}
            self._start = {n: p.detach().clone() for n, p in self._own.items()}
        together, _ = next(iter(knowledge.once()))
        about = {
            "kind": "fisher of drawn outputs",
            # what the squares are of: so many records together, of the model with what its adapter adds already
            "together": len(together),
            "added": [f"{float(first.norm()):.3g}" for first in self._first.values()],
            "model": base_fingerprint(model),
            "data": knowledge.fingerprint,
            "weights": sorted([*self._layers, *self._own]),
        }
        fisher = kept_outputs(cache, about, self._collected, self._fits)
        self._fisher = {name: value.to(device_of(model)) for name, value in fisher.items()}

    def __call__(self) -> Float[Tensor, ""]:
        parts = []
        for name, layer in self._layers.items():
            parts.append((self._fisher[name] * (change(layer) - self._first[name]).square()).sum())
        for name, parameter in self._own.items():
            moved = parameter.float() - self._start[name].float()
            parts.append((self._fisher[name] * moved.square()).sum())
        return torch.stack(parts).sum() / 2

    def _fits(self, found: Outputs) -> bool:
        wanted = {n: w.shape for n, w in self._weights().items()}
        return wanted == {n: f.shape for n, f in found.items()}

    def _weights(self) -> dict[str, nn.Parameter]:
        adapted = {n: cast(Any, layer.get_base_layer()).weight for n, layer in self._layers.items()}
        return {**adapted, **self._own}

    def _collected(self) -> Outputs:
        """The mean over records of the squared gradients, for outputs that are drawn from what the model gives."""
        weights = self._weights()
        drawn = torch.Generator().manual_seed(_SEED)
        family = detect_family(unwrap(self.model))
        sums = {
            name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()
        }
        count = 0
        with requiring(self.model, weights.values()), steady(self.model), torch.enable_grad():
            for _, batch in self.knowledge.once():
                value, counted = _drawn(
                    unwrap(self.model), on_device(batch, device_of(self.model)), family, drawn
                )
                # of outputs drawn apart for each token and record: the square of the sum is in expectation that of each
                found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                for name, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        sums[name] += gradient.detach().float().square()
                count += counted
        return {name: (total / max(count, 1)).cpu() for name, total in sums.items()}


def _drawn(
    model: nn.Module, batch: Batch, family: Family, drawn: torch.Generator
) -> tuple[Tensor, int]:
    """A scalar whose squared gradient is the Fisher information in expectation, and of how many tokens or records."""
    if family.generative is not None:
        logits, _ = answer_logits(model, batch)
        return log_likelihood_drawn(logits.float(), drawn), len(logits)
    parts = family.need_contrastive(model)
    found = []
    if "pixel_values" in batch:
        found.append(parts.encode_image(model, batch["pixel_values"]))
    if "input_ids" in batch:
        found.append(parts.encode_text(model, batch))
    return along_random(F.normalize(torch.cat(found).float(), dim=1), drawn), len(found[0])


def change(layer: LoraLayer) -> Float[Tensor, " out *inp"]:
    """What the active adapters of a layer add to its weight, in float32."""
    parts = [
        cast(Any, layer).get_delta_weight(a).float()
        for a in layer.active_adapters
        if a in layer.lora_A
    ]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _adapted(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers with an adapter, by the names of the base model."""
    found = {}
    for name, layer in base_of(model).named_modules():
        if not isinstance(layer, LoraLayer) or not any(
            adapter in layer.lora_A for adapter in layer.active_adapters
        ):
            continue
        base: Any = layer.get_base_layer()
        is_plain = hasattr(base, "weight") and storage_of(base) is None
        if any(layer.use_dora.values()) or not is_plain or not base.weight.is_floating_point():
            raise CordaError(
                f"ewc weighs the change B A of a weight, and {name!r} has none that it knows (DoRA, a quantized base, or experts that share a parameter): take "
                "another method, or distill in place of ewc"
            )
        found[name] = layer
    return found


def consolidation(
    model: nn.Module, batches: Batches | Knowledge, *, cache: str | Path | None = None
) -> Consolidation:
    """EWC as a term of the loss: `loss = task_loss + weight * ewc()`; see `Consolidation`.

    Made before the first step and before a checkpoint is loaded. The gradients of one batch are squared together, so that
    small batches, of four records say, give the better estimate.

    Args:
        batches: of the knowledge to keep, as for `distillation`.
        cache: a folder for the Fisher information, which trainings of one kind share.

    Raises:
        CordaError: nothing is trained, or an adapter whose change is no `B A`.
        DataError: the batches of a model that generates text have no labels.
    """
    return Consolidation(model, as_knowledge(batches), None if cache is None else Path(cache))
