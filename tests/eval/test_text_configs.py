"""The shipped experiments on models that generate text, each from beginning to end on a tiny model and tiny files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from corda_vlm.evaluation import load_suite, read_rows
from corda_vlm.experiment import run
from corda_vlm.experiment.load import load_experiment
from corda_vlm.files import asset

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than their width")


@pytest.fixture
def small_run(tmp_path, saved):
    """Runs a shipped config on a tiny model: one learning rate a variant, two steps, a few records a task."""

    def small(config: str, loaded, *overrides: str) -> list[dict]:
        text = loaded.model.config.get_text_config()
        text.max_position_embeddings = 1024
        experiment = load_experiment(config)
        content = yaml.safe_load((asset("eval/suites") / f"{experiment.suite}.yaml").read_text())
        for task in content["tasks"]:
            task["limit"] = 3
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
        rates = [f"variants.{name}.learning_rates=[0.001]" for name in experiment.variants]
        size = ["rank=2", "calibration.samples=8", "calibration.batch_size=4", "training.batch_size=2"]  # fmt: skip
        given = [f"model={saved(loaded, 'model')}", f"suite={tmp_path}/suite.yaml", f"data_root={tmp_path}"]  # fmt: skip
        folder = run(config, output=tmp_path / "out", overrides=[*given, *rates, *size, *overrides])
        assert (folder / "report.html").is_file()
        rows = read_rows(folder / "scores.jsonl")
        assert {row["method"] for row in rows} == {"base", *experiment.variants}
        tasks = {task.name for task in load_suite(tmp_path / "suite.yaml").tasks}
        assert {row["task"] for row in rows} == tasks
        return rows

    return small


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("config", ["smollm2", pytest.param("smollm2-nf4", marks=pytest.mark.slow)])
def test_smollm2(config, small_run, tiny_llm, tmp_path):
    if "nf4" in config:
        pytest.importorskip("bitsandbytes", reason="the extra corda-vlm[quantized] is missing")
    lines(tmp_path / "nq_open_dev_3610.jsonl", [{"question": f"who is {i}", "answer": [f"x{i}", "y"]} for i in range(12)])  # fmt: skip
    lines(tmp_path / "triviaqa_3000.jsonl", [{"question": f"Where is {i}?", "answer": f"z{i}", "aliases": ["w"]} for i in range(12)])  # fmt: skip
    sums = [{"context": f"{i} plus 1?", "chain_of_thought": "Add.", "answer": str(i)} for i in range(1319)]  # fmt: skip
    lines(tmp_path / "gsm8k_test_1319.jsonl", sums)
    rows = small_run(f"configs/{config}.yaml", tiny_llm, "training.steps=2")
    assert {row["scale"] for row in rows} == {1.0, 0.5}


@pytest.mark.unchecked  # of 35,000 questions, read several times; the others are checked
def test_llava_on_digits(small_run, tiny_llava):
    if not asset("model_zoo/shapes-llava").joinpath("data").is_dir():
        pytest.skip("easy-VQA is not here")
    rows = small_run("configs/llava.yaml", tiny_llava, "training.steps=2")
    assert {row["chance"] for row in rows} == {0.0}


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (shade % 256, 90, 160)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def data_root(tmp_path):
    """Three records of each set, with the columns that matter of the files that the headers name."""

    def parquet(path: str, *rows: dict) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        found = [{**row, "image": {"bytes": picture(40 * i), "path": None}} for i, row in enumerate(rows)]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(found), tmp_path / path)

    ten = ["yes"] * 7 + ["no", "maybe", "yes"]
    people = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(ten)]
    vqav2 = {"question": "Is it blue?", "answers": people, "multiple_choice_answer": "yes", "question_type": "is it", "answer_type": "yes/no"}  # fmt: skip
    parquet("VQAv2/data/validation-00000-of-00068.parquet", *[vqav2] * 3)
    listed = {"question": "what is written?", "answers": ten}
    parquet("textvqa/data/validation-00000-of-00003.parquet", *[{**listed, "ocr_tokens": ["a"]}] * 3)  # fmt: skip
    parquet("VizWiz-VQA/data/val-00000-of-00005.parquet", *[{**listed, "category": "other"}] * 3)
    parquet("OK-VQA/data/val2014-00000-of-00002.parquet", *[{**listed, "question_id": "1"}] * 3)
    science = {"question": "Which is it?", "choices": ["red", "blue", "green"], "answer": 1, "hint": "", "solution": "It is."}  # fmt: skip
    parquet("ScienceQA/ScienceQA-IMG/test-00000-of-00001.parquet", *[science] * 3)
    bench = {"question": "Which?", "hint": "nan", "answer": "B", "A": "red", "B": "blue", "C": None, "D": "nan", "category": "x"}  # fmt: skip
    parquet("MMBench/en/dev-00000-of-00001.parquet", bench, bench, {**bench, "C": "green"})
    pope = {"question": "Is there a cat?", "answer": "no", "category": "random", "question_id": "1"}
    parquet("POPE/data/test-00000-of-00003.parquet", *[pope] * 3)

    gqa = [{"image": f"{i}.jpg", "question": "Is it day?", "answer": "yes"} for i in range(3)]
    lines(tmp_path / "GQA/testdev_balanced.jsonl", gqa)
    okvqa = [{"image": f"{i}.jpg", "question": "What is it used for?", "answers": ten} for i in range(6)]  # fmt: skip
    lines(tmp_path / "okvqa_train.jsonl", okvqa)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    mix = [{"id": i, "image": f"coco/train2017/{i}.jpg", "conversations": turns} for i in range(6)]
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    (tmp_path / "llava_v1_5_mix665k.json").write_text(json.dumps([*mix, {"id": "t", "conversations": talk}]))  # fmt: skip
    for folder in ("GQA/images", "coco/train2014", "images/coco/train2017"):
        (tmp_path / folder).mkdir(parents=True)
        for index in range(6):
            (tmp_path / folder / f"{index}.jpg").write_bytes(picture(index))
    return tmp_path


def test_llava_15_7b(small_run, tiny_llava, data_root):
    rows = small_run(
        "configs/llava-1.5-7b.yaml", tiny_llava, "training.epochs=1", "training.gradient_accumulation=2"
    )  # fmt: skip
    assert all(row["n"] == 3 for row in rows)
    chance = {row["task"]: row["chance"] for row in rows}
    assert chance["scienceqa"] == pytest.approx(1 / 3)
    assert chance["mmbench"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3), "empty choices are none"


def test_choices_are_asked_for_by_letter(data_root):
    from corda_vlm.data import load_records
    from corda_vlm.data.spec import with_root

    tasks = {task.name: task for task in load_suite("llava-okvqa").tasks}
    record = load_records(with_root(tasks["mmbench"].data, data_root))[0]
    assert record["question"] == ("Which?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly.")  # fmt: skip
    assert (record["choices"], record["choice"], record["answers"]) == (["A", "B"], 1, ["B"])
    record = load_records(with_root(tasks["vqav2"].data, data_root))[0]
    assert len(record["answers"]) == 10
    assert record["question"] == "Is it blue?\nAnswer the question using a single word or phrase."
