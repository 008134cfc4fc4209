"""Data as other tools have it: each row of the table in docs/pages/how-to/data.md is read as the table says."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from corda_vlm.covariance import CovarianceStore, collect_covariance
from corda_vlm.data import load_records
from corda_vlm.errors import CordaError, DataError
from corda_vlm.files import asset
from tests.families.language_toy import LANGUAGE

PAGE = asset("docs") / "pages" / "how-to" / "data.md"
USER, ANSWER = {"role": "user", "content": "What @?"}, {"role": "assistant", "content": "A @"}
SEEN = {"role": "user", "content": "<image>What @?"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
HUMAN, GPT = {"from": "human", "value": "What @?"}, {"from": "gpt", "value": "A @"}


def rows_of_the_table() -> dict[str, Any]:
    """What one has -> the spec that the page says."""
    section = PAGE.read_text(encoding="utf-8").partition("## As it lies around")[2]
    table = section.partition("\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [re.fullmatch(r"\| (.+) \| `(\{.+\})` \|", line) for line in table]
    return {cell[1]: yaml.safe_load(cell[2]) for cell in cells if cell}


def pictures(folder: Path, count: int = 3) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(path)
    return paths


def numbered(row: Any) -> list[Any]:
    """Three rows, with their numbers in place of @."""
    return [json.loads(json.dumps(row).replace("@", str(number))) for number in range(3)]


def write(name: str, *rows: Any) -> Callable[[Path], None]:
    """Writes three rows of each kind as JSON, or as JSON lines."""

    def make(folder: Path) -> None:
        pictures(folder / "img")
        every = [one for row in rows for one in numbered(row)]
        text = "\n".join(map(json.dumps, every)) if name.endswith("l") else json.dumps(every)
        (folder / name).write_text(text)

    return make


def table(separator: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        pictures(folder / "img")
        lines = [("filepath", "title"), *((f"img/{n}.png", f"a red {n}") for n in range(3))]
        (folder / "data.csv").write_text("".join(f"{separator.join(line)}\n" for line in lines))

    return make


def shards(names: Sequence[str], ending: str, said: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            with tarfile.open(folder / name, "w") as archive:
                for number, path in enumerate(pictures(folder / "img")):
                    for end, content in (("png", path.read_bytes()), (ending, said.encode())):
                        member = tarfile.TarInfo(f"{number:05d}.{end}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))

    return make


def saved(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        datasets = pytest.importorskip("datasets")
        paths = pictures(folder / "data" / "train")
        rows = [{"image": Image.open(path), "caption": f"a {path.stem}"} for path in paths]
        made = datasets.Dataset.from_list(rows)
        if kind == "disk":
            datasets.DatasetDict({"train": made}).save_to_disk(folder / "data")
        elif kind == "hub":
            (folder / "data" / "data").mkdir()
            made.to_parquet(folder / "data" / "data" / "train-00000-of-00001.parquet")
            (folder / "data" / "README.md").write_text("---\nlicense: mit\n---\n")
        else:
            lines = [{"file_name": path.name, "text": f"a {path.stem}"} for path in paths]
            text = "\n".join(map(json.dumps, lines))
            (folder / "data" / "train" / "metadata.jsonl").write_text(text)

    return make


def by_class(folder: Path) -> None:
    for name in ("cat", "dog"):
        pictures(folder / "data" / name)


OPENAI = (
    {"messages": [{"role": "developer", "content": "s"}, USER,
                  {"role": "assistant", "content": None, "tool_calls": [
                      {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
                  {"role": "tool", "tool_call_id": "c", "content": "3"}, {**ANSWER, "weight": 1}],
     "tools": [TOOL]},
)  # fmt: skip
CALLED = {"conversations": [HUMAN, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                            {"from": "observation", "value": "3"}, GPT], "tools": json.dumps([TOOL])}  # fmt: skip

MADE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "LLaVA's JSON": (write("data.json", {"id": "@", "image": "img/@.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat @?"}, GPT]}), ["image", "user", "assistant"]),
    "ShareGPT's": (write("data.json", CALLED), ["user", "call", "tool", "assistant"]),
    "Alpaca's": (write("data.json", {"instruction": "Do @", "input": "x", "output": "y", "system": "s",
        "history": [["a", "b"]]}), ["system", "user", "assistant", "user", "assistant"]),
    "ms-swift's:": (write("data.jsonl", {"messages": [SEEN, {**ANSWER, "loss": False}, USER, ANSWER],
        "images": ["img/@.png"], "rejected_response": "B"}), ["image", "user", "unlearned", "user", "assistant"]),
    "ms-swift's former": (write("data.jsonl", {"query": "What @?", "response": "A", "history": [["a", "b"]]}),
        ["user", "assistant", "user", "assistant"]),
    "TRL, conversational": (write("data.jsonl", {"images": ["img/@.png"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What @?"}]}, ANSWER]}),
        ["image", "user", "assistant"]),
    "TRL, prompt and": (write("data.jsonl", {"prompt": [USER], "completion": [ANSWER]}), ["user", "assistant"]),
    "TRL, preference": (write("data.jsonl", {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}),
        ["user", "assistant"]),
    "LLaMA-Factory, preference": (write("data.json", {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}),
        ["user", "assistant"]),
    "Preference as Alpaca": (write("data.json", {"instruction": "What", "input": "@?", "chosen": "A @", "rejected": "B"}),
        ["user", "assistant"]),
    "TRL, language": (write("data.jsonl", {"text": "Words @"}), []),
    "OpenAI's": (write("data.jsonl", *OPENAI), ["system", "user", "call", "tool", "assistant"]),
    "open_clip's CSV": (table("\t"), []),
    "CSV with": (table(","), []),
    "open_clip's webdataset": (shards(["data-000.tar", "data-001.tar"], "txt", "a red one"), []),
    "CLIP_benchmark's": (shards(["data/0.tar"], "cls", "1"), []),
    "a data set": (saved("disk"), []),
    "a folder of": (saved("hub"), []),
    "an image folder": (saved("images"), []),
    "pictures, one": (by_class, []),
    "pictures in one": (lambda folder: (pictures(folder / "data"), None)[1], []),
}  # fmt: skip
"""How the row begins -> what makes such data, and what happens in its first conversation."""


def turns(messages: Sequence[Any]) -> list[str]:
    told = []
    for message in messages:
        if not isinstance(message["content"], str):
            told.append("image")
        learned = message.get("learn", True)
        kind = "call" if "tool_calls" in message else message["role"]
        told.append(kind if learned or kind == "call" else "unlearned")
    return told


@pytest.mark.parametrize("row", rows_of_the_table())
def test_a_row_of_the_table_is_read_as_it_says(row, tmp_path, monkeypatch):
    (begins,) = [one for one in MADE if row.startswith(one)]
    make, expected = MADE[begins]
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    spec = rows_of_the_table()[row]
    records = load_records(spec)
    assert len(records) >= 3
    first = records[0]
    assert not records.bad
    if expected:
        assert turns(first["messages"]) == expected
        assert bool(first["images"]) == ("image" in expected)
        bare = {key: value for key, value in spec.items() if key == "source"}
        if "image" not in expected:  # pictures alone are of use to a CLIP
            with pytest.raises(DataError, match=rf"write .*format: {spec['format']}"):
                load_records(bare)
    elif spec.get("format") == "text":
        assert first["text"] == "Words 0"
    else:
        assert first["image"].size == (8, 8)
    if "tool" in expected:
        assert first["may_call"] == [TOOL]
        (call,) = first["messages"][expected.index("call")]["tool_calls"]
        assert call["function"] == {"name": "add", "arguments": {"a": 1}}
    if "label" in spec or begins == "pictures, one":
        assert isinstance(first["label"], int)


def test_every_kind_is_in_the_table():
    assert len(rows_of_the_table()) == len(MADE)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "Write format: preference"),
        ({"query": "a", "response": "b"}, "Write format: alpaca, question: query, answer: response"),
        ({"messages": [USER]}, "Write format: chat"),
        ({"question": "a", "answer": "b"}, "Write format: qa"),
    ],
)  # fmt: skip
def test_another_format_is_named_with_the_line_to_write(row, message, tmp_path):
    write("data.jsonl", row)(tmp_path)
    with pytest.raises(DataError, match=message):
        load_records({"source": f"jsonl:{tmp_path / 'data.jsonl'}", "format": "llava"})


def test_a_folder_of_other_files_is_told_with_the_line_to_write(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="Hugging Face's library saved; write hf:"):
        load_records(f"folder:{tmp_path}")
    (tmp_path / "state.json").rename(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"write parquet:.*\*\.parquet"):
        load_records(f"folder:{tmp_path}")


def test_pairs_without_a_prompt_begin_with_it(tmp_path):
    write("data.jsonl", {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]})(tmp_path)
    records = load_records({"source": f"jsonl:{tmp_path / 'data.jsonl'}", "format": "preference"})
    assert records[0]["messages"] == numbered([USER, ANSWER])[0]
    write("data.jsonl", {"chosen": "A", "rejected": "B"})(tmp_path)
    with pytest.raises(DataError, match="has no prompt"):
        load_records({"source": f"jsonl:{tmp_path / 'data.jsonl'}", "format": "preference"})


@pytest.mark.parametrize(
    ("beside", "why"),
    [
        ({"prompt": " What @?"}, None),
        ({"prompt": [USER]}, None),
        ({"prompt": None}, None),
        ({"messages": [USER, ANSWER]}, None),
        ({"prompt": "Who @?"}, "leaves out what the prompt beside it says"),
        ({"prompt": [{"role": "system", "content": "Be brief."}, USER]}, "leaves out what"),
    ],
)  # fmt: skip
def test_a_prompt_that_the_chosen_repeats_is_asked_once(beside, why, tmp_path):
    write("data.jsonl", {**beside, "chosen": [USER, ANSWER], "rejected": None})(tmp_path)
    spec = {"source": f"jsonl:{tmp_path / 'data.jsonl'}", "format": "preference"}
    if why is None:
        assert load_records(spec)[1]["messages"] == numbered([USER, ANSWER])[1]
    else:
        with pytest.raises(DataError, match=why):
            load_records(spec)


@pytest.mark.parametrize(("format", "column"), [("preference", "chosen"), ("prompt_completion", "completion")])  # fmt: skip
@pytest.mark.parametrize("answer", ['{"name": "Ann"}', '[{"role": "admin"}]', "[]", "5"])
def test_an_answer_in_json_is_an_answer(format, column, answer, tmp_path):
    write("data.jsonl", {"prompt": "[1, 2]", column: answer})(tmp_path)
    (first, *_) = load_records({"source": f"jsonl:{tmp_path / 'data.jsonl'}", "format": format})
    assert [message["content"] for message in first["messages"]] == ["[1, 2]", answer]


def test_of_a_question_with_a_system_text_the_chosen_is_the_answer(tmp_path):
    row = {"system": "Be brief.", "question": "What @?", "chosen": "A @", "rejected": "B"}
    write("data.jsonl", row)(tmp_path)
    records = load_records({"source": f"jsonl:{tmp_path / 'data.jsonl'}", "format": "preference"})
    system = {"role": "system", "content": "Be brief."}
    assert records[2]["messages"] == [system, *numbered([USER, ANSWER])[2]]


def counts(store: CovarianceStore) -> dict[str, int]:
    """Site -> the tokens that it has seen."""
    return {name: store[name].count for name in store.site_streams}


class TestLoaders:
    """Plain DataLoaders, for calibration."""

    def loader(self, *tensors: torch.Tensor) -> DataLoader:
        return DataLoader(TensorDataset(*tensors), batch_size=4)

    def test_pictures_with_their_labels(self, tiny_clip_hf):
        pixels = torch.randn(8, 3, 32, 32)
        batches = [{"pixel_values": pixels[:4]}, {"pixel_values": pixels[4:]}]
        want = collect_covariance(tiny_clip_hf, batches, towers="vision", show_progress=False)
        for tensors in ((pixels, torch.arange(8)), (pixels,)):
            store = collect_covariance(
                tiny_clip_hf, self.loader(*tensors), towers="vision", show_progress=False
            )
            assert counts(store) == counts(want)

    def test_pictures_with_tokens_feed_both_towers(self, tiny_clip_hf):
        ids = torch.randint(1, 99, (8, 12))
        loader = self.loader(torch.randn(8, 3, 32, 32), ids)
        store = collect_covariance(tiny_clip_hf, loader, show_progress=False)
        assert any("text_model" in name for name in store.site_streams)
        assert any("vision_model" in name for name in store.site_streams)

    def test_tokens_of_a_language_model(self):
        ids = torch.randint(3, 60, (8, 12))
        store = collect_covariance(LANGUAGE["llama"](), self.loader(ids), show_progress=False)
        assert set(counts(store).values()) == {96}

    def test_what_a_second_tensor_is_has_to_be_named(self):
        ids = torch.randint(3, 60, (8, 12))
        with pytest.raises(CordaError, match=r"a list of 2 \(Tensor \(4, 12\), Tensor \(4, 12\)\)"):
            collect_covariance(LANGUAGE["llama"](), self.loader(ids, ids), show_progress=False)
