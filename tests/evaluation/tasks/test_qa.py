"""Exact match of open questions, as the harness has it."""

from __future__ import annotations

import pytest

from corda_vlm.errors import DataError
from corda_vlm.evaluation.tasks import qa


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [  # as lm-evaluation-harness's NQ-open
        ("The 14 December, 1972", ["14 december 1972", "December 1972"], 1.0),
        ("December 1972.", ["14 December 1972 UTC", "December 1972"], 1.0),
        ("in December 1972", ["December 1972"], 0.0),
        ("vitamin A", ["Vitamin  a"], 1.0),
        ("vitamin", ["vitamin A"], 0.0),
        ("THE Beatles", ["Beatles"], 0.0),  # articles in capitals are words
        ("a an the", ["the"], 1.0),  # the last article has no space after it, so it is a word
        ("", ["..."], 0.0),  # neither says anything
        ("?", ["?"], 1.0),
        ("Beyoncé", ["beyoncé"], 1.0),
    ],
)
def test_exact_match(answer: str, references: list[str], right: float) -> None:
    assert qa.exact_match(answer, references) == right


def test_exact_match_with_articles_as_triviaqa_has_it() -> None:
    assert qa.exact_match("The Beatles", ["Beatles"]) == 1.0
    assert qa.exact_match("The Beatles", ["Beatles"], articles=True) == 0.0
    assert qa.exact_match("the beatles!", ["The Beatles"], articles=True) == 1.0
    with pytest.raises(DataError):
        qa.exact_match("x", [])
