"""What a server of models takes of an export, and the command with which it does.

- `vllm` takes ranks up to 512, if `--max-lora-rank` says so (1, 8, 16, 32, 64, 128, 256, 320 or 512; without it 16); no
  `modules_to_save`; and layers of the language model alone: those of towers it passes over without an error, unless
  `--enable-tower-connector-lora`, an experiment for some models, is given. Read in vLLM 0.33.0: `config/lora.py`,
  `lora/peft_helper.py` (`validate_legal`), `lora/lora_model.py` (`from_local_checkpoint`), `lora/model_manager.py`; its
  GPT-2 takes no LoRA (`model_executor/models/gpt2.py`).
- `llama.cpp` takes one `lora_alpha` for all layers; tensors that are an A or a B and no others; and layers of the language
  model that its converter finds again: none of towers, none that transformers stores transposed, no head that is tied to the
  embeddings. Read in llama.cpp as llama-cpp-python 0.3.36 ships it: `convert_lora_to_gguf.py` (`get_tensors`,
  `modify_tensors`), `conversion/base.py`, `conversion/gpt2.py`, `src/llama-adapter.cpp`.

Patterns of ranks and of alpha, which one or the other ignores, are in no export of ours: its ranks are filled up with zeros to
one, and alpha is that rank. Neither are biases, DoRA or names of PEFT's own for fused layers: an export has plain pairs A, B by the
layers' names in transformers.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from corda_vlm.adapter.paired import base_of
from corda_vlm.adapter.wrapped.carriers import carriers
from corda_vlm.adapter.wrapped.targets import as_parameters
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.families import any_family
from corda_vlm.families.layers.conv1d import TransposedLinear, is_conv1d
from corda_vlm.families.layers.walk import inner_layer
from corda_vlm.sites import site_of, site_slices

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be; vLLM 0.33.0, `MaxLoRARanks` of `vllm/config/lora.py`."""

BASE = "BASE"
"""Stands in a command for a model of which no folder and no id is known."""


@dataclass(frozen=True)
class Layers:
    """What an adapter changes.

    Attributes:
        model: bare.
        sites: the names of the layers with a pair A, B.
        full: the names of modules that are trained in full beside it.
    """

    model: nn.Module
    sites: tuple[str, ...]
    full: tuple[str, ...]

    def outside(self) -> list[str]:
        """The sites that are not of the language model."""
        family = any_family(self.model)
        found = ((name, site_of(family, self.model, name)) for name in self.sites)
        return [name for name, site in found if site and site.tower in ("vision", "projector")]

    def parameters(self) -> list[str]:
        """The sites that PEFT adapts as parameters: experts and routers, and what it would take for them."""
        return [*as_parameters(self.sites, site_slices(self.model), plain=True)[1]]

    def heads(self) -> list[str]:
        """The sites that give the logits, where their weight is that of the embeddings too."""
        get_in, get_out = (
            getattr(self.model, f"get_{end}_embeddings", lambda: None)
            for end in ("input", "output")
        )
        tokens, head = get_in(), get_out()
        if tokens is None or head is None or tokens.weight is not head.weight:
            return []
        return [name for name in self.sites if self.model.get_submodule(name) is head]

    def transposed(self) -> list[str]:
        """The sites whose weights transformers stores transposed."""
        inner = {name: inner_layer(self.model.get_submodule(name)) for name in self.sites}
        return [
            n
            for n, layer in inner.items()
            if isinstance(layer, TransposedLinear) or is_conv1d(layer)
        ]


@dataclass(frozen=True)
class Written:
    """What an export has written, for the commands.

    Attributes:
        folder: where it is.
        format: "lora", "residual" or "merged".
        base: the folder (an absolute path) or the id on a hub of the model that the adapter belongs on, `BASE` where neither is
            known.
        rank: of the adapter; None of "merged".
    """

    folder: Path
    format: str
    base: str
    rank: int | None


@dataclass(frozen=True)
class Server:
    """A program that serves models.

    Attributes:
        refuses: what the adapter changes -> for each kind of thing that the server does not take, why, and what of it there is.
        ranks: the ranks that it can be told to take, in ascending order; None where any will do.
        commands: what was written -> the commands that serve it.
    """

    refuses: Callable[[Layers], Iterator[tuple[str, list[str]]]]
    commands: Callable[[Written], list[str]]
    ranks: tuple[int, ...] | None = None


