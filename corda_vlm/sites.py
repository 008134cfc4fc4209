"""Which weight matrices a model has, in which tower, and fed by which input stream.

A family declares patterns (`Rule`); this file resolves them against a model to `Site`s. Names are those of the
base model with its attention unpacked: they do not change when the model is packed, or wrapped by PEFT.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.errors import NoSitesError
from corda_vlm.families import Family, Rule, any_family, family_of, unwrap
from corda_vlm.families.layers.attention import is_packed, packed_parts
from corda_vlm.families.layers.conv1d import is_conv1d
from corda_vlm.families.layers.conv2d import is_conv2d, left_out
from corda_vlm.families.layers.experts import (
    Slice,
    is_router,
    is_stack,
    slices_of,
    stacked_weights,
)
from corda_vlm.families.layers.matrix import Matrix, matrix_of, stored
from corda_vlm.families.options import ROLES, TOWERS, chosen_names, listed_names
from corda_vlm.names import quoted
from corda_vlm.text_table import text_table

_SAMPLES = 256  # weights of each site that the fingerprint looks at


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
        for name, matrix in _matrices(bare).items()
        if (site := _resolved(rules, found, bare, name, matrix.kernel))
    ]


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


def get_linear(model: nn.Module, name: str, *, as_trained: bool = False) -> nn.Linear:
    """The layer of a site as of `get_layer`, where that has to be an `nn.Linear`."""
    layer = get_layer(model, name, as_trained=as_trained)
    if not isinstance(layer, nn.Linear):
        raise NoSitesError(f"{name} is a {type(layer).__name__}, not an nn.Linear")
    return layer


def get_layer(model: nn.Module, name: str, *, as_trained: bool = False) -> nn.Linear | nn.Conv2d:
    """The base layer of a site, inside PEFT's wrappers too.

    Args:
        as_trained: of a module that `modules_to_save` trains whole, PEFT's trained copy, not the original.

    Raises:
        NoSitesError: no such layer, or it is a part of a packed attention layer (see `attention.unpacked`).
    """
    module: nn.Module = unwrap(model)
    for step, key in enumerate(parts := name.split(".")):
        if is_packed(module):
            raise NoSitesError(
                f"{name}: {'.'.join(parts[:step])} is packed, so its parts are no modules yet; "
                "work under corda_vlm.families.layers.attention.unpacked(model)"
            )
        if is_stack(module):
            raise NoSitesError(
                f"{name}: {'.'.join(parts[:step])} keeps its experts in one parameter, so that none is a module yet; "
                "work under corda_vlm.families.layers.attention.unpacked(model)"
            )
        child = module._modules.get(key)
        if child is None:
            raise NoSitesError(f"{type(unwrap(model)).__name__} has no layer {name!r}")
        module = inner_layer(child, as_trained=as_trained)
    if is_conv1d(module):
        raise NoSitesError(
            f"{name} is a Conv1D, which is no nn.Linear yet; work under corda_vlm.families.layers.attention.unpacked(model)"
        )
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and is_conv2d(module)):
        return module
    why = left_out(module)
    raise NoSitesError(
        f"{name} is a {type(module).__name__}, "
        + (f"{why}" if why else "neither an nn.Linear nor an nn.Conv2d")
    )


def lies_in(site: str, modules: Iterable[str]) -> bool:
    """Is the site one of these modules of the bare model, or in one of them?"""
    return f"{site}.".startswith(tuple(f"{module}." for module in modules))


def site_shapes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of these sites' weights, packed or not; the model is walked once for all of them.

    Raises:
        NoSitesError: the model has no such layer.
    """
    return {name: matrix.shape for name, matrix in _of(model, names).items()}


def site_slices(model: nn.Module) -> dict[str, Slice]:
    """Site name -> where its weight lies, of those that are no module of their own: experts in a stack, and routers."""
    found: dict[str, Slice] = {}
    for path, module in _modules(unwrap(model), "", set()):
        found |= slices_of(module, path)
    return found


def site_shape(model: nn.Module, name: str) -> tuple[int, int]:
    """(out, in) of one site's weight; raises as `site_shapes` does."""
    return site_shapes(model, [name])[name]


def site_weights(model: nn.Module, names: Iterable[str]) -> SiteWeights:
    """Name -> weight of these sites, packed or not; raises as `site_shapes` does."""
    return SiteWeights(_of(model, names))


