"""A training that was interrupted, however, ends where it would have ended."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from corda_vlm.adapter import attach_adapter
from corda_vlm.anchor import anchor_penalty
from corda_vlm.covariance import collect_covariance
from corda_vlm.data import load_records
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.methods import prepare_method
from corda_vlm.plan import plan_adapter
from corda_vlm.sites import find_sites
from corda_vlm.train import TrainingInterrupted, TrainOptions, TrainResult, train
from corda_vlm.train.history import read_history

FAST: dict[str, Any] = {"steps": 6, "batch_size": 16, "log_every": 2, "bf16": False}


def trained(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(one, two, **tolerance) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], **tolerance)


class Stop(TrainerCallback):
    """Raises in the midst of a training, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize("kind", ["lora_open", "lora_hf", "full", "head", "untouched", "residual"])
def test_an_interrupted_training_ends_where_the_uninterrupted_one_does(
    lora, kind, tiny_open_clip, tiny_clip_hf, digits, processor, tmp_path
):
    import copy

    base = tiny_clip_hf if kind == "lora_hf" else tiny_open_clip

    def fresh():
        model = copy.deepcopy(base)
        if kind.startswith("lora"):
            return lora(
                model, dropout=0.1
            )  # dropout draws from the generators that a checkpoint keeps
        if kind in ("untouched", "residual"):
            plan = plan_adapter(model, None, method="milora", rank=4, towers=["vision"])
            return attach_adapter(model, plan, base=kind)
        return model.requires_grad_(kind == "full")

    options = TrainOptions(
        steps=10, batch_size=16, learning_rate=1e-3, save_every=4, log_every=5, augment="light", train_head=kind == "head"
    )  # fmt: skip
    straight = fresh()
    expected = train(
        straight, digits, processor, options=options, output_dir=tmp_path / "a", show_progress=False
    )

    with pytest.raises(RuntimeError, match="killed"):
        train(
            fresh(),
            digits,
            processor,
            options=options,
            output_dir=tmp_path / "b",
            callbacks=[Stop(7)],
            show_progress=False,
        )
    assert (tmp_path / "b" / "checkpoint-4").is_dir()
    torn = tmp_path / "b" / "checkpoint-6"  # as a kill in the midst of writing leaves it
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_')
    names = {path.name for path in (tmp_path / "b" / "checkpoint-4").iterdir()}
    assert "training_args.bin" not in names
    if kind not in ("full", "head"):
        assert "adapter_model.safetensors" in names
        assert not names & {"model.safetensors", "trained.safetensors"}

    model = fresh()
    result = train(
        model, digits, processor, options=options, output_dir=tmp_path / "b", show_progress=False
    )
    assert result.resumed_from == 4
    same(trained(straight), trained(model), rtol=1e-5, atol=1e-6)
    assert result.history[-1]["loss"] == pytest.approx(expected.history[-1]["loss"], rel=1e-5)
    assert [entry["step"] for entry in result.history] == [
        entry["step"] for entry in expected.history
    ]
    if kind == "head":
        same(dict(expected.head.named_parameters()), dict(result.head.named_parameters()))

    again = fresh()  # finished: the weights are loaded, nothing is trained
    done = train(
        again, digits, processor, options=options, output_dir=tmp_path / "b", show_progress=False
    )
    assert done.resumed_from == done.steps == 10
    same(trained(model), trained(again), rtol=0, atol=0)
    assert done.history == result.history


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("killed_at", [1, 4, 5, 6, 9])
def test_a_resumed_history_is_the_uninterrupted_one_to_the_digit(
    tiny_open_clip, digits, held_out, processor, tmp_path, killed_at, accumulated
):
    """Entries are means over the steps since the one before, wherever in between the training was cut and resumed."""
    sites = find_sites(tiny_open_clip, towers="vision")
    pixels = {"pixel_values": torch.randn(64, 3, 32, 32)}
    store = collect_covariance(tiny_open_clip, [pixels], sites, show_progress=False)
    options = TrainOptions(
        steps=10, batch_size=16, learning_rate=1e-2, save_every=2, log_every=5, eval_every=4, bf16=False,
        gradient_accumulation=accumulated,
    )  # fmt: skip

    def run(folder: Path, *callbacks: TrainerCallback) -> TrainResult:
        model = prepare_method("lora", copy.deepcopy(tiny_open_clip), rank=4, towers="vision")
        grown = next(p for p in model.parameters() if p.requires_grad)
        return train(
            model, digits, processor, options=options, output_dir=folder, eval_data=held_out,
            anchor=anchor_penalty(model, store), anchor_weight=1.0, extra_loss=lambda: grown.square().mean(),
            callbacks=callbacks, show_progress=False,
        )  # fmt: skip

    def entries(found: list[dict]) -> list[dict]:
        clocks = ("seconds", "samples_per_second")
        return [{k: v for k, v in entry.items() if k not in clocks} for entry in found]

    expected = run(tmp_path / "straight").history
    assert [entry["step"] for entry in expected] == [4, 5, 8, 10, 10]
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "cut", Stop(killed_at))
    history = tmp_path / "cut" / "history.jsonl"
    with history.open("a") as file:
        file.write('{"step": 99, "lo')  # as a kill in the midst of an entry leaves it
    result = run(tmp_path / "cut")
    assert result.resumed_from == (killed_at // 2 * 2 or None)
    assert entries(result.history) == entries(expected)
    assert read_history(history) == result.history


def test_damaged_progress_is_named(lora, tiny_open_clip, digits, processor, tmp_path):
    base = copy.deepcopy(tiny_open_clip)
    options = {"options": TrainOptions(**FAST, save_every=2), "output_dir": tmp_path}
    with pytest.raises(RuntimeError, match="killed"):
        train(lora(tiny_open_clip), digits, processor, callbacks=[Stop(5)], **options)
    (tmp_path / "checkpoint-4" / "progress.json").write_text('{"seconds": 1, "loss": 3}')
    (
        tmp_path / "checkpoint-4" / "checksums.json"
    ).unlink()  # else the checkpoint before it is taken
    with pytest.raises(ForeignFileError, match=r"progress\.json is damaged; delete the folder"):
        train(lora(base), digits, processor, **options)


def test_only_what_was_trained_is_written(tiny_open_clip, digits, processor, tmp_path):
    tiny_open_clip.requires_grad_(False)
    tiny_open_clip.visual.proj.requires_grad_(True)
    train(
        tiny_open_clip,
        digits,
        processor,
        options=TrainOptions(**FAST),
        output_dir=tmp_path,
        show_progress=False,
    )
    assert set(load_file(tmp_path / "weights" / "trained.safetensors")) == {"visual.proj"}


def test_a_full_fine_tune_of_another_base_is_refused(tiny_open_clip, digits, processor, tmp_path):
    """Nothing of it is frozen that would tell the two apart, and the shapes are the same."""
    other = copy.deepcopy(tiny_open_clip)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def again(model):
        options = {"options": TrainOptions(**FAST), "output_dir": tmp_path, "show_progress": False}
        return train(prepare_method("full", model), digits, processor, **options)

    again(copy.deepcopy(tiny_open_clip))
    assert (tmp_path / "weights" / "base.json").is_file()
    again(tiny_open_clip)
    with pytest.raises(CordaError, match="began with other weights"):
        again(other)


def test_a_folder_of_another_training_is_refused(
    lora, tiny_open_clip, tiny_clip_hf, digits, held_out, processor, tmp_path
):
    import copy

    base = copy.deepcopy(tiny_open_clip)
    train(
        lora(tiny_open_clip),
        digits,
        processor,
        options=TrainOptions(**FAST),
        output_dir=tmp_path,
        show_progress=False,
    )

    def again(model, data=digits, **changed):
        return train(
            model,
            data,
            processor,
            options=TrainOptions(**{**FAST, **changed}),
            output_dir=tmp_path,
            show_progress=False,
        )

    with pytest.raises(
        CordaError, match=r"holds another training .*learning_rate: 0.001 there, 0.002 now"
    ):
        again(lora(copy.deepcopy(base)), learning_rate=2e-3)
    with pytest.raises(CordaError, match=r"holds another training \(data\)"):
        again(lora(copy.deepcopy(base)), held_out)
    with pytest.raises(CordaError, match="of another model or method"):
        again(lora(tiny_clip_hf))
    other = copy.deepcopy(base)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    with pytest.raises(CordaError, match="other frozen weights"):
        again(lora(other))
    again(lora(copy.deepcopy(base)), save_every=3, log_every=1)  # what changes no weight may change
    begun = json.loads((tmp_path / "train.json").read_text())
    del begun["options"]["chat_template"]
    (tmp_path / "train.json").write_text(json.dumps(begun))
    again(lora(copy.deepcopy(base)))  # begun before there was such an option


def test_damaged_weights_are_named(lora, tiny_open_clip, digits, processor, tmp_path):
    import copy

    base = copy.deepcopy(tiny_open_clip)
    train(
        lora(tiny_open_clip),
        digits,
        processor,
        options=TrainOptions(**FAST),
        output_dir=tmp_path,
        show_progress=False,
    )
    path = tmp_path / "weights" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ForeignFileError, match=r"adapter_model\.safetensors: not readable"):
        train(
            lora(base),
            digits,
            processor,
            options=TrainOptions(**FAST),
            output_dir=tmp_path,
            show_progress=False,
        )


