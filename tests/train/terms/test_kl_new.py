"""KL to the base on the new task's own batch."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from corda_vlm.data import make_batches
from corda_vlm.errors import CordaError
from corda_vlm.methods import prepare_method
from corda_vlm.train import AnchorMixin, TrainOptions, train
from corda_vlm.train.next_token import NextTokenObjective
from corda_vlm.train.terms import TaskData, TermOptions, make_terms
from corda_vlm.train.terms.before import Before
from corda_vlm.train.terms.kl_new import NewTaskDivergence
from tests.train.terms.conftest import OPTIONS, PLAIN, SPOKEN, Stop, moved, weights


def kl_new(model, data, processor, **options):
    task = TaskData(data, TrainOptions(**{**OPTIONS, **options}))
    return make_terms(TermOptions(kl_new=1.0), model, processor, None, task)


@pytest.mark.parametrize("method", ["lora", "dora", "full", "milora"])
def test_the_model_as_it_was_is_run_beside_the_trained_one(method, tiny_llm, questions):
    before = copy.deepcopy(tiny_llm.model)
    model = prepare_method(
        method, tiny_llm.model, rank=2, **({"show_progress": False} if method == "milora" else {})
    )
    held = Before(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    moved(model, 0.3)
    batch = next(iter(make_batches(questions, tiny_llm.processor, batch_size=4, chat=PLAIN)))
    with held.running() as base:
        found = base(**batch).logits
    torch.testing.assert_close(found, before(**batch).logits, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in trained)
    assert not torch.allclose(tiny_llm.model(**batch).logits, found, atol=1e-3)


def test_a_residual_base_is_the_original(tiny_llm, questions):
    before = copy.deepcopy(tiny_llm.model)
    model = prepare_method("milora", tiny_llm.model, rank=2, base="residual", show_progress=False)
    held = Before(model)
    moved(model, 0.3)
    batch = next(iter(make_batches(questions, tiny_llm.processor, batch_size=4, chat=PLAIN)))
    with held.running() as base:
        torch.testing.assert_close(
            base(**batch).logits, before(**batch).logits, rtol=1e-3, atol=1e-4
        )


def test_it_is_the_divergence_of_the_next_tokens(tiny_llm, questions):
    model = prepare_method("lora", tiny_llm.model, rank=2)
    near = NewTaskDivergence(model, NextTokenObjective())
    batch = next(
        iter(make_batches(questions, tiny_llm.processor, batch_size=4, chat=PLAIN, must_learn=True))
    )
    old = near.objective.logits(model, batch).log_softmax(1).detach()
    assert float(near(batch)) == pytest.approx(0, abs=1e-6)
    moved(model, 0.3)
    new = near.objective.logits(model.eval(), batch).log_softmax(1)
    wanted = F.kl_div(new, old, log_target=True, reduction="batchmean")
    torch.testing.assert_close(near(batch), wanted, rtol=1e-4, atol=1e-6)


def test_it_holds_the_classes_of_prompts(tiny_open_clip, digits, processor, tmp_path):
    found = {}
    for weight in (0.0, 100.0):
        model = prepare_method("lora", copy.deepcopy(tiny_open_clip), rank=4, towers="vision")
        (term,) = kl_new(model, digits, processor)
        term = type(term)(term.name, term.penalty, weight)
        result = train(model, digits, processor, options=TrainOptions(**OPTIONS), output_dir=tmp_path / str(weight),
                       terms=[term], show_progress=False)  # fmt: skip
        found[weight] = [entry["kl_new"] for entry in result.history if "loss" in entry]
    assert len(found[0.0]) == 4
    assert 0 < found[100.0][-1] < 0.5 * found[0.0][-1]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_it_is_gone_on_with_to_the_bit(accumulated, tiny_open_clip, digits, processor, tmp_path):
    changes = {"save_every": 2, "gradient_accumulation": accumulated, "augment": "light"}
    options = TrainOptions(**{**OPTIONS, **changes})

    def run(folder, *callbacks):
        model = prepare_method("lora", copy.deepcopy(tiny_open_clip), rank=4, towers="vision")
        terms = kl_new(model, digits, processor, **changes)
        train(model, digits, processor, options=options, output_dir=folder, terms=terms, callbacks=callbacks,
              show_progress=False)  # fmt: skip
        return weights(model)

    straight = run(tmp_path / "straight")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "cut", Stop(5))
    for name, value in run(tmp_path / "cut").items():
        assert torch.equal(value, straight[name]), name


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loss": "contrastive"}, "the contrastive loss has none"),
        ({"loss": "linear"}, "the linear loss has none"),
        ({"train_head": True}, "train_head trains class vectors apart"),
    ],
)
def test_where_there_is_nothing_to_compare(changes, match, tiny_open_clip, digits, processor):
    model = prepare_method("lora", tiny_open_clip, rank=2, towers="vision")
    with pytest.raises(CordaError, match=match):
        kl_new(model, digits, processor, **changes)


def test_a_language_model_stays_near(tiny_llm, questions, tmp_path):
    model = prepare_method("lora", tiny_llm.model, rank=2)
    options = TrainOptions(**SPOKEN)
    terms = make_terms(
        TermOptions(kl_new=0.1), model, tiny_llm.processor, None, TaskData(questions, options)
    )
    result = train(model, questions, tiny_llm.processor, options=options, output_dir=tmp_path, terms=terms,
                   show_progress=False)  # fmt: skip
    assert [entry["kl_new"] > 0 for entry in result.history if "loss" in entry][-1]


def test_any_trainer_stays_near(tiny_llm, questions, tmp_path):
    """A Trainer of transformers, with batches that have labels."""
    batch = next(
        iter(make_batches(questions, tiny_llm.processor, batch_size=8, chat=PLAIN, must_learn=True))
    )
    rows = [{name: value[index] for name, value in batch.items()} for index in range(8)]

    class Near(AnchorMixin, Trainer):
        pass

    drift = {}
    for weight in (0.0, 1000.0):
        model = prepare_method("lora", copy.deepcopy(tiny_llm.model), rank=2)
        args = TrainingArguments(
            str(tmp_path / str(weight)), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = Near(model=model, args=args, train_dataset=cast(Any, rows))
        trainer.stay_near(weight)
        trainer.train()
        logged = [entry["kl_new"] for entry in trainer.state.log_history if "loss" in entry]
        drift[weight] = logged[-1]
    assert 0 < drift[1000.0] < 0.5 * drift[0.0]
