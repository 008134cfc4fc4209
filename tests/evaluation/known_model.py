"""A model whose every probability is known, and how the tests of text measure one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from corda_vlm.data import ChatOptions
from corda_vlm.evaluation.models.encoder import Encoder

PLAIN = ChatOptions(chat_template="plain")


class Bigram(nn.Module):
    """p(next | last) from a table; what the table leaves is shared by all other tokens."""

    def __init__(self, tokenizer: Any, table: dict[str, dict[str, float]]) -> None:
        super().__init__()
        size = len(tokenizer)
        known = torch.full((size, size), 1 / size)
        for last, row in table.items():
            left = (1 - sum(row.values())) / (size - len(row))
            known[one(tokenizer, last)] = left
            for following, share in row.items():
                known[one(tokenizer, last), one(tokenizer, following)] = share
        self.table = nn.Parameter(known.log())

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def one(tokenizer: Any, text: str) -> int:
    (found,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def encoder(model: nn.Module, loaded: Any, **options: Any) -> Encoder:
    return Encoder(model, loaded.family, loaded.processor, **{"batch_size": 3, **options})
