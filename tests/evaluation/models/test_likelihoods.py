"""Likelihoods in batches are those of each sample alone."""

from __future__ import annotations

import pytest
import torch

from corda_vlm.data import ConversationBatches
from corda_vlm.evaluation.models.likelihoods import likelihoods
from corda_vlm.evaluation.models.text_model import TextGenerator
from tests.evaluation.known_model import PLAIN


def test_likelihoods_are_those_of_each_sample_alone(tiny_llm, records) -> None:
    data = records([{"question": "is there " * k, "answer": "yes or no"} for k in (1, 7, 3, 12, 5)])
    builder = ConversationBatches(data, tiny_llm.processor, chat=PLAIN)
    samples = [builder.sample(i) for i in range(5)]
    tiny_llm.model.train()
    found = likelihoods(TextGenerator(tiny_llm.model, tiny_llm.processor, batch_size=2), samples)
    assert tiny_llm.model.training
    for sample, own in zip(samples, found, strict=True):
        ids, labels = sample["input_ids"], sample["labels"]
        with torch.no_grad():
            shares = tiny_llm.model.eval()(input_ids=ids[None]).logits[0].log_softmax(-1)
        places = [i for i in range(1, len(ids)) if labels[i] != -100]
        assert own.tokens == len(places)
        assert own.total == pytest.approx(
            float(sum(shares[i - 1, ids[i]] for i in places)), rel=1e-4
        )
