"""The pictures of a report: the trade-off between task and kept knowledge, and the training curves."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from corda_vlm.evaluation.frontier import REFERENCE, Point, Results, Setting, kept_at, mean_point
from corda_vlm.evaluation.placement import Words
from corda_vlm.files import atomic_write

logger = logging.getLogger(__name__)

# Okabe and Ito's palette, then Tol's muted one: told apart with any colour vision. Marker and label repeat
# what colour says.
_COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
    "#332288", "#882255", "#117733", "#999933", "#666666", "#AA4499",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h", "d")
# The three of the demo look the same in every report.
_FIRST = ("corda-kpm", "lora", "full")
_INK, _FAINT = "#222222", "#767676"


def styles(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Method -> (colour, marker): those of the demo always their own, the others what is left.

    From the thirteenth method on colours come again, with other markers.
    """
    free = iter(range(len(_FIRST), len(_COLOURS) + len(methods)))
    found = {}
    for method in methods:
        index = _FIRST.index(method) if method in _FIRST else next(free)
        again = index // len(_COLOURS)
        found[method] = (
            _COLOURS[index % len(_COLOURS)],
            _MARKERS[(index + 3 * again) % len(_MARKERS)],
        )
    return found


def tradeoff(results: Results, path: Path) -> bool:
    """Draw task accuracy against kept knowledge: a curve for each method over its learning rates.

    Returns whether there was anything to draw.
    """
    base = results.base_point
    points = {method: found for method in results.trained if (found := results.points(method))}
    if base is None or not points:
        return False
    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    axes = figure.subplots()
    look = styles(list(points))
    curves: dict[str, dict[Setting, Point]] = {}
    ink: dict[str, list[np.ndarray]] = defaultdict(list)
    for method, settings in points.items():
        colour, marker = look[method]
        means = {setting: mean_point(by_seed.values()) for setting, by_seed in settings.items()}
        unscaled = {s: p for s, p in means.items() if s.scale == 1.0}
        for setting, by_seed in settings.items():
            if setting.scale == 1.0 and len(by_seed) > 1:
                axes.plot(
                    [p.task for p in by_seed.values()], [p.kept for p in by_seed.values()],
                    linestyle="", marker=marker, markersize=4, color=colour, alpha=0.35, markeredgewidth=0,
                )  # fmt: skip
        axes.plot(
            [p.task for p in unscaled.values()], [p.kept for p in unscaled.values()],
            marker=marker, markersize=7.5, color=colour, linewidth=2, markeredgecolor="white", zorder=3,
        )  # fmt: skip
        if len(means) > len(unscaled):
            frontier = _envelope(means, base)
            ink[method].append(np.array([(p.task, p.kept) for p in frontier]))
            axes.plot(
                [p.task for p in frontier], [p.kept for p in frontier],
                linestyle=(0, (4, 2)), linewidth=1.4, color=colour, alpha=0.9, zorder=2,
            )  # fmt: skip
        if unscaled:
            curves[method] = unscaled
            ink[method].append(np.array([(p.task, p.kept) for p in unscaled.values()]))
    found = np.array(
        [(p.task, p.kept) for of in points.values() for by in of.values() for p in by.values()]
    )
    (left, bottom), (right, _) = found.min(0), found.max(0)
    # curves far from the base model, or from chance, would be a knot in a corner: look closer
    base_is_far = left - base.task > 1.5 * (right - left)
    chance_is_far = bottom > 0.3
    if base_is_far:
        axes.axhline(1.0, color=_INK, linewidth=1, linestyle="--", zorder=1)
        axes.annotate(
            f"base model, {base.task:.0%} on the new task", (0, 1.0), xycoords=("axes fraction", "data"),
            xytext=(6, 4), textcoords="offset points", color=_INK, fontsize=10,
        )  # fmt: skip
    else:
        axes.plot(base.task, 1.0, marker="*", markersize=17, color=_INK, linestyle="", zorder=4)
    if not chance_is_far:
        axes.axhline(0.0, color=_FAINT, linewidth=1, linestyle=":")
        axes.annotate(
            "chance", (1, 0.0), xycoords=("axes fraction", "data"), xytext=(-4, 3),
            textcoords="offset points", ha="right", color=_FAINT, fontsize=9,
        )  # fmt: skip
    best = results.best_setting(REFERENCE)
    if best is not None:
        aim = mean_point(points[REFERENCE][best].values()).task
        ink["aim"].append(np.array([[aim, bottom if chance_is_far else 0.0], [aim, 1.0]]))
        axes.axvline(aim, color=look[REFERENCE][0], linewidth=1, linestyle=":", alpha=0.8, zorder=1)
        axes.annotate(
            f"{REFERENCE}'s best", (aim, 0), xycoords=("data", "axes fraction"), xytext=(-4, 4),
            textcoords="offset points", rotation=90, ha="right", va="bottom",
            color=look[REFERENCE][0], fontsize=8.5,
        )  # fmt: skip
    _frame(axes)
    axes.xaxis.set_major_formatter(_percent())
    axes.yaxis.set_major_formatter(_percent())
    axes.margins(x=0.08, y=0.08)
    floor = bottom - 0.12 * (1.0 - bottom) if chance_is_far else min(-0.03, axes.get_ylim()[0])
    ceiling = 1.0 + 0.12 * (1.0 - floor) if chance_is_far else 1.08
    axes.set_ylim(top=max(ceiling, found[:, 1].max() + 0.02), bottom=floor)
    axes.set_xlabel(f"accuracy on the new task ({', '.join(results.gain)})")
    axes.set_ylabel("knowledge kept (base model 100%, chance 0%)")
    several = any(len(by_seed) > 1 for settings in points.values() for by_seed in settings.values())
    told = "one curve a method over its learning rates"
    told += " (small numbers)" if len(curves) <= 6 else ""
    told += "; faint marks: single seeds" if several else ""
    told += "; dashed: scaled after training" if len(results.curves()) > len(points) else ""
    axes.set_title(told, fontsize=9.5, color=_FAINT, loc="left")
    if not base_is_far:
        ink["base"].append(np.array([[base.task, 1.0]]))
    words = Words(axes, ink)
    if not base_is_far:
        words.add("base model", [(base.task, 1.0)], 10.0, "base", color=_INK)
    for method, curve in curves.items():
        along = [(p.task, p.kept) for p in sorted(curve.values(), key=lambda p: -p.kept)]
        middle = len(along) // 2
        preferred = [along[middle], *along[:middle], *along[middle + 1 :]]
        words.add(method, preferred, 11.0, method, color=look[method][0], fontweight="bold")
    for method, curve in curves.items():
        rated = [(s.learning_rate, p) for s, p in curve.items() if s.learning_rate is not None]
        if len(curves) > 6 or len(rated) < 2:  # too many curves to read them by
            continue
        for rate, point in (rated[0], rated[-1]):
            words.add(f"{rate:g}", [(point.task, point.kept)], 7.5, method, color=look[method][0])
    _save(figure, path)
    return True


