"""YAML of other people: what is read, and what is refused before it costs anything."""

from __future__ import annotations

import os

import pytest

from corda_vlm.errors import CordaError
from corda_vlm.yaml_file import parse_yaml, read_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{key}: &{key} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, key in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_plain_values():
    assert parse_yaml("{a: 1, b: [1e-3, 2.5E2, no], c: x}") == {
        "a": 1,
        "b": [0.001, 250.0, False],
        "c": "x",
    }
    assert parse_yaml("") is None


def test_an_alias_is_a_copy():
    read = parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, b: 2}")
    read["a"]["b"] = 3
    assert (read["c"], read["d"]) == ({"b": 1}, {"b": 2})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: {c: 1, c: 2}", "the key 'c' stands here twice"),
        (LAUGHS, "once its aliases are written out"),
        ("a: &a [*a]", "lies in"),
        ("[" * 500 + "]" * 500, "more than 60 levels deep"),
        ("{a: " * 500, "more than 60 levels deep"),
        ("[" * 100_000, "nesting"),
        ("!!python/object/apply:os.system ['touch pwned']", "could not determine a constructor"),
        ("!!python/name:os.system ''", "could not determine a constructor"),
        ("a: 2024-13-45", "month"),
        ("a: " + "9" * 10_000, "digits"),
        ("!!int ''", "not YAML"),
        ("!!timestamp x", "not YAML"),
        ("? [a]\n: 1", "unhashable"),
        ("a: \0", "not YAML"),
        ("a: \ud800", "not YAML"),
        ("a: 1\n---\nb: 2", "single document"),
    ],
)
def test_what_is_refused(text, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CordaError, match=told) as raised:
        parse_yaml(text, "it")
    assert len(str(raised.value)) < 2000
    assert not list(tmp_path.iterdir())


def test_files_that_are_none(tmp_path):
    with pytest.raises(CordaError, match="no file of text at"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(CordaError, match="a file of text was expected"):
        read_yaml(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for endless in (tmp_path / "pipe", "/dev/zero"):  # one that were opened would never end
        with pytest.raises(CordaError, match="a file of text was expected"):
            read_yaml(endless)
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(CordaError, match="not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * 10_000_001)
    with pytest.raises(CordaError, match="above 10 MB"):
        read_yaml(tmp_path / "big.yaml")
    for name in ("a\0b", "x" * 10_000):
        with pytest.raises(CordaError):
            read_yaml(name)
    (tmp_path / "bom.yaml").write_bytes("\ufeffa: 1".encode())
    assert read_yaml(tmp_path / "bom.yaml") == {"a": 1}
