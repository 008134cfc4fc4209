"""Experts and routers of transformers 5, presented as `nn.Linear` while something has to see their weights or inputs.

A mixture's experts are a stack: one parameter (experts, out, in) for each matrix, (experts, in, out) in GPT-OSS and Llama 4,
which one call multiplies with the tokens that the router sends to each. No module is called for one expert, so that no
hook sees its tokens. `unpack_experts` puts a module with an `nn.Linear` an expert in the stack's place,
`experts.gate_up_proj.5` say, whose weight is a view of the stack, and which runs one expert after another whatever
`experts_implementation` the model has; `pack_experts` puts the same original module back. A router that keeps its weight
as a parameter becomes a `RouterLinear`.

Only classes of transformers itself are taken for experts: nothing of a model's folder is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from corda_vlm.errors import CordaError
from corda_vlm.families.layers.slots import slots_of

STACKS = ("gate_up_proj", "up_proj", "down_proj")
_DENSE = (
    "Llama4TextExperts"  # every expert is given every token, times a score that is zero for most
)


@dataclass(frozen=True)
class Slice:
    """Where the weight of a site lies that is no module of its own.

    Attributes:
        module: dotted path of the module that has the parameter, in the bare model.
        parameter: its name there.
        expert: which matrix of a stack; None of a parameter that is one matrix.
        mistaken: each matrix is kept as (in, out), which the module does not say, so that PEFT takes it for (out, in).
    """

    module: str
    parameter: str
    expert: int | None = None
    mistaken: bool = False

    @property
    def path(self) -> str:
        return f"{self.module}.{self.parameter}"


def is_stack(module: nn.Module | None) -> bool:
    """Are these the experts of a mixture, each matrix of all of them one parameter?"""
    if module is None or not _of_transformers(module):
        return False
    down = module._parameters.get("down_proj")
    known = _is_dense(module) or hasattr(module, "is_transposed")
    return known and down is not None and down.dim() == 3


def is_router(module: nn.Module | None) -> bool:
    """Does this choose the experts of each token, by a weight that is no `nn.Linear`'s, or by one that gives out more?"""
    if (
        module is None
        or not _of_transformers(module)
        or not type(module).__name__.endswith("Router")
    ):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2


def _of_transformers(module: nn.Module) -> bool:
    # by name, so that this file does not import transformers for models that never use it
    return type(module).__module__.startswith("transformers.models.")


def is_flipped(module: Any) -> bool:
    """Is each matrix of this stack kept as (in, out)?"""
    return _is_dense(module) or bool(module.is_transposed)


def _is_dense(module: nn.Module) -> bool:
    # of its bases too: while PEFT runs it, its class is one that torch makes for parametrized modules
    return any(kind.__name__ == _DENSE for kind in type(module).__mro__)


def is_mistaken(module: Any) -> bool:
    """Is it kept as (in, out), and does not say so?"""
    return is_flipped(module) and not getattr(module, "is_transposed", False)


def stacked_weights(module: Any) -> Iterator[tuple[str, int, Float[Tensor, "out inp"]]]:
    """(parameter, expert, weight as (out, in)) of each matrix of a stack, as views that share its storage."""
    for name in STACKS:
        if (stack := module._parameters.get(name)) is not None:
            for expert, matrix in enumerate(stack.detach()):
                yield name, expert, matrix.T if is_flipped(module) else matrix


def slices_of(module: Any, path: str) -> dict[str, Slice]:
    """Site name -> where its weight lies, of a stack or a router at a dotted path; of anything else none."""
    if is_router(module):
        return {path: Slice(path, "weight")}
    if not is_stack(module):
        return {}
    return {
        f"{path}.{name}.{expert}": Slice(path, name, expert, is_mistaken(module))
        for name, expert, _ in stacked_weights(module)
    }


class ExpertLinear(nn.Linear):
    """One matrix of a stack; `rows` are the places of the tokens in hand among all of the batch, set while it is called."""

    rows: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, trainable: bool) -> None:
        nn.Module.__init__(self)  # nothing is allocated or initialized
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=trainable)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.rows = None