class SiteWeights(Mapping[str, Tensor]):
    """Site name -> weight (out, inp), detached, read each time it is looked up.

    A weight that is stored as a matrix is a view of its storage. One that is stored otherwise is made dense, and kept by nobody: all
    at once would take the memory that the storage saves.

    Attributes:
        shapes: site name -> (out, inp), for which nothing is read.
    """

    def __init__(self, matrices: Mapping[str, Matrix]) -> None:
        self._matrices = matrices
        self.shapes = {name: matrix.shape for name, matrix in matrices.items()}

    def __getitem__(self, name: str) -> Float[Tensor, "out inp"]:
        return self._matrices[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


def model_fingerprint(model: nn.Module, family: str | Family = "auto") -> str:
    """Hash of the sites' names, shapes and sampled weights: equal for one model in any dtype, packed or not.

    Of each weight matrix the signs of at most 256 evenly spaced entries go in: rounding to bfloat16 or float16
    keeps every sign, negative zeros included, while training turns some. Adapters of PEFT are not looked at, and neither
    is a convolution that reads the image itself, which of a model of no known family can be a site.
    """
    bare = unwrap(model)
    matrices = _matrices(bare)
    digest = hashlib.sha256()
    of = any_family(bare) if family == "auto" else family
    for site in find_sites(bare, of):
        matrix = matrices[site.name]
        if _reads_pixels(matrix):
            continue
        digest.update(f"{site.name}:{matrix.shape};".encode())
        digest.update(bytes(_signs(matrix.read())))
    return digest.hexdigest()[:32]


def _reads_pixels(matrix: Matrix) -> bool:
    """A convolution that reads at most four channels: the patch embedding of a ViT, which was no site once and is in no hash."""
    return matrix.kernel is not None and matrix.shape[1] <= 4 * math.prod(matrix.kernel)


def sites_table(model: nn.Module, sites: Sequence[Site], *, full: bool = False) -> str:
    """The sites as a table: one row for each role of a tower, its blocks collapsed; `full` gives one a site.

    Convolutions have their kernel beside their shape, and those that can be no sites are named below.
    """
    matrices = _of(model, [site.name for site in sites])
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    with_kernels = any(matrix.kernel for matrix in matrices.values())
    where = "layer" if full else "stream"
    headers = ["tower", "blocks", "role", "out × in", "kernel", where, "sites", "parameters"]
    rows: list[list[object]] = []
    for group in _groups(sites, matrices, full):
        first = group[0]
        out, inp = shapes[first.name]
        rows.append([
            first.tower,
            _ranges([site.block for site in group]),
            first.role,
            f"{out} × {inp}",
            "×".join(map(str, matrices[first.name].kernel or ())),
            first.name if full else _generic(first.stream),
            len(group),
            f"{sum(out * inp for _ in group):,}",
        ])  # fmt: skip
    if not with_kernels:
        for row in (headers, *rows):
            del row[4]
    right = [header in ("out × in", "kernel", "sites", "parameters") for header in headers]
    table = text_table(rows, headers, right=right)
    total = sum(out * inp for out, inp in shapes.values())
    streams = len({site.stream for site in sites})
    counts = f"{len(sites)} sites, {streams} streams, {total:,} parameters"
    return "\n".join([f"{table}\n\n{counts}", *_told_left_out(unwrap(model))])


def _told_left_out(model: nn.Module) -> Iterator[str]:
    """A line for each reason why convolutions of the model are no sites."""
    reasons: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if why := left_out(module):
            reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        yield f"{len(names)} convolutions are no sites, {why}: {quoted(names)}"


# ------------------------------------------------------------------ resolving


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def site_of(family: Family, model: nn.Module, name: str) -> Site | None:
    """The site of an `nn.Linear`, from the family's first rule that matches its whole path; None where none does."""
    return _resolved(family.rules_of(model), family, model, name, None)


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


def _of(model: nn.Module, names: Iterable[str]) -> dict[str, Matrix]:
    """Name -> weight of these sites; the model is walked once for all of them."""
    bare = unwrap(model)
    matrices, found = _matrices(bare), {}
    for name in names:
        if name not in matrices:
            raise NoSitesError(f"{type(bare).__name__} has no layer {name!r}")
        found[name] = matrices[name]
    return found


def _matrices(model: nn.Module) -> dict[str, Matrix]:
    """Base name -> weight of every linear layer and convolution, the parts of packed attention and wrapped layers included."""
    return dict(_walk(model, "", set()))


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, Matrix]]:
    for path, layer in _modules(module, prefix, seen):
        if is_packed(layer):
            for part, (weight, _) in packed_parts(layer).items():
                yield f"{path}.{part}", stored(weight)
        elif is_stack(layer):
            for name, expert, weight in stacked_weights(layer):
                yield f"{path}.{name}.{expert}", stored(weight)
        elif (matrix := matrix_of(layer)) is not None:
            yield path, matrix
        elif is_router(layer):
            yield path, stored(layer.weight)


