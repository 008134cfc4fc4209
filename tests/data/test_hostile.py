"""Whatever a file or a spec holds, it is read or refused by name: no raw traceback, no hang, no full memory."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from corda_vlm.data import load_records
from corda_vlm.data.paths import MOST_PATHS
from corda_vlm.errors import CordaError, DataError

pytestmark = pytest.mark.unchecked


def picture(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    noise = np.random.RandomState(0).randint(0, 255, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def attempt(spec) -> None:
    """Read all of it; anything but records or a `CordaError` fails the test."""
    told = ""
    try:
        data = load_records(spec)
        for _ in data:
            pass
        assert data.fingerprint
    except CordaError as error:
        told = str(error)
    assert len(told) < 2000


# ------------------------------------------------------------------ mutated files


def parquet_file() -> bytes:
    rows = [{"image": picture(), "caption": f"a {i}", "label": i % 2, "when": i / 2, "tags": ["a"]} for i in range(12)]  # fmt: skip
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=5)
    return buffer.getvalue()


def tar_file() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for index in range(3):
            members = {"png": picture(), "cls": b"1", "txt": b"a caption", "json": b'{"n": 1}'}
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{index}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


CHAT = [{"images": ["a.png"], "system": "s", "messages": [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, {"role": "assistant", "content": "x"}]}]  # fmt: skip
LLAVA = [{"id": "1", "image": "a.png", "conversations": [
    {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]}]  # fmt: skip
QA = [{"question": "q", "answer": "a", "answers": [{"answer": "a"}], "aliases": ["x"], "image": "a.png",
       "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "qa_json": [{"question": "q"}]}]  # fmt: skip
ALPACA = [{"instruction": "i", "input": "j", "output": "o", "history": [["a", "b"]], "system": "s"}]
PROMPT = [{"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "y"}]}]  # fmt: skip
CAPTIONS = [{"image": "a.png", "caption": "c", "label": 1}]
STRUCTURED = {
    "llava": LLAVA, "sharegpt": LLAVA, "chat": CHAT, "qa": QA, "alpaca": ALPACA, "prompt_completion": PROMPT, None: CAPTIONS,
}  # fmt: skip
FILES: dict[str, Any] = {
    "parquet": parquet_file(),
    "webdataset": tar_file(),
    "json": json.dumps(CAPTIONS * 3).encode(),
    "jsonl": json.dumps(CAPTIONS[0]).encode() + b"\n",
    "csv": b'filepath,title\na.png,"a, b"\na.png,c\n',
    "text": "one two äöü\nthree".encode() * 5,
}
PICTURES: dict[str, Any] = {
    kind: picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
}

edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "zero", "ones", "cut", "drop", "double"]),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from([1, 4, 32, 300]),
    ),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, changes) -> bytes:
    made = bytearray(content)
    for how, where, length in changes:
        start = int(where * len(made))
        end = min(len(made), start + length)
        if how == "flip" and made:
            made[start] ^= 1 << (length % 8)
        elif how == "zero":
            made[start:end] = bytes(end - start)
        elif how == "ones":
            made[start:end] = b"\xff" * (end - start)
        elif how == "cut":
            del made[start:]
        elif how == "drop":
            del made[start:end]
        elif how == "double":
            made[start:start] = made[start:end]
    return bytes(made)


short = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("kind", FILES)
@short
@given(changes=edits)
def test_damaged_files_are_read_or_refused(tmp_path, kind, changes):
    (tmp_path / "a.png").write_bytes(PICTURES["PNG"])
    path = tmp_path / f"data.{kind}"
    path.write_bytes(damaged(FILES[kind], changes))
    more = {"format": "text", "chunk": 2} if kind == "text" else {}
    attempt({"source": f"{kind}:{path}", "max_bad_share": 0.99, **more})


@pytest.mark.parametrize("kind", PICTURES)
@short
@given(changes=edits)
def test_damaged_pictures_are_decoded_or_refused(tmp_path, kind, changes):
    (tmp_path / "a.png").write_bytes(damaged(PICTURES[kind], changes))
    path = tmp_path / "data.json"
    path.write_text(json.dumps(CAPTIONS))
    attempt(f"json:{path}")


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.just(10**25) | st.floats() | st.text(max_size=3)
    | st.sampled_from(["\ud800", "\0", "<image>", "a.png", "[", "[[1]]"]),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["a", "role", "content", "type", "text", "image", "label"]), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def replaced(value, draw):
    """A JSON value, some parts of which are anything."""
    if draw(st.integers(0, 6)) == 0:
        return draw(anything)
    if isinstance(value, dict):
        return {name: replaced(one, draw) for name, one in value.items()}
    if isinstance(value, list):
        return [replaced(one, draw) for one in value]
    return value


@pytest.mark.parametrize("format", STRUCTURED)
@settings(short, max_examples=60)
@given(data=st.data())
def test_values_of_any_type_are_read_or_refused(tmp_path, format, data):
    (tmp_path / "a.png").write_bytes(PICTURES["PNG"])
    path = tmp_path / "data.json"
    path.write_text(json.dumps(replaced(STRUCTURED[format], data.draw)))
    attempt({"source": f"json:{path}", "format": format, "max_bad_share": 0.99})


@settings(short, max_examples=200)
@given(data=st.data())
def test_options_of_any_type_are_taken_or_refused(tmp_path, data):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(QA))
    names = [
        "split", "image", "text", "label", "where", "classes", "names", "splits", "limit", "per_class", "seed", "rows",
        "max_bad_share", "config", "root", "format", "system", "question", "answer", "choices", "expand", "chunk", "separator",
    ]  # fmt: skip
    name = data.draw(st.sampled_from(names))
    attempt({"source": f"json:{path}", "format": "qa", name: data.draw(anything)})


# ------------------------------------------------------------------ what is no file


@pytest.fixture
def fifo(tmp_path) -> Path:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


KINDS = ("parquet", "webdataset", "json", "jsonl", "csv", "tsv", "hf")


@pytest.mark.parametrize("kind", KINDS)
def test_pipes_and_devices_are_no_data(kind, fifo):
    """Opening a pipe would wait for a writer for ever, and /dev/zero never ends."""
    for path in (fifo, Path("/dev/zero")):
        with pytest.raises(DataError, match=r"(pipe|zero): is a device or a pipe; a file was"):
            load_records(f"{kind}:{path}")
    if kind != "hf":
        with pytest.raises(DataError, match="is a folder; a file was expected"):
            load_records(f"{kind}:{fifo.parent}")


@pytest.mark.parametrize("format", [None, "qa"])
def test_pipes_and_devices_are_no_pictures(format, fifo):
    path = fifo.parent / "data.json"
    for stored in (str(fifo), "/dev/zero", "/dev/null", str(fifo.parent), "a\0b", "x" * 300):
        path.write_text(json.dumps([{"image": stored, "caption": "c", "question": "q", "answer": "a"}]))  # fmt: skip
        data = load_records({"source": f"json:{path}", "format": format})
        assert data.fingerprint
        with pytest.raises(DataError, match=r"data\.json, record 0: no image that can be decoded"):
            _ = data[0]


def test_pipes_and_devices_are_no_lists_of_classes(fifo):
    path = fifo.parent / "data.json"
    path.write_text(json.dumps(CAPTIONS))
    for option in ("classes", "names"):
        with pytest.raises(DataError, match="is a device or a pipe"):
            load_records({"source": f"json:{path}", option: str(fifo)})
        (fifo.parent / "latin.txt").write_bytes("é".encode("latin-1"))
        with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 text"):
            load_records({"source": f"json:{path}", option: str(fifo.parent / "latin.txt")})


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "text", "parquet", "webdataset", "folder"])  # fmt: skip
@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("a\0b", "NUL"),
        ("x" * 300, "too long"),
        ("~nosuchuser/a", "no such user"),
        ("**x/*", "no pattern of paths|no data matches"),
        (f"{{0..{MOST_PATHS}}}", "stand for more than 100,000 paths"),
        ("{a,b}" * 40, "stand for more than 100,000 paths"),
        ("", "choose one of"),
    ],
)
def test_what_is_no_path_is_said(kind, where, why):
    with pytest.raises(CordaError, match=why):
        load_records(f"{kind}:{where}")


def test_what_may_not_be_read_is_said(tmp_path, monkeypatch):
    """As where permissions forbid it; who runs tests may be allowed everything."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps(CAPTIONS))

    def denied(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(DataError, match=r"data\.json: cannot be read \(Permission denied\)"):
        load_records(f"json:{path}")


# ------------------------------------------------------------------ what damage looks like


def test_a_damaged_page_is_named_with_its_row(tmp_path):
    content = bytearray(parquet_file())
    at = content.index(b"IHDR")
    content[4 : at + 20] = b"\xff" * (at + 16)
    path = tmp_path / "page.parquet"
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"page\.parquet, row 0: its image cannot be read"):
        list(load_records(f"parquet:{path}"))


