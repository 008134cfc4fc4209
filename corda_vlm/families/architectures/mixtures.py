"""What mixtures of experts have in a block in place of a feed-forward part: experts, what is shared beside them, a router.

Each expert's matrix is a site with a covariance of the tokens that the router sends it, and a pool to fall back to where those
are too few. In transformers 5 the experts of a layer are one parameter for each matrix (see `layers.experts`), in 4.57 most
are modules of their own; the names of both are in the rules. Shared experts see every token and are sites as any MLP is. Routers
are sites of the role "router", which nothing adapts unless it is asked for.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from corda_vlm.families.base import Rule
from corda_vlm.families.layers.experts import is_stack

_MIXTURE = r"(?P<moe>mlp|block_sparse_moe|feed_forward)"
_ONE = r"(?P<expert>\d+)"

# Path among the experts, role, what it reads within the expert: the stacks of transformers 5, and modules of 4.57.
_OF_EXPERTS = (
    (rf"gate_up_proj\.{_ONE}", "gate_up", "in"),
    (rf"up_proj\.{_ONE}", "up", "in"),
    (rf"down_proj\.{_ONE}", "down", "mid"),
    (rf"{_ONE}\.(?:gate_proj|w1)", "gate", "in"),
    (rf"{_ONE}\.(?:up_proj|w3)", "up", "in"),
    (rf"{_ONE}\.(?:down_proj|w2)", "down", "mid"),
)
_SHARED = (("gate_proj", "gate", "in"), ("up_proj", "up", "in"), ("down_proj", "down", "mid"))
_ROUTERS = r"(?:gate|router|router\.layer|shared_expert_gate)"


def expert_rules(path: str) -> tuple[Rule, ...]:
    """The rules of what is mixed in the blocks `<path>.<n>` of a decoder; `path` is a regular expression."""
    prefix = rf"(?P<prefix>{path}\.(?P<block>\d+))\.{_MIXTURE}"
    experts = [
        Rule(
            rf"{prefix}\.experts\.{layer}",
            "language",
            role,
            f"{{prefix}}.{{moe}}.experts.{{expert}}.{stream}",
            pool=f"{{prefix}}.{{moe}}.experts.{stream}",
        )
        for layer, role, stream in _OF_EXPERTS
    ]
    shared = [
        Rule(
            rf"{prefix}\.(?P<shared>shared_experts?)\.{layer}",
            "language",
            role,
            f"{{prefix}}.{{moe}}.{{shared}}.{stream}",
        )
        for layer, role, stream in _SHARED
    ]
    router = Rule(rf"{prefix}\.{_ROUTERS}", "language", "router", "{prefix}.{moe}.router.in")
    return (*experts, *shared, router)


def unknown_experts(model: Any) -> str | None:
    """Why the experts of a model cannot be adapted, or None."""
    for name, module in model.named_modules():
        if name.endswith(".experts") and _is_unknown(module):
            return (
                f"{name} keeps its experts in parameters of a layout that is not known ({type(module).__name__}): this takes "
                "transformers 5, `pip install -U transformers`"
            )
    return None


def _is_unknown(module: nn.Module) -> bool:
    stacked = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    return stacked and not is_stack(module)
