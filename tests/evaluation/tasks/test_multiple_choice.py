"""Multiple choice, by a model whose every probability is known."""

from __future__ import annotations

import pytest

from corda_vlm.errors import DataError
from corda_vlm.evaluation.tasks.multiple_choice import MultipleChoice
from tests.evaluation.known_model import Bigram, encoder


def test_multiple_choice_by_hand(tiny_llm, records) -> None:
    """ " no blue" (1/8, 7 characters) against " yes" (1/6, 3): acc takes yes, acc_norm no blue."""
    model = Bigram(
        tiny_llm.processor.tokenizer, {":": {" yes": 1 / 6, " no": 0.25}, " no": {" blue": 0.5}}
    )
    rows = [
        {"question": "is", "choices": ["yes", "no blue"], "answer": right} for right in (0, 1, 1)
    ]
    outcomes = {
        o.metric: o
        for o in MultipleChoice(records(rows), chat_template="plain").outcomes(
            encoder(model, tiny_llm)
        )
    }
    assert outcomes["acc"].values.tolist() == [1, 0, 0]
    assert outcomes["acc_norm"].values.tolist() == [0, 1, 1]
    assert outcomes["acc"].chance == 0.5
    with pytest.raises(DataError, match="has no choices"):
        list(
            MultipleChoice(
                records([{"question": "is", "answer": "yes"}]), chat_template="plain"
            ).outcomes(encoder(model, tiny_llm))
        )
