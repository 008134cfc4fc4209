"""lm-eval itself, on SmolLM2 cut to 4 layers: a live model with an adapter is measured as its export is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from corda_vlm import asset
from corda_vlm.errors import CordaError
from corda_vlm.integrations import lm_eval
from corda_vlm.report import BeforeAfterOptions, read_results, write_comparison

pytestmark = [pytest.mark.unchecked]

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{q}}}}"
{more}
metadata: {{version: 1.0}}
"""
CHOICE = """doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
LIKELIHOOD = """doc_to_target: "{{a}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]"""
CAPITALS = ("Paris", "Rome", "Madrid", "Berlin", "Vienna", "Athens")
COUNTRIES = ("France", "Italy", "Spain", "Germany", "Austria", "Greece")


@pytest.fixture
def tasks(tmp_path) -> Path:
    """Two small tasks: one of choice, and one of likelihood, whose numbers tell models apart finely."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    capitals = [
        {"q": f"The capital of {country} is", "choices": list(CAPITALS), "gold": number}
        for number, country in enumerate(COUNTRIES)
    ]
    sums = [{"q": f"{n} and {n} is", "a": f" {2 * n}"} for n in range(2, 8)]
    for name, rows, kind, more in (
        ("capitals", capitals, "multiple_choice", CHOICE),
        ("sums", sums, "loglikelihood", LIKELIHOOD),
    ):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            TASK.format(name=name, file=file, kind=kind, more=more)
        )
    return folder


def likelihoods(folder: Path, task: str) -> np.ndarray:
    """What the model gave to each answer of each sample."""
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return np.array([[float(one[0]) for one in row["filtered_resps"]] for row in rows])


def test_a_keyword_that_is_set_here_is_refused():
    with pytest.raises(CordaError, match="log_samples is set by evaluate itself"):
        lm_eval.evaluate(nn.Linear(2, 2), processor=None, log_samples=False)


def test_a_process_without_results_writes_none(tmp_path, monkeypatch):
    """in a distributed run lm-eval gives results to the first process alone"""
    theirs = SimpleNamespace(
        simple_evaluate=lambda **_: None,
        TaskManager=lambda **_: None,
        EvaluationTracker=lambda **_: SimpleNamespace(),
        HFLM=lambda **_: None,
    )
    monkeypatch.setattr(lm_eval, "_lm_eval", lambda module: theirs)
    model: Any = nn.Linear(2, 2)
    model.generate = None
    processor = SimpleNamespace(tokenizer="its")
    assert lm_eval.evaluate(model, processor=processor, output=tmp_path / "results") is None


@pytest.mark.slow
def test_a_live_adapter_is_measured_as_its_export_and_the_report_reads_both(
    tool, tasks, smollm2_4, tmp_path, measured
):
    """a live adapter's likelihoods are those of its export; the report reads lm-eval's files"""
    script = Path(__file__).with_name("lm_eval_live.py")
    tool.run(script, smollm2_4, tasks, tmp_path, cwd=tmp_path, HF_DATASETS_OFFLINE="1")
    tool.run(
        "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'exported'},dtype=float32", "--device", "cpu",
        "--include_path", tasks, "--tasks", "capitals,sums", "--batch_size", "8", "--log_samples",
        "--output_path", tmp_path / "plain", cwd=tmp_path, HF_DATASETS_OFFLINE="1",
    )  # fmt: skip
    apart = 0.0
    for task in ("capitals", "sums"):
        live, plain = (likelihoods(tmp_path / name, task) for name in ("live", "plain"))
        before = likelihoods(tmp_path / "before", task)
        apart = max(apart, float(np.abs(live - plain).max()))
        assert np.abs(live - before).max() > 0.05
    assert apart < 1e-3
    page, _ = write_comparison(
        BeforeAfterOptions(
            before=[str(tmp_path / "before")],
            after=[str(tmp_path / "live")],
            output=str(tmp_path / "report"),
            gain=["sums"],
        )
    )
    card = json.loads(page.with_name("card.json").read_text())
    capitals = next(one for one in card["after"][0]["tasks"] if one["task"] == "capitals")
    assert (capitals["interval"], capitals["n"], capitals["chance"]) == (
        "paired",
        6,
        pytest.approx(1 / 6),
    )
    (plain,) = read_results(tmp_path / "plain")
    assert plain.of("capitals").value == pytest.approx(capitals["after"])
    measured(f"log-likelihoods within {apart:.0e} of those of the export")


HUB = {
    "mandarjoshi/trivia_qa": ("rc.nocontext", "validation", lambda q, a: {"question": q, "answer": {"aliases": a}}),
    "google-research-datasets/nq_open": ("nq_open", "validation", lambda q, a: {"question": q, "answer": a}),
    "stanfordnlp/web_questions": ("default", "test", lambda q, a: {"question": q, "answers": a}),
}  # fmt: skip
"""The data sets of the group's tasks -> configuration, the split that is measured, and a record with a question and its answers."""

