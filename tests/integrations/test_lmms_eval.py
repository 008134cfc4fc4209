"""lmms-eval itself, with a live shapes-llava, on a task whose records are local."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from torch import nn

from corda_vlm import ask, load_model
from corda_vlm.data import load_records
from corda_vlm.errors import CordaError
from corda_vlm.evaluation.predictions import read_predictions
from corda_vlm.integrations import lmms_eval
from corda_vlm.report import BeforeAfterOptions, read_results, write_comparison
from tests.integrations.test_evaluation_tools import absent

pytestmark = [pytest.mark.unchecked]

TASK = """task: seen
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function seen.visual
doc_to_text: "question"
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false}}
process_results: !function seen.score
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 1.0}}]
"""
SEEN = """from PIL import Image


def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def score(doc, results):
    return {"right": float(results[0].strip().lower() == doc["answer"].lower())}
"""
COUNT = 40


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder with a task of easy-VQA's questions, which shapes-llava has learned, and the same records for us."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    spec = {
        "source": "parquet:model_zoo/shapes-llava/data/*.parquet",
        "split": "test",
        "format": "qa",
    }
    records = load_records({**spec, "limit": COUNT})
    rows = []
    for number in range(COUNT):
        record = records[number]
        picture = folder / f"{number}.png"
        record["images"][0].save(picture)
        rows.append(
            {"question": record["question"], "answer": record["answers"][0], "image": str(picture)}
        )
    file = folder / "seen.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "seen.yaml").write_text(TASK.format(file=file))
    (folder / "seen.py").write_text(SEEN)
    return folder


def request(messages: Any, asked: dict[str, Any], document: int = 0) -> Any:
    """A request as lmms-eval hands it over."""
    return SimpleNamespace(args=("", messages, asked, document, "seen", "test"))


def test_requests_that_ask_alike_are_answered_together_and_in_their_order():
    calls = []

    def answers(conversations, *, max_new_tokens, stop):
        calls.append((len(conversations), max_new_tokens, stop))
        return [f"{conversation()} {max_new_tokens}" for conversation in conversations]

    documents = {"seen": {"test": ["a", "b", "c"]}}
    kinds = [{"max_new_tokens": 8}, {"until": ["\n"], "temperature": 0}, {"max_new_tokens": 8}]
    requests = [request(str.upper, asked, number) for number, asked in enumerate(kinds)]
    assert lmms_eval._answered(answers, requests, documents) == ["A 8", "B 1024", "C 8"]
    assert calls == [(2, 8, ()), (1, 1024, ("\n",))]


@pytest.mark.parametrize("asked", [{"do_sample": True}, {"temperature": 0.7}, {"num_beams": 3}])
def test_answers_that_are_drawn_are_refused(asked):
    with pytest.raises(CordaError, match="answers are greedy here, and a task asks for"):
        lmms_eval._greedy(asked)


def test_pictures_and_texts_are_taken_and_videos_are_not():
    picture, pictures = Image.new("RGB", (8, 8)), []
    parts = [{"type": "image", "url": picture}, {"type": "text", "text": "What is it?"}]
    assert lmms_eval._content(parts, pictures) == [{"type": "image"}, parts[1]]
    assert pictures == [picture]
    with pytest.raises(CordaError, match="a part of type 'video'"):
        lmms_eval._content([{"type": "video", "url": "a.mp4"}], [])


def test_a_model_answers_messages_as_it_answers_a_question():
    loaded = load_model("shapes-llava")
    picture = Image.new("RGB", (64, 64), "red")
    answers = lmms_eval.Answers(loaded.model, loaded.processor)
    content = [{"type": "image", "url": picture}, {"type": "text", "text": "What colour is it?"}]
    messages = [{"role": "user", "content": content}]
    alone = ask(loaded, "What colour is it?", picture, max_new_tokens=4)
    assert answers([lambda: messages] * 3, max_new_tokens=4) == [alone] * 3


def test_a_keyword_that_is_set_here_is_refused():
    with pytest.raises(CordaError, match="log_samples is set by evaluate itself"):
        lmms_eval.evaluate(nn.Linear(2, 2), ["pope"], processor=None, log_samples=False)


def test_lmms_eval_that_is_not_installed_is_named(monkeypatch):
    absent(monkeypatch, "lmms_eval")
    loaded = load_model("shapes-llava")
    with pytest.raises(CordaError, match="pip install lmms_eval"):
        lmms_eval.as_lmms(loaded.model, loaded.processor)


def test_a_model_that_writes_no_text_is_none_of_theirs():
    loaded = load_model("emoji-clip")
    with pytest.raises(CordaError, match="generates none: measure it on"):
        lmms_eval.as_lmms(loaded.model, loaded.processor)


@pytest.mark.slow
def test_a_live_adapter_answers_as_in_our_own_measure_and_the_report_reads_it(
    tool, tasks, tmp_path, measured
):
    """a live model's answers in simple_evaluate are those of our own measure; the report reads lmms-eval's files"""
    script, out = Path(__file__).with_name("lmms_eval_live.py"), tmp_path / "out"
    tool.run(script, tasks, tasks / "seen.jsonl", out, cwd=tmp_path, HF_DATASETS_OFFLINE="1")
    theirs = said(out / "live")
    ours = [
        one.said for one in sorted(read_predictions(out / "ours.jsonl"), key=lambda one: one.index)
    ]
    assert theirs == ours
    assert said(out / "before") != theirs
    (before,) = read_results(out / "before")
    assert before.name == "before"
    assert before.of("seen").value > 0.5
    page, _ = write_comparison(
        BeforeAfterOptions(
            before=[str(out / "before")], after=[str(out / "live")], output=str(tmp_path / "report")
        )
    )
    (task,) = json.loads(page.with_name("card.json").read_text())["after"][0]["tasks"]
    assert (task["task"], task["interval"], task["n"]) == ("seen", "paired", COUNT)
    measured(f"{COUNT} answers are the same, {before.of('seen').value:.0%} right before")


def said(folder: Path) -> list[str]:
    """What the model answered to each document, in their order."""
    (file,) = folder.rglob("*_samples_seen.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
