"""Safetensors files of ours: what was not written is not read, whatever happened to the file in between."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import corda_vlm
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.tensors import (
    CHECKSUMS,
    add_checksums,
    check_tensors,
    load_tensors,
    read_header,
    save_tensors,
)

KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8,
         torch.uint8, torch.bool, torch.float8_e4m3fn)  # fmt: skip


def load(path: Path) -> dict[str, torch.Tensor]:
    return load_tensors(path, "weights", "train again")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].float().equal(b[n].float()) for n in a
    )


def test_other_readers_read_what_was_written(tmp_path):
    shared = torch.arange(12.0).view(3, 4)
    tensors = {str(kind): torch.tensor([[0, 1], [1, 0]]).to(kind) for kind in KINDS}
    tensors |= {"turned": shared.T, "part": shared[1:], "number": torch.tensor(3.5), "none": torch.empty(0, 3)}  # fmt: skip
    save_tensors(tmp_path / "a.safetensors", tensors, {"kind": "prompt"})
    assert same(load_file(tmp_path / "a.safetensors"), tensors)
    assert same(load(tmp_path / "a.safetensors"), tensors)
    shapes, header = read_header(tmp_path / "a.safetensors", "weights", "")
    assert shapes["turned"] == (4, 3)
    assert (header["kind"], header["format"]) == ("prompt", "pt")
    save_tensors(tmp_path / "b.safetensors", dict(reversed(tensors.items())), {"kind": "prompt"})
    written = [(tmp_path / name).read_bytes() for name in ("a.safetensors", "b.safetensors")]
    assert written[0] == written[1], "the same tensors give the same file"
    with pytest.raises(CordaError, match="complex128"):
        save_tensors(tmp_path / "c.safetensors", {"c": torch.zeros(1, dtype=torch.complex128)})


def test_no_flipped_bit_passes(tmp_path):
    """Each byte of the file in turn: an error of ours, or (padding, the checksums' own name) the tensors as they were."""
    path, tensors = tmp_path / "a.safetensors", {"a": torch.randn(2, 3), "b": torch.ones(2).half()}
    save_tensors(path, tensors, {"kind": "prompt"})
    data, passed, told = path.read_bytes(), 0, set()
    for position in range(len(data)):
        for bit in (1, 64):
            path.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
            try:
                found = load(path)
            except ForeignFileError as error:
                told.add("a.safetensors" in str(error) and "train again" in str(error))
                continue
            assert same(found, tensors), position
            passed += 1
    assert told == {True}
    assert passed < 0.1 * len(data)


def test_no_cut_and_no_zeroed_range_passes(tmp_path):
    path, tensors = tmp_path / "a.safetensors", {"a": torch.randn(4, 4) + 9, "b": torch.ones(20)}
    save_tensors(path, tensors)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ForeignFileError, match="not readable"):
            load(path)
    for start in range(len(data) - 144, len(data) - 15, 16):
        path.write_bytes(data[:start] + bytes(16) + data[start + 16 :])
        with pytest.raises(ForeignFileError, match="checksum"):
            load(path)
        with pytest.raises(ForeignFileError, match="checksum"):
            check_tensors(path, "weights", "train again")


def _with_header(data: bytes, change) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


WRONG = {
    "overlap": lambda h: h["b"].update(data_offsets=h["a"]["data_offsets"]),
    "outside": lambda h: h["b"].update(data_offsets=[64, 10**12]),
    "negative": lambda h: h["b"].update(data_offsets=[-8, 8]),
    "swapped": lambda h: h.update(a=h["b"], b=h["a"]),
    "shape": lambda h: h["a"].update(shape=[8, 2]),
    "negative shape": lambda h: h["a"].update(shape=[-4, -4]),
    "dtype": lambda h: h["a"].update(dtype="I32"),
    "no dtype": lambda h: h["a"].update(dtype="F99"),
    "no tensors": lambda h: (h.pop("a"), h.pop("b")),
    "renamed": lambda h: h.update(c=h.pop("a")),
    "a list": lambda h: h.update(a=[1, 2]),
    "metadata": lambda h: h.update(__metadata__={"format": 3}),
    "checksums": lambda h: h["__metadata__"].update({CHECKSUMS: "[[[[["}),
    "checksums of another type": lambda h: h["__metadata__"].update({CHECKSUMS: "[3]"}),
    "no checksum of one": lambda h: h["__metadata__"].update({CHECKSUMS: '{"a": "00000000"}'}),
}


@pytest.mark.parametrize("case", WRONG)
def test_no_header_that_lies_passes(case, tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.randn(4, 4), "b": torch.ones(20)})
    path.write_bytes(_with_header(path.read_bytes(), WRONG[case]))
    with pytest.raises(ForeignFileError, match=r"a\.safetensors"):
        load(path)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_neither_written_nor_read(kind, value, tmp_path):
    tensors = {"fine": torch.ones(3), "odd": torch.tensor([1.0, value]).to(kind)}
    if kind == torch.float8_e4m3fn and value == float("inf"):
        pytest.skip("a type without Inf")
    with pytest.raises(CordaError, match="odd holds NaN or Inf"):
        save_tensors(tmp_path / "a.safetensors", tensors)
    assert not list(tmp_path.iterdir())
    save_file(tensors, tmp_path / "a.safetensors")  # another tool's
    with pytest.raises(ForeignFileError, match="odd holds NaN or Inf"):
        load(tmp_path / "a.safetensors")
    with pytest.raises(CordaError, match="odd holds NaN or Inf"):
        add_checksums(tmp_path / "a.safetensors")


def test_files_of_other_tools_are_read_and_can_be_sealed(tmp_path):
    path, tensors = tmp_path / "a.safetensors", {"a": torch.randn(3, 3), "b": torch.zeros(2).half()}
    save_file(tensors, path, {"format": "pt", "told": "by another"})
    assert same(load(path), tensors)
    add_checksums(path, {"more": "by us"})
    assert same(load_file(path), tensors)
    header = read_header(path, "weights", "")[1]
    assert (header["told"], header["more"]) == ("by another", "by us")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ForeignFileError, match="checksum"):
        load(path)


def test_what_is_no_file_is_said(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.safetensors", Path("/dev/null"), Path("a\0b")):
        with pytest.raises(ForeignFileError):
            load(path)


def test_nothing_else_writes_safetensors():
    """One writer, so that permissions, atomic writes and checksums are the same everywhere."""
    package = Path(corda_vlm.__file__).parent
    for path in package.rglob("*.py"):
        if "_assets" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            )
            names |= {node.attr} if isinstance(node, ast.Attribute) else set()
            assert not names & {"save_file", "save_model", "serialize_file"} - _OURS, path


_OURS = {"save_model"}  # `adapter.folder.save_model` writes a whole model, through this writer
