"""VQA accuracy against hand-worked answers and the official script's rules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corda_vlm.errors import DataError
from corda_vlm.evaluation.tasks import vqa


@pytest.mark.parametrize(
    ("answer", "normal"),
    [  # as the official script's processPunctuation and processDigitArticle give them
        ("The two dogs.", "2 dogs"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),  # an oddity of the official table
        ("3,000 people!", "3000 people"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("4.5", "4.5"),
        ("U.S.A.", "usa"),
        ("it's a cat-dog?", "it's cat dog"),
        ("None", "0"),
        ("No, thanks", "no thanks"),
        (" a\tthe\nan ", ""),
    ],
)
def test_vqa_normalisation(answer: str, normal: str) -> None:
    assert vqa.normalize_answer(answer) == normal


@pytest.mark.parametrize(
    ("agree", "accuracy"),
    # With k of ten: k subsets have k − 1 left, 10 − k have k. For k = 2: (2 · 1/3 + 8 · 2/3) / 10.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_of_ten_people(agree: int, accuracy: float) -> None:
    people = ["red"] * agree + ["blue"] * (10 - agree)
    assert vqa.vqa_accuracy("Red.", people) == pytest.approx(accuracy)


@given(
    st.lists(st.sampled_from(["yes", "no", "2", "red"]), min_size=2, max_size=10),
    st.sampled_from(["yes", "two", "the red"]),
)
def test_vqa_accuracy_is_the_mean_over_leaving_one_out(people: list[str], answer: str) -> None:
    given_answer = vqa.normalize_answer(answer)
    each = []
    for one in range(len(people)):
        others = people[:one] + people[one + 1 :]
        each.append(min(1, others.count(given_answer) / min(3, len(others))))
    assert vqa.vqa_accuracy(answer, people) == pytest.approx(np.mean(each))


def test_vqa_with_one_reference_and_types() -> None:
    assert vqa.vqa_accuracy("A circle", ["circle"]) == 1.0
    assert vqa.vqa_accuracy("square", ["circle"]) == 0.0
    with pytest.raises(DataError, match="without a reference"):
        vqa.vqa_accuracy("x", [])
    assert vqa.vqa_accuracy("x", ["x", "an x"]) == 1.0
    assert vqa.vqa_accuracy("x", ["x", "y"]) == 0.5
    assert vqa.exact_match("x", ["y", "An x"]) == 1.0
    assert vqa.answer_type(["yes"] * 6 + ["red"] * 4) == "yes_no"
    assert vqa.answer_type(["two"]) == "number"
    assert vqa.answer_type(["red", "red", "2"]) == "other"


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [("A", "A", 1.0), ("a.", "A", 1.0), ("(A)", "A", 1.0), ("", "A", 0.0), ("The", "A", 0.0), ("", "", 0.0)],
)  # fmt: skip
def test_vqa_where_normalising_leaves_nothing(answer: str, reference: str, right: float) -> None:
    assert vqa.vqa_accuracy(answer, [reference]) == right
    assert vqa.exact_match(answer, ["blue", reference]) == right
