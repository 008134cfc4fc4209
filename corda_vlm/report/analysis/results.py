"""From rows of scores to curves: what each method keeps at what task accuracy.

A single trained model says little, as the learning rate alone moves it anywhere between the base model and
a model that forgot everything. So methods are compared along the curve over their settings:
how much they keep where they have learned the task equally well.

`task` is the mean over the gain tasks of each one's first metric; `kept` is the mean over the retention
tasks of (score − chance) / (base − chance): 1 is the base model, 0 is guessing. Retention tasks on which the
base model itself is not above chance with 95 % confidence have nothing to keep and do not count.

Which settings count for what: a curve is drawn through every setting that was measured, and at a task accuracy it
stands for the most that any of them, or a straight line between neighbors, keeps there. Curves of one run have equal
chances of a lucky maximum as far as they have equally many settings. The accuracy at which curves are compared is the
reference's at the learning rate chosen on the selection tasks, and where a single model is claimed (`choose`), its
learning rate and scale are chosen there, never on the gain or retention tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from corda_vlm.errors import DataError
from corda_vlm.evaluation.bootstrap import Interval
from corda_vlm.evaluation.diverged import TrainingKey, read_diverged
from corda_vlm.evaluation.score_file import BASE, gain_of, interval_of, read_rows
from corda_vlm.report.analysis.curve import Point, Setting
from corda_vlm.report.analysis.kept import kept_share
from corda_vlm.run_files import SCORES

REFERENCE = "lora"

PREDICTORS = ("forecast", "kl_new", "update_size", "task_change")
"""What may foretell forgetting, by the keys of a row of scores (`corda_vlm.train.predictors`)."""

Place = tuple[str, Setting, int | None, str]
"""Method, setting, seed and task: where one score of a trained model stands."""


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
        predictors: what may foretell forgetting, of `PREDICTORS` -> (method, learning rate, seed) -> its value at the end of
            training, where it was noted.
        diverged: (method, learning rate, seed) -> why that training came to nothing; its scores, if it has any, are left
            out, and a setting of which a seed diverged has no point: the seeds that survive are no fair sample of it.
        gains: (method, setting, seed, task) -> how far the trained model is above the base model, paired over the examples,
            where the rows tell it.
        intervals: the same key -> the trained model's own interval over examples, where the rows tell it.
    """

    gain: tuple[str, ...]
    retention: tuple[str, ...]
    selection: tuple[str, ...]
    primary: Mapping[str, str]
    chance: Mapping[str, float]
    base: Mapping[str, float]
    trained: Mapping[str, Mapping[Setting, Mapping[int | None, Mapping[str, float]]]]
    base_rows: Sequence[Mapping[str, Any]]
    predictors: Mapping[str, Mapping[TrainingKey, float]] = field(default_factory=dict)
    diverged: Mapping[TrainingKey, str] = field(default_factory=dict)
    gains: Mapping[Place, Interval] = field(default_factory=dict)
    intervals: Mapping[Place, Interval] = field(default_factory=dict)

    @classmethod
    def read(cls, run_dir: str | Path) -> Results:
        """The results in a run's folder: its scores, and its trainings that diverged.

        Raises:
            ForeignFileError: no scores, or a line that is none.
            DataError: the base model was not measured on some task that a trained model was.
        """
        return cls.of(read_rows(Path(run_dir) / SCORES), read_diverged(run_dir))

    @classmethod
    def of(
        cls, rows: Sequence[Mapping[str, Any]], diverged: Mapping[TrainingKey, str] | None = None
    ) -> Results:
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
        predictors: dict[str, dict[TrainingKey, float]] = {}
        gains: dict[Place, Interval] = {}
        intervals: dict[Place, Interval] = {}
        diverged = dict(diverged or {})
        for row in rows:
            task, metric = row["task"], row["metric"]
            if row["method"] == BASE:
                base_rows[(task, metric)] = row
            if primary.setdefault(task, metric) != metric:
                continue
            names = roles.setdefault(row.get("role") or "retention", [])
            if task not in names:
                names.append(task)
            chance[task] = float(row.get("chance") or 0.0)
            if row["method"] == BASE:
                base[task] = float(row["value"])
            else:
                key = (row["method"], row.get("learning_rate"), row.get("seed"))
                if key in diverged:
                    continue
                setting = _setting_of(row)
                seeds = trained.setdefault(row["method"], {}).setdefault(setting, {})
                seeds.setdefault(row.get("seed"), {})[task] = float(row["value"])
                place = (row["method"], setting, row.get("seed"), task)
                for kind, interval in ((gains, gain_of(row)), (intervals, interval_of(row))):
                    kind.pop(place, None)
                    if interval is not None:
                        kind[place] = interval
                # of the trained model itself: what a scale makes of it follows (`forecast`)
                for name in PREDICTORS if setting.scale == 1.0 else ():
                    if row.get(name) is not None:
                        predictors.setdefault(name, {})[key] = float(row[name])
        if trained:
            _check_base(primary, base)
        return cls(
            tuple(roles["gain"]), tuple(roles["retention"]), tuple(roles["selection"]),
            primary, chance, base, trained, tuple(base_rows.values()), predictors, diverged, gains,
            intervals,
        )  # fmt: skip

    def kept_share(self, task: str, score: float) -> float:
        """(score − chance) / (base − chance); NaN where the base model itself does no better than chance."""
        share = kept_share(self.primary[task], score, self.base[task], None, self.chance[task])
        return float("nan") if share is None else share

    @cached_property
    def known(self) -> tuple[str, ...]:
        """The retention tasks on which the base model is above chance, also at the lower end of its interval: on others
        nothing can be kept (`kept_share`)."""
        low = dict(self.base)
        for row in self.base_rows:
            task = row["task"]
            if self.primary[task] == row["metric"] and row.get("low") is not None:
                low[task] = min(low[task], float(row["low"]))
        return tuple(t for t in self.retention if t in low and self._is_known(t, low[t]))

    def _is_known(self, task: str, low: float) -> bool:
        base = self.base[task]
        return kept_share(self.primary[task], base, base, low, self.chance[task]) is not None

    def point(self, scores: Mapping[str, float]) -> Point | None:
        """Where a model lies, or None while some task is not yet measured."""
        if not self.gain or not self.known or any(t not in scores for t in self.gain + self.known):
            return None
        task = float(np.mean([scores[t] for t in self.gain]))
        return Point(task, float(np.mean([self.kept_share(t, scores[t]) for t in self.known])))

    def points(self, method: str) -> Mapping[Setting, Mapping[int | None, Point]]:
        """Setting -> seed -> point, settings in the order of scale and learning rate."""
        return self._points[method]

    @cached_property
    def _points(self) -> dict[str, dict[Setting, dict[int | None, Point]]]:
        placed_by_method: dict[str, dict[Setting, dict[int | None, Point]]] = {}
        for method, settings in self.trained.items():
            placed_by_method[method] = {}
            for setting in sorted(settings, key=lambda s: (s.scale, s.learning_rate or 0.0)):
                if self.lost_seeds(method, setting.learning_rate):
                    continue
                placed = {
                    seed: point
                    for seed, scores in settings[setting].items()
                    if (point := self.point(scores))
                }
                if placed:
                    placed_by_method[method][setting] = placed
        return placed_by_method

    @property
    def forecasts(self) -> Mapping[TrainingKey, float]:
        """(method, learning rate, seed) -> the anchor's value at the end of training, where it was noted."""
        return self.predictors.get(PREDICTORS[0], {})

    def lost_seeds(self, method: str, learning_rate: float | None) -> list[int | None]:
        """The seeds of a setting that diverged."""
        return [
            seed for name, rate, seed in self.diverged if (name, rate) == (method, learning_rate)
        ]

    def forecast(self, method: str, setting: Setting) -> float | None:
        """The forgetting that the anchor foretold, the mean over seeds: the relative change of the layers' outputs on
        the knowledge. A scale s shrinks the change of every weight to s and this, being squared, to s²."""
        values = [
            self.forecasts[key]
            for seed in self.trained[method][setting]
            if (key := (method, setting.learning_rate, seed)) in self.forecasts
        ]
        return setting.scale**2 * float(np.mean(values)) if values else None

    @property
    def base_point(self) -> Point | None:
        """The model before training: everything kept."""
        return self.point(self.base)

    @property
    def seeds(self) -> list[int | None]:
        """All seeds of all methods."""
        seeds = {seed for of in self.trained.values() for by in of.values() for seed in by}
        return sorted(seeds, key=lambda seed: -1 if seed is None else seed)

    def judged(self, method: str) -> dict[Setting, float]:
        """Setting -> how well it learns, by which settings are chosen: the mean over the selection tasks, or over the
        gain tasks themselves where there are none."""
        tasks, means = self.selection or self.gain, {}
        for setting, seeds in self.trained.get(method, {}).items():
            values = [
                np.mean([s[t] for t in tasks]) for s in seeds.values() if s.keys() >= {*tasks}
            ]
            if values and setting in self.points(method):
                means[setting] = float(np.mean(values))
        return means

    def best_setting(self, method: str) -> Setting | None:
        """The unscaled setting that learns the task best: on the selection tasks where there are any."""
        means = {s: value for s, value in self.judged(method).items() if s.scale == 1.0}
        return max(means, key=lambda s: means[s]) if means else None

    def curves(self) -> dict[str, tuple[str, bool]]:
        """Label -> (method, scaled): one curve a method over its learning rates, and where the models
        were also scaled after training (WiSE-FT) a second one over learning rates and scales."""
        curves = {}
        for method in self.trained:
            curves[method] = (method, False)
            if any(setting.scale != 1.0 for setting in self.trained[method]):
                curves[f"{method}, scaled"] = (method, True)
        return curves


def _setting_of(row: Mapping[str, Any]) -> Setting:
    scale = row.get("scale")
    return Setting(row.get("learning_rate"), 1.0 if scale is None else float(scale))


def _check_base(tasks: Iterable[str], base: Mapping[str, float]) -> None:
    absent = [task for task in tasks if task not in base]
    if absent:
        raise DataError(
            f"the base model has no score for {', '.join(absent)}, so what was kept cannot be said; "
            'evaluate it with method "base" first'
        )
