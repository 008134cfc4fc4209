"""What trackers get of a training, which of them are refused, and that a run of theirs is not mixed with the next."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import transformers.integrations.integration_utils as integrations

from corda_vlm.anchor import anchor_penalty
from corda_vlm.covariance import collect_covariance
from corda_vlm.data import load_records, make_batches
from corda_vlm.errors import CordaError
from corda_vlm.methods import prepare_method
from corda_vlm.sites import find_sites
from corda_vlm.train import TrainOptions, forgetting_budget, trackers, train
from corda_vlm.train.folder import training_plan
from tests.train.terms.conftest import OPTIONS


class Writer:
    """Takes what TensorBoard's writer would write."""

    def __init__(self) -> None:
        self.curves: dict[str, list[int]] = {}

    def add_text(self, *_: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert isinstance(value, (int, float))
        self.curves.setdefault(name, []).append(step)


def test_the_terms_and_the_probe_are_curves(
    tiny_open_clip, digits, held_out, processor, tmp_path, monkeypatch
) -> None:
    writer = Writer()

    class Recorded(integrations.TensorBoardCallback):
        def __init__(self) -> None:
            self.tb_writer, self._SummaryWriter, self.logging_dir = writer, None, None

    monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, "tensorboard", Recorded)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    bare = copy.deepcopy(tiny_open_clip)
    known = make_batches(held_out, processor, batch_size=8, towers="vision")
    store = collect_covariance(bare, known, find_sites(bare, towers=["vision"]))
    model = prepare_method("lora", bare, rank=4, towers="vision")
    anchor = anchor_penalty(model, store)
    probe = load_records({"source": "sklearn:digits", "split": "val", "limit": 150})
    budget = forgetting_budget(
        model, probe, 0.8, processor=processor, metric="agreement", term="anchor", every=2
    )
    options = TrainOptions(**OPTIONS, report_to=["tensorboard"], eval_every=4)
    train(
        model, digits, processor, options=options, output_dir=tmp_path / "lora" / "1e-3-0", anchor=anchor, anchor_weight=1.0,
        budget=budget, eval_data=held_out, show_progress=False,
    )  # fmt: skip
    steps = [2, 4, 6, 8]
    assert writer.curves["train/loss"][:4] == steps
    assert writer.curves["train/anchor"] == steps
    assert writer.curves["train/keep"][:3] == steps[:3]
    assert writer.curves["eval/accuracy"] == [4, 8]


def test_a_tracker_that_is_not_installed(
    tiny_open_clip, digits, processor, lora, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    options = TrainOptions(**OPTIONS, report_to=["wandb"])
    with pytest.raises(CordaError, match=r"report_to names wandb.*pip install wandb"):
        train(lora(tiny_open_clip), digits, processor, options=options, output_dir=tmp_path)


@pytest.mark.unchecked
@pytest.mark.parametrize("names", [["tensorbord"], ["wandb", "wandb"]])
def test_an_unknown_tracker_and_one_named_twice(names: Any) -> None:
    with pytest.raises(CordaError, match="report_to"):
        TrainOptions(report_to=names)


def test_a_training_may_be_gone_on_with_under_another_tracker(tiny_open_clip, digits) -> None:
    plans = [
        training_plan(
            tiny_open_clip, digits, TrainOptions(**OPTIONS, report_to=to), None, None, None
        )
        for to in ([], ["wandb"])
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("own", [True, False])
def test_a_run_that_a_training_opened_is_closed(monkeypatch, own: bool) -> None:
    wandb = SimpleNamespace(run="the caller's" if own else None, closed=0)

    def finish() -> None:
        wandb.run, wandb.closed = None, wandb.closed + 1

    wandb.finish = finish
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with trackers.tracked(["wandb"]):
        wandb.run = wandb.run or "the training's"
    assert wandb.closed == (not own)
