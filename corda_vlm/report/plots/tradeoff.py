"""The picture of the trade-off: accuracy on the new task against knowledge kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from corda_vlm.names import listed
from corda_vlm.report.analysis.curve import Curve, Point, Setting, mean_point
from corda_vlm.report.analysis.learned import learned, reference_learned
from corda_vlm.report.analysis.results import REFERENCE, Results
from corda_vlm.report.markup import shortened
from corda_vlm.report.plots.labels import Words
from corda_vlm.report.plots.style import FAINT, INK, frame, literal_text, percent_axis, save, styles
from corda_vlm.report.words import FEW, ONE_SEED, over_all

NEAR = 0.95
"""The share of the reference's best accuracy at which panels tell what is kept."""

_Placed = Mapping[str, Mapping[Setting, Mapping[int | None, Point]]]


@literal_text()
def tradeoff(results: Results, path: Path) -> bool:
    """Draw task accuracy against kept knowledge: a curve for each method over its learning rates, and over its scales.

    Few methods share one picture; of more, each has a panel, with the reference in gray in every one.
    Returns whether there was anything to draw.
    """
    base = results.base_point
    points = {method: placed for method in results.trained if (placed := results.points(method))}
    if base is None or not points:
        return False
    if len(points) <= FEW:
        figure = _together(results, points, base)
    else:
        figure = _panels(results, points, base)
    save(figure, path)
    return True


def _together(results: Results, points: _Placed, base: Point) -> Figure:
    """All methods in one panel, each with its own mark and name."""
    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    axes = figure.subplots()
    look = styles(list(points))
    ink: _Ink = defaultdict(list)
    curves = _draw_curves(axes, points, base, look, ink)
    every = np.array(
        [(p.task, p.kept) for of in points.values() for by in of.values() for p in by.values()]
    )
    (left, bottom), (right, top) = every.min(0).tolist(), every.max(0).tolist()
    # curves far from the base model, or from chance, would be a knot in a corner: look closer
    base_is_far = left - base.task > 1.5 * (right - left)
    chance_is_far = bottom > 0.3
    _draw_base(axes, base, base_is_far)
    if not chance_is_far:
        _draw_chance(axes)
    best = results.best_setting(REFERENCE) if reference_learned(results) else None
    if best is not None:
        aim = mean_point(points[REFERENCE][best].values()).task
        ink["aim"].append(np.array([[aim, bottom if chance_is_far else 0.0], [aim, 1.0]]))
        _draw_aim(axes, aim, look[REFERENCE][0])
    frame(axes)
    axes.xaxis.set_major_formatter(percent_axis())
    axes.yaxis.set_major_formatter(percent_axis())
    axes.margins(x=0.08, y=0.08)
    _limit(axes, bottom, top, chance_is_far)
    axes.set_xlabel(new_task(results))
    axes.set_ylabel("knowledge kept (base model 100%, chance 0%)")
    several = any(len(by_seed) > 1 for settings in points.values() for by_seed in settings.values())
    title = "one curve a method over its learning rates"
    title += " (small numbers)" if len(curves) <= 6 else ""
    title += "; faint marks: single seeds" if several else ""
    title += "; dashed: scaled after training" if len(results.curves()) > len(points) else ""
    title += "" if best is not None else _unlearned(results)
    axes.set_title(title, fontsize=9.5, color=FAINT, loc="left")
    if not base_is_far:
        ink["base"].append(np.array([[base.task, 1.0]]))
    words = Words(axes, ink)
    if not base_is_far:
        words.add("base model", [(base.task, 1.0)], 10.0, "base", color=INK)
    _name_curves(words, curves, look)
    return figure


_Ink = dict[str, list[np.ndarray]]
"""What is drawn of each method, which its words must not cover: lists of (x, y)."""


def _draw_curves(
    axes: Any, points: _Placed, base: Point, look: Mapping[str, tuple[str, str]], ink: _Ink
) -> dict[str, dict[Setting, Point]]:
    """Draw each method over its learning rates, and give the means over seeds that its curve goes through."""
    curves: dict[str, dict[Setting, Point]] = {}
    for method, settings in points.items():
        color, marker = look[method]
        means = {setting: mean_point(by_seed.values()) for setting, by_seed in settings.items()}
        unscaled = {s: p for s, p in means.items() if s.scale == 1.0}
        for setting, by_seed in settings.items():
            if setting.scale == 1.0 and len(by_seed) > 1:
                axes.plot(
                    [p.task for p in by_seed.values()], [p.kept for p in by_seed.values()],
                    linestyle="", marker=marker, markersize=4, color=color, alpha=0.35, markeredgewidth=0,
                )  # fmt: skip
        axes.plot(
            [p.task for p in unscaled.values()], [p.kept for p in unscaled.values()],
            marker=marker, markersize=7.5, color=color, linewidth=2, markeredgecolor="white", zorder=3,
        )  # fmt: skip
        if len(means) > len(unscaled):
            frontier = envelope(means, base)
            ink[method].append(np.array([(p.task, p.kept) for p in frontier]))
            axes.plot(
                [p.task for p in frontier], [p.kept for p in frontier],
                linestyle=(0, (4, 2)), linewidth=1.4, color=color, alpha=0.9, zorder=2,
            )  # fmt: skip
        if unscaled:
            curves[method] = unscaled
            ink[method].append(np.array([(p.task, p.kept) for p in unscaled.values()]))
    return curves


