"""Perplexity, by a model whose every probability is known, in windows that overlap."""

from __future__ import annotations

import pytest
import torch

from corda_vlm.errors import CordaError, DataError
from corda_vlm.evaluation.tasks.perplexity import Perplexity, windows
from tests.evaluation.known_model import Bigram, encoder


def test_perplexity_by_hand(tiny_llm, document) -> None:
    """Tokens: <none> yes no no | " no" is certain to the half after " yes" and " no"."""
    model = Bigram(tiny_llm.processor.tokenizer, {" yes": {" no": 0.5}, " no": {" no": 0.125}})
    data = document(" yes no no no", " yes no")  # 1/2 · 1/8 · 1/8 and 1/2
    found = dict(Perplexity(data).run(encoder(model, tiny_llm)))
    assert found["perplexity"] == pytest.approx(2 ** ((1 + 3 + 3 + 1) / 4), rel=1e-5)
    assert found["token_probability"] == pytest.approx(1 / found["perplexity"])
    with pytest.raises(DataError, match="holds no token to learn"):
        dict(Perplexity(document(" yes")).run(encoder(model, tiny_llm)))


@pytest.mark.parametrize(("window", "stride"), [(128, None), (10, 3), (10, 9), (7, 1)])
def test_windows_predict_each_token_once_with_the_context_they_promise(
    tiny_llm, document, window, stride
) -> None:
    text = "is there a red circle in the image? yes no blue green " * 2
    ids = torch.tensor(tiny_llm.processor.tokenizer(text)["input_ids"])
    expected, length = 0.0, len(ids)
    step = stride or window // 2
    with torch.no_grad():
        for at in range(1, length):
            start = next(s for s in range(0, length, step) if s + window > at)
            logits = tiny_llm.model(input_ids=ids[None, start:at]).logits[0, -1]
            expected += float(logits.log_softmax(-1)[ids[at]])
            assert at - start >= min(at, window - step)
    task = Perplexity(document(text), window=window, stride=stride)
    (outcome, _) = task.outcomes(encoder(tiny_llm.model, tiny_llm))
    assert outcome.weights.tolist() == [length - 1]
    assert float(outcome.values[0]) * (length - 1) == pytest.approx(expected, rel=1e-4)


def test_a_window_that_cannot_be_is_refused(tiny_llm, document) -> None:
    for options, told in (
        ({"window": 500}, "reads at most 128"),
        ({"window": 10, "stride": 10}, "below the window of 10"),
        ({"window": 1}, "at least 2"),
    ):
        with pytest.raises(CordaError, match=told):
            list(
                Perplexity(document("yes no yes"), **options).outcomes(
                    encoder(tiny_llm.model, tiny_llm)
                )
            )
    picture = {
        "input_ids": torch.zeros(9),
        "labels": torch.zeros(9),
        "pixel_values": torch.zeros(1, 3),
    }
    with pytest.raises(CordaError, match="cannot cut images"):
        windows(picture, 5, 2)
