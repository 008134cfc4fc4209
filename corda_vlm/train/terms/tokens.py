"""Distillation of models that generate text: the distribution of the next token, on the answers of the knowledge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from corda_vlm.adapter.base import base_fingerprint
from corda_vlm.errors import DataError
from corda_vlm.families.base import Batch, device_of, on_device, unwrap
from corda_vlm.families.generative.language import IGNORED
from corda_vlm.train.next_token import answer_logits
from corda_vlm.train.terms.knowledge import Knowledge
from corda_vlm.train.terms.teacher import Outputs, kept_outputs, steady
from corda_vlm.train.terms.term import DataPenalty

TOP = 64
"""Tokens whose probabilities are kept at each place, the most likely ones; the others count together."""


class TokenDistillation(DataPenalty):
    """KL divergence of the next-token distributions, from before training to now; see `distillation`.

    What the model gave is kept, not computed again by the model with its adapter off: that works for weights trained in
    full too, which have no adapter to turn off, costs a step no second forward pass, and takes for each token of an answer
    `TOP` numbers in place of the vocabulary. The divergence between the distributions over these tokens and all others
    taken together is at most that over the whole vocabulary, and zero where that is.
    """

    def __init__(self, model: nn.Module, knowledge: Knowledge, cache: Path | None) -> None:
        self.model, self.knowledge = model, knowledge
        rows, batch = next(iter(knowledge.once()))
        if "labels" not in batch:
            raise DataError(
                "the batches of the knowledge have no labels, which say where the answers are: make them by "
                "make_batches(..., must_learn=True)"
            )
        self._probe = rows, batch
        identity = {
            "kind": f"top {TOP} tokens",
            "model": base_fingerprint(model),
            "data": knowledge.fingerprint,
        }
        before = kept_outputs(cache, identity, self._before, self._is_mine)
        knowledge.keep_only(before["rows"].numpy())
        # begins[row]: where the tokens of that record begin
        self._begins = {
            int(row): (int(end) - int(count), int(end))
            for row, count, end in zip(
                before["rows"], before["counts"], before["counts"].cumsum(0), strict=True
            )
        }
        self._top, self._shares = before["top"], before["shares"]

    @property
    def identity(self) -> dict[str, Any]:
        return {"loss": "tokens", "top": TOP, **self.knowledge.identity}

    def __call__(self, number: int) -> Float[Tensor, ""]:
        rows, batch = self.knowledge.at(number)
        logits = self._logits(batch)
        top, before = self._kept(rows, logits.device)
        after = shares_of(logits, top)
        return kl_terms(before, after).sum(1).mean()

    def _logits(self, batch: Batch) -> Float[Tensor, "n v"]:
        with steady(self.model):
            logits, _ = answer_logits(unwrap(self.model), on_device(batch, device_of(self.model)))
        return logits.float()

    def _kept(self, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """The most likely tokens and the logarithms of their shares, of the answers of some records."""
        where = torch.cat([torch.arange(*self._begins[int(row)]) for row in rows])
        return self._top[where].long().to(device), self._shares[where].to(device)

    @torch.no_grad()
    def _before(self) -> Outputs:
        rows, counts, top, shares = [], [], [], []
        for some, batch in self.knowledge.once():
            logits = self._logits(batch)
            best = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
            top.append(best.to(torch.int32).cpu())
            shares.append(shares_of(logits, best).cpu())
            rows.append(torch.from_numpy(some))
            counts.append(_answered(batch))
        outputs = {"rows": rows, "counts": counts, "top": top, "shares": shares}
        return {name: torch.cat(pieces) for name, pieces in outputs.items()}

    @torch.no_grad()
    def _is_mine(self, outputs: Outputs) -> bool:
        _, batch = self._probe
        count = int(_answered(batch).sum())
        if set(outputs) != {"rows", "counts", "top", "shares"} or len(outputs["top"]) < count:
            return False
        logits = self._logits(batch)
        top, before = (outputs[name][:count].to(logits.device) for name in ("top", "shares"))
        kept = shares_of(logits, top.long()).exp() - before.exp()
        return float(kept.abs().max()) < _SAME


_SAME = 0.05
"""By how much the share of a token may differ that was kept: in bfloat16 too."""


def shares_of(logits: Float[Tensor, "n v"], top: Int[Tensor, "n k"]) -> Float[Tensor, "n s"]:
    """Logarithms of the shares of some tokens, and behind them that of all others together, where there are others."""
    total = logits.logsumexp(1, keepdim=True)
    shares = logits.gather(1, top) - total
    if top.shape[1] == logits.shape[1]:
        return shares
    others = logits.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True) - total
    return torch.cat([shares, others], dim=1)


def kl_terms(before: Float[Tensor, "n s"], after: Float[Tensor, "n s"]) -> Float[Tensor, "n s"]:
    """What each share adds to KL(before ‖ after), of logarithms of shares."""
    return before.exp() * (before - after)


def _answered(batch: Batch) -> Int[Tensor, " b"]:
    """How many tokens of each record are predicted."""
    return (batch["labels"][:, 1:] != IGNORED).sum(1)
