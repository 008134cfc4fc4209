"""What a run found, in sentences: the head of its report, of its table in the terminal, and of a study's overview.

Nothing is claimed where nothing was learned, no winner is named among ties, and one seed has no interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from corda_vlm.errors import CordaError
from corda_vlm.names import listed
from corda_vlm.report.analysis.compare import Dominance, against
from corda_vlm.report.analysis.learned import Learned, all_learned, learned, reference_learned
from corda_vlm.report.analysis.results import REFERENCE, Results
from corda_vlm.report.analysis.standing import Standing, standing
from corda_vlm.report.markup import bold, code, markdown
from corda_vlm.report.words import ONE_SEED, over_all, percent, setting_text, signed

SCALED_REFERENCE = f"{REFERENCE}, scaled"

MOST = 5
"""Names that a sentence lists."""


def findings(results: Results, dominances: Sequence[Dominance] | None = None) -> list[str]:
    """A sentence on the best method that is not the reference, at the reference's best accuracy and, if it is another
    one there, just below; and one against the scaled reference. None where the reference has not learned the task."""
    if not reference_learned(results):
        return []
    sentences, former, shares = [], None, []
    for share in (1.0, 0.95):
        place = standing(results, share)
        if place is None or place.best == former:
            continue
        former = place.best
        sentences.append(_at_equal_accuracy(results, place))
        shares += [place.kept[REFERENCE], place.kept[place.best]]
    if sentences and (sentence := over_all(shares)):
        sentences.append(sentence)
    along = scaled_dominances(results) if dominances is None else dominances
    along = [d for d in along if results.curves()[d.curve][0] != REFERENCE]
    return [*sentences, _along_the_frontier(results, along)] if sentences and along else sentences


def leading_finding(results: Results) -> str:
    """What a report begins with, as Markdown: how the best method compares, or why nothing can be said."""
    return markdown(" ".join(findings(results) or [state(results)]))


def scaled_dominances(results: Results) -> list[Dominance]:
    """Each method, scaled where it was, against the reference scaled; none where nothing was scaled or learned."""
    curves = results.curves()
    if SCALED_REFERENCE not in curves or not reference_learned(results):
        return []
    labels = [
        label
        for label, (method, scaled) in curves.items()
        if label != SCALED_REFERENCE
        and results.points(method)
        and (scaled or f"{method}, scaled" not in curves or method == REFERENCE)
    ]
    try:
        dominances = against(results, SCALED_REFERENCE, labels)
    except CordaError:  # the reference has not learned enough for a range
        return []
    return sorted(dominances, key=lambda d: -d.mean.value)


def state(results: Results) -> str:
    """Why nothing can be compared (yet)."""
    if not results.trained:
        if results.diverged:
            return f"Every training that has ended diverged: {_diverged(results.diverged)}."
        return "Only the model before training has been measured so far."
    if not results.gain or not results.retention:
        return "A trade-off needs at least one task of each role, gain and retention."
    if not results.known:
        return (
            f"The base model does no better than chance on {listed(results.retention)}, so there is no knowledge "
            "to keep and nothing to compare."
        )
    if learned(results, REFERENCE) is not None:
        return _not_learned(results)
    lost = [key for key in results.diverged if key[0] == REFERENCE]
    if lost:
        return (
            f"No training with {code(REFERENCE)} came to an end without diverging ({_diverged(lost)}), so there is "
            "no task accuracy to compare the methods at."
        )
    return f"Nothing was trained with {code(REFERENCE)}, so there is no task accuracy to compare the methods at."


# ------------------------------------------------------------------ sentences


def _not_learned(results: Results) -> str:
    every = all_learned(results)
    best, reference = every[0], learned(results, REFERENCE)
    assert reference is not None
    learners = [one for one in every if one.verdict == "yes"]
    unclear = next((one for one in every if one.verdict == "unknown"), None)
    if not learners and unclear is not None:
        return (
            f"Whether any method learnt the task cannot be said: {_against_base(unclear)}. That is within the two models' own "
            "intervals, and these scores hold no comparison on the same examples, which is finer: they come from a version "
            "that did not note it, or the model before training was measured elsewhere. Nothing is compared; measure both "
            "again into one file of scores."
        )
    if not learners:
        return (
            f"No method learnt the task, best {percent(best.task)} against {percent(best.base)} before "
            f"({best.method}, {setting_text(best.setting)}{_gain(best)}). So there is nothing to compare: train longer, at a "
            "higher learning rate, or on more data."
        )
    names = listed([f"{one.method} ({percent(one.task)})" for one in learners])
    how = "did not learn the task" if reference.verdict == "no" else "may not have learnt the task"
    return (
        f"{code(REFERENCE)}, at whose task accuracy the methods are compared, {how}: {_against_base(reference)}. So nothing is "
        f"compared. The task was learnt by {names}."
    )


def _against_base(one: Learned) -> str:
    return (
        f"{one.method} reaches {percent(one.task)} against {percent(one.base)} before "
        f"({setting_text(one.setting)}{_gain(one)})"
    )


def _gain(one: Learned) -> str:
    if one.gain is None:
        return ""
    low, high = signed(one.gain.low), signed(one.gain.high)
    return f"; {signed(one.gain.value)} points on the same examples, 95% interval {low} to {high}"


def _at_equal_accuracy(results: Results, standing: Standing) -> str:
    where = (
        f"At the task accuracy that {REFERENCE} reaches at its best ({percent(standing.task)})"
        if standing.share == 1.0
        else f"At {standing.share:g} of {REFERENCE}'s best task accuracy ({percent(standing.task)})"
    )
    kept, base = standing.kept[standing.best], standing.kept[REFERENCE]
    seeds = f"the 95% interval over {len(results.seeds)} seeds"
    ratio = f", {kept / base:.2f} times as much" if base > 0 else ""
    both = f"keeps {percent(kept)} of what the model knew and {REFERENCE} keeps {percent(base)}"
    if standing.verdict == "one seed":
        return f"{where}, {standing.best} {both}{ratio} ({ONE_SEED})."
    assert standing.over is not None
    if standing.verdict == "tie":
        return (
            f"{where}, {standing.best} {both}: a tie, as the difference of {signed(standing.over.value)} points is within {seeds} "
            f"({signed(standing.over.low)} to {signed(standing.over.high)})."
        )
    if standing.verdict == "less":
        return (
            f"{where}, {bold(REFERENCE)} keeps most of what the model knew, {percent(base)}, and of the others {standing.best} "
            f"most, {percent(kept)}."
        )
    if standing.verdict == "rarely":
        return (
            f"{where}, {standing.best} {both}{ratio}, but it learns that much in {standing.reached:.0%} of the resamples of "
            f"{len(results.seeds)} seeds only."
        )
    if standing.ties:
        first = (standing.best, *standing.ties)
        names = listed([f"{name} ({percent(standing.kept[name])})" for name in first], MOST)
        return (
            f"{where}, {names} keep more of what the model knew than {REFERENCE} ({percent(base)}) and are a tie: their "
            f"differences are within {seeds}."
        )
    return f"{where}, {bold(standing.best)} {both}{ratio}."


def _along_the_frontier(results: Results, along: Sequence[Dominance]) -> str:
    top, several = along[0], len(results.seeds) > 1
    ties = [
        other.curve
        for other in along[1:]
        if several and against(results, other.curve, [top.curve])[0].mean.low <= 0
    ]
    ahead = several and top.mean.low > 0
    name = bold(top.curve) if ahead and not ties else top.curve
    spread = f"{signed(top.mean.low)} to {signed(top.mean.high)}" if several else ONE_SEED
    text = (
        f"Against {REFERENCE} scaled after training, {name} keeps {signed(top.mean.value)} points on average along the "
        f"frontier ({spread}) and lies above it on {top.above:.0%} of it"
    )
    if several and top.mean.low <= 0 <= top.mean.high:
        text += ": a tie, as the interval holds 0"
    elif ahead and ties:
        text += f"; a tie with {listed(ties, MOST)}, by the intervals of their differences"
    return f"{text}."


def _diverged(keys: Iterable[tuple[str, float | None, int | None]]) -> str:
    names = [
        f"{name}{'' if rate is None else f' at learning rate {rate:g}'}" for name, rate, _ in keys
    ]
    return listed(dict.fromkeys(names), MOST)
