"""What the tasks of text have in common: suites of them, diverged models, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from corda_vlm.errors import CordaError, DataError, NotFiniteError, UnknownNameError
from corda_vlm.evaluation import evaluate, load_suite
from corda_vlm.evaluation.tasks.likelihood import AnswerLikelihood
from corda_vlm.evaluation.tasks.multiple_choice import MultipleChoice
from corda_vlm.evaluation.tasks.perplexity import Perplexity
from corda_vlm.evaluation.tasks.qa import Qa
from corda_vlm.evaluation.tasks.vqa import Vqa
from tests.evaluation.known_model import encoder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_diverged_has_no_score(tiny_llm, records, document, value) -> None:
    with torch.no_grad():
        tiny_llm.model.lm_head.weight.fill_(value)
    data = records([{"question": "is", "choices": ["yes", "no"], "answer": 0}])
    broken = encoder(tiny_llm.model, tiny_llm)
    asked = records([{"question": "is", "answer": "yes", "answers": ["yes"]}])
    for task, outputs in (
        (MultipleChoice(data, chat_template="plain"), "2 of 2 texts"),
        (AnswerLikelihood(data, chat_template="plain"), "1 of 1 texts"),
        (Perplexity(document("yes no")), "1 of 1 texts"),
        (Qa(asked, chat_template="plain", max_new_tokens=2), "1 of 1 prompts"),
        (Vqa(asked, chat_template="plain", max_new_tokens=2), "1 of 1 prompts"),
    ):
        with pytest.raises(NotFiniteError, match=f"NaN or Inf on {outputs} measured.*float32"):
            dict(task.run(broken))


def test_suites_with_text_tasks(tiny_llm, tiny_llava, tmp_path, digits_file) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"question": f"q{i}", "choices": ["yes", "no"], "answer": i % 2})
            for i in range(4)
        )
    )
    data = {"source": f"jsonl:{path}", "format": "qa"}
    options = {"chat_template": "plain", "max_new_tokens": 3}
    tasks: list[dict[str, Any]] = [
        {"name": "open", "kind": "qa", "options": {**options, "stop": ["\n"]}},
        {"name": "sure", "kind": "likelihood", "options": {"chat_template": "plain"}},
        {"name": "choice", "kind": "multiple_choice", "metrics": "acc", "options": {"chat_template": "plain"}},
        {"name": "text", "kind": "perplexity", "options": {"chat_template": "plain", "stride": 8}},
    ]  # fmt: skip
    suite = {
        "name": "s",
        "version": 1,
        "tasks": [{"role": "retention", "data": data, **t} for t in tasks],
    }
    scores = evaluate(tiny_llm, suite)
    assert [(s.task, s.metric, s.n) for s in scores] == [
        ("open", "exact_match", 4), ("sure", "token_probability", 4), ("sure", "log_likelihood", 4),
        ("sure", "log_likelihood_per_token", 4), ("choice", "acc", 4), ("text", "token_probability", 4),
        ("text", "perplexity", 4),
    ]  # fmt: skip
    assert evaluate(tiny_llm, suite) == scores
    vqa = {"name": "v", "version": 1, "tasks": [
        {"name": "easy", "role": "gain", "kind": "vqa", "options": {"max_new_tokens": 3, "chance": 0.25},
         "metrics": ["vqa_accuracy", "accuracy_yes_no"], "data": {"source": f"parquet:{digits_file}", "format": "qa"}}]}  # fmt: skip
    easy = evaluate(tiny_llava, vqa)
    assert [(s.metric, s.n, s.chance) for s in easy] == [
        ("vqa_accuracy", 4, 0.25),
        ("accuracy_yes_no", 2, 0.25),
    ]
    none = {**vqa["tasks"][0], "metrics": ["accuracy_number"]}
    with pytest.raises(DataError, match="no question of type number"):
        evaluate(tiny_llava, {**vqa, "tasks": [none]})


@pytest.fixture
def digits_file(tmp_path):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rows = []
    for shade in (0, 255):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (shade,) * 3).save(buffer, "PNG")
        qa = [{"question": "is it dark?", "answer": "no" if shade else "yes"}, {"question": "which shade?", "answer": "grey"}]  # fmt: skip
        rows.append({"image": buffer.getvalue(), "qa_json": json.dumps(qa)})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shades.parquet")
    return tmp_path / "shades.parquet"


def test_refusals(tiny_clip_hf, tiny_processor, tiny_llm, records) -> None:
    from corda_vlm.families import Loaded, detect_family

    task = {"name": "t", "role": "gain", "kind": "qa", "data": "jsonl:x"}

    def suite(**changes: Any) -> dict[str, Any]:
        return {"name": "s", "version": 1, "tasks": [{**task, **changes}]}

    for bad, told in (
        ({"options": {"stride": 3}}, "unknown option in options of .*stride.*max_new_tokens"),
        ({"options": 3}, "options must be a mapping"),
        ({"metrics": ["f1"]}, "unknown metric"),
        (
            {"kind": "zero_shot", "classes": ["a"], "templates": ["{}"], "options": {}},
            "takes no options",
        ),
        ({"classes": ["a"]}, "takes no classes"),
    ):
        with pytest.raises(CordaError, match=told):
            load_suite(suite(**bad))
    data = records([{"question": "is", "answer": "yes"}])
    for kind, options in (
        (Qa, {"max_new_tokens": 0}),
        (Qa, {"stop": "x"}),
        (Vqa, {"stop": [""]}),
        (AnswerLikelihood, {"most_answers": 0}),
    ):
        with pytest.raises(CordaError):
            kind(data, **options)
    for kind in (Qa, Vqa, AnswerLikelihood, MultipleChoice, Perplexity):
        with pytest.raises(UnknownNameError):
            kind(data, ("top1",))
    clip = Loaded(tiny_clip_hf, tiny_processor, detect_family(tiny_clip_hf), "tiny")
    with pytest.raises(CordaError, match="compares images with texts and generates none"):
        dict(Qa(data).run(encoder(clip.model, clip)))
    nobody = records(
        [{"question": "is " * 200, "answer": "yes"}, {"question": "is", "answer": "yes"}],
        max_bad_share=0.99,
    )
    short = replace(tiny_llm, processor=replace(tiny_llm.processor, context=5))
    with pytest.raises(DataError, match=r"not one record could be measured|cannot be used"):
        dict(Qa(nobody, chat_template="plain").run(encoder(short.model, short)))


def test_a_report_of_probabilities_tells_them_so_that_they_can_be_told_apart(tmp_path):
    from corda_vlm.evaluation import append_rows, score_row
    from corda_vlm.evaluation.scores import Score
    from corda_vlm.report import write_report

    rows = []
    for method, rate, gained, kept in (("base", None, 0.234, 0.0101), ("lora", 1e-3, 0.4, 0.0094)):
        for task, role, metric, value in (
            ("sums", "gain", "token_probability", gained),
            ("sums", "gain", "perplexity", 1 / gained),
            ("facts", "retention", "token_probability", kept),
        ):
            score = Score(task, metric, value, 0.9 * value, 1.1 * value, 50, role)
            rows.append(score_row(score, run="r", method=method, learning_rate=rate, seed=0))
    append_rows(tmp_path / "scores.jsonl", rows)
    told = write_report(tmp_path).with_suffix(".md").read_text()
    assert "| lora | 0.001 | 40.0% | 0.940% |" in told
    assert "| base | – | 23.4% | 1.01% |" in told
    assert "1% is −4.6" in told
    assert "| sums | gain | perplexity | 4.274 (3.846 to 4.701) | – | 50 |" in told
