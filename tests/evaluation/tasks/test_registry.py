"""Tasks and metrics of one's own: suites name them, and they are measured with intervals as the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corda_vlm import CordaError, register_metric, register_task
from corda_vlm.errors import UnknownNameError
from corda_vlm.evaluation import TASK_KINDS, TaskKind, evaluate, load_suite
from corda_vlm.evaluation.tasks.base import shares
from corda_vlm.evaluation.tasks.qa import judged
from tests.evaluation.tasks.test_base import Brightness

pytestmark = pytest.mark.usefixtures("own_registrations")


def suite_of(folder, **task) -> dict:
    told = {"name": "colours", "role": "retention", "data": f"folder:{folder}", **task}
    return {"name": "own", "version": 1, "tasks": [told]}


def zero_shot(folder, *metrics: str) -> dict:
    names = ["blue whale", "green tree", "red"]
    return suite_of(
        folder, kind="zero_shot", classes=names, templates=["{}"], metrics=list(metrics)
    )


def confidence(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1).gather(1, labels[:, None])[:, 0]


def test_a_task_of_ones_own(tiny_clip_hf, tiny_processor, colour_folder):
    kind = TaskKind(Brightness, ("brightness",))
    assert register_task("brightness", kind) is kind
    suite = suite_of(colour_folder, kind="brightness")
    (score,) = evaluate(tiny_clip_hf, suite, processor=tiny_processor)
    assert score.metric == "brightness"
    with pytest.raises(CordaError, match="a kind of task named 'qa' is registered already"):
        register_task("qa", kind)


def test_a_metric_of_zero_shot(tiny_clip_hf, tiny_processor, colour_folder):
    suite = zero_shot(colour_folder, "top1", "confidence")
    with pytest.raises(UnknownNameError, match=r"unknown metric .* 'confidence'"):
        load_suite(suite)
    register_metric("zero_shot", "confidence", confidence, chance=1 / 3)
    register_metric(
        "zero_shot", "confidence", confidence, chance=1 / 3
    )  # again, as a notebook does
    top1, own = evaluate(tiny_clip_hf, suite, processor=tiny_processor)
    assert (top1.metric, own.metric) == ("top1", "confidence")
    assert 0.3 < own.value < 0.4  # cosines without a temperature
    assert own.low <= own.value <= own.high
    assert own.chance == pytest.approx(1 / 3)


def test_a_metric_that_is_not_asked_for_is_not_computed(
    tiny_clip_hf, tiny_processor, colour_folder
):
    register_metric("zero_shot", "broken", lambda logits, labels: 1 / 0)
    suite = zero_shot(colour_folder, "top1")
    assert len(evaluate(tiny_clip_hf, suite, processor=tiny_processor)) == 1


@pytest.mark.parametrize(
    ("judge", "why"),
    [
        (lambda logits, labels: logits, r"gave values of shape \(12, 3\)"),
        (lambda logits, labels: 2 * torch.ones(len(labels)), "outside 0 to 1"),
        (lambda logits, labels: torch.full((len(labels),), float("nan")), "or NaN"),
        (lambda logits, labels: ["a"] * len(labels), "gave no numbers"),
    ],
)
def test_what_it_gives_is_looked_at(judge, why, tiny_clip_hf, tiny_processor, colour_folder):
    register_metric("zero_shot", "odd", judge)
    with pytest.raises(CordaError, match=f"the metric 'odd' {why}|{why}"):
        evaluate(tiny_clip_hf, zero_shot(colour_folder, "odd"), processor=tiny_processor)


def test_a_metric_of_answers():
    own = register_metric(
        "qa", "begins_right", lambda said, right: said[:1] in [r[:1] for r in right]
    )
    register_metric("vqa", "begins_right", own.judge)
    outcome = judged("begins_right", own, [("Paris", ["paris", "Pa"]), ("Rome", ["Oslo"])])
    assert outcome.values.tolist() == [1, 0]
    for kind in ("qa", "vqa"):
        suite = suite_of("x", kind=kind, metrics=["begins_right"])
        assert load_suite(suite).tasks[0].metrics == ("begins_right",)


def test_kinds_that_take_none_and_names_that_are_taken_are_refused():
    with pytest.raises(UnknownNameError, match="choose one of: qa, vqa, zero_shot"):
        register_metric("retrieval", "mine", confidence)
    with pytest.raises(CordaError, match="a metric of zero_shot named 'top1' is there already"):
        register_metric("zero_shot", "top1", confidence)
    register_metric("zero_shot", "mine", confidence)
    with pytest.raises(
        CordaError, match="a metric of zero_shot named 'mine' is registered already"
    ):
        register_metric("zero_shot", "mine", shares)
    with pytest.raises(CordaError, match="chance"):
        register_metric("zero_shot", "other", confidence, chance=1.0)


def test_every_kind_that_takes_metrics_says_what_it_calls_them_with():
    takers = {name for name, kind in TASK_KINDS.items() if kind.judged_by}
    assert takers == {"zero_shot", "qa", "vqa"}


def test_shares_are_numbers_of_each_example():
    assert np.array_equal(shares("m", torch.tensor([0.5, 1.0]), 2), [0.5, 1.0])