def test_the_first_ctrl_c_saves_and_the_next_run_goes_on(
    lora, tiny_open_clip, digits, processor, tmp_path, capfd
):
    import copy

    base = copy.deepcopy(tiny_open_clip)

    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    options = TrainOptions(**FAST)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        TrainingInterrupted, match=r"stopped at step 4 of 6.*Run the same command again"
    ):
        train(
            lora(tiny_open_clip),
            digits,
            processor,
            options=options,
            output_dir=tmp_path,
            callbacks=[Press()],
            show_progress=False,
        )
    assert signal.getsignal(signal.SIGINT) is before
    assert "once more to stop at once" in capfd.readouterr().err
    result = train(
        lora(base), digits, processor, options=options, output_dir=tmp_path, show_progress=False
    )
    assert (result.resumed_from, result.steps) == (4, 6)


def test_sigkill_costs_only_the_steps_since_the_last_checkpoint(processor, tmp_path):
    """A process killed without warning; the next one ends like one that was left alone."""
    here = Path(__file__).parent
    code = f"""
from tests.train.conftest import _image, _text
from corda_vlm.families import Processor
from tests.train.test_resume import Rest, killed_training
killed_training(Processor(image=_image, text=_text, image_size=(32, 32)), {str(tmp_path / "a")!r}, [Rest()])
"""
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=here.parents[1])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("a/checkpoint-*/trainer_state.json")):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    resumed = killed_training(processor, tmp_path / "a")
    straight = killed_training(processor, tmp_path / "b")
    assert resumed.resumed_from >= 5
    assert straight.resumed_from is None
    assert resumed.history[-1]["loss"] == pytest.approx(straight.history[-1]["loss"], rel=1e-5)


