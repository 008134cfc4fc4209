"""LLaMA-Factory from both exports of a start, in an environment of its own, with the PEFT that it pins."""

from __future__ import annotations

import json

import pytest

from corda_vlm import asset
from tests.integrations.plain import departure
from tests.integrations.starts import logits, losses

pytestmark = [pytest.mark.slow, pytest.mark.unchecked]
RECIPE = asset("configs/integrations/llamafactory.yaml")


@pytest.fixture(autouse=True)
def listed(starts) -> None:
    """The tool looks a data set up by its name."""
    about = json.dumps({"task": {"file_name": "task.json"}})
    (starts["lora"].parent / "dataset_info.json").write_text(about)


@pytest.mark.parametrize("format", ["residual", "lora"])
def test_recipe(tool, starts, smollm2_4, format, tmp_path, measured):
    """starts at the base, trains, resumes, and its own PEFT loads the result"""
    start = starts[format]
    base = start / "base" if format == "residual" else smollm2_4
    before = logits(tool, smollm2_4, None, tmp_path)
    at_start = departure(logits(tool, base, start, tmp_path), before)
    assert at_start < 1e-4
    words = ["-m", "llamafactory.cli", "train", RECIPE, f"model_name_or_path={base}", f"adapter_name_or_path={start}",
             "dataset=task", f"dataset_dir={start.parent}", "output_dir=trained", "gradient_accumulation_steps=1",
             "save_steps=2", "use_cpu=true", "cutoff_len=64", "lr_scheduler_type=constant"]  # fmt: skip
    tool.run(*words, "max_steps=2", cwd=tmp_path)
    first = losses(tmp_path / "trained", 2)
    tool.run(*words, "max_steps=4", "resume_from_checkpoint=trained/checkpoint-2", cwd=tmp_path)
    whole = losses(tmp_path / "trained", 4)
    assert whole[:2] == first
    assert len(whole) == 4
    after = departure(logits(tool, base, tmp_path / "trained", tmp_path), before)
    assert after > 10 * at_start
    measured(f"{format}: start off by {at_start:.0e}, loss {whole[0]:.3f} to {whole[-1]:.3f}")
