"""What may foretell how much a training has forgotten."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from corda_vlm.anchor import anchor_penalty
from corda_vlm.data import make_batches
from corda_vlm.errors import NotFiniteError
from corda_vlm.families import detect_family, unwrap
from corda_vlm.methods import prepare_method
from corda_vlm.train import TrainOptions
from corda_vlm.train.next_token import NextTokenObjective
from corda_vlm.train.objectives import make_objective
from corda_vlm.train.predictors import Predictors, new_task_change
from corda_vlm.train.terms import TaskData
from tests.anchor.test_anchor import store_of, weights_of
from tests.train.terms.conftest import PLAIN, SPOKEN, moved, questions  # noqa: F401

FEW = TrainOptions(steps=1, batch_size=16, bf16=False)


def classes_of(model, data, processor):
    """The probabilities of the digits of every record, in the order of the draw, from the model itself."""
    objective = make_objective(
        FEW.complete(None), model, detect_family(model), processor, data, None, None
    )
    batch = next(iter(make_batches(data, processor, batch_size=len(data), shuffle=True, seed=0)))
    with torch.no_grad():
        return objective.logits(model, batch).log_softmax(1)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("towers", ["vision", ["vision", "text"]])
def test_the_divergence_is_over_the_classes_of_the_task(towers, tiny_open_clip, digits, processor):
    before = classes_of(tiny_open_clip, digits, processor)
    model = prepare_method("lora", copy.deepcopy(tiny_open_clip), rank=2, towers=towers)
    change = new_task_change(model, processor, TaskData(digits, FEW))
    assert change is not None
    assert change() == pytest.approx(0.0, abs=1e-9)
    moved(model, 0.2)
    after = classes_of(unwrap(model).eval(), digits, processor)
    wanted = F.kl_div(after, before, log_target=True, reduction="batchmean")
    assert change() == pytest.approx(float(wanted), rel=1e-4)
    assert change() > 1e-4


def test_of_a_language_model_it_is_over_the_next_tokens(tiny_llm, questions):  # noqa: F811
    model = prepare_method("lora", tiny_llm.model, rank=2)
    change = new_task_change(model, tiny_llm.processor, TaskData(questions, TrainOptions(**SPOKEN)))
    assert change is not None
    every = make_batches(
        questions, tiny_llm.processor, batch_size=16, shuffle=True, chat=PLAIN, must_learn=True
    )

    def shares():
        with torch.no_grad():
            (batch,) = every
            return NextTokenObjective().logits(unwrap(model).eval(), batch).log_softmax(1)

    before = shares()
    moved(model, 0.3)
    wanted = float(F.kl_div(shares(), before, log_target=True, reduction="batchmean"))
    # the tokens beside the most likely count together, which cannot raise it; of a tiny model they are many
    assert 0.1 * wanted < change() <= wanted * (1 + 1e-4)


@pytest.mark.parametrize(
    "options", [{"loss": "linear"}, {"loss": "contrastive"}, {"train_head": True}]
)
def test_a_loss_that_compares_nothing_known_before_has_none(
    options, tiny_open_clip, digits, processor
):
    model = prepare_method("lora", tiny_open_clip, rank=2, towers="vision")
    options = TrainOptions(steps=1, batch_size=8, bf16=False, **options)
    assert new_task_change(model, processor, TaskData(digits, options)) is None


@pytest.mark.parametrize("method", ["lora", "full", "dora"])
def test_all_of_them_at_the_end(method, tiny_open_clip, digits, processor):
    bare = copy.deepcopy(tiny_open_clip)
    store = store_of(bare)
    model = prepare_method(method, tiny_open_clip, rank=2, towers="vision")
    forecast = anchor_penalty(model, store)
    predictors = Predictors(forecast)
    predictors.look_at(model, processor, TaskData(digits, FEW), store)
    assert max(predictors.now().values()) < 1e-6
    moved(model, 0.05)
    values = predictors.now()
    assert values["task_change"] == pytest.approx(values["forecast"]), "of the same covariances"
    sizes = relative_size(method, model, bare, forecast.sites)
    assert values["update_size"] == pytest.approx(sizes, rel=1e-3)
    assert values["kl_new"] > 0
    if method == "full":  # nothing is copied a second time
        one, other = forecast, predictors._others["update_size"]
        assert all(one.copies()[name] is copied for name, copied in other.copies().items())
        assert other.copies()


def relative_size(method, model, bare, sites):
    """The mean over the layers of `‖W − W₀‖ / ‖W₀‖`, from the weights themselves."""
    merged = copy.deepcopy(model)
    if method != "full":
        merged = merged.merge_and_unload()
    now, before = weights_of(merged), weights_of(bare)
    return math.fsum(float((now[s] - before[s]).norm() / before[s].norm()) for s in sites) / len(
        sites
    )


def test_what_is_no_number_is_a_divergence(tiny_open_clip, digits, processor):
    store = store_of(tiny_open_clip)
    model = prepare_method("lora", tiny_open_clip, rank=2, towers="vision")
    predictors = Predictors(anchor_penalty(model, store))
    predictors.look_at(model, processor, TaskData(digits, FEW), None)
    assert "task_change" not in predictors.now()
    moved(model, float("nan"))
    with pytest.raises(NotFiniteError, match="forecast of forgetting is nan"):
        predictors.now()
