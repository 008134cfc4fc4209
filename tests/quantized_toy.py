"""A tiny language model, and its copies in four and eight bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from corda_vlm.families.loading.quantization import dequantize_model, quantize_model
from tests.families.language_toy import TEXT, text_batch

KINDS = ("nf4", "int8", "torchao")
OF_BITSANDBYTES = KINDS[:2]


def dense() -> Any:
    """Its rows are multiples of 64, else bitsandbytes reads four bits wrongly on a CPU."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TEXT, **sizes})).eval()


def quantized(kind: str, model: nn.Module | None = None) -> Any:
    """A copy of the model with its weights kept otherwise; skips where the package is not installed."""
    model = copy.deepcopy(dense() if model is None else model)
    if kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
        return model
    pytest.importorskip("bitsandbytes", reason="the extra corda-vlm[quantized] is not installed")
    return quantize_model(model, kind)


def dequantized_copy(model: nn.Module) -> Any:
    """The dense model that a quantised one stands for."""
    return dequantize_model(copy.deepcopy(model), torch.float32)


def batches(count: int = 5) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [text_batch(3) for _ in range(count)]
