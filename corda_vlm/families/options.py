"""Options about the model: how it is loaded, and which of its layers are meant. Read before PyTorch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from typing_extensions import TypedDict

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.options import Items, Text, check_options

if TYPE_CHECKING:
    import torch

    from corda_vlm.families.base import Family

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "int8"]
Tower = Literal["vision", "text", "projector", "language", "model"]
Role = Literal[
    "q",
    "k",
    "v",
    "o",
    "up",
    "gate",
    "down",
    "proj",
    "qkv",
    "kv",
    "gate_up",
    "router",
    "conv",
    "linear",
]
Tokens = Literal["all", "prompt", "response", "image", "text"]
"""Which tokens of a language model count for a covariance."""

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
TOWERS: tuple[Tower, ...] = get_args(Tower)
ROLES: tuple[Role, ...] = get_args(Role)
TOKENS: tuple[Tokens, ...] = get_args(Tokens)

Names = Annotated[Sequence[Text], Items(distinct=True)]
"""Several names, each once."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        family: The family whose format is expected, for a folder that holds more than one; "auto" finds out.
        dtype: What the weights are kept in. A language model of billions of parameters wants bfloat16.
        device: "cpu", "cuda", "cuda:1", …, or "auto": the first GPU if there is one, else the CPU.
        quantization: Keep the weight matrices in four bits (nf4, as QLoRA does) or eight (int8); models of transformers alone, by
            bitsandbytes. What is no matrix, and what is computed, is in `dtype`.
        device_map: "auto" spreads a language model over all GPUs, as in transformers; `device` is then not looked at.
        trust_remote_code: Run the Python code that comes with the model. Without it none of it runs, and nobody is asked.
    """

    family: Text = "auto"
    dtype: Dtype = "float32"
    device: Text = "auto"
    quantization: Quantization | None = None
    device_map: str | dict[str, Any] | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_options(self)


class LoadKeywords(TypedDict, total=False):
    """`LoadOptions` as keywords of a function; there a family, dtype or device may also be the thing itself."""

    family: str | Family
    dtype: Dtype | torch.dtype
    device: str | int | torch.device
    quantization: Quantization | None
    device_map: Any
    trust_remote_code: bool


@dataclass(frozen=True, kw_only=True)
class SiteOptions:
    """Which weight matrices of a model are meant.

    Attributes:
        towers: Only these of vision, text, projector and language (a model of no known family has one, model), e.g. vision,text; the default is all that the model has.
        roles: Only these of q, k, v, o, up, gate, down, proj, qkv, kv, gate_up, conv and router (in a model of no known family: linear and conv), e.g. q,v; the default is all but router.
        targets: Only the nn.Linear and nn.Conv2d layers whose dotted names are like these patterns, in which * is any text, e.g.
            encoder.layer.*.attention.self.query; of a model that no family knows they say what is adapted at all.
    """

    towers: Names | str | None = None
    roles: Names | str | None = None
    targets: Names | str | None = None

    def __post_init__(self) -> None:
        check_options(self)
        chosen_names("tower", self.towers, TOWERS)
        chosen_names("role", self.roles, ROLES)
        listed_names("target", self.targets)


class SiteKeywords(TypedDict, total=False):
    """`SiteOptions` as keywords of a function."""

    towers: Sequence[str] | str | None
    roles: Sequence[str] | str | None
    targets: Sequence[str] | str | None


def chosen_names(
    kind: str, names: Sequence[str] | str | None, choices: Sequence[str]
) -> list[str] | None:
    """The names as of `listed_names`, each of which is among the choices.

    Raises:
        UnknownNameError: one that is not.
        CordaError: not one name.
    """
    chosen = listed_names(kind, names, f"choose from {', '.join(choices)}, or ")
    for name in chosen or ():
        if name not in choices:
            raise UnknownNameError(kind, name, choices)
    return chosen


def listed_names(
    kind: str, names: Sequence[str] | str | None, choose: str = ""
) -> list[str] | None:
    """The names in a list, or in a text with commas between them; None stays None.

    Args:
        kind: what they are names of, for the messages.
        choose: what to choose from, for the message.

    Raises:
        CordaError: not one name.
    """
    if names is None:
        return None
    listed = names.split(",") if isinstance(names, str) else names
    chosen = [stripped for name in listed if (stripped := name.strip())]
    if not chosen:
        raise CordaError(f"no {kind} given; {choose}leave it out for all")
    return chosen
