"""The picture of a plan: ranks, compactness and the share of the gradient held over blocks and roles."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from corda_vlm import run_files
from corda_vlm.errors import ForeignFileError
from corda_vlm.families.options import ROLES, TOWERS
from corda_vlm.plan import AdapterPlan, SitePlan
from corda_vlm.report.document import Picture
from corda_vlm.report.markup import shortened
from corda_vlm.report.pictures import PLANS, PLANS_CAPTION
from corda_vlm.report.plots.style import FAINT, INK, literal_text, save

logger = logging.getLogger(__name__)

MOST = 4  # plans in one picture
_WORDS = {
    "q": "query", "k": "key", "v": "value", "o": "attention out", "up": "MLP up", "gate": "MLP gate",
    "down": "MLP down", "proj": "projection", "qkv": "query, key, value", "kv": "key, value",
    "gate_up": "MLP gate, up", "conv": "convolution", "linear": "linear",
}  # fmt: skip
_WIDTH = 11.5  # inches for all columns, at most
_BESIDE = 14  # columns up to which the two measures stand side by side


@dataclass(frozen=True)
class _Measure:
    """What a panel shows: a number of each site, and how it is drawn. One hue a measure, the more the darker."""

    title: str
    of: Callable[[SitePlan], float | None]
    text: Callable[[float], str]
    colors: str
    log: bool


_MEASURES = (
    _Measure("rank", lambda s: s.rank, lambda v: f"{v:.0f}", "Blues", True),
    _Measure(
        "compactness, log₁₀ π",
        lambda s: math.log10(s.compactness) if s.compactness else None,
        lambda v: f"{v:.1f}",
        "Oranges",
        False,
    ),
    _Measure(
        "share of the gradient held, %",
        lambda s: None if s.gradient_share is None else 100 * s.gradient_share,
        lambda v: f"{v:.0f}",
        "Greens",
        False,
    ),
)


@literal_text()
def plan_heatmap(plans: Mapping[str, AdapterPlan], path: str | Path) -> Path | None:
    """Draw each plan as panels of cells: blocks from left to right, roles from top to bottom.

    Blue: ranks, on a logarithmic scale; orange: log₁₀ of the compactness; green: the share of the new task's gradient
    that the adapter's directions hold. All plans share the scales. Layers outside of blocks have columns of their own,
    with their name; gray cells have no such layer, or no such number.

    Args:
        plans: name -> plan, drawn from top to bottom.
        path: PNG, written atomically.

    Returns:
        `path`; None without plans.
    """
    if not plans:
        return None
    measures = [m for m in _MEASURES if any(m.of(s) is not None for p in plans.values() for s in p.sites)]  # fmt: skip
    scales = {measure.title: _scale(measure, plans.values()) for measure in measures}
    grids = {name: _grids(plan) for name, plan in plans.items()}
    wide = max(sum(len(g.columns) for g in of) for of in grids.values())
    tall = max(len(of[0].roles) for of in grids.values())
    beside = wide <= _BESIDE
    across = wide * (len(measures) if beside else 1)
    cell = min(0.46, _WIDTH / across)
    heights = [0.95 + (0.3 * tall + 0.75) * (1 if beside else len(measures)) for _ in plans]
    figure = Figure(figsize=(cell * across + 2.6, sum(heights)), layout="constrained")
    rows: Any = figure.subfigures(len(plans), 1, height_ratios=heights, hspace=0.02, squeeze=False)[
        :, 0
    ]
    for row, (name, plan) in zip(rows, plans.items(), strict=True):
        room = int(figure.get_figwidth() / 0.088) - len(plan.spent) - 2  # letters of this size
        title = f"{shortened(name, max(12, room))}: {plan.spent}"
        row.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
        if beside:
            parts = row.subfigures(1, len(measures), wspace=0.02, squeeze=False)[0]
        else:
            parts = row.subfigures(len(measures), 1, hspace=0.02, squeeze=False)[:, 0]
        for part, measure in zip(parts, measures, strict=True):
            _panels(part, grids[name], measure, scales[measure.title], cell)
    save(figure, Path(path))
    return Path(path)


def heatmap_picture(run_dir: str | Path) -> Picture | None:
    """Draw `plans.png` of a run's plans that chose anything: ranks, or covariances.

    Plans lie in `run_dir/<variant>/plan.json`; the first four by name are drawn. None if there are none.
    """
    run_dir, chosen = Path(run_dir), {}
    for file in sorted(run_dir.glob(f"*/{run_files.PLAN}")):
        try:
            plan = AdapterPlan.load(file, factors=False)
        except ForeignFileError as error:
            logger.warning("%s is left out of the picture of plans: %s", file, error)
            continue
        if len({s.rank for s in plan.sites}) > 1 or any(s.scores for s in plan.sites):
            chosen[file.parent.name] = plan
    drawn = dict(list(chosen.items())[:MOST])
    path = plan_heatmap(drawn, run_dir / run_files.PLANS)
    if path is None:
        return None
    words = "; ".join(f"{name}: {_in_words(plan)}" for name, plan in drawn.items())
    left = ", ".join(name for name in chosen if name not in drawn)
    return Picture(
        path, f"{PLANS} {words}.", PLANS_CAPTION + (f" Not drawn: {left}." if left else "")
    )


def _in_words(plan: AdapterPlan) -> str:
    by_role: dict[str, list[int]] = {}
    for site in plan.sites:
        by_role.setdefault(site.site.role, []).append(site.rank)
    means = {role: float(np.mean(ranks)) for role, ranks in by_role.items()}
    most, least = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    words = plan.spent
    if means[most] > means[least]:
        words += (
            f", on average most in {_WORDS[most]} ({means[most]:.1f}) and least in {_WORDS[least]} "
            f"({means[least]:.1f})"
        )
    rounds = [s.round for s in plan.sites if s.scores]
    if rounds:
        words += f", covariances of {len(set(rounds))} calibration rounds"
    return words


# ------------------------------------------------------------------ the grid of a tower


@dataclass(frozen=True)
class _Grid:
    """The layers of a tower, placed.

    Attributes:
        columns: headings: block numbers, then names of what lies outside of blocks.
        roles: of the rows, the same for all towers of a plan.
        cells: (row, column) -> its site plan.
    """

    tower: str
    columns: tuple[str, ...]
    roles: tuple[str, ...]
    cells: Mapping[tuple[int, int], SitePlan]


def _grids(plan: AdapterPlan) -> list[_Grid]:
    grids, present = [], {s.site.role for s in plan.sites}
    roles = tuple(role for role in ROLES if role in present)
    for tower in TOWERS:
        sites = [s for s in plan.sites if s.site.tower == tower]
        if not sites:
            continue
        columns = [
            str(b) for b in sorted({s.site.block for s in sites if s.site.block is not None})
        ]
        cells: dict[tuple[int, int], SitePlan] = {}
        for site in sites:
            at = str(site.site.block) if site.site.block is not None else _outside(site.site.name)
            row = roles.index(site.site.role)
            # a second layer of the same role, as of two blocks with one number: a column of its own
            free = [i for i, column in enumerate(columns) if column == at and (row, i) not in cells]
            if not free:
                free = [len(columns)]
                columns.append(at)
            cells[row, free[0]] = site
        grids.append(_Grid(tower, tuple(columns), roles, cells))
    return grids


def _outside(name: str) -> str:
    """A short heading for a layer outside of blocks: "head" for vision_model.head.attention.q_proj."""
    parts = name.split(".")
    part = parts[1] if len(parts) > 2 else parts[-1]
    part = part.removeprefix("visual_").removeprefix("text_").replace("projection", "proj")
    return shortened(part, 24)


# ------------------------------------------------------------------ drawing


def _scale(measure: _Measure, plans: Any) -> Normalize:
    values = [v for plan in plans for s in plan.sites if (v := measure.of(s)) is not None]
    low, high = min(values), max(values)
    if low == high:  # one shade, in the middle
        low, high = (low / 2, high * 2) if measure.log else (low - 1, high + 1)
    return LogNorm(low, high) if measure.log else Normalize(low, high)


def _panels(
    part: Any, grids: Sequence[_Grid], measure: _Measure, scale: Normalize, cell: float
) -> None:
    """One measure of one plan: a panel for each tower, and the scale."""
    widths = [len(grid.columns) for grid in grids]
    panels = part.subplots(1, len(grids), width_ratios=widths, squeeze=False)[0]
    # the lightest and the darkest shades hide their cell's edge, or its text
    shades = colormaps[measure.colors](np.linspace(0.06, 0.9, 256))
    colors = LinearSegmentedColormap.from_list(measure.colors, shades)
    numbers = [
        measure.text(v) for g in grids for s in g.cells.values() if (v := measure.of(s)) is not None
    ]
    # all of them, or none
    fits = cell >= max(0.2, 0.075 * max(map(len, numbers), default=0) + 0.05)
    image = None
    for panel, grid in zip(panels, grids, strict=True):
        values = _values(grid, measure)
        panel.set_facecolor("#ededed")
        image = panel.pcolormesh(
            np.ma.masked_invalid(values), cmap=colors, norm=scale, edgecolors="white", linewidth=1
        )
        if fits:
            _write_numbers(panel, values, measure, scale, cell)
        _label(panel, grid, cell, roles=grid is grids[0])
    panels[0].set_title(measure.title, fontsize=10, color=INK, loc="left")
    _draw_scale(part, panels, image, measure, scale)


def _values(grid: _Grid, measure: _Measure) -> np.ndarray:
    """(roles, columns) the number of each cell, NaN where there is none."""
    values = np.full((len(grid.roles), len(grid.columns)), np.nan)
    for at, site in grid.cells.items():
        value = measure.of(site)
        values[at] = np.nan if value is None else value
    return values


def _write_numbers(
    panel: Any, values: np.ndarray, measure: _Measure, scale: Normalize, cell: float
) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            panel.text(
                column + 0.5, row + 0.5, measure.text(value), ha="center", va="center",
                fontsize=min(8.5, 25 * cell), color="white" if scale(value) > 0.6 else INK,
            )  # fmt: skip


def _label(panel: Any, grid: _Grid, cell: float, *, roles: bool) -> None:
    """Write the headings of the columns, of the rows if `roles`, and the tower's name."""
    panel.invert_yaxis()
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0, labelcolor=INK, labelsize=8.5)
    step = max(1, math.ceil(0.22 / cell))  # headings that do not run into one another
    shown = [i for i, c in enumerate(grid.columns) if not c.isdigit() or int(c) % step == 0]
    panel.set_xticks([i + 0.5 for i in shown], [grid.columns[i] for i in shown])
    for label in panel.get_xticklabels():
        if not label.get_text().isdigit():
            label.set_rotation(90)
    names = [_WORDS[role] for role in grid.roles] if roles else []
    panel.set_yticks(np.arange(len(grid.roles)) + 0.5, names)
    title = grid.tower if grid.tower == "projector" else f"{grid.tower} blocks"
    panel.set_xlabel(title, fontsize=8.5, color=FAINT)


def _draw_scale(part: Any, panels: Any, image: Any, measure: _Measure, scale: Normalize) -> None:
    bar = part.colorbar(image, ax=list(panels), pad=0.02, aspect=18)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=INK)
    if measure.log:
        assert scale.vmin is not None
        assert scale.vmax is not None
        powers = [2**k for k in range(20) if scale.vmin <= 2**k <= scale.vmax]
        bar.ax.yaxis.set_major_locator(FixedLocator(powers))
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