def training_curves(run_dir: Path, path: Path) -> bool:
    """Draw the training loss of every run that left a history.jsonl, a panel for each method.

    Histories lie in `run_dir/<method>/<learning rate>-<seed>/history.jsonl`, rows with `step` and `loss`.
    Returns whether there was anything to draw.
    """
    histories = _histories(run_dir)
    if not histories:
        return False
    columns = min(3, len(histories))
    lines = -(-len(histories) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.6, 2.6 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(histories) :]:
        panel.set_visible(False)
    top = []
    for panel, (method, runs) in zip(panels.flat, histories.items(), strict=False):
        rates = sorted({rate for rate, _, _ in runs})
        shades = colormaps["viridis"](np.linspace(0.1, 0.8, len(rates)))
        named = set()
        for rate, steps, losses in sorted(runs, key=lambda run: run[0]):
            smooth = _smooth(losses)
            top += [float(v) for v in smooth if np.isfinite(v)]
            panel.plot(
                steps, smooth, color=shades[rates.index(rate)], linewidth=1.2,
                label=f"{rate:g}" if rate not in named else None,
            )  # fmt: skip
            named.add(rate)
        panel.set_title(method, fontsize=10.5, loc="left", color=_INK)
        panel.legend(title="learning rate", fontsize=7.5, title_fontsize=7.5, frameon=False)
        _frame(panel)
    if top:  # a run that diverged must not flatten all the others
        panels[0, 0].set_ylim(0, float(np.percentile(top, 99)) * 1.1)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    for panel in panels[:, 0]:
        panel.set_ylabel("training loss")
    _save(figure, path)
    return True


def _histories(run_dir: Path) -> dict[str, list[tuple[float, list[int], list[float]]]]:
    found: dict[str, list[tuple[float, list[int], list[float]]]] = {}
    for file in sorted(run_dir.glob("*/*/history.jsonl")):
        try:
            rate = float(file.parent.name.rsplit("-", 1)[0])
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            logger.warning("%s is left out of the training curves: %s", file, error)
            continue
        losses = [
            (int(row["step"]), float(row["loss"]))
            for row in rows
            if "step" in row and "loss" in row
        ]
        if losses:
            steps, values = zip(*losses, strict=True)
            found.setdefault(file.parent.parent.name, []).append((rate, list(steps), list(values)))
    return found


def _smooth(losses: Sequence[float]) -> np.ndarray:
    """A running mean over a twentieth of the run, shorter at both ends."""
    half = max(0, len(losses) // 40)
    values = np.asarray(losses, dtype=float)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _envelope(means: Mapping[Setting, Point], base: Point) -> list[Point]:
    """The frontier over learning rates and scales: the most that is kept at each task accuracy."""
    grid = np.linspace(base.task, max(p.task for p in means.values()), 200)
    heights = [kept_at(means, float(task), base) for task in grid]
    return [Point(float(t), h) for t, h in zip(grid, heights, strict=True) if h is not None]


def _frame(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_FAINT, labelcolor=_INK)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _percent() -> Any:
    return PercentFormatter(xmax=1.0, decimals=0, symbol="%")


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path) as partial:
        figure.savefig(
            partial, dpi=160, format="png", facecolor="white", metadata={"Software": None}
        )
