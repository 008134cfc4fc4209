"""The one model of each method that stands for it where a single number is claimed, chosen on validation data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from corda_vlm.evaluation.bootstrap import RESAMPLES, Interval
from corda_vlm.report.analysis.curve import Point, Setting, mean_point
from corda_vlm.report.analysis.results import REFERENCE, Results
from corda_vlm.report.analysis.seeds import Draw, SeedBootstrap, drawn_of


@dataclass(frozen=True)
class Choice:
    """The one model of a curve that stands for it where a single number is claimed.

    Attributes:
        curve: its label.
        setting: learning rate and scale, chosen on the selection tasks; None where none learns enough there.
        forecast: whether the forecast of forgetting decided among those that learn enough.
        task: its accuracy on the gain tasks.
        share: the same as a share of the reference's at its best.
        kept: chance subtracted, the mean over the retention tasks.
        raw: task -> its score as a share of the base model's, chance not subtracted.
    """

    curve: str
    setting: Setting | None
    forecast: bool = False
    task: Interval | None = None
    share: Interval | None = None
    kept: Interval | None = None
    raw: Mapping[str, Interval] | None = None


def choose(
    results: Results,
    share: float = 0.95,
    reference: str = REFERENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Choice]:
    """For each curve the one model that stands for it, chosen without looking at any test split.

    Of the settings that learn at least `share` of what the reference's best does, on the selection tasks, it is the one
    with the smallest forecast of forgetting, where all of them carry one, and otherwise the one that just learns enough.
    """
    best = results.best_setting(reference)
    if best is None or results.base_point is None:
        return []
    target = share * results.judged(reference)[best]
    seeds = SeedBootstrap(results, resamples, seed)

    def interval(statistic: Callable[[Draw], float]) -> Interval:
        return seeds.certain(seeds.over(statistic))

    choices = []
    for label, (method, scaled) in results.curves().items():
        chosen, by_forecast = _setting(results, method, scaled, target)
        if chosen is None:
            choices.append(Choice(label, None))
            continue

        def at(draw: Draw, m: str = method, s: Setting = chosen) -> Point:
            return draw.points[m][s]

        raw = {
            task: interval(lambda d, by=shares: mean_point(drawn_of(by, d.seeds)).kept)
            for task, shares in _shares(results, method, chosen).items()
        }
        choices.append(
            Choice(
                label, chosen, by_forecast,
                task=interval(lambda d, a=at: a(d).task),
                share=interval(lambda d, a=at: a(d).task / d.points[reference][best].task),
                kept=interval(lambda d, a=at: a(d).kept),
                raw=raw,
            )
        )  # fmt: skip
    return choices


def _setting(
    results: Results, method: str, scaled: bool, target: float
) -> tuple[Setting | None, bool]:
    """The setting of a method that stands for it, None where none learns `target`; and whether the forecast decided."""
    enough = {
        s: value
        for s, value in results.judged(method).items()
        if value >= target and (scaled or s.scale == 1.0)
    }
    if not enough:
        return None, False
    forecasts = {s: results.forecast(method, s) for s in enough}
    by_forecast = None not in forecasts.values()
    order = forecasts if by_forecast else enough
    return min(enough, key=lambda s: order[s] or 0.0), by_forecast


def _shares(results: Results, method: str, setting: Setting) -> dict[str, dict[int | None, Point]]:
    """Retention task -> seed -> what is kept of the base model's score, chance not subtracted."""
    seeds = results.trained[method][setting]
    return {
        task: {
            seed: Point(0.0, scores[task] / results.base[task])
            for seed, scores in seeds.items()
            if task in scores
        }
        for task in results.known
    }