def check_served(server: str, model: PeftModel, name: str, format: str, layout: str) -> None:
    """Raise unless a server takes what the adapter `name` changes, as far as that does not depend on ranks.

    Raises:
        UnknownNameError: no such server.
        CordaError: the model writes no text, or the server would refuse the adapter, or leave a part of it out.
    """
    if server not in SERVERS:
        raise UnknownNameError("server", server, SERVERS)
    bare = base_of(model)
    if any_family(bare).generative is None:
        raise CordaError(
            f"serve={server!r} is for models that generate text, and {type(bare).__name__} is none; leave serve out"
        )
    if layout == "peft":
        raise CordaError(f"serve={server!r} needs the adapter beside its base: take layout='ours'")
    if format == "merged":
        return
    full = tuple(getattr(model.peft_config[name], "modules_to_save", None) or ())
    sites = tuple(site for carrier in carriers(model, name) for site in carrier.sites)
    layers = Layers(bare, sites, full)
    for why, names in SERVERS[server].refuses(layers):
        if names:
            raise CordaError(
                f"{server} {why}, and this adapter has {len(names)} of them, first {names[0]!r}. Take format='merged', or train "
                "without them"
            )


def commands(server: str, written: Written) -> list[str]:
    """The commands that serve an export, once `check_served` has passed.

    Raises:
        CordaError: its rank is more than the server takes.
    """
    ranks = SERVERS[server].ranks
    if ranks is not None and written.rank is not None and written.rank > ranks[-1]:
        raise CordaError(
            f"the adapter has rank {written.rank}, and {server} takes at most {ranks[-1]}; give rank={ranks[-1]} with "
            "format='lora', which recompresses it, or take format='merged'"
        )
    return SERVERS[server].commands(written)


_OF_PARAMETERS = "is not known to read PEFT's adapters of parameters (target_parameters)"


def _refused_by_vllm(layers: Layers) -> Iterator[tuple[str, list[str]]]:
    yield _OF_PARAMETERS, layers.parameters()
    yield "takes no modules that are trained in full (modules_to_save)", list(layers.full)
    yield (
        "applies a LoRA to the language model alone, and would pass over other layers",
        layers.outside(),
    )
    yield "has no LoRA for models whose layers are stored transposed", layers.transposed()


def _refused_by_llama_cpp(layers: Layers) -> Iterator[tuple[str, list[str]]]:
    yield _OF_PARAMETERS, layers.parameters()
    yield (
        "takes tensors of a LoRA alone, and no modules that are trained in full",
        list(layers.full),
    )
    yield "converts a LoRA of the language model alone", layers.outside()
    yield "has no tensor of its own for a head that is tied to the embeddings", layers.heads()
    yield (
        "turns layers round that are stored transposed, and with them A and B",
        layers.transposed(),
    )


def _vllm(written: Written) -> list[str]:
    folder = str(written.folder)
    if written.rank is None:
        return [shlex.join(["vllm", "serve", folder])]
    allowed = next(rank for rank in VLLM_RANKS if rank >= written.rank)
    return [
        shlex.join([
            "vllm", "serve", written.base, "--enable-lora", "--max-lora-rank", str(allowed),
            "--lora-modules", _named(written.folder.name, folder),
        ])
    ]  # fmt: skip


def _named(name: str, folder: str) -> str:
    """An adapter as `--lora-modules` takes it: name=path, or JSON where that has signs which part it (`LoRAParserAction`)."""
    parted = any(sign in part for part in (name, folder) for sign in "=,")
    return json.dumps({"name": name, "path": folder}) if parted else f"{name}={folder}"


def _llama_cpp(written: Written) -> list[str]:
    folder = written.folder
    convert = ["python", "convert_hf_to_gguf.py"]
    if written.rank is None:
        model = str(folder / "model.gguf")
        return [
            shlex.join([*convert, str(folder), "--outfile", model]),
            shlex.join(["llama-server", "-m", model]),
        ]
    adapter, model = str(folder / "adapter.gguf"), "base.gguf"
    is_id = written.base != BASE and not Path(written.base).is_absolute()
    whole = ["--remote", written.base] if is_id else [written.base]
    of = ["--base-model-id" if is_id else "--base", written.base]
    return [
        shlex.join([*convert, *whole, "--outfile", model]),
        shlex.join(["python", "convert_lora_to_gguf.py", str(folder), *of, "--outfile", adapter]),
        shlex.join(["llama-server", "-m", model, "--lora", adapter]),
    ]


SERVERS: Mapping[str, Server] = {
    "vllm": Server(_refused_by_vllm, _vllm, ranks=VLLM_RANKS),
    "llama.cpp": Server(_refused_by_llama_cpp, _llama_cpp),
}
"""The servers by name."""


def served(server: str, written: Written) -> dict[str, Any]:
    """What `corda_export.json` notes of a server."""
    return {"serve": server, "serve_commands": commands(server, written)}