def _draw_base(axes: Any, base: Point, is_far: bool) -> None:
    """The model before training: a star, or where it lies far off a line with its words."""
    if not is_far:
        axes.plot(base.task, 1.0, marker="*", markersize=17, color=INK, linestyle="", zorder=4)
        return
    axes.axhline(1.0, color=INK, linewidth=1, linestyle="--", zorder=1)
    axes.annotate(
        f"base model, {base.task:.0%} on the new task", (0, 1.0), xycoords=("axes fraction", "data"),
        xytext=(6, 4), textcoords="offset points", color=INK, fontsize=10,
    )  # fmt: skip


def _draw_chance(axes: Any) -> None:
    axes.axhline(0.0, color=FAINT, linewidth=1, linestyle=":")
    axes.annotate(
        "chance", (1, 0.0), xycoords=("axes fraction", "data"), xytext=(-4, 3),
        textcoords="offset points", ha="right", color=FAINT, fontsize=9,
    )  # fmt: skip


def _draw_aim(axes: Any, aim: float, color: str) -> None:
    """The task accuracy of the reference at its best."""
    axes.axvline(aim, color=color, linewidth=1, linestyle=":", alpha=0.8, zorder=1)
    axes.annotate(
        f"{REFERENCE}'s best", (aim, 1), xycoords=("data", "axes fraction"), xytext=(-4, -3),
        textcoords="offset points", ha="right", va="top", color=color, fontsize=9,
    )  # fmt: skip


def _limit(axes: Any, bottom: float, top: float, chance_is_far: bool) -> None:
    """The base model's 1.0 is always in sight, also where all others keep more, or nearly the same."""
    low, high = min(bottom, 1.0), max(top, 1.0)
    edge = 0.12 * max(high - low, 0.05)
    floor = low - edge if chance_is_far else min(-0.03, axes.get_ylim()[0])
    axes.set_ylim(top=high + edge if chance_is_far else max(1.08, high + 0.02), bottom=floor)


def _name_curves(
    words: Words,
    curves: Mapping[str, Mapping[Setting, Point]],
    look: Mapping[str, tuple[str, str]],
) -> None:
    """Write each method's name beside its curve, and of a few curves the first and last learning rate."""
    for method, curve in curves.items():
        along = [(p.task, p.kept) for p in sorted(curve.values(), key=lambda p: -p.kept)]
        middle = len(along) // 2
        preferred = [along[middle], *along[:middle], *along[middle + 1 :]]
        words.add(
            shortened(method, 28), preferred, 11.0, method, color=look[method][0], fontweight="bold"
        )
    for method, curve in curves.items():
        rated = [(s.learning_rate, p) for s, p in curve.items() if s.learning_rate is not None]
        if len(curves) > 6 or len(rated) < 2:  # too many curves to read them by
            continue
        for rate, point in (rated[0], rated[-1]):
            words.add(f"{rate:g}", [(point.task, point.kept)], 7.5, method, color=look[method][0])


