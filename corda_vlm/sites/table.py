"""The sites of a model as a table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from corda_vlm.families import unwrap
from corda_vlm.families.layers.conv2d import left_out
from corda_vlm.families.layers.matrix import Matrix
from corda_vlm.families.options import ROLES
from corda_vlm.names import quoted
from corda_vlm.sites.find import Site
from corda_vlm.sites.weights import matrices_at
from corda_vlm.text_table import text_table


def sites_table(model: nn.Module, sites: Sequence[Site], *, full: bool = False) -> str:
    """The sites as a table: one row for each role of a tower, its blocks collapsed; `full` gives one a site.

    Convolutions have their kernel beside their shape, and those that can be no sites are named below.
    """
    matrices = matrices_at(model, [site.name for site in sites])
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
