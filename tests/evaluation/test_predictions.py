"""What a model said of each example: noted, written, read back, and compared with what another said."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corda_vlm.__main__ import main
from corda_vlm.data import load_records
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.evaluation import Encoder, evaluate, load_suite, read_predictions
from corda_vlm.evaluation.measure import encoder_of, measure
from corda_vlm.evaluation.predictions import (
    ModelPrediction,
    Prediction,
    add_predictions,
    by_model,
    changes,
    unpredicted,
)
from corda_vlm.evaluation.tasks.multiple_choice import MultipleChoice
from corda_vlm.evaluation.tasks.perplexity import Perplexity
from corda_vlm.evaluation.tasks.qa import Qa
from corda_vlm.evaluation.tasks.vqa import Vqa
from corda_vlm.families.base import Loaded
from tests.evaluation.conftest import suite_of
from tests.evaluation.known_model import Bigram, encoder


def heard(evaluator: Any, listening: Encoder) -> list[Prediction]:
    listening = replace(listening, heard=[])
    list(evaluator.outcomes(listening))
    assert listening.heard is not None
    return listening.heard


def test_pictures_are_numbered_as_in_the_data(loaded: Loaded, colour_folder: Path) -> None:
    """One that does not decode is left out, and those behind it keep their numbers."""
    (colour_folder / "blue" / "1.png").write_bytes(b"not a picture")
    data = {"source": f"folder:{colour_folder}", "max_bad_share": 0.2}
    suite = suite_of(colour_folder, data=data, classes=["red", "green", "blue"])
    (plain,) = measure(encoder_of(loaded), suite)
    assert (plain.predictions, plain.records) == ((), None), "nobody asked"
    (result,) = measure(encoder_of(loaded), suite, predict=True)
    assert [one.index for one in result.predictions] == [0, *range(2, 12)]
    assert result.outcomes[0].values.tolist() == [one.correct for one in result.predictions]
    records = load_records(data)
    for one in result.predictions:
        colour = (records.class_names or ())[(records.labels or [])[one.index]]
        assert one.right == (colour,)
        assert one.place == records.place(one.index)
        assert (one.said == colour) == bool(one.correct)
    assert {one.said for one in result.predictions} <= {"red", "green", "blue"}
    assert result.records is not None
    again = load_records(result.records["spec"], beside=result.records["beside"])
    assert again.fingerprint == result.records["fingerprint"] == records.fingerprint


def test_a_trained_head_says_the_names_of_the_data(loaded: Loaded, colour_folder: Path) -> None:
    suite = suite_of(colour_folder, role="gain", classes=["red", "blue", "green"])
    import torch

    first = torch.tensor([9.0, 0.0, 0.0])
    (result,) = measure(
        encoder_of(loaded), suite, head=lambda vectors: first.expand(len(vectors), 3), predict=True
    )
    assert {one.said for one in result.predictions} == {"blue"}, "the first in sorted order"
    assert result.outcomes[0].values.tolist() == [one.correct for one in result.predictions]


def test_answers_and_choices(tiny_llm, records) -> None:
    """As in the test of multiple choice: acc takes yes, acc_norm takes no blue."""
    model = Bigram(
        tiny_llm.processor.tokenizer, {":": {" yes": 1 / 6, " no": 0.25}, " no": {" blue": 0.5}}
    )
    rows = [{"question": "is", "choices": ["yes", "no blue"], "answer": right} for right in (0, 1)]
    for metrics, said in ((("acc", "acc_norm"), "yes"), (("acc_norm",), "no blue")):
        task = MultipleChoice(records(rows), metrics, chat_template="plain")
        one, other = heard(task, encoder(model, tiny_llm))
        assert (one.question, one.said, one.right, other.right) == (
            "is",
            said,
            ("yes",),
            ("no blue",),
        )
        assert (one.correct, other.correct) == ((1, 0) if said == "yes" else (0, 1))
        assert (one.index, other.index, one.metric) == (0, 1, metrics[0])


def test_free_answers(tiny_llm, records) -> None:
    rows = [{"question": f"q{i}", "answer": "yes", "answers": ["yes", "yeah"]} for i in range(4)]
    data = records(rows)
    for kind, metric in ((Qa, "exact_match"), (Vqa, "vqa_accuracy")):
        task = kind(data, chat_template="plain", max_new_tokens=2)
        listening = replace(encoder(tiny_llm.model, tiny_llm), heard=[])
        (outcome,) = task.outcomes(listening)
        assert outcome.values.tolist() == [one.correct for one in listening.heard or ()]
        assert [one.question for one in listening.heard or ()] == ["q0", "q1", "q2", "q3"]
        assert {(one.right, one.metric) for one in listening.heard or ()} == {(("yes", "yeah"), metric)}  # fmt: skip


def test_what_has_no_predictions_says_so(tiny_llm, document, tmp_path, caplog) -> None:
    assert not heard(Perplexity(document("yes no")), encoder(tiny_llm.model, tiny_llm))
    data = {"source": f"jsonl:{tmp_path / 'texts.jsonl'}", "format": "text"}
    text = {"name": "text", "role": "retention", "kind": "perplexity", "data": data, "options": {"chat_template": "plain"}}  # fmt: skip
    file = tmp_path / "said.jsonl"
    with pytest.raises(CordaError, match=r"no task of suite s has predictions.*zero_shot, vqa, qa"):
        evaluate(tiny_llm, {"name": "s", "version": 1, "tasks": [text]}, predictions=file)
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"question": "is", "answer": "yes"}))
    qa: dict[str, Any] = {
        "name": "qa",
        "role": "gain",
        "kind": "qa",
        "data": {"source": f"jsonl:{asked}", "format": "qa"},
    }
    qa["options"] = {"chat_template": "plain", "max_new_tokens": 2}
    suite = {"name": "s", "version": 1, "tasks": [text, qa]}
    with caplog.at_level(logging.WARNING):
        evaluate(tiny_llm, suite, predictions=file, method="own")
    assert "task text: a task of kind perplexity has no predictions" in caplog.text
    (told,) = read_predictions(file)
    assert (told.task, told.method, told.question, told.right) == ("qa", "own", "is", ("yes",))


def test_a_model_measured_again_takes_its_former_place(
    loaded: Loaded, colour_folder: Path, tmp_path: Path
) -> None:
    suite, file = load_suite(suite_of(colour_folder)), tmp_path / "said.jsonl"
    (result,) = measure(encoder_of(loaded), suite, predict=True)
    for method, scale in (("base", 1.0), ("lora", 0.5), ("lora", 1.0), ("lora", 0.5)):
        assert add_predictions(file, result, method=method, scale=scale, made_from="x") == 12
    models = by_model(read_predictions(file))
    assert [key[::3] for key in models] == [("base", 1.0), ("lora", 1.0), ("lora", 0.5)]
    assert all(len(own) == 12 for own in models.values())
    assert models[("base", None, None, 1.0)][3].records == result.records
    for made, left in (("x", []), ("y", ["colours"])):
        assert unpredicted(suite, [], file, {"colours": made}, method="lora", scale=0.5) == left
    assert not list(tmp_path.glob("*partial*")), "nothing half written stays"


@pytest.mark.parametrize(
    "change",
    [
        {"correct": 1.5}, {"right": "yes"}, {"index": -1}, {"said": None}, {"records": 3},
        {"records": {"spec": {}, "beside": 5}}, {"records": {"spec": {}, "fingerprint": ["x"]}},
    ],
)  # fmt: skip
def test_a_line_that_is_no_prediction(tmp_path: Path, change: dict[str, Any]) -> None:
    row = {"task": "t", "method": "base", "index": 0, "place": "p", "said": "a", "right": ["a"], "correct": 1, "metric": "m"}  # fmt: skip
    file = tmp_path / "said.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
    with pytest.raises(ForeignFileError, match="line 2, is not a prediction"):
        read_predictions(file)


ANSWERS = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from([0.0, 0.3, 0.5, 1.0])), unique_by=lambda pair: pair[0]
)  # fmt: skip


@given(ANSWERS, ANSWERS)
def test_changes_are_those_that_one_of_both_has_right(before: Any, after: Any) -> None:
    def told(pairs: Any, method: str) -> list[ModelPrediction]:
        return [
            ModelPrediction(i, f"row {i}", "said", ("right",), c, "m", task="t", method=method)
            for i, c in pairs
        ]

    found, common = changes(told(before, "base"), told(after, "lora"))
    first, second = dict(before), dict(after)
    assert common == len(first.keys() & second.keys())
    gained = {c.after.index for c in found if c.is_gain}
    lost = {c.after.index for c in found if not c.is_gain}
    both = first.keys() & second.keys()
    assert gained == {i for i in both if first[i] < 0.5 <= second[i]}
    assert lost == {i for i in both if second[i] < 0.5 <= first[i]}


def test_other_records_are_not_compared() -> None:
    one = ModelPrediction(0, "p", "a", ("a",), 1.0, "m", task="t", records={"fingerprint": "1"})
    other = replace(one, correct=0.0, records={"fingerprint": "2"})
    assert changes([one], [other]) == ([], 0)


@pytest.mark.usefixtures("one_text_side")
def test_the_verb_writes_them_also_where_the_scores_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    verb = ["evaluate", "emoji-clip", "emoji-digits", "--tasks=digits", "--limit=24", "--output=scores.jsonl"]  # fmt: skip
    main(verb)
    main([*verb, "--predictions=said.jsonl"])
    told = read_predictions("said.jsonl")
    (row,) = (json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()[:1])
    assert len(told) == row["n"] == 24
    assert sum(one.correct for one in told) / 24 == row["value"]
    assert {one.method for one in told} == {"base"}
    before = Path("said.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    main([*verb, "--predictions=said.jsonl"])
    assert "measured before" in capsys.readouterr().out
    assert Path("said.jsonl").stat().st_mtime_ns == before
