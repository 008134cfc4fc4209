"""A training with a budget: it is met, gone on with to the bit, told, and refused where it cannot be."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel

from corda_vlm import load_model
from corda_vlm.adapter.paired import base_of
from corda_vlm.data import load_records, make_batches
from corda_vlm.errors import CordaError, ForeignFileError, UnknownNameError
from corda_vlm.experiment import steps
from corda_vlm.methods import prepare_method
from corda_vlm.run_files import BEGUN, DONE
from corda_vlm.train import TrainOptions, forgetting_budget, train
from corda_vlm.train.history import read_history
from corda_vlm.train.terms import KnowledgeData, Term, TermOptions, distillation
from corda_vlm.train.trained import load_trained
from tests.train.terms.conftest import OPTIONS, Stop, weights

HARSH = TrainOptions(**{**OPTIONS, "learning_rate": 3e-2}, save_every=2)


@pytest.fixture(scope="module")
def many():
    """Enough records to tell of four fifths."""
    return load_records({"source": "sklearn:digits", "split": "val", "limit": 150})


@pytest.fixture
def run(tiny_open_clip, digits, held_out, many, processor, lora):
    """(folder, *callbacks) -> the model, and what its training gave: on digits, with nearest images as the probe."""

    def run(folder, *callbacks, keep=0.8, method="lora", every=2, options=HARSH, stop=False):
        bare = copy.deepcopy(tiny_open_clip)
        plain = method == "lora"  # on layers that plain PEFT knows
        model = lora(bare) if plain else prepare_method(method, bare, rank=4, towers="vision")
        knowledge = make_batches(held_out, processor, batch_size=8)
        distill = Term("distill", distillation(model, knowledge), 1.0, every=3)
        budget = forgetting_budget(
            model,
            many,
            keep,
            processor=processor,
            metric="agreement",
            term=None if stop else "distill",
            stop=stop,
            every=every,
        )
        result = train(model, digits, processor, options=options, output_dir=folder, terms=[distill],
                       budget=budget, callbacks=callbacks, show_progress=False,
                       eval_data=held_out if stop else None)  # fmt: skip
        return model, result

    return run


def test_a_budget_is_met_told_and_gone_on_with_to_the_bit(run, tmp_path) -> None:
    straight, result = run(tmp_path / "straight")
    spent = result.budget
    assert spent.kept.share >= 0.8 > spent.kept_at_full.share
    assert 0 < spent.strength < 1
    assert spent.task.keys() == spent.task_at_full.keys() == {"loss", "accuracy"}
    looks = [(e["step"], e["keep"], e["keep_weight"]) for e in result.history if "keep" in e]
    assert [step for step, *_ in looks] == [2, 4, 6]
    assert looks[-1][2] == spent.weight
    assert [e["step"] for e in result.history if "loss" in e] == [2, 4, 6, 8], "looks hide no entry"
    assert json.loads((tmp_path / "straight" / DONE).read_text())["budget"] == spent.as_json()
    assert "at strength" in str(spent)
    assert "80% was asked for" in str(spent)

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "cut", Stop(5))
    model, gone_on = run(tmp_path / "cut")
    assert gone_on.resumed_from == 4
    assert gone_on.budget == spent
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(model)[name]), name
    again = read_history(tmp_path / "cut" / "history.jsonl")
    assert looks == [(e["step"], e["keep"], e["keep_weight"]) for e in again if "keep" in e]

    # a second run over the first one's output
    model, finished = run(tmp_path / "cut")
    assert finished.budget == spent
    assert finished.resumed_from == finished.steps
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(model)[name]), name
    with pytest.raises(
        CordaError, match=r"holds another training \(the budget's keep: 0.8 there, 0.82 now"
    ):
        run(tmp_path / "cut", keep=0.82)
    damaged = json.loads((tmp_path / "cut" / DONE).read_text())
    damaged["budget"] = {"strength": 1}
    (tmp_path / "cut" / DONE).write_text(json.dumps(damaged))
    with pytest.raises(ForeignFileError, match="delete it to train again"):
        run(tmp_path / "cut")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_saved_is_the_model_at_that_strength(
    method, run, tiny_open_clip, held_out, processor, tmp_path
) -> None:
    # weights that are trained in full forget more
    model, result = run(tmp_path / "run", method=method, keep=0.8 if method == "lora" else 0.6)
    assert 0 < result.budget.strength < 1
    pixels = next(iter(make_batches(held_out, processor, batch_size=4)))["pixel_values"]

    def seen(model):
        with torch.no_grad():
            return model.eval().encode_image(pixels)

    loaded = load_trained(copy.deepcopy(tiny_open_clip), tmp_path / "run").model
    torch.testing.assert_close(seen(loaded), seen(model))
    if method == "lora":
        plain = PeftModel.from_pretrained(copy.deepcopy(tiny_open_clip), str(result.weights))
        torch.testing.assert_close(seen(plain.base_model.model), seen(model))


def test_a_training_that_forgets_little_keeps_its_strength(run, tmp_path) -> None:
    gentle = TrainOptions(**{**OPTIONS, "learning_rate": 1e-6})
    _, result = run(tmp_path / "run", options=gentle)
    assert result.budget.strength == 1.0
    assert result.budget.kept == result.budget.kept_at_full
    assert "at full strength" in str(result.budget)


def test_a_training_stops_early_and_so_it_does_when_it_is_gone_on_with(run, tmp_path) -> None:
    straight, result = run(tmp_path / "straight", stop=True)
    looks = [(e["step"], e["keep"]) for e in result.history if "keep" in e]
    assert result.steps == looks[-1][0] < OPTIONS["steps"]
    assert all("keep_weight" not in e for e in result.history)
    assert looks[-1][1] < 0.8 <= result.budget.kept.share
    (last,) = (e["step"] for e in result.history if "eval_loss" in e)
    assert last == result.steps, "as at the end of a training that goes all the way"
    assert [e["step"] for e in result.history if "loss" in e][-1] == result.steps
    assert result.budget.term is None
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "cut", Stop(1), stop=True)
    model, gone_on = run(tmp_path / "cut", stop=True)
    assert gone_on.steps == result.steps
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(model)[name]), name
    gentle = TrainOptions(**{**OPTIONS, "learning_rate": 1e-6})
    _, whole = run(tmp_path / "gentle", options=gentle, stop=True)
    assert whole.steps == OPTIONS["steps"]
    with pytest.raises(CordaError, match="holds another training"):
        run(tmp_path / "gentle", options=gentle)


def test_a_training_of_a_former_version_is_gone_on_with(
    lora, tiny_open_clip, digits, processor, tmp_path
) -> None:
    def run():
        return train(lora(copy.deepcopy(tiny_open_clip)), digits, processor, options=TrainOptions(**OPTIONS),
                     output_dir=tmp_path, show_progress=False)  # fmt: skip

    run()
    plan = json.loads((tmp_path / BEGUN).read_text())
    assert plan.pop("budget") is None
    (tmp_path / BEGUN).write_text(json.dumps(plan))
    assert run().budget is None


def test_any_trainer_keeps_a_budget(tiny_open_clip, held_out, many, processor, tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    from corda_vlm.train import AnchorMixin

    class Own(AnchorMixin, Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            return -model.encode_image(inputs["pixel_values"])[:, 0].mean()

        def prediction_step(self, model, inputs, *_, **__):
            with torch.no_grad():
                return self.compute_loss(model, inputs), None, None

    bare = copy.deepcopy(tiny_open_clip)
    model = base_of(prepare_method("lora", tiny_open_clip, rank=2, towers="vision"))
    batch = next(iter(make_batches(held_out, processor, batch_size=8)))
    items = [{"pixel_values": one} for one in batch["pixel_values"]] * 4
    args = TrainingArguments(str(tmp_path), max_steps=8, per_device_train_batch_size=8, learning_rate=0.1,
                             use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=4, save_strategy="no", prediction_loss_only=True,
                             remove_unused_columns=False)  # fmt: skip
    trainer = Own(model=model, args=args, train_dataset=items, eval_dataset=items[:8])
    budget = forgetting_budget(
        model, many, 0.6, processor=processor, metric="agreement", term="distill", every=2
    )
    foreign = forgetting_budget(
        prepare_method("lora", bare, rank=2, towers="vision"),
        many, 0.6, processor=processor, metric="agreement",
    )  # fmt: skip
    with pytest.raises(CordaError, match="made of another model"):
        trainer.keep(foreign)
    with pytest.raises(UnknownNameError, match="distill"):
        trainer.keep(budget)
    trainer.distill_from(make_batches(held_out, processor, batch_size=8), weight=0.0)
    with pytest.raises(CordaError, match="only logged"):
        trainer.keep(budget)
    trainer.distill_from(make_batches(held_out, processor, batch_size=8), weight=0.01)
    trainer.keep(budget)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "keep" in entry] == [2, 4, 6]
    assert trainer.spent is not None
    assert trainer.spent.strength < 1
    assert budget.kept().share >= 0.6
    assert trainer.spent.weight == trainer.weight_of("distill") != 0.01
    assert trainer.spent.task["loss"] > trainer.spent.task_at_full["loss"]
    assert "loss" in str(trainer.spent)


def test_budgets_that_cannot_be(tiny_open_clip, held_out, processor) -> None:
    model = prepare_method("lora", copy.deepcopy(tiny_open_clip), rank=2, towers="vision")
    with pytest.raises(CordaError, match="keep is nan"):
        forgetting_budget(model, held_out, float("nan"), processor=processor)
    for keep in (0.0, -1.0, 1.5):
        with pytest.raises(CordaError, match=r"above 0 \(chance\) and at most 1"):
            forgetting_budget(model, held_out, keep, processor=processor)
        with pytest.raises(CordaError, match=r"above 0 \(chance\) and at most 1"):
            TermOptions(keep=keep)
    with pytest.raises(CordaError, match=r"95 per cent is 0\.95"):
        TermOptions(keep=95)
    with pytest.raises(CordaError, match="probe= is for keep="):
        TermOptions(probe="folder:photos")
    with pytest.raises(CordaError, match="40 records are too few to tell whether 95% is kept"):
        forgetting_budget(model, held_out, 0.95, processor=processor, metric="agreement")
    with pytest.raises(CordaError, match="every is 0"):
        forgetting_budget(model, held_out, 0.5, processor=processor, every=0)
    frozen = copy.deepcopy(tiny_open_clip).requires_grad_(False)
    with pytest.raises(CordaError, match="nothing of this one is trained"):
        forgetting_budget(frozen, held_out, 0.5, processor=processor, metric="agreement")


@pytest.mark.parametrize(
    "said", [{"keep_by": "distill"}, {"keep_every": 5}, {"keep_metric": "top1"}, {"probe_records": 9},
             {"probe_templates": ("a {}",)}],
)  # fmt: skip
def test_what_is_said_of_no_budget_is_refused(said) -> None:
    (name,) = said
    with pytest.raises(CordaError, match=f"{name}= is for keep="):
        TermOptions(**said)
    assert getattr(TermOptions(keep=0.9, **said), name) == said[name]


@pytest.fixture
def once(tiny_open_clip, digits, processor, lora, tmp_path):
    """(term, budget's model, **more) -> a training that is held to records by distillation alone, with a budget."""
    model = lora(copy.deepcopy(tiny_open_clip))

    def once(probe, term="distill", of=None, **more):
        budget = forgetting_budget(
            of or model, probe, 0.6, processor=processor, metric="agreement", term=term
        )
        return train(model, digits, processor, options=TrainOptions(**{**OPTIONS, "steps": 1}),
                     output_dir=tmp_path / "run", budget=budget, show_progress=False, **more)  # fmt: skip

    return once


def test_a_budget_of_no_use_claims_no_folder(
    once, lora, tiny_open_clip, held_out, many, tmp_path
) -> None:
    given = {"knowledge": held_out}
    with pytest.raises(CordaError, match="made of another model"):
        once(many, of=lora(copy.deepcopy(tiny_open_clip)), **given)
    with pytest.raises(UnknownNameError, match="anchor_kfac"):
        once(many, term="anchor_kfac", **given)
    assert not (tmp_path / "run").exists() or not [
        path for path in (tmp_path / "run").iterdir() if "lock" not in path.name
    ]
    assert once(many, **given).budget.term == "distill"
    assert list((tmp_path / "run").glob("*.safetensors")), "what the model gave is kept for later"


def test_a_probe_that_is_trained_on_is_refused(
    once, digits, many, processor, tiny_open_clip, tmp_path
) -> None:
    with pytest.raises(CordaError, match=r"probe \(.*\) holds records of the task \("):
        once(digits, knowledge=many)
    with pytest.raises(CordaError, match=r"probe \(.*\) holds records of the knowledge \("):
        once(many, knowledge=many.select(range(90, 120)))
    again = load_records({"source": "sklearn:digits", "split": "val", "limit": 150})
    with pytest.raises(CordaError, match="holds records of the knowledge"):
        once(again, knowledge=many)

    def probed(probe, knowledge, **asked):
        terms = TermOptions(keep=0.6, probe_records=50, **asked)
        return steps.probed(terms, KnowledgeData(knowledge, samples=20), probe, digits)

    with pytest.raises(CordaError, match="holds records of the knowledge"):
        probed(again, many, distill=1.0)
    assert len(probed(again, many, keep_by="strength")[1]) == 50
    assert len(probed(None, many, distill=1.0)[1]) == 50
    same = load_records({"source": "sklearn:digits", "split": "train", "per_class": 9,
                         "text": "a photo of a {class_name}"})  # fmt: skip
    with pytest.raises(CordaError, match="holds records of the task"):
        probed(None, same, distill=1.0)


def test_which_weight_is_steered() -> None:
    def settled(has_data=True, has_store=True, output_side=True, **asked):
        options = TermOptions(keep=0.9, **asked)
        found = options.with_budget(has_data=has_data, has_store=has_store, output_side=output_side)
        again = found.with_budget(has_data=has_data, has_store=has_store, output_side=output_side)
        assert again == found
        return found

    assert settled().steered == "distill"
    assert settled().distill > 0
    assert settled(has_data=False).steered == "anchor"
    assert settled(has_data=False).anchor_output == "kfac"
    assert settled(has_data=False, output_side=False).anchor_output == "none"
    assert settled(has_data=False, anchor_output="mean").anchor_output == "mean"
    assert settled(has_data=False, has_store=False).steered is None
    assert settled(keep_by="strength").names == []
    assert settled(anchor=7.0).steered == "anchor"
    assert settled(anchor=7.0).anchor == 7.0
    assert settled(anchor=7.0).anchor_output == "none"
    assert settled(anchor=7.0, keep_by="distill").steered == "distill"
    assert settled(keep_by="anchor").steered == "anchor"
    assert settled(replay=0.3, start_decay=1.0).steered == "replay"
    for by, what in (("distill", "records"), ("anchor", "covariances")):
        with pytest.raises(CordaError, match=f"keep_by {by} .* {what} of the knowledge"):
            settled(has_data=False, has_store=False, keep_by=by)
    assert TermOptions(distill=1.0).steered is None
    assert TermOptions(keep=0.9, keep_by="strength").with_data().names == []


def test_a_trained_model_keeps_what_it_knew(tmp_path) -> None:
    """emoji-clip learns digits at a rate at which it forgets more than a tenth, and is held to a tenth."""
    loaded = load_model("emoji-clip")
    knowledge = load_records(
        {"source": "parquet:model_zoo/emoji-clip/data/*.parquet", "split": "val", "limit": 320}
    )
    prepared = prepare_method("lora", loaded.model, rank=4, towers="vision")
    digits = load_records({"source": "sklearn:digits", "split": "train", "limit": 160})
    options = TrainOptions(steps=8, batch_size=16, learning_rate=5e-2, bf16=False, save_every=100)
    result, predictors = steps.train_anchored(
        prepared, digits, loaded.processor, options=options, output_dir=tmp_path, classes=None, templates=None,
        knowledge=None, knowledge_data=KnowledgeData(knowledge, samples=60),
        terms=TermOptions(keep=0.9, keep_by="strength", probe_records=240),
    )  # fmt: skip
    assert predictors == {}
    spent = result.budget
    assert spent.metric == "top5"
    assert spent.kept.records == 240
    assert spent.kept_at_full.share < 0.9 <= spent.kept.share
    assert 0 < spent.strength < 1
