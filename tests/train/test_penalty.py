"""Penalties and the anchor in training: in ours, in any Trainer of transformers, and in TRL's."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from corda_vlm.anchor import anchor_penalty
from corda_vlm.covariance import collect_covariance
from corda_vlm.errors import CordaError
from corda_vlm.families import FAMILIES, Family, Rule, register_family
from corda_vlm.methods import prepare_method
from corda_vlm.train import AnchorMixin, TrainOptions, train
from corda_vlm.train.history import read_history

OPTIONS: dict[str, Any] = {
    "steps": 8,
    "batch_size": 16,
    "log_every": 2,
    "bf16": False,
    "learning_rate": 1e-2,
}


def batch(size: int = 64) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    }


def quietly(collect, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return collect(*args, show_progress=False, **kwargs)


def vision_store(model):
    from corda_vlm.sites import find_sites

    return quietly(collect_covariance, model, [batch()], find_sites(model, towers="vision"))


# ------------------------------------------------------------------ train()


def trained_with(weight, model, digits, processor, folder, method="lora", **options):
    store = vision_store(model)
    ready = prepare_method(method, model, rank=4, towers="vision")
    result = train(
        ready,
        digits,
        processor,
        options=TrainOptions(**{**OPTIONS, **options}),
        output_dir=folder,
        anchor=anchor_penalty(ready, store),
        anchor_weight=weight,
        show_progress=False,
    )
    return ready, [entry["anchor"] for entry in result.history if "loss" in entry]


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_anchor_holds_down_what_it_forecasts(
    method, tiny_open_clip, digits, processor, tmp_path
):
    free, drift = trained_with(
        0.0, copy.deepcopy(tiny_open_clip), digits, processor, tmp_path / "0", method
    )
    held, slight = trained_with(
        300.0, copy.deepcopy(tiny_open_clip), digits, processor, tmp_path / "300", method
    )
    assert len(drift) == 4
    assert 0 < drift[0] < drift[-1]
    assert slight[-1] < 0.3 * drift[-1]
    assert any(not torch.equal(v, values(held)[n]) for n, v in values(free).items())


def test_logging_the_anchor_changes_nothing(tiny_open_clip, digits, processor, tmp_path):
    with_it, _ = trained_with(
        0.0, copy.deepcopy(tiny_open_clip), digits, processor, tmp_path / "with"
    )
    without = prepare_method("lora", copy.deepcopy(tiny_open_clip), rank=4, towers="vision")
    train(
        without,
        digits,
        processor,
        options=TrainOptions(**OPTIONS),
        output_dir=tmp_path / "without",
        show_progress=False,
    )
    assert all(torch.equal(v, values(without)[n]) for n, v in values(with_it).items())
    assert not any("anchor" in e for e in read_history(tmp_path / "without" / "history.jsonl"))


@pytest.mark.parametrize("method", ["corda-kpm", "full"])
def test_a_resumed_training_is_the_same(method, tiny_open_clip, digits, processor, tmp_path):
    """The reference of the anchor is the model before training, not the checkpoint."""

    class Stop(Exception):
        pass

    def run(folder, stop_at=None):
        model = copy.deepcopy(tiny_open_clip)
        store = vision_store(model)
        ready = prepare_method(
            method, model, rank=4, towers="vision", store=store, show_progress=False
        )
        calls = []

        def extra():
            calls.append(1)
            if len(calls) == stop_at:
                raise Stop
            return torch.zeros((), requires_grad=True)

        train(
            ready,
            digits,
            processor,
            options=TrainOptions(**{**OPTIONS, "learning_rate": 1e-3}, save_every=2),
            output_dir=folder,
            anchor=anchor_penalty(ready, store),
            anchor_weight=100.0,
            extra_loss=extra,
            show_progress=False,
        )
        return ready

    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "cut", stop_at=6)
    again = run(tmp_path / "cut")
    for name, value in values(whole).items():
        assert torch.allclose(value, values(again)[name], atol=1e-6), name
    for entry, other in zip(
        *(read_history(tmp_path / kind / "history.jsonl") for kind in ("whole", "cut")), strict=True
    ):
        assert entry["anchor"] == pytest.approx(other["anchor"], rel=1e-3)


def test_another_weight_is_another_training(tiny_open_clip, digits, processor, tmp_path):
    trained_with(3.0, copy.deepcopy(tiny_open_clip), digits, processor, tmp_path)
    assert json.loads((tmp_path / "train.json").read_text())["terms"]["anchor"]["weight"] == 3.0
    with pytest.raises(CordaError, match=r"the anchor's weight: 3\.0 there, 30\.0 now"):
        trained_with(30.0, copy.deepcopy(tiny_open_clip), digits, processor, tmp_path)
    with pytest.raises(CordaError, match=r"the anchor's weight: 3\.0 there, None now"):
        trained_with(0.0, copy.deepcopy(tiny_open_clip), digits, processor, tmp_path)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_none(weight, tiny_open_clip, digits, processor, tmp_path):
    with pytest.raises(CordaError, match=r"the weight of 'anchor' is .*must be a number from 0"):
        trained_with(weight, tiny_open_clip, digits, processor, tmp_path)


def test_a_weight_without_an_anchor_and_an_anchor_of_another(
    tiny_open_clip, digits, processor, tmp_path
):
    other = copy.deepcopy(tiny_open_clip)
    store = vision_store(other)
    anchor = anchor_penalty(prepare_method("lora", other, rank=2, towers="vision"), store)
    model = prepare_method("lora", tiny_open_clip, rank=2, towers="vision")
    options = {"options": TrainOptions(**OPTIONS), "output_dir": tmp_path, "show_progress": False}
    with pytest.raises(CordaError, match="there is no anchor; pass anchor="):
        train(model, digits, processor, anchor_weight=1.0, **options)
    with pytest.raises(CordaError, match="the anchor was built for another model"):
        train(model, digits, processor, anchor=anchor, **options)
    assert not (tmp_path / "train.json").exists()


# ------------------------------------------------------------------ a Trainer that never heard of it


class Pictures(Dataset):
    def __init__(self) -> None:
        self.pixels = batch(8)["pixel_values"]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": torch.tensor(0)}


class Drifting(Trainer):
    """A loss of its own: the mean over the batch of what the embeddings are."""

    share = 1.0

    def compute_loss(self, model: Any, inputs, return_outputs=False, num_items_in_batch=None):
        out: Any = model.get_image_features(inputs["pixel_values"])
        features = getattr(out, "pooler_output", out)
        loss = self.share * features.square().mean()
        return (loss, {"features": features}) if return_outputs else loss


class Anchored(AnchorMixin, Drifting):
    pass


def trainer_of(model, folder, accumulation=1, steps=1, rate=1.0, kind=Anchored):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=rate,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        label_names=["labels"],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    return kind(model=model, args=args, train_dataset=Pictures(), eval_dataset=Pictures())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_accumulated_batches_give_the_same_gradient(share, tiny_clip_hf, tmp_path, capsys):
    store = vision_store(tiny_clip_hf)
    found = {}
    for accumulation in (1, 4):
        for takes_kwargs in (False, True) if share == 0 else (False,):
            model = prepare_method("lora", copy.deepcopy(tiny_clip_hf), rank=2, towers="vision")
            anchor = anchor_penalty(model, store)
            with torch.no_grad():
                for number, parameter in enumerate(
                    p for p in model.parameters() if p.requires_grad
                ):
                    parameter.add_(0.05 * (number % 3))
            before, value = values(model), anchor().item()
            trainer = trainer_of(model, tmp_path, accumulation)
            trainer.share, trainer.model_accepts_loss_kwargs = share, takes_kwargs
            trainer.anchor_to(anchor, weight=3.0)
            trainer.train()
            assert trainer.state.log_history[0]["anchor"] == pytest.approx(value, rel=1e-5)
            assert "anchor" not in trainer.evaluate()
            after = values(model)
            found[accumulation, takes_kwargs] = {n: before[n] - after[n] for n in before}
    first = found.pop((1, False))
    assert any(step.any() for step in first.values())
    for steps in found.values():
        for name, step in steps.items():
            assert torch.allclose(step, first[name], rtol=1e-4, atol=1e-6), name


def test_losses_are_logged_without_it(tiny_clip_hf, tmp_path):
    """Of training and of evaluation: curves of runs with different weights can be compared."""
    store = vision_store(tiny_clip_hf)
    model = prepare_method("full", tiny_clip_hf, towers="vision")
    trainer = trainer_of(model, tmp_path, steps=2, rate=1e-2)
    anchor = trainer.anchor_to(store, weight=1e4)
    plain = trainer_of(model, tmp_path, kind=Drifting)
    before = plain.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(before, rel=1e-3)
    assert trainer.state.log_history[0]["anchor"] == 0.0
    assert trainer.state.log_history[1]["anchor"] > 0.0
    assert anchor().item() > 0
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])


def test_weight_zero_only_logs(tiny_clip_hf, tmp_path):
    store = vision_store(tiny_clip_hf)
    prepare_method("full", tiny_clip_hf, towers="vision")
    plain = trainer_of(copy.deepcopy(tiny_clip_hf), tmp_path, steps=2, rate=1e-2, kind=Drifting)
    plain.train()
    trainer = trainer_of(tiny_clip_hf, tmp_path, steps=2, rate=1e-2)
    trainer.anchor_to(store, weight=0.0)
    trainer.train()
    assert trainer.state.log_history[1]["anchor"] > trainer.state.log_history[0]["anchor"] > 0
    assert all(torch.equal(v, values(plain.model)[n]) for n, v in values(tiny_clip_hf).items())


def test_every_third_step_with_three_times_the_weight(tiny_clip_hf, tmp_path):
    steps = []

    def penalty():
        if torch.is_grad_enabled():  # else it is only logged
            steps.append(trainer.state.global_step)
        return 0.01 * next(p for p in tiny_clip_hf.vision_model.parameters()).sum()

    first = next(tiny_clip_hf.vision_model.parameters()).detach().clone()
    trainer = trainer_of(tiny_clip_hf, tmp_path, steps=6)
    trainer.share = 0.0
    trainer.penalize("sum", penalty, weight=2.0, every=3)
    trainer.train()
    assert steps == [0, 3]
    moved = next(tiny_clip_hf.vision_model.parameters()).detach() - first
    assert torch.allclose(moved, torch.full_like(moved, -6 * 2.0 * 0.01), atol=1e-5)
    with pytest.raises(CordaError, match="every is 0"):
        trainer.penalize("sum", penalty, every=0)


def test_any_trainer_distills(tiny_clip_hf, tmp_path):
    """From the model that it had, on batches of the knowledge."""
    drift = {}
    for weight in (0.0, 100.0):
        model = prepare_method("lora", copy.deepcopy(tiny_clip_hf), rank=2, towers="vision")
        trainer = trainer_of(model, tmp_path / str(weight), steps=20, rate=0.02)
        distill = trainer.distill_from([batch(8), batch(4)], weight=weight, every=1)
        trainer.train()
        logged = [entry["distill"] for entry in trainer.state.log_history if "loss" in entry]
        # what is only logged is looked at after the step
        assert logged[0] == pytest.approx(0, abs=1e-6) or weight == 0
        drift[weight] = float(distill(0))
    assert drift[100.0] < 0.5 * drift[0.0]


def test_a_penalty_that_is_not_finite(tiny_clip_hf, tmp_path):
    trainer = trainer_of(tiny_clip_hf, tmp_path)
    trainer.penalize("broken", lambda: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(CordaError, match="'broken' is nan at step 1"):
        trainer.train()


# ------------------------------------------------------------------ TRL

TINY_LLAMA = Family(
    name="tiny-llama",
    matches=lambda model: type(model).__name__ == "LlamaForCausalLM",
    rules=(
        Rule(r"(?P<at>.*)\.(?P<block>\d+)\.self_attn\.q_proj", "language", "q", "{at}.{block}.attn.in"),
        Rule(r"(?P<at>.*)\.(?P<block>\d+)\.self_attn\.v_proj", "language", "v", "{at}.{block}.attn.in"),
        Rule(r"(?P<at>.*)\.(?P<block>\d+)\.mlp\.down_proj", "language", "down", "{at}.{block}.down"),
    ),
    classes=("LlamaForCausalLM",),
    towers=lambda _: ("language",),
)  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft_trainer_of_trl(accumulation, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset as Table
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    known = [FAMILIES[name] for name in FAMILIES]
    if not any(family.matches(model) for family in known):
        register_family(TINY_LLAMA)
    try:
        ids = torch.randint(3, 64, (8, 16))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        from corda_vlm.sites import find_sites

        sites = [site for site in find_sites(model) if site.role in ("q", "v", "down")]
        store = quietly(collect_covariance, model, [inputs], sites)

        class Mine(AnchorMixin, trl.SFTTrainer):
            pass

        kind: Any = Mine
        trainer = kind(
            model=model,
            args=trl.SFTConfig(
                output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, bf16=False,
                gradient_accumulation_steps=accumulation, learning_rate=1e-2, logging_steps=1,
                report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_length=16,
            ),
            train_dataset=Table.from_dict({"input_ids": torch.randint(3, 64, (12, 16)).tolist()}),
            processing_class=_tokenizer(),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]),
        )  # fmt: skip
        anchor = trainer.anchor_to(store, weight=30)
        trainer.train()
    finally:
        FAMILIES.pop("tiny-llama", None)
    logged = [entry["anchor"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == 0.0
    assert 0 < logged[1] < 1
    assert len(anchor.report()) == 6


def _tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {
        word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *map(str, range(61))])
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip


def test_mixing_in_leaves_the_rest_alone(tiny_clip_hf, tmp_path):
    """Without a penalty it is the Trainer it was."""
    plain = trainer_of(copy.deepcopy(tiny_clip_hf), tmp_path, steps=2, rate=1e-2, kind=Drifting)
    mixed = trainer_of(tiny_clip_hf, tmp_path, steps=2, rate=1e-2)
    plain.train()
    mixed.train()
    assert all(torch.equal(v, values(plain.model)[n]) for n, v in values(mixed.model).items())
