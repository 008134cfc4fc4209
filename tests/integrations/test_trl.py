"""The recipes of TRL, with the tool in an environment of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from corda_vlm import asset, load_model
from corda_vlm.data import load_records, make_batches
from tests.integrations.plain import batch_of, departure, outputs

pytestmark = [pytest.mark.slow, pytest.mark.unchecked]
SMALL = ["--samples=16", "--batch-size=2"]


@pytest.fixture
def lines(tmp_path):
    """Writes JSON lines."""

    def write(name: str, rows: list[dict]) -> Path:
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def knowledge(lines) -> str:
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}."} for i in range(32)]
    return f"{{source: 'jsonl:{lines('known.jsonl', rows)}', format: qa}}"


def history(folder: Path, step: int) -> list[dict]:
    """What the Trainer logged until the checkpoint of a step."""
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def check(log: list[dict], steps: int) -> None:
    assert [entry["step"] for entry in log] == list(range(1, steps + 1))
    assert log[0]["anchor"] == 0.0
    assert abs(log[0]["distill"]) < 1e-6
    assert log[-1]["anchor"] > 0.0


def test_sft(tool, smollm2_4, lines, knowledge, tmp_path, measured):
    """SFTTrainer, text: anchor and distillation begin at 0, it resumes, plain PEFT loads the result"""
    rows = [{"prompt": f"The colour number {i} is", "completion": " blue."} for i in range(16)]
    given = [asset("configs/integrations/trl_sft.py"), f"--model={smollm2_4}", f"--knowledge={knowledge}",
             f"--data={lines('train.jsonl', rows)}", "--output=trained", *SMALL]  # fmt: skip
    tool.run(*given, "--steps=2", cwd=tmp_path)
    tool.run(*given, "--steps=4", "--resume", cwd=tmp_path)
    log = history(tmp_path / "trained", 4)
    check(log, 4)
    change = changed(smollm2_4, tmp_path / "trained" / "lora")
    assert change > 0
    measured(f"loss {log[0]['loss']:.2f} to {log[-1]['loss']:.2f}, outputs changed by {change:.1e}")


def test_dpo(tool, smollm2_4, lines, knowledge, tmp_path, measured):
    """DPOTrainer: the first loss is ln 2, so the reference is the original model; it resumes, plain PEFT loads the result"""
    rows = [{"prompt": f"Number {i}:", "chosen": " yes, of course", "rejected": " no"} for i in range(16)]  # fmt: skip
    given = [asset("configs/integrations/trl_dpo.py"), f"--model={smollm2_4}", f"--knowledge={knowledge}",
             f"--data={lines('pairs.jsonl', rows)}", "--output=trained", *SMALL]  # fmt: skip
    tool.run(*given, "--steps=2", cwd=tmp_path)
    tool.run(*given, "--steps=4", "--resume", cwd=tmp_path)
    log = history(tmp_path / "trained", 4)
    check(log, 4)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    change = changed(smollm2_4, tmp_path / "trained" / "lora")
    assert change > 0
    measured(f"loss {log[0]['loss']:.4f} to {log[-1]['loss']:.4f}, outputs changed by {change:.1e}")


def test_sft_vlm(tool, tmp_path, measured):
    """SFTTrainer, shapes-llava: anchor and distillation begin at 0, it resumes, plain PEFT loads the result"""
    given = [asset("configs/integrations/trl_sft_vlm.py"), "--output=trained", "--limit=32", *SMALL]
    tool.run(*given, "--steps=2", cwd=tmp_path)
    tool.run(*given, "--steps=4", "--resume", cwd=tmp_path)
    log = history(tmp_path / "trained", 4)
    check(log, 4)
    change = changed("shapes-llava", tmp_path / "trained" / "lora", digits=True)
    assert change > 0
    measured(f"loss {log[0]['loss']:.2f} to {log[-1]['loss']:.2f}, outputs changed by {change:.1e}")


def changed(source: str | Path, adapter: Path, *, digits: bool = False) -> float:
    """By how much a plain LoRA changes the outputs of its base."""
    from peft import PeftModel

    base = load_model(str(source))
    if digits:
        asked = {"source": "sklearn:digits", "format": "qa", "question": "Which digit?", "answer": "{label}"}  # fmt: skip
        batch = next(iter(make_batches(load_records(asked), base.processor, batch_size=2)))
    else:
        batch = batch_of("What is one plus one?", base.processor)
    before = outputs(base.model, batch)
    return departure(outputs(PeftModel.from_pretrained(base.model, str(adapter)), batch), before)
