"""One experiment end to end on models that generate text: a tiny Llama and a tiny LLaVA, saved as transformers saves them."""

from __future__ import annotations

import json

import pytest
import yaml

from corda_vlm.covariance import CovarianceStore
from corda_vlm.errors import CordaError, DataError, UnknownNameError
from corda_vlm.evaluation import read_rows
from corda_vlm.experiment import run

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than their width")

VARIANTS = {
    "corda-kpm": {"a_norm": 10, "learning_rates": [1e-3]},
    "preview": {"method": "corda-ipm", "learning_rates": [1e-3]},
    "lora": {"learning_rates": [1e-3]},
    "lora-anchor": {"method": "lora", "anchor": 1.0, "learning_rates": [1e-3]},
    "full": {"learning_rates": [1e-3], "scales": [0.5]},
}


@pytest.fixture
def questions(tmp_path):
    rows = [{"question": f"is {i} even?", "answer": ["no", "nope"] if i % 2 else ["yes", "yeah"]} for i in range(24)]  # fmt: skip
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"context": f"what is {i} + 1?", "work": "count", "answer": str(i + 1)} for i in range(20)]  # fmt: skip
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def config(tmp_path):
    """Writes an experiment and its suite, with changes, and returns its path."""

    def write(model, suite, experiment, **changes):
        suite = {"name": "small", "version": 1, "data_root": str(tmp_path), "tasks": suite}
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
        path = tmp_path / "small.yaml"
        given = {"name": "small", "model": str(model), "suite": str(tmp_path / "suite.yaml"), "rank": 2,
                 "variants": VARIANTS, "evaluation": {"batch_size": 8}, **experiment, **changes}  # fmt: skip
        path.write_text(yaml.safe_dump(given))
        return path

    return write


LLM_SUITE = [
    {"name": "sums", "role": "gain", "kind": "perplexity", "options": {"template": "plain"},
     "data": {"source": "jsonl:{data_root}/sums.jsonl", "rows": [15, 20], "format": "qa", "question": "context",
              "answer": "{work} #### {answer}"}},
    {"name": "even", "role": "retention", "kind": "likelihood", "options": {"template": "plain"},
     "data": {"source": "jsonl:{data_root}/qa.jsonl", "rows": [0.5, 1.0], "format": "qa"}},
]  # fmt: skip
LLM = {
    "chat": "plain",
    "calibration": {
        "data": {"source": "jsonl:{data_root}/qa.jsonl", "rows": [0, 0.5], "format": "qa"},
        "samples": 12,
        "batch_size": 4,
        "tokens": "response",
    },
    "task": {
        "data": {"source": "jsonl:{data_root}/sums.jsonl", "rows": [0, 15], "format": "qa", "question": "context",
                 "answer": "{work} #### {answer}"}
    },
    "training": {"loss": "next_token", "steps": 3, "batch_size": 4, "bf16": False},
}  # fmt: skip


def test_a_language_model(tiny_llm, saved, questions, config, tmp_path, capsys):
    path = config(saved(tiny_llm, "llm"), LLM_SUITE, LLM)
    folder = run(path, output=tmp_path / "out")
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "records/s" in printed
    rows = read_rows(folder / "scores.jsonl")
    assert {row["method"] for row in rows} == {"base", *VARIANTS}
    assert {row["scale"] for row in rows if row["method"] == "full"} == {1.0, 0.5}
    sums = [row for row in rows if row["task"] == "sums" and row["metric"] == "perplexity"]
    assert len({round(row["value"], 6) for row in sums}) == 7, "every training changes the model"
    assert all(row["n"] == (5 if row["task"] == "sums" else 12) for row in rows)
    assert any(row.get("forecast") for row in rows if row["method"] == "lora-anchor")

    stores = [CovarianceStore.load(folder / f"{name}.safetensors") for name in ("covariance", "covariance-task")]  # fmt: skip
    assert all(store.data_fingerprint.endswith("-response") for store in stores)
    report = (folder / "report.md").read_text()
    perplexity = next(row["value"] for row in sums if row["method"] == "base")
    assert f"| {perplexity:.4g} (" in report, "a perplexity is told as a number"
    assert (folder / "tradeoff.png").is_file()

    before = (folder / "scores.jsonl").read_bytes()
    run(path, output=folder)
    assert (folder / "scores.jsonl").read_bytes() == before
    renamed = [{**task, "options": {"chat_template": "plain"}} for task in LLM_SUITE]
    run(config(tmp_path / "llm", renamed, LLM), output=folder)
    assert (folder / "scores.jsonl").read_bytes() == before, "a task's option by its name of today"
    with pytest.raises(CordaError, match=r"differs in chat_template\)"):
        run(config(tmp_path / "llm", LLM_SUITE, LLM, chat="bare"), output=folder)


