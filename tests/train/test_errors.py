"""What goes wrong in a training is said by its name, and loses nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from corda_vlm.data import load_records
from corda_vlm.errors import CordaError, DataError, UnknownNameError
from corda_vlm.train import TrainOptions, train

FAST: dict[str, Any] = {"steps": 6, "batch_size": 16, "log_every": 2, "bf16": False}


def test_nothing_to_train(tiny_open_clip, digits, processor, tmp_path):
    with pytest.raises(
        CordaError, match="nothing to train: no parameter of CLIP requires a gradient"
    ):
        train(
            tiny_open_clip.requires_grad_(False),
            digits,
            processor,
            options=TrainOptions(**FAST),
            output_dir=tmp_path,
        )


def test_a_loss_that_is_not_finite_names_step_and_rate(
    lora, tiny_open_clip, digits, processor, tmp_path
):
    model = lora(tiny_open_clip)
    options = TrainOptions(
        **{**FAST, "learning_rate": 1e20, "max_grad_norm": 0.0, "steps": 30, "save_every": 1}
    )
    with pytest.raises(
        CordaError, match=r"(nan|inf|NaN).* at step \d+ of 30 \(learning rate \d.*Lower the peak"
    ):
        train(model, digits, processor, options=options, output_dir=tmp_path, show_progress=False)
    saved = list(tmp_path.glob("checkpoint-*/adapter_model.safetensors"))
    assert all(torch.isfinite(value).all() for path in saved for value in load_file(path).values())


def test_data_that_lacks_what_the_loss_needs(tiny_open_clip, digits, processor, tmp_path):
    unlabelled = load_records({"source": "sklearn:digits", "split": "val", "label": None})
    for loss, data, message in (
        ("prompt", unlabelled, "the prompt loss needs labels"),
        ("linear", unlabelled, "the linear loss needs labels"),
        ("contrastive", unlabelled, "needs a text for each image"),
    ):
        with pytest.raises(DataError, match=message):
            train(
                tiny_open_clip,
                data,
                processor,
                options=TrainOptions(loss=loss, steps=1),
                output_dir=tmp_path,
            )
    with pytest.raises(DataError, match="has label 9, but there are 2 class names"):
        train(
            tiny_open_clip,
            digits,
            processor,
            options=TrainOptions(steps=1),
            classes=["a", "b"],
            output_dir=tmp_path,
        )
    with pytest.raises(CordaError, match=r"no \{\} for the class name"):
        train(
            tiny_open_clip,
            digits,
            processor,
            options=TrainOptions(steps=1),
            templates=["a photo"],
            output_dir=tmp_path,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1, "epochs": 1.0}, "give steps or epochs"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1, "learning_rate": -1.0}, "learning_rate is -1"),
        ({"steps": 1, "warmup_ratio": 1.0}, "warmup_ratio is 1"),
        (
            {"steps": 1, "loss": "linear", "train_head": True},
            "train_head belongs to the prompt loss",
        ),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(CordaError, match=message):
        TrainOptions(**options)


def test_unknown_choices():
    with pytest.raises(UnknownNameError, match="Did you mean 'cosine'"):
        TrainOptions(steps=1, schedule="cosin")


def test_a_full_disk_leaves_the_earlier_checkpoint(
    lora, tiny_open_clip, digits, processor, tmp_path, monkeypatch
):
    import corda_vlm.train.trainer as trainer_module

    written = []

    def failing(model, head, folder):
        written.append(folder)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return original(model, head, folder)

    original = trainer_module.save_weights
    monkeypatch.setattr(trainer_module, "save_weights", failing)
    with pytest.raises(
        CordaError, match=r"could not write .*checkpoint-4: .*No space left.*resume"
    ):
        train(
            lora(tiny_open_clip),
            digits,
            processor,
            options=TrainOptions(**FAST, save_every=2),
            output_dir=tmp_path,
            show_progress=False,
        )
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()
