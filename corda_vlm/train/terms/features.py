"""Distillation of models that compare images with texts: their embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.adapter.base import base_fingerprint
from corda_vlm.errors import CordaError
from corda_vlm.families import unwrap
from corda_vlm.families.base import Batch, Contrastive, device_of, on_device
from corda_vlm.train.losses import capped
from corda_vlm.train.terms.knowledge import Knowledge
from corda_vlm.train.terms.options import DistillLoss
from corda_vlm.train.terms.teacher import Outputs, kept_outputs, steady
from corda_vlm.train.terms.term import DataPenalty

_INPUTS = {"vision": "pixel_values", "text": "input_ids"}
_SAME = 0.99
"""The cosine at which embeddings that were kept are taken to be this model's: in bfloat16 too."""


class FeatureDistillation(DataPenalty):
    """How far the embeddings of the knowledge have turned; see `distillation`.

    Attributes:
        towers: those that something trained lies in; the others give what they gave.
    """

    def __init__(
        self,
        model: nn.Module,
        contrastive: Contrastive,
        knowledge: Knowledge,
        loss: DistillLoss,
        cache: Path | None,
    ) -> None:
        self.model, self.contrastive, self.knowledge = model, contrastive, knowledge
        self.loss = "cosine" if loss == "auto" else loss
        rows, batch = next(iter(knowledge.once()))
        self._probe = rows[:_PROBED], {name: value[:_PROBED] for name, value in batch.items()}
        self.towers = self._reached()
        identity = {
            "kind": "embeddings",
            "model": base_fingerprint(model),
            "data": knowledge.fingerprint,
        }
        before = kept_outputs(cache, identity, self._before, self._is_mine)
        knowledge.keep_only(before.pop("rows").numpy())
        self._base = {tower: unit.to(device_of(model)) for tower, unit in before.items()}

    @property
    def identity(self) -> dict[str, Any]:
        return {"loss": self.loss, **self.knowledge.identity}

    def __call__(self, number: int) -> Float[Tensor, ""]:
        rows, batch = self.knowledge.at(number)
        batch = on_device(batch, device_of(self.model))
        where = torch.from_numpy(rows).to(device_of(self.model))
        with steady(self.model):
            now = {tower: self._embedded(tower, batch) for tower in self.towers}
        with torch.autocast(where.device.type, enabled=False):
            if self.loss == "cosine":
                turned = [
                    1 - (unit * self._base[t][where]).sum(1).mean() for t, unit in now.items()
                ]
            else:
                turned = [self._dissimilarity(t, unit, where) for t, unit in now.items()]
            return torch.stack(turned).mean()

    def _dissimilarity(self, tower: str, unit: Float[Tensor, "b d"], where: Tensor) -> Tensor:
        """KL of the rows of the similarity matrix, base from trained: to the other tower's embeddings of the whole
        knowledge as they were, or to those of the same tower where it has no other, each row without itself."""
        other = {"vision": "text", "text": "vision"}[tower]
        against = self._base.get(other, self._base[tower])  # (n, D)
        scale = capped(self.contrastive.logit_scale(unwrap(self.model)).detach().float())
        before, after = (scale * rows @ against.T for rows in (self._base[tower][where], unit))
        if other not in self._base:
            own = F.one_hot(where, len(against)).bool()
            before, after = before.masked_fill(own, _NEVER), after.masked_fill(own, _NEVER)
        log_before, log_after = before.log_softmax(1), after.log_softmax(1)
        return F.kl_div(log_after, log_before, log_target=True, reduction="batchmean")

    def _embedded(self, tower: str, batch: Batch) -> Float[Tensor, "b d"]:
        """Unit vectors, in float32."""
        bare = unwrap(self.model)
        if tower == "vision":
            found = self.contrastive.encode_image(bare, batch["pixel_values"])
        else:
            found = self.contrastive.encode_text(bare, batch)
        return F.normalize(found.float(), dim=-1)

    def _reached(self) -> tuple[str, ...]:
        """The towers of which the knowledge has inputs, and whose embeddings change in training."""
        _, batch = self._probe
        there = [tower for tower, name in _INPUTS.items() if name in batch]
        one = on_device({name: value[:1] for name, value in batch.items()}, device_of(self.model))
        with torch.enable_grad(), steady(self.model):
            reached = [tower for tower in there if self._embedded(tower, one).requires_grad]
        if not reached:
            raise CordaError(
                f"nothing that is trained changes the embeddings of the knowledge, which has inputs for {' and '.join(there)}: "
                "there is nothing to distill. Adapt that tower, give knowledge of the tower that is adapted, or leave distill out"
            )
        return tuple(reached)

    @torch.no_grad()
    def _before(self) -> Outputs:
        """The embeddings of every record that is of use; zeros for the others."""
        found: dict[str, list[tuple[np.ndarray, Tensor]]] = {}
        with steady(self.model):
            for rows, batch in self.knowledge.once():
                inputs = on_device(batch, device_of(self.model))
                for tower, name in _INPUTS.items():
                    if name in inputs:
                        unit = self._embedded(tower, inputs).cpu()
                        found.setdefault(tower, []).append((rows, unit))
        kept = np.concatenate([rows for rows, _ in next(iter(found.values()))])
        outputs = {"rows": torch.from_numpy(kept)}
        for tower, pieces in found.items():
            every = torch.zeros(int(kept.max()) + 1, pieces[0][1].shape[1])
            for rows, unit in pieces:
                every[torch.from_numpy(rows)] = unit
            outputs[tower] = every
        return outputs

    @torch.no_grad()
    def _is_mine(self, outputs: Outputs) -> bool:
        """Do embeddings that were kept equal the model's own, of a few records?"""
        rows, batch = self._probe
        inputs = on_device(batch, device_of(self.model))
        for tower, name in _INPUTS.items():
            if name not in inputs:
                continue
            if tower not in outputs or len(outputs[tower]) <= rows.max():
                return False
            with steady(self.model):
                now = self._embedded(tower, inputs).cpu()
            if float((now * outputs[tower][torch.from_numpy(rows)]).sum(1).min()) < _SAME:
                return False
        return "rows" in outputs


_PROBED = 8
_NEVER = -1e4
