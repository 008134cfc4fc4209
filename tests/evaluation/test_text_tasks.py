"""Likelihood, perplexity, multiple choice and generation: by a model whose every probability is known, and by real ones."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from corda_vlm.data import ChatOptions, ConversationBatches, load_records
from corda_vlm.errors import CordaError, DataError, NotFiniteError, UnknownNameError
from corda_vlm.evaluation import evaluate, load_suite
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.models.generate import before_any, generate
from corda_vlm.evaluation.models.likelihoods import likelihoods
from corda_vlm.evaluation.models.text_model import TextGenerator
from corda_vlm.evaluation.tasks.likelihood import AnswerLikelihood
from corda_vlm.evaluation.tasks.multiple_choice import MultipleChoice
from corda_vlm.evaluation.tasks.perplexity import Perplexity, windows
from corda_vlm.evaluation.tasks.qa import Qa
from corda_vlm.evaluation.tasks.vqa import Vqa

PLAIN = ChatOptions(chat_template="plain")


class Bigram(nn.Module):
    """p(next | last) from a table; what the table leaves is shared by all other tokens."""

    def __init__(self, tokenizer: Any, table: dict[str, dict[str, float]]) -> None:
        super().__init__()
        size = len(tokenizer)
        known = torch.full((size, size), 1 / size)
        for last, row in table.items():
            left = (1 - sum(row.values())) / (size - len(row))
            known[one(tokenizer, last)] = left
            for following, share in row.items():
                known[one(tokenizer, last), one(tokenizer, following)] = share
        self.table = nn.Parameter(known.log())

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def one(tokenizer: Any, text: str) -> int:
    (found,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def encoder(model: nn.Module, loaded: Any, **options: Any) -> Encoder:
    return Encoder(model, loaded.family, loaded.processor, **{"batch_size": 3, **options})


@pytest.fixture
def records(tmp_path):
    def make(rows: list[dict[str, Any]], **options: Any) -> Any:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return load_records({"source": f"jsonl:{path}", "format": "qa", **options})

    return make


@pytest.fixture
def document(tmp_path):
    def make(*texts: str) -> Any:
        path = tmp_path / "texts.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        return load_records({"source": f"jsonl:{path}", "format": "text"})

    return make


# ------------------------------------------------------------------ hand-worked


def test_answer_likelihood_by_hand(tiny_llm, records) -> None:
    model = Bigram(
        tiny_llm.processor.tokenizer, {":": {" yes": 0.5, " no": 0.25}, " no": {" blue": 0.5}}
    )
    data = records([
        {"question": "is", "answers": ["no blue", "yes"]},  # 1/4 · 1/2 = 1/8, and 1/2: the best is yes
        {"question": "is there", "answers": ["no blue"]},  # 1/8, over two tokens
    ])  # fmt: skip
    task = AnswerLikelihood(data, chat_template="plain")
    found = {o.metric: o for o in task.outcomes(encoder(model, tiny_llm))}
    np.testing.assert_allclose(found["log_likelihood"].values, np.log([1 / 2, 1 / 8]), rtol=1e-5)
    np.testing.assert_allclose(
        found["log_likelihood_per_token"].values, [math.log(1 / 2), math.log(1 / 8) / 2], rtol=1e-5
    )
    score = found["token_probability"].score("t", "retention")
    assert score.value == pytest.approx(math.sqrt(0.5 * math.sqrt(1 / 8)), rel=1e-5)
    assert 0 < score.low <= score.value <= score.high <= 1
    assert score.chance == 0
    first = AnswerLikelihood(data, ("log_likelihood",), chat_template="plain", most_answers=1)
    assert dict(first.run(encoder(model, tiny_llm)))["log_likelihood"] == pytest.approx(
        math.log(1 / 8), rel=1e-5
    )


def test_multiple_choice_by_hand(tiny_llm, records) -> None:
    """ " no blue" (1/8, 7 characters) against " yes" (1/6, 3): acc takes yes, acc_norm no blue."""
    model = Bigram(
        tiny_llm.processor.tokenizer, {":": {" yes": 1 / 6, " no": 0.25}, " no": {" blue": 0.5}}
    )
    rows = [
        {"question": "is", "choices": ["yes", "no blue"], "answer": right} for right in (0, 1, 1)
    ]
    outcomes = {
        o.metric: o
        for o in MultipleChoice(records(rows), chat_template="plain").outcomes(
            encoder(model, tiny_llm)
        )
    }
    assert outcomes["acc"].values.tolist() == [1, 0, 0]
    assert outcomes["acc_norm"].values.tolist() == [0, 1, 1]
    assert outcomes["acc"].chance == 0.5
    with pytest.raises(DataError, match="has no choices"):
        list(
            MultipleChoice(
                records([{"question": "is", "answer": "yes"}]), chat_template="plain"
            ).outcomes(encoder(model, tiny_llm))
        )


def test_perplexity_by_hand(tiny_llm, document) -> None:
    """Tokens: <none> yes no no | " no" is certain to the half after " yes" and " no"."""
    model = Bigram(tiny_llm.processor.tokenizer, {" yes": {" no": 0.5}, " no": {" no": 0.125}})
    data = document(" yes no no no", " yes no")  # 1/2 · 1/8 · 1/8 and 1/2
    found = dict(Perplexity(data).run(encoder(model, tiny_llm)))
    assert found["perplexity"] == pytest.approx(2 ** ((1 + 3 + 3 + 1) / 4), rel=1e-5)
    assert found["token_probability"] == pytest.approx(1 / found["perplexity"])
    with pytest.raises(DataError, match="holds no token to learn"):
        dict(Perplexity(document(" yes")).run(encoder(model, tiny_llm)))


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


# ------------------------------------------------------------------ real models


def test_likelihoods_are_those_of_each_sample_alone(tiny_llm, records) -> None:
    data = records([{"question": "is there " * k, "answer": "yes or no"} for k in (1, 7, 3, 12, 5)])
    builder = ConversationBatches(data, tiny_llm.processor, chat=PLAIN)
    samples = [builder.sample(i) for i in range(5)]
    tiny_llm.model.train()
    found = likelihoods(TextGenerator(tiny_llm.model, tiny_llm.processor, batch_size=2), samples)
    assert tiny_llm.model.training
    for sample, own in zip(samples, found, strict=True):
        ids, labels = sample["input_ids"], sample["labels"]
        with torch.no_grad():
            shares = tiny_llm.model.eval()(input_ids=ids[None]).logits[0].log_softmax(-1)
        places = [i for i in range(1, len(ids)) if labels[i] != -100]
        assert own.tokens == len(places)
        assert own.total == pytest.approx(
            float(sum(shares[i - 1, ids[i]] for i in places)), rel=1e-4
        )


@pytest.mark.parametrize(("window", "stride"), [(128, None), (10, 3), (10, 9), (7, 1)])
def test_windows_predict_each_token_once_with_the_context_they_promise(
    tiny_llm, document, window, stride
) -> None:
    text = "is there a red circle in the image? yes no blue green " * 2
    ids = torch.tensor(tiny_llm.processor.tokenizer(text)["input_ids"])
    expected, length = 0.0, len(ids)
    step = stride or window // 2
    with torch.no_grad():
        for at in range(1, length):
            start = next(s for s in range(0, length, step) if s + window > at)
            logits = tiny_llm.model(input_ids=ids[None, start:at]).logits[0, -1]
            expected += float(logits.log_softmax(-1)[ids[at]])
            assert at - start >= min(at, window - step)
    task = Perplexity(document(text), window=window, stride=stride)
    (outcome, _) = task.outcomes(encoder(tiny_llm.model, tiny_llm))
    assert outcome.weights.tolist() == [length - 1]
    assert float(outcome.values[0]) * (length - 1) == pytest.approx(expected, rel=1e-4)


def test_a_window_that_cannot_be_is_refused(tiny_llm, document) -> None:
    for options, told in (
        ({"window": 500}, "reads at most 128"),
        ({"window": 10, "stride": 10}, "below the window of 10"),
        ({"window": 1}, "at least 2"),
    ):
        with pytest.raises(CordaError, match=told):
            list(
                Perplexity(document("yes no yes"), **options).outcomes(
                    encoder(tiny_llm.model, tiny_llm)
                )
            )
    picture = {
        "input_ids": torch.zeros(9),
        "labels": torch.zeros(9),
        "pixel_values": torch.zeros(1, 3),
    }
    with pytest.raises(CordaError, match="cannot cut images"):
        windows(picture, 5, 2)


def test_generation_is_that_of_each_prompt_alone(tiny_llm, records) -> None:
    data = records([{"question": "is there " * k, "answer": "yes"} for k in (1, 7, 3, 12, 5)])
    builder = ConversationBatches(data, tiny_llm.processor, chat=PLAIN)
    prompts = [builder.prompt(i, 6) for i in range(5)]
    tokenizer, side = tiny_llm.processor.tokenizer, tiny_llm.processor.tokenizer.padding_side
    tiny_llm.model.train()
    tiny_llm.model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=2.0)
    generator = TextGenerator(tiny_llm.model, tiny_llm.processor, batch_size=2)
    said = generate(generator, prompts, max_new_tokens=6)
    assert tiny_llm.model.training
    assert tokenizer.padding_side == side
    tiny_llm.model.eval()
    for prompt, own in zip(prompts, said, strict=True):
        ids = prompt["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                following = tiny_llm.model(input_ids=ids[None]).logits[0, -1].argmax()
            if following == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following[None]])
        assert (
            own
            == tokenizer.decode(ids[len(prompt["input_ids"]) :], skip_special_tokens=True).strip()
        )
    words = [text[len(text) // 2 :][:1] for text in said if text]
    stopped = generate(generator, prompts, max_new_tokens=6, stop=words)
    assert stopped == [before_any(text, words).strip() for text in said]
    assert before_any("yes, no.", [".", ","]) == "yes"


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