def test_parquet_that_says_nonsense_is_named(tmp_path):
    path = tmp_path / "t.parquet"
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")]
    )
    far = pa.array([2**50], pa.timestamp("ms"))
    for column, why in ((broken, "UnicodeDecodeError"), (far, "OverflowError")):
        pq.write_table(pa.table({"caption": ["c"]}), tmp_path / "good.parquet")
        pq.write_table(pa.table({"caption": ["c"], "more": column}), path)
        with pytest.raises(DataError, match=rf"t\.parquet: not a readable parquet file \({why}"):
            load_records(f"parquet:{tmp_path}/*.parquet")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["caption", "caption"])
    pq.write_table(twice, path)
    with pytest.raises(DataError, match="has the column 'caption' twice"):
        load_records(f"parquet:{path}")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000 + "]" * 100_000, "not a JSON record"),
        ('[{"caption": "a", "caption": "b"}]', "it has 'caption' twice"),
        ('[{"caption": "\\ud83d"}]', r"record 0: caption is '\\ud83d', which is no text"),
        ('[{"caption": "a", "label": ' + "9" * 5000 + "}]", "not a JSON record"),
        ('[{"caption": "a", "label": 10000000000}]', "more than 1,000,000 classes"),
    ],
)
def test_json_that_is_no_data_is_named(tmp_path, text, why):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(DataError, match=why):
        load_records(f"json:{path}")


