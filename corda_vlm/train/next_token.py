"""The loss of models that generate text: the next token, where it belongs to an answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from corda_vlm.data import Records, no_labels
from corda_vlm.errors import DataError
from corda_vlm.families.base import Batch, Family
from corda_vlm.families.generative.language import IGNORED
from corda_vlm.families.generative.next_token import next_token_logits
from corda_vlm.train.heads import Head
from corda_vlm.train.options import TrainOptions


@dataclass
class NextTokenObjective:
    """Cross-entropy of the labeled tokens of a batch, each given the tokens before it; all count equally.

    A record is right if every one of its labeled tokens was the most likely one, given the true tokens before it.
    """

    label_smoothing: float = 0.0
    head: Head | None = None
    towers: tuple[str, ...] = ("language",)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        picked, learnt = answer_logits(model, batch)
        target = batch["labels"][:, 1:][learnt]  # (n,)
        with torch.autocast(picked.device.type, enabled=False):
            loss = F.cross_entropy(picked.float(), target, label_smoothing=self.label_smoothing)
        right = torch.ones_like(learnt)
        right[learnt] = picked.detach().argmax(-1) == target
        return loss, right.all(1)

    def logits(self, model: nn.Module, batch: Batch) -> Float[Tensor, "n v"]:
        """Those that predict the labeled tokens."""
        return answer_logits(model, batch)[0]


def answer_logits(
    model: nn.Module, batch: Batch
) -> tuple[Float[Tensor, "n v"], Bool[Tensor, "b l"]]:
    """The logits that predict the labeled tokens of a batch, record after record, and where these are among the tokens
    from the second on.

    Raises:
        DataError: no token is labeled.
    """
    learnt = batch["labels"][:, 1:] != IGNORED  # position i predicts token i + 1
    if not bool(learnt.any()):
        raise DataError("a batch holds no token to learn: all its labels are masked")
    return next_token_logits(model, no_labels(dict(batch)), learnt), learnt


def make_next_token(options: TrainOptions, family: Family, data: Records) -> NextTokenObjective:
    """The objective, once model and data go with it.

    Raises:
        DataError: a model that does not generate text, or records that are no conversations.
    """
    if family.generative is None:
        raise DataError(
            f"{data.spec}: the next_token loss is for models that generate text; for this one choose prompt, linear "
            "or contrastive"
        )
    if not data.conversational:
        raise DataError(
            f"{data.spec}: the next_token loss needs conversations, questions or documents; say which format: the "
            "records have, e.g. llava, chat, qa or alpaca"
        )
    return NextTokenObjective(options.label_smoothing)
