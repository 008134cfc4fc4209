"""ms-swift from both exports of a start, in an environment of its own, with the PEFT that it pins."""

from __future__ import annotations

from pathlib import Path

import pytest

from corda_vlm import asset, load_adapter, load_model
from tests.integrations.plain import batch_of, departure, outputs
from tests.integrations.starts import ASKED, logits, losses

pytestmark = [pytest.mark.slow, pytest.mark.unchecked]
RECIPE = asset("configs/integrations/swift.yaml")


def sft(base: Path, data: Path) -> list[str | Path]:
    """The command of the recipe on a CPU, with little data."""
    return ["-m", "swift.cli.main", "sft", RECIPE, "--model", base, "--model_type", "llama", "--template", "default",
            "--dataset", data / "task.json", "--gradient_accumulation_steps", "1", "--save_steps", "2", "--max_length", "64",
            "--lr_scheduler_type", "constant", "--torch_dtype", "float32", "--use_cpu", "true", "--dataloader_num_workers", "0",
            "--dataset_num_proc", "1", "--use_hf", "true", "--split_dataset_ratio", "0"]  # fmt: skip


@pytest.mark.parametrize("format", ["residual", "lora"])
def test_recipe(tool, starts, smollm2_4, format, tmp_path, measured):
    """starts at the base, trains, resumes, and its own PEFT loads the result"""
    start = starts[format]
    base = start / "base" if format == "residual" else smollm2_4
    before = logits(tool, smollm2_4, None, tmp_path)
    at_start = departure(logits(tool, base, start, tmp_path), before)
    assert at_start < 1e-4
    words = [*sft(base, start.parent), "--adapters", start]
    tool.run(*words, "--max_steps", "2", cwd=tmp_path)
    first = losses(tmp_path / "trained", 2)
    again = ["--max_steps", "4", "--resume_from_checkpoint", tmp_path / "trained" / "checkpoint-2"]
    tool.run(*words, *again, cwd=tmp_path)
    whole = losses(tmp_path / "trained", 4)
    assert whole[:2] == first
    assert len(whole) == 4
    after = departure(logits(tool, base, tmp_path / "trained" / "checkpoint-4", tmp_path), before)
    assert after > 10 * at_start
    measured(f"{format}: start off by {at_start:.0e}, loss {whole[0]:.3f} to {whole[-1]:.3f}")


def test_tuner(tool, starts, smollm2_4, tmp_path, measured):
    """tuners_map: our tuner starts at the base, resumes, and load_adapter loads the checkpoint"""
    if (peft := tool.versions()["peft"]) < "0.21":
        pytest.skip(f"the tuner is saved by PEFT 0.21 or later, and ms-swift pins {peft}")
    folder = starts["lora"].parent
    words = [*sft(smollm2_4, folder), "--external_plugins", asset("configs/integrations/swift_plugin.py"),
             "--tuner_type", "corda"]  # fmt: skip
    plan = str(folder / "plan.json")
    tool.run(*words, "--max_steps", "2", cwd=tmp_path, CORDA_PLAN=plan)
    first = losses(tmp_path / "trained", 2)
    again = ["--max_steps", "4", "--resume_from_checkpoint", tmp_path / "trained" / "checkpoint-2"]
    tool.run(*words, *again, cwd=tmp_path, CORDA_PLAN=plan)
    whole = losses(tmp_path / "trained", 4)
    assert whole[:2] == first
    assert len(whole) == 4
    loaded = load_model(str(smollm2_4))
    batch = batch_of(ASKED, loaded.processor)
    before = outputs(loaded.model, batch)
    trained = load_adapter(loaded.model, tmp_path / "trained" / "checkpoint-4")
    assert departure(outputs(trained, batch), before) > 1e-6
    with trained.disable_adapter():
        assert departure(outputs(trained, batch), before) == 0.0
    measured(f"loss {whole[0]:.3f} to {whole[-1]:.3f}")
