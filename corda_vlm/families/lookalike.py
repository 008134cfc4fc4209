"""Decoders of transformers that no row names, but whose blocks look like Llama's: layers with the usual names, in one list.

What a name reads is taken from the decoders that are known, and calibration proves it; where the proof fails, or blocks
look otherwise, the layers are said by `targets`, or in a row of their own (`llm.family`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from corda_vlm.families import llm
from corda_vlm.families.architectures.decoders import DECODERS, LLAMA, SHARED
from corda_vlm.families.architectures.mixtures import expert_rules
from corda_vlm.families.base import Family, Layers, Rule, block_rules, class_of
from corda_vlm.families.layers.experts import is_stack
from corda_vlm.families.layers.walk import layers_of
from corda_vlm.families.loading.hub import config_of, has_weights

_log = logging.getLogger(__name__)


def _usual(*decoders: Layers) -> dict[str, tuple[str, str]]:
    """Layer -> its role, and what it reads: what comes after the attention, as in most decoders, is taken to read an input
    of its own, where in some both read one. Where that is so, it costs a covariance, no more.
    """
    found: dict[str, tuple[str, str]] = {}
    for layer, role, stream in (row for layers in decoders for row in layers):
        after = layer.startswith("mlp.") and stream == "attn.in"
        found.setdefault(layer, (role, "mlp.in" if after else stream))
    return found


_KNOWN = _usual(LLAMA, *(layers for _, layers in DECODERS.values()), SHARED)

_BLOCK = re.compile(r"(?P<path>(?:[^.\d][^.]*\.)*[^.\d][^.]*)\.\d+\.(?P<layer>.+)")


def blocks_of(model: nn.Module) -> tuple[str, Layers, tuple[str, ...]] | None:
    """Where the blocks of a bare model are, which layers of them are known by name, and which are not.

    None where it generates no text from text alone, has more than one list of blocks or none, or where these do not have
    attention and a feed-forward part with the usual names.
    """
    config = getattr(model, "config", None)
    if not {"PreTrainedModel", "GenerationMixin"} <= class_of(model, "transformers") or any(
        getattr(config, field, None)
        for field in ("is_encoder_decoder", "vision_config", "audio_config")
    ):
        return None
    lists: dict[str, dict[str, None]] = {}
    for path, layer in _in_blocks(model):
        lists.setdefault(path, {})[layer] = None
    if len(lists) != 1:
        return None
    ((path, names),) = lists.items()
    layers = tuple((layer, *_KNOWN[layer]) for layer in names if layer in _KNOWN)
    roles = {role for _, role, _ in layers}
    feeds = {"down"} <= roles and roles & {"up", "gate_up"}
    mixes = any(is_stack(module) for module in model.modules())
    if not ("o" in roles and roles & {"q", "qkv"} and (feeds or mixes)):
        return None
    return path, layers, tuple(layer for layer in names if layer not in _KNOWN)


def _in_blocks(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(path of a list of blocks, path in a block) of every linear layer, with an adapter around it or without."""
    for name, module in layers_of(model):
        if isinstance(module, nn.Linear) and (match := _BLOCK.fullmatch(name)):
            yield match["path"], match["layer"]


def rules(model: nn.Module) -> tuple[Rule, ...]:
    """The rules of a bare model that looks like Llama."""
    found = blocks_of(model)
    assert found is not None  # as it matches
    path, layers, left_out = found
    _say(type(model).__name__, path, ", ".join(left_out))
    return (
        *block_rules(re.escape(path), "language", layers),
        *expert_rules(re.escape(path)),
    )


@lru_cache
def _say(kind: str, path: str, left_out: str) -> None:
    _log.warning(
        "no family knows %s, but its blocks %s look like those of Llama, as which it is adapted%s",
        kind,
        path,
        f"; left out are {left_out}" if left_out else "",
    )


def _matches(model: nn.Module) -> bool:
    return blocks_of(model) is not None


def generates(config: dict[str, Any]) -> bool:
    """Is this the configuration of a model of text alone that generates text?"""
    return config.get("vision_config") is None and any(
        str(name).endswith("ForCausalLM") for name in config.get("architectures") or ()
    )


def _reads(folder: Path) -> bool:
    return generates(config_of(folder)) and has_weights(folder)


LOOKALIKE: Family = llm.family("decoder", (), rules, matches=_matches, reads=_reads)
"""Asked for a model that no other family knows."""
