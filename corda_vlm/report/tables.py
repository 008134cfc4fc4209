"""The tables of a report, as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from corda_vlm.evaluation.bootstrap import Interval
from corda_vlm.evaluation.scores import NO_SHARE, value_text
from corda_vlm.names import listed
from corda_vlm.report.analysis.choose import Choice
from corda_vlm.report.analysis.compare import Comparison, Dominance
from corda_vlm.report.analysis.convergence import Convergence
from corda_vlm.report.analysis.curve import Setting
from corda_vlm.report.analysis.forecast import Ranking
from corda_vlm.report.analysis.results import BASE, REFERENCE, Results
from corda_vlm.report.document import Table
from corda_vlm.report.markup import bold
from corda_vlm.report.words import ABSENT, PREDICTORS, over_all_sentence, percent, shown_of, signed


def equal_table(comparisons: Sequence[Comparison], caption: str | None = None) -> Table:
    """What each curve keeps at the reference's accuracy, at shares of it, and on average along the way."""
    shares = list(dict.fromkeys(c.share for c in comparisons))
    by = {(c.curve, c.share): c for c in comparisons}
    headings = ["method"]
    for share in shares:
        task = next(c.task for c in comparisons if c.share == share)
        if share is None:
            headings.append("area under the curve")
        else:
            headings += [f"kept at task {percent(task)}", f"× {REFERENCE}"]
    rows, partly = [], False
    for curve in sorted(dict.fromkeys(c.curve for c in comparisons), key=lambda c: _place(by, c)):
        row = [curve]
        for share in shares:
            comparison = by[(curve, share)]
            kept = _interval(comparison.kept, percent) if comparison.kept else "not reached"
            if comparison.kept and comparison.reached < 1.0:
                kept += f", in {comparison.reached:.0%} of resamples"
                partly = True
            row.append(kept)
            if share is not None:
                row.append(_interval(comparison.ratio, lambda v: f"{v:.2f}"))
        rows.append(row)
    best = next(c.task for c in comparisons if c.share == 1.0)
    about = caption or (
        f"Kept knowledge where a method has learnt as much as {REFERENCE} at its best ({percent(best)}), and at "
        "0.95 of that. Area: the mean of what is kept from five points above the base model's task accuracy to "
        "there; left of its slowest learning rate a method counts as keeping what it keeps with that."
    )
    about += over_all_sentence(shown_of(c.kept for c in comparisons))
    if partly:
        about += " Where an accuracy is reached in some resamples of the seeds only, the interval is over those."
    return Table(about, headings, rows)


def trained_table(results: Results, brief: bool = False, scaled: bool = False) -> Table:
    """Every setting of every method, with its score on each task and what it keeps.

    Args:
        brief: means alone, without the seeds' range and the tasks' metrics.
        scaled: the models that were scaled after training, in place of the others.
    """
    tasks = [*results.gain, *results.retention]
    headings = ["method", "learning rate"] + (["scale"] if scaled else [])
    for task in tasks:
        role = "gain" if task in results.gain else "kept"
        headings.append(f"{task} ({role})" if brief else f"{task} {results.primary[task]}")
    as_text = {task: partial(value_text, results.primary[task]) for task in tasks}
    cells = [as_text[t](results.base[t]) if t in results.base else ABSENT for t in tasks]
    scale = [ABSENT] if scaled else []
    rows = [[BASE, ABSENT, *scale, *cells, percent(1.0) if results.base_point else ABSENT]]
    shares: list[float] = []
    for method, setting in _settings(results, scaled):
        seeds = results.trained.get(method, {}).get(setting, {})
        row = [method, ABSENT if setting.learning_rate is None else f"{setting.learning_rate:g}"]
        row += [f"{setting.scale:g}"] if scaled else []
        for task in tasks:
            measured = [s[task] for s in seeds.values() if task in s]
            row.append(_spread(measured, brief, as_text[task]))
        placed = [p.kept for s in seeds.values() if (p := results.point(s))]
        if lost := len(results.lost_seeds(method, setting.learning_rate)):
            some = f" in {lost} of {lost + len(seeds)} seeds" if seeds else ""
            rows.append([*row, f"diverged{some}"])
            continue
        shares += [float(np.mean(placed))] if brief and placed else placed
        rows.append([*row, _spread(placed, brief)])
    return Table(
        _about_trained(results) + over_all_sentence(shares), [*headings, "kept share"], rows
    )


def _settings(results: Results, scaled: bool) -> Iterator[tuple[str, Setting]]:
    """The methods with their settings, by learning rate; of those that were not scaled the diverged ones too."""
    for method in dict.fromkeys([*results.trained, *(name for name, _, _ in results.diverged)]):
        settings = set(results.trained.get(method, ()))
        if not scaled:
            settings |= {Setting(rate) for name, rate, _ in results.diverged if name == method}
        for setting in sorted(settings, key=lambda s: (s.learning_rate or 0.0, -s.scale)):
            if (setting.scale != 1.0) == scaled:
                yield method, setting


