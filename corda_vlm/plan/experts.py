"""What a plan has to know of experts that share one parameter: they are planned all or none, with one rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.covariance import GradientStore
from corda_vlm.errors import CordaError
from corda_vlm.names import quoted
from corda_vlm.sites import Site, site_slices

logger = logging.getLogger(__name__)


def stacks_of(model: nn.Module, sites: Sequence[Site]) -> dict[str, list[str]]:
    """Dotted path of each parameter that holds the experts of a layer -> the sites in it.

    Raises:
        CordaError: some experts of one are among the sites, and others are not.
    """
    chosen = {site.name for site in sites}
    stacks: dict[str, list[str]] = {}
    for name, part in site_slices(model).items():
        if part.expert is not None:
            stacks.setdefault(part.path, []).append(name)
    for path, members in stacks.items():
        left = [name for name in members if name not in chosen]
        if left and len(left) < len(members):
            raise CordaError(
                f"the {len(members)} experts of {path} are one parameter, which PEFT adapts as a whole, and {quoted(left)} "
                f"are left out: give targets that are like all of them ({path}.*) or none"
            )
    return {path: members for path, members in stacks.items() if members[0] in chosen}


def check_one_rank(stacks: Mapping[str, Sequence[str]], rule: str | None) -> None:
    """Raise `CordaError` where ranks are shared out over sites of which some have to have one rank."""
    if rule is not None and stacks:
        path, members = next(iter(stacks.items()))
        raise CordaError(
            f"dynamic_rank gives each matrix a rank of its own, and the {len(members)} experts of {path} have one parameter, "
            "for which PEFT has one rank: leave dynamic_rank out, or the experts, with roles=q,k,v,o (--roles)"
        )


class StackGradients(Mapping[str, Tensor]):
    """The gradient of a new task, in which an expert that saw none of its tokens has the mean of its stack's others.

    No direction is better than another for such an expert: those that its neighbors learn along are as likely as any.
    """

    def __init__(self, gradient: GradientStore, stacks: Mapping[str, Sequence[str]]) -> None:
        self._gradient = gradient
        self._stand_ins = {
            name: [other for other in members if other in gradient]
            for members in stacks.values()
            for name in members
            if name not in gradient and any(other in gradient for other in members)
        }
        self._last: tuple[list[str], Tensor] | None = None
        if self._stand_ins:
            logger.warning(
                "the new task sent no token to the experts of %d sites, which take the mean gradient of their stack's others: %s",
                len(self._stand_ins),
                quoted(list(self._stand_ins)),
            )

    def __getitem__(self, site: str) -> Float[Tensor, "out inp"]:
        others = self._stand_ins.get(site)
        if others is None:
            return self._gradient[site]
        if self._last is None or self._last[0] != others:
            total = self._gradient[others[0]].clone()
            for other in others[1:]:
                total += self._gradient[other]
            self._last = others, total / len(others)
        return self._last[1]

    def __contains__(self, site: object) -> bool:
        return site in self._stand_ins or site in self._gradient

    def __iter__(self) -> Iterator[str]:
        yield from self._gradient
        yield from self._stand_ins

    def __len__(self) -> int:
        return len(self._gradient) + len(self._stand_ins)
