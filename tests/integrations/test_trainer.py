"""The recipe of transformers' Trainer, on shapes-llava."""

from __future__ import annotations

import pytest

from corda_vlm import load_model
from corda_vlm.data import make_batches
from tests.integrations.plain import departure, outputs, peft_type

pytestmark = [
    pytest.mark.sees,
    pytest.mark.unchecked,
    pytest.mark.filterwarnings("ignore:.*fewer tokens than their width"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]
SMALL = ["--batch-size=2", "--samples=4"]


def test_recipe(recipe, tmp_path, measured):
    """starts at the base with anchor and distillation at 0, resumes, and plain PEFT loads the result"""
    from peft import PeftModel

    script = recipe("trainer")
    folder = tmp_path / "trained"
    first = script.main([*SMALL, "--steps=2", f"--output={folder}"])
    logs = [entry for entry in first.state.log_history if "loss" in entry]
    assert logs[0]["anchor"] == 0.0
    assert abs(logs[0]["distill"]) < 1e-6
    assert logs[1]["anchor"] > 0.0

    again = script.main([*SMALL, "--steps=3", f"--output={folder}", "--resume"])
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2, 3]

    assert peft_type(folder / "lora") == "LORA"
    base = load_model("shapes-llava")
    batch = next(iter(make_batches(script.load_records(script.TASK), base.processor, batch_size=2)))
    before = outputs(base.model, batch)
    plain = PeftModel.from_pretrained(base.model, str(folder / "lora"))
    trained = again.model
    error = departure(outputs(plain, batch), outputs(trained, batch))
    assert error < 1e-4
    assert departure(outputs(trained, batch), before) > 10 * error
    measured(f"PEFT's outputs are those of training within {error:.0e}")


@pytest.mark.slow
def test_a_budget(recipe, tmp_path, measured):
    """with --keep 0.95 a probe steers the weight of distillation, and what is kept is told at the end"""
    given = ["--batch-size=8", "--samples=64", "--steps=6", "--every=2", "--keep=0.95"]
    trainer = recipe("trainer").main([*given, f"--output={tmp_path / 'trained'}"])
    looks = [entry for entry in trainer.state.log_history if "keep" in entry]
    assert [entry["step"] for entry in looks] == [2, 4]
    assert all(0.5 < entry["keep"] <= 1.2 for entry in looks)
    weights = [entry["keep_weight"] for entry in looks]
    assert weights[-1] != weights[0], "it is steered"
    assert trainer.spent is not None
    measured(f"{trainer.spent}")