def _about_trained(results: Results) -> str:
    """What the numbers of a table of trained models are."""
    seeds = len(results.seeds)
    about = (
        f"Means over {seeds} seeds, in brackets the lowest and the highest. " if seeds > 1 else ""
    )
    about += f"Gain: {listed(results.gain)}. Retention: {listed(results.retention)}. Kept share: 100% is "
    about += "the base model, 0% is chance, the mean over the retention tasks."
    unmeasured = [task for task in results.retention if results.primary[task] in NO_SHARE]
    if unmeasured:
        about += (
            f" The metric of {listed(unmeasured)} has no chance level, so it does not count there."
        )
    unknown = [t for t in results.retention if t not in results.known and t not in unmeasured]
    if unknown:
        about += f" The base model does no better than chance on {listed(unknown)}, so it does not count there."
    if "token_probability" in results.primary.values():
        about += (
            " Token probability is exp of the mean log-likelihood a token, in nats: 1% is −4.6."
        )
    if results.diverged:
        about += (
            " Diverged: the loss, the weights or the outputs became NaN or Inf, which is no score; a setting of which a seed "
            "diverged is in no curve and no comparison."
        )
    return about


def base_table(results: Results) -> Table:
    rows = []
    for row in results.base_rows:
        value, low, high = row["value"], row.get("low"), row.get("high")
        score = value_text(row["metric"], value)
        if low is not None and high is not None:
            score = _interval(Interval(value, low, high), partial(value_text, row["metric"]))
        n = row.get("n")
        chance = float(row.get("chance") or 0.0)
        rows.append(
            [
                row["task"],
                row.get("role") or ABSENT,
                row["metric"],
                score,
                ABSENT if row["metric"] in NO_SHARE else percent(chance, digits=2),
                f"{n:,}" if n else ABSENT,
            ]
        )
    return Table(
        "With 95% bootstrap intervals over examples.",
        ["task", "role", "metric", "score", "chance", "examples"],
        rows,
    )


def dominance_table(dominances: Sequence[Dominance], seeds: int) -> Table:
    """Curves against one reference curve, in points of kept knowledge; `seeds`: how many the means are over."""
    how = "with 95% confidence" if seeds > 1 else "by this one seed"
    rows = [
        [
            d.curve,
            _interval(d.mean, signed),
            _interval(d.minimum, signed),
            percent(d.where),
            f"{d.above:.0%}",
        ]
        for d in dominances
    ]
    return Table(
        f"More kept than by {dominances[0].reference}: on average along the range, and where it is least; then the share of "
        f"the range on which the method lies above. What does not reach an accuracy keeps 0 there. Above everywhere, {how}: "
        f"{listed([d.curve for d in dominances if d.everywhere])}.",
        ["method", "on average", "at the least", "which is at task", "above on"], rows,
    )  # fmt: skip


def chosen_table(results: Results, choices: Sequence[Choice]) -> Table:
    """The one model that stands for each method, chosen among its scales too where it has some."""
    labels = {choice.curve for choice in choices}
    choices = [c for c in choices if f"{c.curve}, scaled" not in labels]
    headings = ["method", "chosen", "new task", f"of {REFERENCE}'s best", "kept share"]
    headings += [f"{task} / base" for task in results.known]
    rows = []
    for choice in sorted(choices, key=lambda c: -(c.kept.value if c.kept else -np.inf)):
        if choice.setting is None or choice.raw is None:
            rows.append(
                [
                    choice.curve.removesuffix(", scaled"),
                    "none learns enough",
                    *[ABSENT] * (len(headings) - 2),
                ]
            )
            continue
        setting = choice.setting
        shown = "" if setting.learning_rate is None else f"{setting.learning_rate:g}"
        shown += "" if setting.scale == 1.0 else f" × {setting.scale:g}"
        intervals = [choice.task, choice.share, choice.kept, *choice.raw.values()]
        rows.append(
            [
                choice.curve.removesuffix(", scaled"),
                shown or ABSENT,
                *(_interval(i, percent) for i in intervals),
            ]
        )
    by, least = (
        "the one with the smallest forecast of forgetting",
        "the one that just learns enough",
    )
    over = over_all_sentence(shown_of(choice.kept for choice in choices))
    by_forecast = [choice.forecast for choice in choices if choice.setting is not None]
    if not any(by_forecast):
        by = least
    elif not all(by_forecast):
        by += f" (of methods without forecasts {least})"
    return Table(
        f"Of the settings (learning rate × scale) that learn at least 0.95 of {REFERENCE}'s best on {listed(results.selection)}, "
        f"{by}; then measured on the test splits. Last columns: accuracy as a share of the base model's, chance not "
        f"subtracted.{over}",
        headings, rows,
    )  # fmt: skip