class UnpackedExperts(nn.Module):
    """The experts of a mixture as an `nn.Linear` each; holds the original, unregistered, to put it back."""

    packed: Any

    def __init__(self, packed: Any) -> None:
        super().__init__()
        # Not a child: its parameters would be listed twice, and `.to()` would move them apart.
        self.__dict__["packed"] = packed
        lists: dict[str, nn.ModuleList] = {}
        for name, expert, weight in stacked_weights(packed):
            biases = packed._parameters.get(f"{name}_bias")
            linear = ExpertLinear(
                weight,
                None if biases is None else biases.detach()[expert],
                packed._parameters[name].requires_grad,
            )
            lists.setdefault(name, nn.ModuleList()).append(linear)
        for name, linears in lists.items():
            self.add_module(name, linears)
        self.train(packed.training)

    @property
    def _first(self) -> str:
        return STACKS[0] if STACKS[0] in self._modules else STACKS[1]

    def forward(self, hidden_states: Float[Tensor, "t d"], *routing: Any, **named: Any) -> Tensor:
        if not routing and not named:
            return self._dense(hidden_states)
        chosen, weights = (*routing, *named.values())
        top_k = chosen.shape[-1]
        experts = chosen.reshape(-1)  # (t·k,), the pairs of tokens and experts
        order = experts.argsort(stable=True)
        counts = experts.bincount(minlength=len(self._list(self._first))).tolist()
        outputs = [
            self._expert(number, hidden_states[pairs // top_k], pairs // top_k)
            for number, pairs in enumerate(order.split(counts))
            if len(pairs)
        ]
        found = torch.cat(outputs) * weights.reshape(-1)[order, None]
        found = found[order.argsort()].unflatten(0, (-1, top_k)).sum(1)  # (t, d)
        return found.to(hidden_states.dtype)

    def _dense(self, hidden_states: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Llama 4: one copy of all tokens an expert, and zeros where the router did not choose it."""
        copies = hidden_states.view(len(self._list(self._first)), -1, hidden_states.shape[-1])
        found = torch.zeros_like(copies)  # (experts, t, d)
        for number, copy in enumerate(copies):
            rows = copy.detach().ne(0).any(1).nonzero().flatten()
            if len(rows):
                found[number, rows] = self._expert(number, copy[rows], rows)
        return found.view(-1, hidden_states.shape[-1])

    def _expert(
        self, number: int, x: Float[Tensor, "n d"], rows: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d"]:
        first, last = self._list(self._first)[number], self._list("down_proj")[number]
        first.rows = last.rows = rows
        try:
            found = last(self._between(first(x)))
        finally:
            first.rows = last.rows = None
        after = getattr(self.packed, "has_post_expert_norm", False)
        return self.packed.post_expert_norm(found) if after else found

    def _between(self, x: Float[Tensor, "n m"]) -> Float[Tensor, "n f"]:
        """Gate and activation, as the model's own class has them."""
        if self._first != STACKS[0]:
            return self.packed.act_fn(x)
        if hasattr(self.packed, "_apply_gate"):
            return self.packed._apply_gate(x)
        gate, up = x.chunk(2, dim=-1)
        return up * self.packed.act_fn(gate)

    def _list(self, name: str) -> Any:
        return self._modules[name]


class RouterLinear(nn.Linear):
    """A router as an `nn.Linear` that has its weight and runs it; holds the original, unregistered, to put it back."""

    packed: Any

    def __init__(self, packed: Any) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.weight.shape
        self.weight, self.bias = packed.weight, getattr(packed, "bias", None)
        self.__dict__["packed"] = packed
        self.train(packed.training)

    def forward(self, input: Float[Tensor, "*b d"], *more: Any, **named: Any) -> Any:
        return self.packed(input, *more, **named)  # LFM2's is given a bias of each expert


def unpack_experts(model: nn.Module) -> list[str]:
    """Replace every stack and every router that no adapter wraps, in place; return their dotted names.

    Raises:
        CordaError: the experts are spread over processes.
    """
    made: dict[int, nn.Module] = {}
    names = []
    for name, parent, key in slots_of(model):
        module: Any = parent._modules[key]
        if key == "base_layer" or not (is_stack(module) or is_router(module)):
            continue
        if getattr(module, "_is_expert_parallel", False):
            raise CordaError(
                f"{name}: its experts are spread over processes, and each sees a part of the tokens; load the model without "
                "expert parallelism"
            )
        if id(module) not in made:
            made[id(module)] = UnpackedExperts(module) if is_stack(module) else RouterLinear(module)
        parent._modules[key] = made[id(module)]
        names.append(name)
    return names


def pack_experts(model: nn.Module, only: Sequence[str] | None) -> list[str]:
    """Undo `unpack_experts` for the modules of these names, None for all; return the names of those put back."""
    names = []
    for name, parent, key in slots_of(model):
        module: Any = parent._modules[key]
        if not isinstance(module, (UnpackedExperts, RouterLinear)):
            continue
        if only is not None and name not in only:
            continue
        if isinstance(module, UnpackedExperts):
            _copy_back(module)
        else:
            module.packed.weight = module.weight
        module.packed.train(module.training)
        parent._modules[key] = module.packed
        names.append(name)
    return names


def _copy_back(layer: UnpackedExperts) -> None:
    """Give the original the values of the parts where those have left its storage (`model.to(dtype)`)."""
    packed: Any = layer.packed
    views: Mapping[tuple[str, int], Tensor] = {(n, e): w for n, e, w in stacked_weights(packed)}
    for name, linears in layer._modules.items():
        assert isinstance(linears, nn.ModuleList)
        parts: list[Any] = list(linears)
        trainable = any(part.weight.requires_grad for part in parts)
        if all(_is_view(part.weight, views[name, n]) for n, part in enumerate(parts)):
            packed._parameters[name].requires_grad_(trainable)
            continue
        matrices = [part.weight.detach() for part in parts]
        whole = torch.stack([m.T for m in matrices] if is_flipped(packed) else matrices)
        packed._parameters[name] = nn.Parameter(whole, requires_grad=trainable)
        if parts[0].bias is not None:
            biases = torch.stack([part.bias.detach() for part in parts])
            learns = packed._parameters[f"{name}_bias"].requires_grad
            packed._parameters[f"{name}_bias"] = nn.Parameter(biases, requires_grad=learns)


def _is_view(part: Tensor, own: Tensor) -> bool:
    return (part.data_ptr(), part.dtype, part.stride()) == (own.data_ptr(), own.dtype, own.stride())
