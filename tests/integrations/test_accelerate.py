"""The recipe of a loop of one's own with Accelerate, on shapes-llava."""

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

    script = recipe("accelerate_loop")
    folder = tmp_path / "trained"
    _, first = script.main([*SMALL, "--steps=2", f"--output={folder}"])
    assert first[0]["anchor"] == 0.0
    assert abs(first[0]["distill"]) < 1e-6
    assert first[1]["anchor"] > 0.0
    trained, again = script.main([*SMALL, "--steps=3", f"--output={folder}", "--resume"])
    assert len(again) == 1
    assert again[0]["anchor"] > first[1]["anchor"]

    assert peft_type(folder / "lora") == "LORA"
    base = load_model("shapes-llava")
    batch = next(iter(make_batches(script.load_records(script.TASK), base.processor, batch_size=2)))
    before = outputs(base.model, batch)
    plain = PeftModel.from_pretrained(base.model, str(folder / "lora"))
    error = departure(outputs(plain, batch), outputs(trained, batch))
    assert error < 1e-4
    assert departure(outputs(trained, batch), before) > 10 * error
    measured(f"PEFT's outputs are those of training within {error:.0e}")
