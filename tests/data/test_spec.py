"""What a spec cannot be is said before anything is read."""

from __future__ import annotations

import pytest

from corda_vlm.data import load_records, parse_spec
from corda_vlm.errors import CordaError, DataError, UnknownNameError


def test_unknown_kinds_and_options():
    with pytest.raises(UnknownNameError, match="Did you mean 'parquet'"):
        load_records("parqet:a")
    with pytest.raises(UnknownNameError, match="choose one of"):
        load_records("photos")
    with pytest.raises(UnknownNameError, match="Did you mean 'limit'"):
        load_records({"source": "sklearn:digits", "limits": 3})
    with pytest.raises(DataError, match="without a source"):
        load_records({"limit": 3})
    with pytest.raises(CordaError, match="limit is 0"):
        load_records({"source": "sklearn:digits", "limit": 0})


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"limit": 0}, "limit is 0; it must be at least 1"),
        ({"limit": "3"}, "limit cannot be '3'; it must be a whole number"),
        ({"limit": True}, "limit cannot be True"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"seed": 2**40}, "seed is 1099511627776"),
        ({"per_class": 0}, "per_class is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"max_bad_share": 1}, "max_bad_share is"),
        ({"max_bad_share": float("nan")}, "max_bad_share cannot be nan"),
        ({"where": [1]}, "where cannot be"),
        ({"splits": {"a": "b"}}, "splits"),
        ({"splits": {"a": 0.0}}, "splits is"),
        ({"splits": {}}, "splits is"),
        ({"classes": ["a", "a"]}, "classes holds 'a' twice"),
        ({"classes": [True, False]}, r"classes.*\(text goes in quotes\)"),
        ({"choices": ["A", "A"]}, "choices holds 'A' twice"),
        ({"question": 5}, "question cannot be 5"),
        ({"image": ["a"]}, "image cannot be"),
        ({"root": "x", "source": "folder:x"}, "root is for records with paths"),
    ],
)
def test_options_are_checked_before_anything_is_read(options, why):
    with pytest.raises(DataError, match=why):
        parse_spec({"source": "json:nothing.json", **options})


@pytest.mark.parametrize("spec", [None, 5, ["json:a.json"]])
def test_what_is_no_spec_is_said(spec):
    with pytest.raises(DataError, match="names no data"):
        parse_spec(spec)
    with pytest.raises(UnknownNameError, match="unknown data option 5"):
        parse_spec({"source": "json:a.json", 5: 6})
    with pytest.raises(CordaError, match="source cannot be None"):
        parse_spec({"source": None})
