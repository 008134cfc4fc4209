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
        enough = {
            s: value
            for s, value in results.judged(method).items()
            if value >= target and (scaled or s.scale == 1.0)
        }
        if not enough:
            choices.append(Choice(label, None))
            continue
        forecasts = {s: results.forecast(method, s) for s in enough}
        by_forecast = None not in forecasts.values()
        order = forecasts if by_forecast else enough
        chosen = min(enough, key=lambda s: order[s] or 0.0)

        def at(draw: Draw, m: str = method, s: Setting = chosen) -> Point:
            return draw.points[m][s]

        raw = {}
        for task in results.known:
            shares = {
                seed: Point(0.0, scores[task] / results.base[task])
                for seed, scores in results.trained[method][chosen].items()
                if task in scores
            }
            raw[task] = interval(lambda d, by=shares: mean_point(drawn_of(by, d.seeds)).kept)
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