def _modules(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Base name -> module of every layer, and of all that hold some; of wrapped ones what is inside."""
    module = inner_layer(module)
    if id(module) in seen:  # a shared layer is one site, under its first name
        return
    seen.add(id(module))
    yield prefix, module
    if not is_packed(module) and not is_stack(module) and matrix_of(module) is None:
        for key, child in module.named_children():
            yield from _modules(child, f"{prefix}.{key}" if prefix else key, seen)


def inner_layer(module: Any, *, as_trained: bool = False) -> nn.Module:
    """The layer that a PEFT layer wraps, or the module itself; `as_trained` as in `get_linear`."""
    # By attribute: PEFT's tuner layers have get_base_layer, its ModulesToSaveWrapper original_module.
    if hasattr(module, "get_base_layer"):
        return module.get_base_layer()
    original = module._modules.get("original_module")
    if original is None:
        return module
    if not as_trained:
        return original
    copies, active = module.modules_to_save, module.active_adapters
    return copies[active[0]] if active and active[0] in copies else original


def _signs(weight: Float[Tensor, "out inp"]) -> list[int]:
    return torch.signbit(sampled(weight)).cpu().to(torch.uint8).tolist()


def sampled(weight: Float[Tensor, "out inp"]) -> Float[Tensor, " n"]:
    """At most 256 evenly spaced entries, in row-major order."""
    flat = weight.reshape(-1)
    step = (
        max(1, flat.numel() // _SAMPLES) | 1
    )  # odd, so that it does not stay in one column of an even width
    return flat[::step][:_SAMPLES]


def _no_sites(model: nn.Module, family: Family, tower: str, present: Sequence[str]) -> str:
    kind, have = type(model).__name__, family.towers(model) or tuple(present)
    if tower not in have:
        return f"{kind} has no {tower} tower; it has: {', '.join(have)}"
    return (
        f"no layer of the {tower} tower of {kind} matches a rule of family {family.name!r}: it has no nn.Linear or nn.Conv2d "
        "that is known to be one to adapt (grouped convolutions, stems and patch embeddings are none). Choose "
        f"towers={','.join(present)!r}, or name layers of it in a Family of your own (docs/pages/extend.md)."
    )


# ------------------------------------------------------------------ the table


def _groups(sites: Sequence[Site], matrices: Mapping[str, Matrix], full: bool) -> list[list[Site]]:
    """Sites that share a row: one each, or the same role of all blocks, in the order of `ROLES`."""
    if full:
        return [[site] for site in sites]
    towers = list(dict.fromkeys(site.tower for site in sites))
    parts = list(dict.fromkeys(_part(site) for site in sites))
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        place = (towers.index(site.tower), site.block is None, parts.index(_part(site)))
        key = (*place, ROLES.index(site.role), *_size(matrices[site.name]), _generic(site.stream))
        groups.setdefault(key, []).append(site)
    return [groups[key] for key in sorted(groups)]


def _size(matrix: Matrix) -> tuple[tuple[int, int], tuple[int, int]]:
    return matrix.shape, matrix.kernel or (0, 0)


def _part(site: Site) -> str:
    """What a site belongs to: the blocks of a tower, its pooling head, …"""
    return re.sub(r"(\.attn|\.mlp)?\.\w+$", "", _generic(site.stream))


def _generic(stream: str) -> str:
    """A stream with the numbers of its path as `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", stream)


def _ranges(blocks: Sequence[int | None]) -> str:
    """[0, 1, 2, 5] -> "0–2, 5"."""
    numbers = sorted({block for block in blocks if block is not None})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs) or "–"
