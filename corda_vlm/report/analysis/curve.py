"""Points and curves: what a method keeps at what task accuracy."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Setting:
    """What distinguishes two trained models of one method, apart from the seed."""

    learning_rate: float | None
    scale: float = 1.0


@dataclass(frozen=True)
class Point:
    """A model, or the mean of several, on the plane of task accuracy and kept knowledge."""

    task: float
    kept: float


def mean_point(points: Iterable[Point]) -> Point:
    """The mean of both coordinates."""
    points = list(points)
    return Point(float(np.mean([p.task for p in points])), float(np.mean([p.kept for p in points])))


class Curve:
    """What one method keeps, over the task accuracies that its settings reach.

    Between settings next to each other (in learning rate, or in scale) the curve is a straight line; scale 0 is the base
    model, so with `base` a curve over scales starts there. At each task accuracy the highest line counts.
    """

    def __init__(self, points: Mapping[Setting, Point], base: Point | None = None) -> None:
        ends = [*points.values(), *([base] if base is not None else [])]
        self._ends = np.array([(p.task, p.kept) for p in ends]).reshape(-1, 2)
        lines = [sorted(pair, key=lambda p: p.task) for pair in _neighbours(points, base)]
        lines = [(a.task, a.kept, b.task, b.kept) for a, b in lines if a.task < b.task]
        self._lines = np.array(lines).reshape(-1, 4)

    def at(self, tasks: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The most that is kept at task accuracies of at least `tasks`; NaN where the curve does not reach."""
        wanted = np.asarray(tasks, dtype=float)[:, None]
        task, kept = self._ends.T
        most = np.where(task >= wanted, kept, -np.inf).max(1, initial=-np.inf)
        left, from_, right, to = self._lines.T
        with np.errstate(invalid="ignore", over="ignore"):  # of lines that `inside` leaves out
            between = from_ + (wanted - left) / (right - left) * (to - from_)
        inside = (left < wanted) & (wanted < right)
        most = np.maximum(most, np.where(inside, between, -np.inf).max(1, initial=-np.inf))
        return np.where(np.isfinite(most), most, np.nan)


def _neighbours(points: Mapping[Setting, Point], base: Point | None) -> list[tuple[Point, Point]]:
    lines: dict[tuple[str, float | None], list[tuple[float, Point]]] = {}
    for setting, point in points.items():
        lines.setdefault(("scale", setting.scale), []).append((setting.learning_rate or 0.0, point))
        lines.setdefault(("rate", setting.learning_rate), []).append((setting.scale, point))
    pairs = []
    for (kind, _), line in lines.items():
        # a learning rate that was not scaled (yet) has no line to the base model
        if (
            kind == "rate"
            and base is not None
            and len(line) > 1
            and min(scale for scale, _ in line) > 0
        ):
            line.append((0.0, base))
        ordered = [point for _, point in sorted(line, key=lambda entry: entry[0])]
        pairs += itertools.pairwise(ordered)
    return pairs


def heights(curve: Curve, start: float, stop: float) -> Float[np.ndarray, " 101"]:
    """What is kept on a grid of task accuracies; 0 where the curve does not reach."""
    return np.nan_to_num(curve.at(np.linspace(start, stop, 101)), nan=0.0)


def mean_height(heights: Float[np.ndarray, " n"]) -> float:
    """The mean of a polygonal line with these heights at equal distances."""
    return float((heights[1:] + heights[:-1]).mean() / 2)
