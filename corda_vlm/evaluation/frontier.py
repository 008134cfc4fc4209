"""From rows of scores to curves: what each method keeps at what task accuracy.

A single trained model says little, as the learning rate alone moves it anywhere between the base model and
a model that forgot everything. So methods are compared along the curve over their settings:
how much they keep where they have learnt the task equally well.

`task` is the mean over the gain tasks of each one's first metric; `kept` is the mean over the retention
tasks of (score − chance) / (base − chance): 1 is the base model, 0 is guessing. Retention tasks on which the
base model itself does no better than chance have nothing to keep and do not count.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from corda_vlm.errors import DataError
from corda_vlm.evaluation.scores import CONFIDENCE, RESAMPLES, Interval

BASE = "base"
REFERENCE = "lora"


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


@dataclass(frozen=True)
class Results:
    """The scores of one run, arranged.

    Attributes:
        gain, retention, selection: names of the tasks of each role, in the order they were measured.
        primary: the metric by which each task is compared, its first one.
        chance: what guessing gives on each task.
        base: score of each task before training.
        trained: method -> setting -> seed -> task -> score, in the order they were measured.
        base_rows: the base model's rows as they are, with intervals.
    """

    gain: tuple[str, ...]
    retention: tuple[str, ...]
    selection: tuple[str, ...]
    primary: Mapping[str, str]
    chance: Mapping[str, float]
    base: Mapping[str, float]
    trained: Mapping[str, Mapping[Setting, Mapping[int | None, Mapping[str, float]]]]
    base_rows: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Results:
        """Arrange rows of scores.jsonl. Of rows measured twice the last counts.

        Raises:
            DataError: the base model was not measured on some task that a trained model was.
        """
        primary: dict[str, str] = {}
        roles: dict[str, list[str]] = {"gain": [], "retention": [], "selection": []}
        chance: dict[str, float] = {}
        base: dict[str, float] = {}
        base_rows: dict[tuple[str, str], Mapping[str, Any]] = {}
        trained: dict[str, dict[Setting, dict[int | None, dict[str, float]]]] = {}
        for row in rows:
            task, metric = row["task"], row["metric"]
            if primary.setdefault(task, metric) == metric:
                names = roles.setdefault(row.get("role", "retention"), [])
                if task not in names:
                    names.append(task)
                chance[task] = float(row.get("chance") or 0.0)
            if row["method"] == BASE:
                base_rows[(task, metric)] = row
            if primary[task] != metric:
                continue
            if row["method"] == BASE:
                base[task] = float(row["value"])
            else:
                setting = Setting(row.get("learning_rate"), float(row.get("scale", 1.0)))
                seeds = trained.setdefault(row["method"], {}).setdefault(setting, {})
                seeds.setdefault(row.get("seed"), {})[task] = float(row["value"])
        absent = [task for task in primary if task not in base]
        if trained and absent:
            raise DataError(
                f"the base model has no score for {', '.join(absent)}, so what was kept cannot be said; "
                'evaluate it with method "base" first'
            )
        return cls(
            tuple(roles["gain"]), tuple(roles["retention"]), tuple(roles["selection"]),
            primary, chance, base, trained, tuple(base_rows.values()),
        )  # fmt: skip

    def kept_share(self, task: str, score: float) -> float:
        """(score − chance) / (base − chance); NaN where the base model itself does no better than chance."""
        known = self.base[task] - self.chance[task]
        return (score - self.chance[task]) / known if known > 0 else float("nan")

    @property
    def known(self) -> tuple[str, ...]:
        """The retention tasks on which the base model does better than chance: on others nothing can be kept."""
        return tuple(t for t in self.retention if self.base.get(t, 0.0) > self.chance[t])

    def point(self, scores: Mapping[str, float]) -> Point | None:
        """Where a model lies, or None while some task is not yet measured."""
        if not self.gain or not self.known or any(t not in scores for t in self.gain + self.known):
            return None
        task = float(np.mean([scores[t] for t in self.gain]))
        return Point(task, float(np.mean([self.kept_share(t, scores[t]) for t in self.known])))

    def points(self, method: str) -> dict[Setting, dict[int | None, Point]]:
        """Setting -> seed -> point, settings in the order of scale and learning rate."""
        found = {}
        for setting in sorted(
            self.trained[method], key=lambda s: (s.scale, s.learning_rate or 0.0)
        ):
            seeds = self.trained[method][setting]
            placed = {
                seed: point for seed, scores in seeds.items() if (point := self.point(scores))
            }
            if placed:
                found[setting] = placed
        return found

    @property
    def base_point(self) -> Point | None:
        """The model before training: everything kept."""
        return self.point(self.base)

    @property
    def seeds(self) -> list[int | None]:
        """All seeds of all methods."""
        found = {seed for of in self.trained.values() for by in of.values() for seed in by}
        return sorted(found, key=lambda seed: -1 if seed is None else seed)

    def best_setting(self, method: str) -> Setting | None:
        """The unscaled setting that learns the task best: on the selection tasks where there are any."""
        judged = self.selection or self.gain
        means = {}
        for setting, seeds in self.trained.get(method, {}).items():
            if setting.scale == 1.0:
                values = [
                    np.mean([s[t] for t in judged])
                    for s in seeds.values()
                    if all(t in s for t in judged)
                ]
                if values and setting in self.points(method):
                    means[setting] = float(np.mean(values))
        return max(means, key=lambda s: means[s]) if means else None

    def curves(self) -> dict[str, tuple[str, bool]]:
        """Label -> (method, scaled): one curve a method over its learning rates, and where the models
        were also scaled after training (WiSE-FT) a second one over learning rates and scales."""
        found = {}
        for method in self.trained:
            found[method] = (method, False)
            if any(setting.scale != 1.0 for setting in self.trained[method]):
                found[f"{method}, scaled"] = (method, True)
        return found


def mean_point(points: Iterable[Point]) -> Point:
    """The mean of both coordinates."""
    points = list(points)
    return Point(float(np.mean([p.task for p in points])), float(np.mean([p.kept for p in points])))


def kept_at(
    points: Mapping[Setting, Point], task: float, base: Point | None = None
) -> float | None:
    """The most that is kept at a task accuracy of at least `task`, or None where it is never reached.

    Between settings next to each other (in learning rate, or in scale) the curve is a straight line;
    scale 0 is the base model, so a curve over scales starts there.
    """
    ends = [*points.values(), *([base] if base is not None else [])]
    best = [p.kept for p in ends if p.task >= task]
    for left, right in _neighbours(points, base):
        low, high = sorted((left, right), key=lambda p: p.task)
        if low.task < task < high.task:
            share = (task - low.task) / (high.task - low.task)
            best.append(low.kept + share * (high.kept - low.kept))
    return max(best) if best else None


def _neighbours(points: Mapping[Setting, Point], base: Point | None) -> list[tuple[Point, Point]]:
    lines: dict[tuple[str, float | None], list[tuple[float, Point]]] = {}
    for setting, point in points.items():
        lines.setdefault(("scale", setting.scale), []).append((setting.learning_rate or 0.0, point))
        lines.setdefault(("rate", setting.learning_rate), []).append((setting.scale, point))
    found = []
    for (kind, _), line in lines.items():
        if (
            kind == "rate"
            and base is not None
            and len(line) > 1
            and all(scale > 0 for scale, _ in line)
        ):
            line.append((0.0, base))
        ordered = [point for _, point in sorted(line, key=lambda entry: entry[0])]
        found += itertools.pairwise(ordered)
    return found


def area(
    points: Mapping[Setting, Point], start: float, stop: float, base: Point | None = None
) -> float:
    """Mean kept share along the frontier between two task accuracies; 0 where the method does not reach."""
    grid = np.linspace(start, stop, 101)
    heights = np.array([kept_at(points, float(task), base) or 0.0 for task in grid])
    return float((heights[1:] + heights[:-1]).mean() / 2)


@dataclass(frozen=True)
class Comparison:
    """One curve where it has learnt as much as the reference, with 95 % intervals from a bootstrap over seeds.

    Attributes:
        curve: the method, or "method, scaled".
        share: task accuracy as a share of the reference's best; None for the area under the frontier.
        task: that task accuracy.
        kept: what is kept there; None where the curve does not reach it (in the means over seeds).
        ratio: kept over what the reference keeps; None where either is missing or the reference kept nothing.
        reached: share of the resamples in which the curve reaches the accuracy.
    """

    curve: str
    share: float | None
    task: float
    kept: Interval | None
    ratio: Interval | None
    reached: float


_Means = Mapping[str, Mapping[Setting, Point]]  # curve -> setting -> mean over some seeds


class SeedBootstrap:
    """The curves of a run, and the same curves over resampled seeds.

    The seeds are resampled together for all methods, so that luck which they share cancels; few seeds have few
    distinct resamples, each of which is computed once.
    """

    def __init__(self, results: Results, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self._points = {method: results.points(method) for method in results.trained}
        self._curves = results.curves()
        seeds = results.seeds
        generator = np.random.default_rng(seed)
        draws = np.sort(generator.integers(0, len(seeds), size=(resamples, len(seeds))), axis=1)
        distinct, counts = np.unique(draws, axis=0, return_counts=True)
        self.means = self._over(seeds)
        self._resampled = [self._over([seeds[i] for i in draw]) for draw in distinct]
        self._counts = counts

    def _over(self, drawn: Sequence[int | None]) -> _Means:
        found: dict[str, dict[Setting, Point]] = {}
        for label, (method, scaled) in self._curves.items():
            found[label] = {}
            for setting, by_seed in self._points[method].items():
                if scaled or setting.scale == 1.0:
                    # A method that lacks the drawn seeds (still running) is judged by those it has.
                    chosen = [by_seed[s] for s in drawn if s in by_seed] or list(by_seed.values())
                    found[label][setting] = mean_point(chosen)
        return found

    def interval(
        self, statistic: Callable[[_Means], float | None]
    ) -> tuple[Interval | None, float]:
        """`statistic` of the means with its interval, and the share of resamples in which it exists."""
        value = statistic(self.means)
        drawn = [
            (statistic(means), int(n))
            for means, n in zip(self._resampled, self._counts, strict=True)
        ]
        usable = [(v, n) for v, n in drawn if v is not None]
        reached = sum(n for _, n in usable) / int(self._counts.sum())
        if value is None or not usable:
            return None, reached
        tail = 50.0 * (1.0 - CONFIDENCE)
        spread = np.repeat([v for v, _ in usable], [n for _, n in usable])
        low, high = np.percentile(spread, [tail, 100.0 - tail])
        return Interval(value, float(low), float(high)), reached


def compare(
    results: Results,
    shares: Sequence[float] = (1.0, 0.95),
    reference: str = REFERENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Comparison]:
    """Every curve at the task accuracy of the reference's best learning rate and at shares of it, and the
    area under it from five points above the base model's task accuracy to the reference's best.

    The accuracy aimed at is the reference's in the same resample: its own luck is part of the interval.
    Empty if the reference was not trained.
    """
    best, base = results.best_setting(reference), results.base_point
    if best is None or base is None:
        return []
    seeds = SeedBootstrap(results, resamples, seed)
    aim = seeds.means[reference][best].task
    start = base.task + 0.05

    def measure(means: _Means, label: str, share: float | None) -> float | None:
        end = base if label in scaled else None
        stop = means[reference][best].task
        if share is not None:
            return kept_at(means[label], share * stop, end)
        return area(means[label], start, stop, end) if stop > start else None

    scaled = {label for label, (_, is_scaled) in results.curves().items() if is_scaled}
    found = []
    for share in (*shares, None):
        for label in results.curves():
            kept, reached = seeds.interval(lambda m, c=label, s=share: measure(m, c, s))
            ratio, _ = seeds.interval(
                lambda m, c=label, s=share: _ratio(measure(m, c, s), measure(m, reference, s))
            )
            found.append(Comparison(label, share, aim * (share or 1.0), kept, ratio, reached))
    return found


def _ratio(value: float | None, reference: float | None) -> float | None:
    return (
        value / reference if value is not None and reference is not None and reference > 0 else None
    )
