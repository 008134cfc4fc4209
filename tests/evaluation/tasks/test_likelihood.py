"""The likelihood of answers, by a model whose every probability is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from corda_vlm.evaluation.tasks.likelihood import AnswerLikelihood
from tests.evaluation.known_model import Bigram, encoder


def test_answer_likelihood_by_hand(tiny_llm, records) -> None:
    model = Bigram(
        tiny_llm.processor.tokenizer, {":": {" yes": 0.5, " no": 0.25}, " no": {" blue": 0.5}}
    )
    data = records([
        {"question": "is", "answers": ["no blue", "yes"]},  # 1/4 · 1/2 = 1/8, and 1/2: the best is yes
        {"question": "is there", "answers": ["no blue"]},  # 1/8, over two tokens
    ])  # fmt: skip
    task = AnswerLikelihood(data, chat_template="plain")
    found = {o.metric: o for o in task.outcomes(encoder(model, tiny_llm))}
    np.testing.assert_allclose(found["log_likelihood"].values, np.log([1 / 2, 1 / 8]), rtol=1e-5)
    np.testing.assert_allclose(
        found["log_likelihood_per_token"].values, [math.log(1 / 2), math.log(1 / 8) / 2], rtol=1e-5
    )
    score = found["token_probability"].score("t", "retention")
    assert score.value == pytest.approx(math.sqrt(0.5 * math.sqrt(1 / 8)), rel=1e-5)
    assert 0 < score.low <= score.value <= score.high <= 1
    assert score.chance == 0
    first = AnswerLikelihood(data, ("log_likelihood",), chat_template="plain", most_answers=1)
    assert dict(first.run(encoder(model, tiny_llm)))["log_likelihood"] == pytest.approx(
        math.log(1 / 8), rel=1e-5
    )