def raw_table(results: Results, comparisons: Mapping[str, Sequence[Comparison]]) -> Table:
    """Accuracy on each retention task as a share of the base model's, along each curve's frontier."""
    by = {
        (task, c.curve): c.kept
        for task, of in comparisons.items()
        for c in of
        if c.share is not None
    }
    rows = []
    for curve in results.curves():
        kept = [by.get((task, curve)) for task in comparisons]
        rows.append([curve, *(_interval(k, percent) if k else "not reached" for k in kept)])
    return Table(
        f"Accuracy at 0.95 times {REFERENCE}'s best task accuracy as a share of the base model's, chance not subtracted: "
        f"the most along each task's own frontier.{over_all_sentence(shown_of(by.values()))}",
        ["method", *(f"{task} / base" for task in comparisons)], rows,
    )  # fmt: skip


def convergence_table(convergences: Sequence[Convergence]) -> Table:
    """Steps to the reference's final loss."""
    rows = []
    for of in convergences:
        reached = [n for n in of.steps if n is not None]
        median = of.median()
        range_text = ABSENT
        if reached:
            range_text = (
                f"{min(reached):,} to {max(reached):,}"
                if len(set(reached)) > 1
                else f"{reached[0]:,}"
            )
        if len(reached) < len(of.steps):
            range_text = (
                f"{range_text} in {len(reached)} of {len(of.steps)} seeds" if reached else "never"
            )
        rows.append(
            [
                of.method,
                ABSENT if of.setting.learning_rate is None else f"{of.setting.learning_rate:g}",
                f"{median[0]:,.0f}" if median else "not reached",
                range_text,
                f"{median[1]:.2f}" if median else ABSENT,
            ]
        )
    return Table(
        f"Each method at the learning rate that learns the task best: the first step at which the training loss, a mean "
        f"over an eighth of the run, is down to where {REFERENCE} of the same seed ends. Median over seeds; the last column "
        f"divides by all steps of {REFERENCE}.",
        ["method", "learning rate", "steps", "over seeds", f"of {REFERENCE}'s steps"], rows,
    )  # fmt: skip


def rankings_table(ranked: Sequence[Ranking]) -> Table:
    """Which predictor of forgetting ranks models best."""
    names = list(ranked[0].spearman)
    within = [ranking for ranking in ranked if ranking.of is not None]
    rows = []
    for ranking in ranked:
        label = "all" if ranking.of is None else f"within {ranking.of}"
        rows.append([label, str(ranking.count), *_correlations(ranking, names)])
    if len(within) > 1:
        mean = Ranking(
            None,
            0,
            {n: _mean([r.spearman[n] for r in within]) for n in names},
            {n: _mean([r.kendall[n] for r in within]) for n in names},
        )
        count = sum(ranking.count for ranking in within)
        at = int(ranked[0].of is None)
        rows.insert(at, ["within a method, mean", str(count), *_correlations(mean, names)])
    return Table(
        "Which of the predictors ranks models best: Spearman's and Kendall's rank correlation with the knowledge kept, over the "
        "models that carry all of them; −1 is the order in which they forgot, and the best of a line is bold. In brackets, by how much "
        "Spearman's is behind the best one's, with the 95 % interval over the same resamples of the models: one that holds 0 is a tie. "
        "Within a method, only learning rate and seed differ.",
        ["models", "how many", *(PREDICTORS[name].removeprefix("the ") for name in names)],
        rows,
    )


def _correlations(ranking: Ranking, names: Sequence[str]) -> list[str]:
    found = {n: v for n in names if not np.isnan(v := ranking.spearman[n])}
    best = min(found, key=lambda n: found[n]) if found else None
    cells = []
    for name in names:
        pair = (ranking.spearman[name], ranking.kendall[name])
        text = " / ".join(ABSENT if np.isnan(v) else _two(v) for v in pair)
        if (behind := ranking.behind.get(name)) is not None:
            text += f" (+{_two(behind.value)}, {_two(behind.low)} to {_two(behind.high)})"
        cells.append(bold(text) if name == best else text)
    return cells


def _two(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


# ------------------------------------------------------------------ cells


def _place(by: Mapping[tuple[str, float | None], Comparison], curve: str) -> tuple[float, float]:
    """Who keeps most a little below the reference's best comes first: the best itself is out of reach for whoever learns
    a hair less. Then who does not get there, by the area."""
    near = min(share for _, share in by if share is not None)
    kept, area = (by[curve, share].kept for share in (near, None))
    return (np.inf if kept is None else -kept.value, 0.0 if area is None else -area.value)


def _spread(
    values: Sequence[float], brief: bool, as_text: Callable[[float], str] | None = None
) -> str:
    if not values:
        return ABSENT
    as_text = as_text or percent
    mean = as_text(float(np.mean(values)))
    if brief or len(values) == 1:
        return mean
    low, high = (as_text(value).removesuffix("%") for value in (min(values), max(values)))
    return f"{mean} ({low} to {high})"


def _interval(interval: Interval | None, as_text: Callable[[float], str]) -> str:
    if interval is None:
        return ABSENT
    low, high = (as_text(v).removesuffix("%") for v in (interval.low, interval.high))
    return (
        f"{as_text(interval.value)} ({low} to {high})" if low != high else as_text(interval.value)
    )
