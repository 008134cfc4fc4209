"""The tables and sentences of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from corda_vlm.evaluation.bootstrap import Interval
from corda_vlm.names import listed
from corda_vlm.report.before_after.comparison import Comparison, number
from corda_vlm.report.before_after.pairs import NONE, OWN, PAIRED, SEEDS, UNPAIRED, Change
from corda_vlm.report.document import Table
from corda_vlm.report.markup import bold
from corda_vlm.report.words import ABSENT, FEW, percent, signed

HOW = {
    PAIRED: "Paired: both models see the same resampled samples.",
    OWN: "Paired by the run itself: the run told how far each score lies above the one before; the score before counts as exact.",
    UNPAIRED: "Unpaired: from the two standard errors that the tool tells, so that they are wider than those over the same samples.",
    SEEDS: "Over seeds: the mean over trainings that differ in their seed alone, with the spread of these and of the samples that all "
    "of them see.",
    NONE: "Without an interval: the results tell neither samples nor standard errors.",
}


def summary_table(comparisons: Sequence[Comparison]) -> Table:
    """A line a model: what it learned of each new task, and what it kept."""
    gained = [one.task for one in comparisons[0].gained]
    kept = [c.task for c in comparisons[0].changes if c.role == "retention" and c.kept is not None]
    rows = []
    for comparison in comparisons:
        by_task = {one.task: one for one in comparison.changes}
        row = [comparison.name]
        row += [_arrow(by_task[task]) for task in gained]
        row += [with_interval(comparison.kept, percent)]
        rows.append([*row, *(with_interval(by_task[task].kept, percent) for task in kept)])
    headings = [f"{task} (gain)" for task in gained] + ["kept share"]
    if len(kept) < 2:
        rows, kept = [row[: 2 + len(gained)] for row in rows], []
    count = len(comparisons[0].retained)
    caption = (
        "Gain: the score before → after. Kept share: (after − chance) / (before − chance), 100% is the model before training and 0% "
        "is chance"
        + (f"; its mean over {count} retention tasks, then each by itself." if count > 1 else ".")
    )
    return Table(caption, ["model", *headings, *(f"{task} kept" for task in kept)], rows)


def changes_table(comparison: Comparison, alone: bool) -> Table:
    """A line a task of one model."""
    rows = []
    for one in comparison.changes:
        text = partial(score_text, one)
        measured = str(one.before.n) if one.before.n else ABSENT
        level = f"{_chance_text(one)}{'?' if one.guessed and one.role == 'retention' else ''}"
        rows.append(
            [
                one.task,
                one.role,
                one.before.metric,
                measured,
                level,
                text(one.before.value),
                text(one.after.value),
                with_interval(one.gain, partial(gain_text, one)),
                with_interval(one.kept, percent),
                one.how,
            ]
        )
    caption = "" if alone else f"{bold(comparison.name)}, with 95% intervals over samples."
    headings = [
        "task",
        "role",
        "metric",
        "samples",
        "chance",
        "before",
        "after",
        "change",
        "kept",
        "interval",
    ]
    return Table(caption, headings, rows)


def ways(comparisons: Sequence[Comparison]) -> list[str]:
    """How the intervals were found, each way once."""
    used = {one.how for comparison in comparisons for one in comparison.changes}
    return [text for how, text in HOW.items() if how in used]


def finding(comparison: Comparison, before: str) -> str:
    """One sentence: what a model kept, and what it gained."""
    kept, tasks = comparison.kept, comparison.retained
    words = f"{bold(comparison.name)} "
    if kept is None:
        words += f"was compared with {before} on no task of which anything was known"
    else:
        of = tasks[0].task if len(tasks) == 1 else f"{len(tasks)} retention tasks"
        words += f"keeps {bold(with_interval(kept, percent))} of what {before} knew, on {of}"
    gains = [
        f"{one.task} goes from {score_text(one, one.before.value)} to {score_text(one, one.after.value)}"
        for one in comparison.gained
    ]
    return words + (f"; {listed(gains, 3)}." if gains else ".")


def leading(comparisons: Sequence[Comparison], before: str) -> list[str]:
    """The sentence of each model; of many, of the one that keeps most."""
    if len(comparisons) <= FEW:
        return [finding(one, before) for one in comparisons]
    with_share = [one for one in comparisons if one.kept is not None]
    if not with_share:
        return [f"{len(comparisons)} models were compared with {before}."]
    most = max(with_share, key=lambda one: number(one.kept or 0.0))
    return [f"Of {len(comparisons)} models {finding(most, before)} No other keeps more."]


def remarks(comparisons: Sequence[Comparison]) -> list[str]:
    """What a reader has to know of the numbers."""
    first = comparisons[0].changes
    told = []
    if guessed := [one.task for one in first if one.guessed and one.role == "retention"]:
        told.append(
            f"The results do not tell what guessing gives on {listed(guessed)}: 0 is taken, which makes the kept share look larger "
            "than it is where an answer is chosen. Give it with --chance or in the file of roles."
        )
    if unknown := [one.task for one in first if one.unknown and one.role == "retention"]:
        told.append(
            f"Before training the model does no better than chance on {listed(unknown)}: there is nothing to keep, and it does "
            "not count."
        )
    if falling := [one.task for one in first if not one.before.rises and one.role == "retention"]:
        told.append(
            f"Of {listed(falling)} less is better, which has no kept share; it does not count in the mean."
        )
    for comparison in comparisons:
        if differ := _settings(comparison):
            told.append(
                f"{comparison.name} was measured with another {listed(differ)} than the model before."
            )
    if not any(one.role == "gain" for one in first):
        told.append("No task is named as gain, so all of them count as retention.")
    return told


def _settings(comparison: Comparison) -> list[str]:
    differ = [
        name
        for one in comparison.changes
        for name, value in one.before.settings.items()
        if one.after.settings.get(name, value) != value
    ]
    return list(dict.fromkeys(differ))


def _arrow(one: Change) -> str:
    return f"{score_text(one, one.before.value)} → {score_text(one, one.after.value)}"


def score_text(one: Change, value: float) -> str:
    return percent(value) if one.before.is_share else f"{value:.4g}"


def gain_text(one: Change, value: float) -> str:
    """A difference: in points where scores are shares."""
    return signed(value) if one.before.is_share else f"{value:+.4g}".replace("-", "−")


def _chance_text(one: Change) -> str:
    return percent(one.chance) if one.before.is_share else f"{one.chance:.4g}"


def with_interval(value: Interval | float | None, as_text: Callable[[float], str]) -> str:
    """A value with its interval in brackets, where it has one."""
    if value is None:
        return ABSENT
    if not isinstance(value, Interval):
        return as_text(value)
    low, high = (as_text(bound).removesuffix("%") for bound in (value.low, value.high))
    text = as_text(number(value))
    return f"{text} ({low} to {high})" if low != high else text
