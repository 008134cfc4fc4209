"""Trainings of tiny models on real digits: every family learns, with every loss and head."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from corda_vlm.data import make_batches
from corda_vlm.errors import ForeignFileError
from corda_vlm.families import detect_family
from corda_vlm.train import Head, TrainOptions, train
from corda_vlm.train.trainer import takes_math

FAST: dict[str, Any] = {"steps": 6, "batch_size": 16, "log_every": 2, "bf16": False}


def trained(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(one, two, **tolerance) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], **tolerance)


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("tiny_open_clip", False),
        ("tiny_open_clip", True),
        ("tiny_clip_hf", True),
        ("tiny_siglip", True),
    ],
)
def test_every_family_learns_the_digits(name, bf16, request, digits, processor, held_out, tmp_path):
    model = request.getfixturevalue(name)
    model.logit_scale.data.fill_(3.0)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("vis" in parameter_name)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    options = TrainOptions(steps=60, batch_size=32, learning_rate=3e-3, log_every=4, bf16=bf16)
    result = train(
        model,
        digits,
        processor,
        options=options,
        output_dir=tmp_path,
        eval_data=held_out,
        show_progress=False,
    )
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    (accuracy,) = [entry["eval_accuracy"] for entry in result.history if "eval_accuracy" in entry]
    assert (
        accuracy > 0.2
    )  # of unseen digits, by a tiny tower that has seen nine of each; chance is 0.1
    assert not model.training
    for n, p in model.named_parameters():
        if n in frozen:
            assert torch.equal(p, frozen[n])
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert lines[0].keys() >= {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "seconds",
        "samples_per_second",
    }
    assert result.steps == 60
    assert result.samples_per_second > 0
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("loss", ["prompt", "linear"])
def test_odd_batch_sizes(lora, size, loss, tiny_open_clip, digits, processor, tmp_path):
    model = lora(tiny_open_clip)
    options = TrainOptions(
        **{**FAST, "batch_size": size, "loss": loss, "steps": 14}
    )  # 7: an epoch and its end
    result = train(
        model, digits, processor, options=options, output_dir=tmp_path, show_progress=False
    )
    assert result.steps == 14


def test_contrastive_training_of_both_towers(tiny_open_clip, digits, processor, held_out, tmp_path):
    options = TrainOptions(
        loss="contrastive", epochs=4.0, batch_size=30, learning_rate=3e-3, log_every=3
    )
    result = train(
        tiny_open_clip,
        digits,
        processor,
        options=options,
        output_dir=tmp_path,
        eval_data=held_out,
        show_progress=False,
    )
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert result.steps == 12
    assert losses[-1] < losses[0]


def test_prompts_are_trained_through_where_the_text_tower_is(
    tiny_open_clip, digits, processor, tmp_path
):
    for name, parameter in tiny_open_clip.named_parameters():
        parameter.requires_grad_(name.startswith("transformer.resblocks"))
    before = trained(tiny_open_clip)
    options = TrainOptions(**FAST, learning_rate=1e-2)
    result = train(
        tiny_open_clip, digits, processor, options=options, output_dir=tmp_path, show_progress=False
    )
    assert result.head is None
    moved = trained(tiny_open_clip)
    assert all(not torch.equal(moved[n], before[n]) for n in before if n.endswith("weight"))


def test_the_first_loss_is_the_one_computed_by_hand(
    lora, tiny_open_clip, digits, processor, tmp_path
):
    model = lora(tiny_open_clip)
    batch = next(iter(make_batches(digits, processor, batch_size=90)))
    family = detect_family(model)
    templates = ["a photo of a {}.", "{}"]
    with torch.no_grad():
        image = F.normalize(model.encode_image(batch["pixel_values"]), dim=-1)
        text = torch.stack(
            [
                F.normalize(
                    sum(
                        F.normalize(
                            model.encode_text(processor.text([t.format(c)])["input_ids"]), dim=-1
                        )
                        for t in templates
                    ),
                    dim=-1,
                )[0]
                for c in digits.class_names
            ]
        )
        logits = family.need_contrastive(model).logit_scale(model) * image @ text.T
        share = logits.log_softmax(-1)
        expected = -(
            0.9 * share.gather(1, batch["labels"][:, None])[:, 0] + 0.1 * share.mean(-1)
        ).mean()
    options = TrainOptions(steps=1, batch_size=90, log_every=1, label_smoothing=0.1, bf16=False)
    result = train(
        model,
        digits,
        processor,
        options=options,
        output_dir=tmp_path,
        templates=templates,
        show_progress=False,
    )
    assert result.history[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("loss", ["prompt", "linear"])
def test_heads_are_trained_saved_and_loaded(loss, tiny_open_clip, digits, processor, tmp_path):
    """A linear probe: no parameter of the model is trained."""
    tiny_open_clip.requires_grad_(False)
    options = TrainOptions(
        loss=loss,
        train_head=loss == "prompt",
        epochs=10.0,
        batch_size=30,
        learning_rate=0.05,
        bf16=False,
    )
    result = train(
        tiny_open_clip, digits, processor, options=options, output_dir=tmp_path, show_progress=False
    )
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < losses[0]
    saved = Head.load(tmp_path / "weights" / "head.safetensors")
    assert saved.kind == loss
    features = torch.randn(3, saved.weight.shape[1])
    assert torch.equal(saved(features), result.head(features))
    assert saved(features).shape == (3, 10)
    with pytest.raises(ForeignFileError, match="no head"):
        Head.load(tmp_path / "weights" / "trained.safetensors")


def test_gradient_accumulation_is_the_larger_batch(
    lora, tiny_open_clip, digits, processor, tmp_path
):
    import copy

    whole, parts = lora(copy.deepcopy(tiny_open_clip)), lora(tiny_open_clip)
    common = {"steps": 3, "bf16": False, "schedule": "constant", "warmup_ratio": 0.0}
    train(
        whole,
        digits,
        processor,
        options=TrainOptions(batch_size=30, **common),
        output_dir=tmp_path / "a",
        show_progress=False,
    )
    train(
        parts,
        digits,
        processor,
        options=TrainOptions(batch_size=15, gradient_accumulation=2, **common),
        output_dir=tmp_path / "b",
        show_progress=False,
    )
    same(trained(whole), trained(parts), rtol=1e-3, atol=1e-5)


def test_extra_loss_is_weighted_and_logged(lora, tiny_open_clip, digits, processor, tmp_path):
    model = lora(tiny_open_clip)
    first = next(p for p in model.parameters() if p.requires_grad)
    before = first.square().sum().item()
    options = TrainOptions(**{**FAST, "steps": 20, "learning_rate": 1e-2})
    result = train(
        model,
        digits,
        processor,
        options=options,
        output_dir=tmp_path,
        extra_loss=lambda: first.square().sum(),
        extra_weight=100.0,
        show_progress=False,
    )
    entries = [entry for entry in result.history if "loss" in entry]
    assert entries[0]["extra_loss"] == pytest.approx(before, rel=0.05)
    assert entries[-1]["extra_loss"] < 0.3 * before
    assert all(entry["loss"] < 10 for entry in entries)  # the loss of the task alone


def test_frozen_batch_norms_keep_their_statistics(
    lora, digits, processor, tmp_path, tiny_open_clip
):
    norm = torch.nn.BatchNorm2d(3)
    model = lora(tiny_open_clip)
    visual = model.get_base_model().visual
    visual.conv1 = torch.nn.Sequential(norm.requires_grad_(False), visual.conv1)
    train(
        model,
        digits,
        processor,
        options=TrainOptions(**FAST),
        output_dir=tmp_path,
        show_progress=False,
    )
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(3))


def test_math_attention_where_it_is_the_faster_one(tiny_open_clip, monkeypatch):
    monkeypatch.setattr("corda_vlm.train.trainer.bf16_is_faster", lambda device: True)

    def taken(side, bf16=True, **options):
        options = TrainOptions(steps=1, bf16=bf16, **options)
        return takes_math(options, tiny_open_clip, (side, side))

    assert taken(32)  # 16 patches of 8 pixels
    assert not taken(224)  # 784 patches
    assert not taken(32, bf16=False)
    assert taken(224, attention="math")
    assert not taken(32, attention="default")
