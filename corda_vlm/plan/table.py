"""The plan as a table for a reader."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from corda_vlm.text_table import text_table

if TYPE_CHECKING:
    from corda_vlm.plan.plan import AdapterPlan, SitePlan

_LEGEND = {
    "tokens": "that the router sent to each expert; in brackets how many experts saw too few, and take the covariance of their layer's together",
    "score": "of the calibration round taken, the lowest; others: of the rounds that were not",
    "log₁₀ π": "compactness of the covariance; the lower, the less a small component can change the outputs",
    "gradient": "the share of the task's gradient, in the method's metric, that the adapted directions hold",
    "at risk": "‖B A C'‖² / ‖W C'‖², the share of the knowledge's energy in the adapted directions",
}


def table_of(plan: AdapterPlan) -> str:
    """One row a site, and for the experts of a layer; columns that would say nothing are left out."""
    # heading, whether it is aligned to the right, cell of a site
    every: list[tuple[str, bool, Callable[[SitePlan], str]]] = [
        ("site", False, lambda s: s.site.name),
        ("shape", True, lambda s: f"{s.shape[0]}×{s.shape[1]}"),
        ("side", False, lambda s: s.side),
        ("round", True, lambda s: "" if s.round is None else str(s.round)),
        ("score", True, lambda s: _score(min(s.scores)) if s.scores else ""),
        ("others", False, _others),
        ("log₁₀ π", True, lambda s: f"{math.log10(s.compactness):.2f}" if s.compactness else ""),
        ("tokens", True, lambda s: "" if s.tokens is None else f"{s.tokens:,}"),
        ("rank", True, lambda s: str(s.rank)),
        ("gradient", True, lambda s: "" if s.gradient_share is None else f"{100 * s.gradient_share:.0f}%"),
        ("at risk", True, lambda s: _percent(s.predicted_damage)),
        ("floored", True, lambda s: str(s.floored or "")),
    ]  # fmt: skip
    columns = [
        column
        for column in every
        if any(column[2](s) for s in plan.sites)
        and (column[0] != "side" or len({s.side for s in plan.sites}) > 1)
    ]
    rows = [[_cell(head, cell, group) or "-" for head, _, cell in columns] for group in _rows(plan)]
    heads = [head for head, _, _ in columns]
    named = f"{plan.method}-{plan.mode}" if plan.mode else plan.method
    scale = (
        f"rows of A at norm {plan.a_norm:g}"
        if plan.a_norm is not None
        else "the method's own split"
    )
    if plan.a_norm is None and not any(s.gradient_share is not None for s in plan.sites):
        scale = "the paper's split"
    lines = [
        f"{named}: {len(plan.sites)} sites of {plan.family}, damping {plan.damping:g}, {scale}",
        text_table(rows, heads, [right for _, right, _ in columns]),
        plan.spent,
        *(f"{head}: {_LEGEND[head]}" for head in heads if head in _LEGEND),
    ]
    return "\n".join(lines)


def _rows(plan: AdapterPlan) -> list[list[SitePlan]]:
    """The sites that share a row: experts with one path but for their number."""
    groups: dict[str | int, list[SitePlan]] = {}
    for number, planned in enumerate(plan.sites):
        key = number if planned.site.pool is None else _path(planned)
        groups.setdefault(key, []).append(planned)
    return list(groups.values())


def _path(planned: SitePlan) -> str:
    """The site's name, of an expert with `*` for its number."""
    if planned.site.pool is None:
        return planned.site.name
    head, _, tail = planned.site.name.rpartition(".experts.")
    return f"{head}.experts." + ".".join("*" if key.isdigit() else key for key in tail.split("."))


def _cell(head: str, cell: Callable[[SitePlan], str], group: list[SitePlan]) -> str:
    """What a row says: of several sites the lowest and the highest."""
    if len(group) == 1:
        text, pooled = cell(group[0]), group[0].pooled
        return f"{text} (1)" if head == "tokens" and pooled else text
    if head == "site":
        return f"{_path(group[0])} ({len(group)})"
    values = [(_number(head, planned), cell(planned)) for planned in group]
    (_, low), (_, high) = min(values), max(values)
    text = low if low == high else f"{low or '0'}–{high}"
    pooled = sum(planned.pooled for planned in group)
    return f"{text} ({pooled})" if head == "tokens" and pooled else text


def _number(head: str, planned: SitePlan) -> float:
    """What the cells of a column are ordered by."""
    value = {
        "score": min(planned.scores or (0.0,)),
        "log₁₀ π": planned.compactness,
        "tokens": planned.tokens,
        "rank": planned.rank,
        "round": planned.round,
        "gradient": planned.gradient_share,
        "at risk": planned.predicted_damage,
        "floored": planned.floored,
    }.get(head)
    return float(value or 0)


def _score(score: float) -> str:
    return f"{score:.2f}" if score < 1000 else f"{score:.0f}"


def _others(site: SitePlan) -> str:
    """The scores of the rounds that the site did not take."""
    if site.scores is None or site.round is None:
        return ""
    others = [score for index, score in enumerate(site.scores) if index != site.round]
    if not others:
        return ""
    low, high = _score(min(others)), _score(max(others))
    return low if low == high else f"{low}–{high}"


def _percent(share: float | None) -> str:
    return (
        "" if share is None else f"{100 * share:.2f}%" if share >= 1e-3 else f"{100 * share:.1e}%"
    )