def _panels(results: Results, points: _Placed, base: Point) -> Figure:
    """One panel a method, the one that keeps most where the reference is near its best first."""
    means = {
        method: {setting: mean_point(by.values()) for setting, by in settings.items()}
        for method, settings in points.items()
    }
    look = styles(list(points))
    best = results.best_setting(REFERENCE) if reference_learned(results) else None
    # the best itself is out of reach for whoever learns a hair less, however much that keeps
    aim = None if best is None else NEAR * means[REFERENCE][best].task
    kept = {method: _kept(means[method], aim, base) for method in points}
    order = _most_kept_first(means, kept)
    columns = 3 if len(order) <= 9 else 4 if len(order) <= 20 else 5
    lines = -(-len(order) // columns)
    figure = Figure(figsize=(2.75 * columns + 0.5, 2.15 * lines + 1.0), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    marks = np.array([(p.task, p.kept) for of in means.values() for p in of.values()])
    for panel in panels.flat[len(order) :]:
        panel.set_visible(False)
    for index, (panel, method) in enumerate(zip(panels.flat, order, strict=False)):
        if REFERENCE in points:
            _one(panel, means[REFERENCE], base, "#a8a8a8", "o", quiet=True)
        color, marker = look[method]
        _one(panel, means[method], base, color, marker)
        panel.plot(base.task, 1.0, marker="*", markersize=9, color=INK, linestyle="", zorder=4)
        _head(panel, method, color, aim, kept[method])
        frame(panel)
        panel.tick_params(labelsize=8, labelbottom=index + columns >= len(order))
    first = panels[0, 0]
    first.xaxis.set_major_formatter(percent_axis())
    first.yaxis.set_major_formatter(percent_axis())
    first.margins(x=0.06)
    first.set_ylim(
        min(-0.05, float(marks[:, 1].min()) - 0.02), max(1.08, float(marks[:, 1].max()) + 0.03)
    )
    figure.supxlabel(new_task(results), fontsize=10.5)
    figure.supylabel("knowledge kept (base model 100%, chance 0%)", fontsize=10.5)
    letters = int(12.5 * figure.get_figwidth())  # of this size on a line
    lines_of_text = (wrap(line, letters) for line in _explained(results, kept, aim).splitlines())
    text = "\n".join(chain.from_iterable(lines_of_text))
    figure.suptitle(text, fontsize=10, color=INK, x=0.01, ha="left")
    return figure


def _most_kept_first(
    means: Mapping[str, Mapping[Setting, Point]], kept: Mapping[str, float]
) -> list[str]:
    """The methods but for the reference: the one that keeps most first, of equals the one that learned most."""
    return sorted(
        (method for method in means if method != REFERENCE),
        key=lambda m: (
            -1.0 if np.isnan(kept[m]) else kept[m],
            max(p.task for p in means[m].values()),
        ),
        reverse=True,
    )


def _head(panel: Any, method: str, color: str, aim: float | None, kept: float) -> None:
    """Write a method's name above its panel, and what it keeps at the accuracy aimed at."""
    number = ""
    if aim is not None:
        panel.axvline(aim, color="#8c8c8c", linewidth=0.9, linestyle=":", zorder=1)
        number = "not reached" if np.isnan(kept) else f"{kept:.0%}"
        panel.set_title(number, fontsize=10.5, loc="right", color=INK, pad=4)
    room = int((2.3 - 0.08 * len(number)) / 0.08)  # letters of this size beside the number
    name = shortened(method, room)
    panel.set_title(name, fontsize=10, loc="left", color=color, fontweight="bold", pad=4)


def _kept(means: Mapping[Setting, Point], aim: float | None, base: Point) -> float:
    """What a method keeps at the accuracy aimed at, scaled where it was; NaN if it does not get there."""
    if aim is None:
        return float("nan")
    return float(Curve(means, base if _is_scaled(means) else None).at(np.array([aim]))[0])


def _explained(results: Results, kept: Mapping[str, float], aim: float | None) -> str:
    scaled = len(results.curves()) > len(results.trained)
    lines = "marks: learning rates" + ("; dashes: scaled after training too" if scaled else "")
    if aim is None:
        return f"Star: the base model; {lines}{_unlearned(results)}."
    text = (
        f"Number: knowledge kept at {NEAR:g} times {REFERENCE}'s best accuracy (dotted, {aim:.0%}), the most first; "
        f"{REFERENCE}, grey, keeps {kept[REFERENCE]:.0%} there{' when scaled' if scaled else ''}"
        f"{'' if len(results.seeds) > 1 else f' ({ONE_SEED})'}.\nStar: the base model; {lines}."
    )
    over = over_all(kept.values())
    return f"{text}\n{over}" if over else text


def _unlearned(results: Results) -> str:
    """Why no accuracy is marked at which to compare."""
    of = learned(results, REFERENCE)
    if of is None:
        return ""
    how = "did not learn the task" if of.verdict == "no" else "may not have learnt the task"
    return f"; {REFERENCE} {how}, so nothing is compared"


def _one(
    panel: Any,
    means: Mapping[Setting, Point],
    base: Point,
    color: str,
    marker: str,
    quiet: bool = False,
) -> None:
    unscaled = [p for setting, p in means.items() if setting.scale == 1.0]
    panel.plot(
        [p.task for p in unscaled], [p.kept for p in unscaled], color=color, marker=marker,
        markersize=3.5 if quiet else 5.5, linewidth=1.1 if quiet else 1.8, markeredgecolor="white",
        markeredgewidth=0.5, zorder=2 if quiet else 3,
    )  # fmt: skip
    if _is_scaled(means):
        frontier = envelope(means, base)
        panel.plot(
            [p.task for p in frontier], [p.kept for p in frontier], color=color,
            linestyle=(0, (4, 2)), linewidth=1.0 if quiet else 1.4, zorder=2,
        )  # fmt: skip


def _is_scaled(means: Mapping[Setting, Point]) -> bool:
    return any(setting.scale != 1.0 for setting in means)


def envelope(means: Mapping[Setting, Point], base: Point) -> list[Point]:
    """The frontier over learning rates and scales: the most that is kept at each task accuracy."""
    grid = np.linspace(base.task, max(p.task for p in means.values()), 200)
    kept = Curve(means, base).at(grid)
    return [Point(float(t), float(k)) for t, k in zip(grid, kept, strict=True) if np.isfinite(k)]


def new_task(results: Results) -> str:
    """What the axis of the new task is called."""
    of_text = {results.primary[task] for task in results.gain} == {"token_probability"}
    what = "token probability" if of_text else "accuracy"
    names = listed([shortened(task, 30) for task in results.gain], most=2)
    return f"{what} on the new task ({names})"