LIVE = """
import sys, torch
from corda_vlm import load_model
from corda_vlm.integrations.lm_eval import evaluate
loaded = load_model(sys.argv[1], dtype=torch.float32)
evaluate(loaded.model, processor=loaded.processor, output=sys.argv[2], limit=5)
"""


@pytest.fixture
def hub(tmp_path) -> Path:
    """A folder in which the data sets of `corda_retention` are found by their names, with six records each."""
    folder = tmp_path / "hub"
    for name, (config, split, record) in HUB.items():
        place = folder / name
        place.mkdir(parents=True)
        rows = [
            json.dumps(record(f"what is the capital of {country}", [capital, f"{capital} city"]))
            for country, capital in zip(COUNTRIES, CAPITALS, strict=True)
        ]
        (place / "rows.jsonl").write_text("\n".join(rows) + "\n")
        files = "".join(f"  - {{split: {one}, path: rows.jsonl}}\n" for one in ("train", split))
        (place / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n"
        )
    return folder


@pytest.mark.slow
def test_the_retention_group_runs_by_the_command_and_with_a_live_model(
    tool, hub, smollm2_4, tmp_path, measured
):
    """corda_retention runs in lm-eval's command and with a live model, on local data, with equal scores that the report reads"""
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    tool.run("-c", LIVE, smollm2_4, tmp_path / "live", cwd=hub, **offline)
    tool.run(
        "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={smollm2_4},dtype=float32", "--device", "cpu",
        "--include_path", lm_eval.tasks_folder(), "--tasks", lm_eval.RETENTION, "--batch_size", "8", "--limit", "5",
        "--log_samples", "--output_path", tmp_path / "plain", cwd=hub, **offline,
    )  # fmt: skip
    (live,), (plain,) = read_results(tmp_path / "live"), read_results(tmp_path / "plain")
    for task in ("triviaqa", "nq_open", "webqs"):
        measure = live.of(task)
        assert measure.n == 5
        assert measure.value == plain.of(task).value
    page, _ = write_comparison(
        BeforeAfterOptions(
            before=[str(tmp_path / "plain")], after=[str(tmp_path / "live")], output=str(tmp_path / "report")
        )
    )  # fmt: skip
    card = json.loads(page.with_name("card.json").read_text())
    tasks = {one["task"]: one for one in card["after"][0]["tasks"]}
    assert tasks.keys() == {"triviaqa", "nq_open", "webqs"}
    assert all(one["n"] == 5 for one in tasks.values())
    measured("triviaqa, nq_open and webqs, 5 records each: equal scores by both ways")


@pytest.mark.slow
def test_the_benchmark_of_speed_runs(tool, smollm2_4, tmp_path, measured):
    """tokens a second beside its own loop, equal numbers (eval/benchmarks/evaluation_speed.py)"""
    script, out = asset("eval/benchmarks/evaluation_speed.py"), tmp_path / "tokens.json"
    tool.run(
        script, "tokens", "--model", smollm2_4, "--limit", "16", "--repeats", "1", "--out", out, cwd=tmp_path
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert found["count"] > 16
    measured(f"its own loop takes {found['ratio']:.2f} times as long for {found['count']} tokens")