def test_half_a_character_in_a_conversation_is_a_fault(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"question": "What is \\ud83d?", "answer": "x"}]')
    with pytest.raises(DataError, match="record 0: holds half of a surrogate pair"):
        load_records({"source": f"json:{path}", "format": "qa"})


def test_an_answer_that_is_no_class_is_a_fault(tmp_path):
    import datasets

    features = datasets.Features(
        {"question": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"question": ["a?", "b?"], "label": [1, -1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="row 1: its label is -1, and there are 2 classes"):
        load_records({"source": f"hf:{tmp_path / 'saved'}", "format": "qa"})


def test_a_picture_of_too_many_pixels_is_refused(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # fmt: skip

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))
    (tmp_path / "a.png").write_bytes(bomb)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(CAPTIONS))
    with pytest.raises(DataError, match="DecompressionBombError"):
        _ = load_records(f"json:{path}")[0]


def test_no_picture_starts_another_program(tmp_path, monkeypatch):
    """PIL hands PostScript to Ghostscript, whatever the file is called."""
    import subprocess

    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(script)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(CAPTIONS))
    with pytest.raises(DataError, match="of no known format"):
        _ = load_records(f"json:{path}")[0]


@pytest.mark.parametrize("content", [None, 5, [1], "x", [[1]]])
def test_json_members_of_shards_are_objects(tmp_path, content):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        body = json.dumps(content).encode()
        info = tarfile.TarInfo("0.json")
        info.size = len(body)
        archive.addfile(info, io.BytesIO(body))
    with pytest.raises(DataError, match="json member cannot be read"):
        load_records(f"webdataset:{path}")


def test_members_of_one_name_are_not_dropped(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for body in (b"one", b"two"):
            info = tarfile.TarInfo("0.txt")
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    with pytest.raises(DataError, match=r"it holds 0\.txt twice"):
        load_records(f"webdataset:{path}")


def test_a_list_of_classes_has_each_once(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"caption": "c", "label": "cat"}]))
    (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(DataError, match="classes has 'cat' twice"):
        load_records({"source": f"json:{path}", "classes": str(tmp_path / "classes.txt")})


def test_root_is_of_pictures_with_captions_too(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PICTURES["PNG"])
    path = tmp_path / "data.json"
    path.write_text(json.dumps(CAPTIONS))
    data = load_records({"source": f"json:{path}", "root": str(tmp_path / "pictures")})
    assert data[0]["image"].size == (12, 12)
