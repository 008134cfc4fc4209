"""Checkpoints that were damaged after they were written: the one before is taken, and nothing in them is run."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.train import TrainOptions, train
from corda_vlm.train.checkpoints import SEAL, last_checkpoint

OPTIONS = TrainOptions(steps=6, batch_size=8, save_every=2, log_every=2, bf16=False)
FILES = ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
         "trainer_state.json", "progress.json", SEAL)  # fmt: skip


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 5:
            raise RuntimeError("killed")


@pytest.fixture
def run(lora, tiny_open_clip, digits, processor):
    """(folder) -> train there, or go on, from the same model."""
    base = copy.deepcopy(tiny_open_clip)

    def run(folder: Path, *callbacks):
        model = lora(copy.deepcopy(base))
        return train(model, digits, processor, options=OPTIONS, output_dir=folder, callbacks=callbacks, show_progress=False)  # fmt: skip

    return run


@pytest.fixture
def killed(run, tmp_path) -> Path:
    """A training that was killed in its sixth step, with checkpoints of its second and fourth."""
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "run", Stop())
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]
    return tmp_path / "run"


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE = {"flipped": flip, "cut": lambda data: data[:-3], "empty": lambda data: b"", "zeroed": lambda data: bytes(len(data)),
          "missing": None}  # fmt: skip


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGE[how](path.read_bytes()))


def test_every_damage_of_every_file_is_noticed(killed, caplog):
    """The seal among them: without it the files are looked at one by one, as in trainings begun before there was one."""
    whole = killed / "checkpoint-4"
    shutil.copytree(whole, kept := killed / "kept")
    assert {path.name for path in whole.iterdir()} - {"README.md"} == set(FILES)
    assert last_checkpoint(killed) == whole
    for name in FILES:
        for how in DAMAGE:
            damage(whole / name, how)
            found = last_checkpoint(killed)
            if (name, how) == (SEAL, "missing"):
                assert found == whole, "nothing else is damaged"
            else:
                assert found == killed / "checkpoint-2", (name, how)
                assert "going on from checkpoint-2" in caplog.text
            caplog.clear()
            shutil.rmtree(whole)
            shutil.copytree(kept, whole)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"])  # fmt: skip
def test_checkpoints_without_a_seal_are_read_through(name, killed):
    whole = killed / "checkpoint-4"
    (whole / SEAL).unlink()
    shutil.copytree(whole, kept := killed / "kept")
    assert last_checkpoint(killed) == whole
    for how in ("cut", "empty", "zeroed"):
        damage(whole / name, how)
        assert last_checkpoint(killed) == killed / "checkpoint-2", how
        shutil.rmtree(whole)
        shutil.copytree(kept, whole)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"]
)
def test_the_training_goes_on_from_the_one_before_and_ends_alike(
    name, run, killed, tmp_path, caplog
):
    damage(killed / "checkpoint-4" / name, "flipped")
    with caplog.at_level(logging.WARNING):
        result = run(killed)
    assert (result.resumed_from, result.steps) == (2, 6)
    assert "checkpoint-4 is damaged" in caplog.text
    straight = run(tmp_path / "straight")
    assert [e["loss"] for e in result.history] == pytest.approx([e["loss"] for e in straight.history], rel=1e-5)  # fmt: skip
    assert not list(killed.glob("checkpoint-*"))


def test_where_none_is_left_the_folders_are_named(run, killed):
    for step in (2, 4):
        damage(killed / f"checkpoint-{step}" / "optimizer.pt", "cut")
    with pytest.raises(CordaError, match=r"checkpoint-4 \(optimizer\.pt .*checkpoint-2.*Delete"):
        run(killed)
    for step in (2, 4):
        shutil.rmtree(killed / f"checkpoint-{step}")
    assert run(killed).resumed_from is None


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over_without_a_word(run, killed, caplog):
    (killed / "checkpoint-4" / SEAL).unlink()
    (killed / "checkpoint-4" / "trainer_state.json").unlink()
    assert run(killed).resumed_from == 2
    assert "damaged" not in caplog.text


class Evil:
    def __reduce__(self):
        return print, ("this was executed",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_nothing_in_a_checkpoint_is_run(name, run, killed, capsys):
    for step in (2, 4):
        (killed / f"checkpoint-{step}" / SEAL).unlink()
        for write in (
            lambda p: p.write_bytes(pickle.dumps(Evil())),
            lambda p: torch.save(Evil(), p),
        ):
            write(killed / f"checkpoint-{step}" / name)
    with pytest.raises(CordaError, match="are damaged"):
        run(killed)
    assert "executed" not in capsys.readouterr().out


def test_a_state_of_another_training_is_named(run, killed):
    """Whole and readable, but not of this optimiser."""
    folder = killed / "checkpoint-4"
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    (folder / SEAL).unlink()
    with pytest.raises(ForeignFileError, match=r"checkpoint-4 is damaged, or of another training"):
        run(killed)


@pytest.mark.parametrize("value", [[], 3, "x", {}, {"options": 5}, {"model": None}, {"anchor": 7}, {"model": {"trained": 3}}])  # fmt: skip
def test_a_damaged_plan_or_result_of_a_training_is_named(value, run, killed):
    path = killed / "train.json"
    plan = json.loads(path.read_text())
    path.write_text(json.dumps({**plan, **value} if isinstance(value, dict) and value else value))
    with pytest.raises(CordaError, match=r"train\.json|holds"):
        run(killed)
    path.write_text(json.dumps(plan))
    run(killed)
    (killed / "result.json").write_text(json.dumps(value))
    with pytest.raises(ForeignFileError, match=r"result\.json is damaged"):
        run(killed)
