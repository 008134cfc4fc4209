"""Which weight matrices a model has, in which tower, and fed by which input stream.

A family declares patterns (`Rule`); this file resolves them against a model to `Site`s.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from torch import nn

from corda_vlm.errors import NoSitesError
from corda_vlm.families import Family, Rule, any_family, family_of, unwrap
from corda_vlm.families.options import ROLES, TOWERS, chosen_names, listed_names
from corda_vlm.sites.weights import all_matrices


@dataclass(frozen=True)
class Site:
    """One weight matrix.

    Attributes:
        name: dotted path of the layer in the bare model with unpacked attention.
        tower: "vision", "text", "projector" or "language"; "model" of one that no family knows.
        block: index of the transformer block, None outside of them.
        role: "q", "k", "v", "o", "up", "gate", "down", "proj", "conv", or fused: "qkv", "kv", "gate_up"; "router" of what
            chooses a token's experts; "linear" or "conv" of a model that no family knows.
        stream: sites that read the same input tensor share one stream, so one covariance.
        pool: of a site that sees some tokens of its layer alone, as an expert does: the name of the streams whose
            covariances together stand in for its own where it saw too few; None of all others.
    """

    name: str
    tower: str
    block: int | None
    role: str
    stream: str
    pool: str | None = None


def find_sites(
    model: nn.Module,
    family: str | Family = "auto",
    towers: str | Sequence[str] | None = None,
    roles: str | Sequence[str] | None = None,
    targets: str | Sequence[str] | None = None,
) -> list[Site]:
    """The weight matrices of `model` that can be adapted, in the model's order.

    Args:
        model: packed, unpacked, or wrapped by PEFT; not changed.
        towers: only these, a list or "vision,text"; None for all that the model has.
        roles: only these, a list or "q,v"; None for all but "router": what a router learns sends tokens to other experts than
            those whose covariances are known, so that it is adapted where it is asked for.
        targets: only layers whose names are like these patterns, in which `*` is any text; None for all. With them a model may
            be one that no family knows.

    Raises:
        UnknownNameError: a tower or role that does not exist.
        NoSitesError: a tower or role of which this model has no layer, or a pattern that none is like.
        CordaError: no family knows the model.
    """
    patterns = listed_names("target", targets)
    found = any_family(model) if family == "auto" and patterns else family_of(family, model)
    wanted = chosen_names("tower", towers, TOWERS)
    only = chosen_names("role", roles, ROLES)
    bare = unwrap(model)
    sites = every_site(bare, found)
    present = list(dict.fromkeys(site.tower for site in sites))
    for tower in wanted if wanted is not None else found.towers(bare):
        if tower not in present:
            raise NoSitesError(_no_sites(bare, found, tower, present))
    sites = [site for site in sites if wanted is None or site.tower in wanted]
    if only is None and patterns is None:
        sites = [site for site in sites if site.role != "router"]
    if not sites:
        raise NoSitesError(
            f"no layer of {type(bare).__name__} matches a rule of family {found.name!r}"
        )
    if only is not None:
        have = list(dict.fromkeys(site.role for site in sites))
        for role in only:
            if role not in have:
                raise NoSitesError(
                    f"no layer of {type(bare).__name__} has the role {role!r}"
                    + (f" in {', '.join(wanted)}" if wanted else "")
                    + f"; it has: {', '.join(have)}"
                )
        sites = [site for site in sites if site.role in only]
    return sites if patterns is None else _like(patterns, sites, bare)


def every_site(model: nn.Module, family: Family | None = None) -> list[Site]:
    """All that a family's rules match, routers included; family None: that of the model."""
    bare = unwrap(model)
    found = family or any_family(bare)
    rules = found.rules_of(bare)
    return [
        site
        for name, matrix in all_matrices(bare).items()
        if (site := _resolved(rules, found, bare, name, matrix.kernel))
    ]


def site_of(family: Family, model: nn.Module, name: str) -> Site | None:
    """The site of an `nn.Linear`, from the family's first rule that matches its whole path; None where none does."""
    return _resolved(family.rules_of(model), family, model, name, None)


def lies_in(site: str, modules: Iterable[str]) -> bool:
    """Is the site one of these modules of the bare model, or in one of them?"""
    return f"{site}.".startswith(tuple(f"{module}." for module in modules))


def _like(patterns: Sequence[str], sites: Sequence[Site], model: nn.Module) -> list[Site]:
    """The sites whose names are like one of the patterns; each pattern has to have one."""
    chosen: set[str] = set()
    names = [site.name for site in sites]
    for pattern in patterns:
        like = [name for name in names if fnmatchcase(name, pattern)]
        if not like:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
            raise NoSitesError(
                f"no layer of {type(model).__name__} that can be adapted has a name like {pattern!r}; a pattern is like the "
                f"whole name, and * is any text. {f'Did you mean {near[0]!r}?' if near else ''} "
                f"It has {len(names)}, from {names[0]} to {names[-1]}"
            )
        chosen.update(like)
    return [site for site in sites if site.name in chosen]


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _resolved(
    rules: Sequence[Rule],
    family: Family,
    model: nn.Module,
    name: str,
    kernel: tuple[int, int] | None,
) -> Site | None:
    known_as = family.canonical(model, name)
    for rule in rules:
        if rule.only == "conv" and kernel is None:
            continue
        if match := _compiled(rule.pattern).fullmatch(known_as):
            groups = match.groupdict()
            block = groups.get("block")
            return Site(
                name=name,
                tower=rule.tower,
                block=None if block is None else int(block),
                role=rule.role,
                stream=rule.stream.format(**groups),
                pool=None if rule.pool is None else rule.pool.format(**groups),
            )
    return None


def _no_sites(model: nn.Module, family: Family, tower: str, present: Sequence[str]) -> str:
    kind, have = type(model).__name__, family.towers(model) or tuple(present)
    if tower not in have:
        return f"{kind} has no {tower} tower; it has: {', '.join(have)}"
    return (
        f"no layer of the {tower} tower of {kind} matches a rule of family {family.name!r}: it has no nn.Linear or nn.Conv2d "
        "that is known to be one to adapt (grouped convolutions, stems and patch embeddings are none). Choose "
        f"towers={','.join(present)!r}, or name layers of it in a Family of your own (docs/pages/extend.md)."
    )
