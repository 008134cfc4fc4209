"""JSON lines: what a kill, another tool or a person left in them is said with its line, or mended."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.jsonl import append_jsonl, is_number, read_jsonl, write_jsonl

GOOD = b'{"step": 1}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1, 2]", "no JSON object, but \\[1, 2\\]"),
        (b"3", "no JSON object"),
        (b"", "Expecting value"),
        (b'{"step": NaN}', "holds NaN"),
        (b'{"step": -Infinity}', "holds -Infinity"),
        (b'{"step": 1e999}', "1e999, which is beyond"),
        (b'{"step": ' + b"9" * 5000 + b"}", "limit"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\0"}', "control character"),
        (b"\0" * 64, "Expecting value"),
        (b'{"step": 1', "Expecting"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(
        ForeignFileError, match=rf"rows\.jsonl, line 2, is not a row: .*{message}"
    ) as told:
        read_jsonl(path, "row")
    assert len(str(told.value)) < 2000


@pytest.mark.parametrize("content", [b"", GOOD, GOOD + b'{"step": 2, "loss"', GOOD + b"\0\0\0\0"])
def test_a_kill_at_any_moment_of_an_append_loses_that_append_alone(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    whole = [{"step": 1}] if content.startswith(GOOD) else []
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert read_jsonl(path, "row") == whole
    assert ("cut short" in caplog.text) == (content not in (b"", GOOD))
    append_jsonl(path, [{"step": 3}], "row")
    assert read_jsonl(path, "row") == [*whole, {"step": 3}]


def test_every_cut_of_a_file_reads_as_the_rows_before_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"name": "ä\n", "value": 0.1}, {"name": "𝄞", "value": -1}, {"name": "", "value": None}]
    append_jsonl(path, rows, "row")
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        kept = read_jsonl(path, "row")
        assert kept == rows[: len(kept)]
        assert len(kept) in (content[:cut].count(b"\n"), content[:cut].count(b"\n") + 1)
        append_jsonl(path, [{"last": True}], "row")
        assert read_jsonl(path, "row") == [*kept, {"last": True}]


def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": 1}], "row")
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (float("nan"), object(), deep):
        with pytest.raises(CordaError, match=r"a row for .* cannot be written as JSON"):
            append_jsonl(path, [{"a": 2}, {"a": value}], "row")
        with pytest.raises(CordaError, match="cannot be written as JSON"):
            write_jsonl(path, [{"a": value}], "row")
    assert read_jsonl(path, "row") == [{"a": 1}]


def test_half_a_surrogate_pair_comes_back(tmp_path: Path) -> None:
    """As file names that are no UTF-8 have it."""
    rows = [{"name": "adapter-\udcff"}]
    append_jsonl(tmp_path / "rows.jsonl", rows, "row")
    assert read_jsonl(tmp_path / "rows.jsonl", "row") == rows


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ForeignFileError, match=r"no rows at .*; make some"):
        read_jsonl(tmp_path / "absent", "row", hint="make some")
    assert read_jsonl(tmp_path / "absent", "row", missing_ok=True) == []
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ForeignFileError, match="a file of rows was expected"):
            read_jsonl(path, "row", missing_ok=True)
    for name in ("x" * 4000, "a\0b"):
        with pytest.raises(CordaError, match="is no path"):
            read_jsonl(tmp_path / name, "row", missing_ok=True)
    with pytest.raises(CordaError, match="could not add to"):
        append_jsonl(tmp_path, [{}], "row")


def test_numbers_are_finite_and_no_truth_values() -> None:
    assert is_number(3)
    assert is_number(-0.5)
    for value in (True, "3", None, 10**400, float("nan"), float("inf"), [1]):
        assert not is_number(value)


def test_a_check_says_what_is_wrong_with_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\n" + json.dumps({"a": "x"}) + "\n")
    with pytest.raises(ForeignFileError, match=r"line 2, is not a row: its a is no number"):
        read_jsonl(path, "row", check=lambda row: None if row["a"] == 1 else "its a is no number")