class Rest(TrainerCallback):
    """After step 12 nothing goes on, so that there is time for a kill."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 12:
            time.sleep(600)


def killed_training(processor, output_dir, callbacks=()) -> TrainResult:
    """The training of the test above, the same in each process."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    model = CLIP(
        embed_dim=24,
        vision_cfg=CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=32),
        text_cfg=CLIPTextCfg(context_length=12, vocab_size=100, width=32, heads=2, layers=1),
    )
    data = load_records({"source": "sklearn:digits", "split": "train", "limit": 64})
    options = TrainOptions(steps=20, batch_size=8, save_every=5, log_every=10, bf16=False)
    return train(
        model, data, processor, options=options, output_dir=output_dir, callbacks=callbacks, show_progress=False
    )  # fmt: skip


def test_the_weights_of_another_plan_are_not_taken_for_this_ones(
    tiny_open_clip, processor, digits, tmp_path
):
    """Equal shapes and options, other directions: the finished training must not be served again."""
    first = prepare_method("pissa", copy.deepcopy(tiny_open_clip), rank=2, towers="vision")
    options = TrainOptions(steps=1, batch_size=8)
    train(first, digits, processor, options=options, output_dir=tmp_path, show_progress=False)
    for method, changes in (("milora", {}), ("pissa", {"a_norm": 3.0}), ("lora", {})):
        other = prepare_method(
            method, copy.deepcopy(tiny_open_clip), rank=2, towers="vision", **changes
        )
        with pytest.raises(CordaError, match="training of another adapter"):
            train(
                other, digits, processor, options=options, output_dir=tmp_path, show_progress=False
            )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"loss": 1.0}', "no step"),
        ('{"step": "one"}', "its step is 'one'"),
        ('{"step": 1, "loss": [1]}', r"its loss is \[1\]"),
        ('{"step": 1, "loss": NaN}', "holds NaN"),
        ("[1]", "no JSON object"),
    ],
)
def test_a_line_that_is_no_entry_of_a_history_is_named(tmp_path, line, message):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ForeignFileError, match=rf"line 2, is not a history entry: .*{message}"):
        read_history(path)
