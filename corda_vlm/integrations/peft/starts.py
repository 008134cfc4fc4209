"""The pair that the adapter of each layer starts from: computed, and kept in a file of safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import TypedDict

from corda_vlm.covariance import CollectOptions, CovarianceStore
from corda_vlm.decompose import decompose
from corda_vlm.errors import CordaError, ForeignFileError, UnknownNameError
from corda_vlm.files import shown
from corda_vlm.integrations.peft.layers import weight_of
from corda_vlm.plan.bases import MODES
from corda_vlm.plan.options import PlanOptions, Route, SideChoice
from corda_vlm.progress import track
from corda_vlm.tensors import load_tensors, read_header, save_tensors

HEADER = "corda_vlm.start"
"""The header's entry: JSON of what the pairs were computed for and how."""

Pairs = dict[str, tuple[Tensor, Tensor]]  # name of a layer -> B (out, r), A (r, inp)


class StartKeywords(TypedDict, total=False):
    """Options of `PlanOptions` and `CollectOptions` that a `CordaConfig` has no field for."""

    a_norm: float | None
    damping: float
    side: SideChoice | None
    route: Route
    seed: int
    precision: Literal["float32", "float64", "bf16"]


@dataclass(frozen=True)
class StartOptions:
    """How the pairs are computed.

    Attributes:
        plan: kpm or ipm as `mode`, with `a_norm`, `damping`, `side`, `route` and `seed`.
        precision: of the covariances, see `CollectOptions`.
    """

    plan: PlanOptions
    precision: str

    @classmethod
    def of(cls, method: str, given: Mapping[str, Any]) -> StartOptions:
        """The options that were given as keywords, and the defaults of the others.

        Raises:
            UnknownNameError: a keyword that is no option, or a method that is none of CorDA's.
            CordaError: a value out of its bounds.
        """
        for name in given:
            if name not in StartKeywords.__annotations__:
                raise UnknownNameError("option", name, StartKeywords.__annotations__)
        if method not in MODES:
            raise UnknownNameError("corda_method", method, MODES)
        plan = {name: value for name, value in given.items() if name != "precision"}
        collect = CollectOptions(**{name: given[name] for name in given if name == "precision"})
        if collect.precision == "auto":
            raise CordaError("precision='auto' is not for this; name float32, float64 or bf16")
        return cls(PlanOptions(method="corda", mode=method, **plan), collect.precision)  # pyright: ignore[reportArgumentType]

    def about(self) -> dict[str, Any]:
        """What pairs depend on, apart from the model, the data and the ranks."""
        names = ("mode", "a_norm", "damping", "side", "route", "seed")
        return {name: getattr(self.plan, name) for name in names}


@torch.no_grad()
def computed(
    layers: Mapping[str, nn.Module],
    store: CovarianceStore,
    ranks: Mapping[str, int],
    options: StartOptions,
) -> Pairs:
    """The pairs, float32 on the device of each weight.

    Raises:
        CordaError: the store lacks a layer, or has one of another width; a weight that holds NaN or Inf.
    """
    plan, pairs = options.plan, {}
    for name, layer in track([*layers.items()], "decompose", unit="layer"):
        weight = weight_of(layer)
        try:
            start = decompose(
                weight,
                store[name].matrix.to(weight.device if weight.device.type == "cuda" else "cpu"),
                rank=ranks[name],
                components=MODES[plan.mode],
                side=_side(weight, plan.side),
                damping=plan.damping,
                a_norm=plan.a_norm,
                route=plan.route,
                seed=plan.seed,
            )
        except CordaError as error:
            raise CordaError(f"layer {name!r}: {error}") from error
        pairs[name] = start.B, start.A
    return pairs


def _side(weight: Float[Tensor, "out inp"], side: SideChoice | None) -> Literal["output", "input"]:
    if side == "auto":
        return "input" if weight.shape[1] > weight.shape[0] else "output"
    return side or "output"


def save_pairs(path: str | Path, pairs: Pairs, about: Mapping[str, Any]) -> None:
    """Write the pairs to `path`, atomically, with what they are of."""
    tensors = {f"{name}.lora_B": B for name, (B, _) in pairs.items()}
    tensors |= {f"{name}.lora_A": A for name, (_, A) in pairs.items()}
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, {HEADER: json.dumps(dict(about))})


def load_pairs(path: str | Path, ranks: Mapping[str, int], about: Mapping[str, Any]) -> Pairs:
    """The pairs of a file of `save_pairs`, for these layers.

    Raises:
        ForeignFileError: no such file, damaged, or its pairs are of another model, method, rank or setting; says which.
    """
    what, remedy = "cache of CorDA's start", "delete it, or give another cache_file"
    refuse_pickle(path, what, remedy)
    _, header = read_header(path, what, remedy)
    try:
        noted = json.loads(header[HEADER])
        different = [key for key, value in about.items() if noted[key] != value]
    except (KeyError, TypeError, ValueError):
        raise ForeignFileError(f"{shown(path)} is no {what} of this package; {remedy}") from None
    if different:
        key = different[0]
        raise ForeignFileError(
            f"{shown(path)} is a {what} made with {key} {noted[key]!r}, and {about[key]!r} is wanted; {remedy}"
        )
    tensors, pairs = load_tensors(path, what, remedy), {}
    for name, rank in ranks.items():
        B, A = tensors.get(f"{name}.lora_B"), tensors.get(f"{name}.lora_A")
        if B is None or A is None or A.shape[0] != rank:
            has = "no such layer" if A is None else f"rank {A.shape[0]}"
            raise ForeignFileError(
                f"{shown(path)} has {has} where {name!r} with rank {rank} is wanted; {remedy}"
            )
        pairs[name] = B, A
    return pairs


def refuse_pickle(path: str | Path, what: str, remedy: str) -> None:
    """Raise `ForeignFileError` for a file as `torch.save` writes it: reading it could run code."""
    with Path(path).open("rb") as file:
        begun = file.read(9)
        # safetensors begin with the length of a header in JSON, whose bytes may be those that pickles begin with
        plain = (
            begun[8:] == b"{" and int.from_bytes(begun[:8], "little") < Path(path).stat().st_size
        )
        if begun[:2] in (b"PK", b"\x80\x02") and not plain:
            raise ForeignFileError(
                f"{shown(path)} is a pickle, as PEFT's own preprocess_corda writes them, which may run code when it is read; "
                f"this {what} is a file of safetensors: {remedy}"
            )