SHADES = {"source": "parquet:{data_root}/shades.parquet", "format": "qa"}
LLAVA_SUITE = [
    {"name": "digits", "role": "gain", "kind": "vqa", "limit": 6, "options": {"max_new_tokens": 3, "chance": 0.1},
     "data": {"source": "sklearn:digits", "split": "test", "format": "qa", "question": "which digit?"}},
    {"name": "shades", "role": "retention", "kind": "likelihood", "data": SHADES},
]  # fmt: skip
LLAVA = {
    "dtype": "bfloat16",
    "towers": ["language", "projector"],
    "calibration": {"data": SHADES, "samples": 12, "batch_size": 4, "tokens": "text"},
    "task": {
        "data": {
            "source": "sklearn:digits",
            "split": "train",
            "format": "qa",
            "question": "which digit?",
        }
    },
    "training": {
        "loss": "next_token",
        "steps": 2,
        "batch_size": 4,
        "gradient_checkpointing": True,
        "projector_learning_rate": 1e-4,
    },
}


def test_a_llava(tiny_llava, saved, shades, config, tmp_path):
    variants = {name: VARIANTS[name] for name in ("corda-kpm", "lora", "full")}
    path = config(saved(tiny_llava, "llava"), LLAVA_SUITE, LLAVA, variants=variants)
    folder = run(path, output=tmp_path / "out")
    rows = read_rows(folder / "scores.jsonl")
    assert {row["method"] for row in rows} == {"base", *variants}
    assert {(row["task"], row["n"]) for row in rows} == {("digits", 6), ("shades", 24)}
    plan = json.loads((folder / "corda-kpm" / "plan.json").read_text())
    assert "model.multi_modal_projector.linear_1" in json.dumps(plan)


def test_the_projector_is_trained_whole(tiny_llava, saved, shades, config, tmp_path):
    training = {**LLAVA["training"], "projector_learning_rate": None}
    whole = {"modules_to_save": ["model.multi_modal_projector"], "learning_rates": [1e-3], "anchor": 1,
             "training": {"projector_learning_rate": 1e-4}}  # fmt: skip
    variants = {"lora": whole, "corda-kpm": whole, "plain": {"method": "lora", "learning_rates": [1e-3]}}  # fmt: skip
    more = {"towers": ["language"], "training": training}
    path = config(saved(tiny_llava, "llava"), LLAVA_SUITE, LLAVA, variants=variants, **more)
    folder = run(path, output=tmp_path / "out")
    trained = {row["method"]: row["trainable"] for row in read_rows(folder / "scores.jsonl") if row["method"] != "base"}  # fmt: skip
    projector = sum(p.numel() for p in tiny_llava.model.model.multi_modal_projector.parameters())
    assert trained["lora"] == trained["corda-kpm"] == trained["plain"] + projector
    # what is trained whole is not planned, but an anchor holds it
    store = CovarianceStore.load(folder / "covariance.safetensors")
    assert "model.multi_modal_projector.linear_1" in store
    assert "multi_modal_projector" not in (folder / "corda-kpm" / "plan.json").read_text()
    with pytest.raises(CordaError, match="trains modules whole, which cannot be scaled"):
        run(config(tmp_path / "llava", LLAVA_SUITE, LLAVA, variants=variants, evaluation={"scales": [0.5]}))  # fmt: skip
    misspelt = {"lora": {**whole, "modules_to_save": ["model.projector"]}}
    with pytest.raises(CordaError, match=r"no module 'model\.projector'"):
        run(config(tmp_path / "llava", LLAVA_SUITE, LLAVA, variants=misspelt, **more), output=tmp_path / "no")  # fmt: skip
    assert not (tmp_path / "no" / "scores.jsonl").exists(), "nothing was measured before"
    with pytest.raises(CordaError, match="'full' has no modules_to_save"):
        run(config(tmp_path / "llava", LLAVA_SUITE, LLAVA, variants={"full": whole}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"chat": "vicnua"}, UnknownNameError, "unknown chat template 'vicnua'"),
        ({"chat": "auto"}, CordaError, "tokenizer brings none; name one"),
        ({"task": {"data": {**SHADES}}}, DataError, "has images, and this model reads text alone"),
        (
            {"training": {"steps": 1, "loss": "prompt"}},
            CordaError,
            "are conversations .format: qa.*loss: next_token",
        ),
        ({"task": {"data": "jsonl:{data_root}/qa.jsonl"}}, CordaError, "say which format"),
        (
            {"calibration": {"data": {"source": "jsonl:{data_root}/empty.jsonl", "format": "qa"}}},
            DataError,
            "line 2: has an empty answer",
        ),
    ],
)
def test_what_cannot_be_is_told_before_a_number_is_written(
    tiny_llm, saved, questions, shades, config, tmp_path, changes, error, message
):
    (tmp_path / "empty.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question": "q", "answer": ""}\n')  # fmt: skip
    path = config(saved(tiny_llm, "llm"), LLM_SUITE, LLM, **changes)
    with pytest.raises(error, match=message):
        run(path, output=tmp_path / "out")
    assert not (tmp_path / "out" / "scores.jsonl").exists()
