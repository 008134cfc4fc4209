"""Plain texts are documents, or pieces that together are the document."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corda_vlm.data import load_records
from corda_vlm.data.text.documents import pieces as cut_up
from corda_vlm.errors import DataError


def test_documents_and_pieces(tmp_path):
    (tmp_path / "a.txt").write_text("one two  three\nfour five")
    (tmp_path / "b.txt").write_text("six")
    whole = load_records({"source": f"text:{tmp_path}/*.txt", "format": "text"})
    assert [r["text"] for r in whole] == ["one two  three\nfour five", "six"]
    assert whole[0]["messages"] is None
    cut = load_records({"source": f"text:{tmp_path}/*.txt", "format": "text", "chunk": 2})
    assert [r["text"] for r in cut] == ["one two  ", "three\nfour ", "five", "six"]
    assert cut.place(1).endswith("a.txt, piece 1")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"b\.txt: its text is no text"):
        load_records({"source": f"text:{tmp_path}/*.txt", "format": "text"})


@given(text=st.text(alphabet=" \nab", max_size=60), words=st.integers(1, 5))
def test_pieces_are_the_document(text, words):
    pieces = list(cut_up(text, words))
    assert "".join(pieces) == text
    assert all(len(piece.split()) <= words for piece in pieces)
    assert all(len(piece.split()) == words for piece in pieces[:-1])
