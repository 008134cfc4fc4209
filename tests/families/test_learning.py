"""The loss of training is transformers' own, on a tiny model of every class that generates text."""

from __future__ import annotations

import pytest
import torch

from corda_vlm.train.next_token import NextTokenObjective
from tests.families.language_toy import LANGUAGE, VLM, batch_for, make


@pytest.mark.parametrize("name", [*LANGUAGE, *VLM])
def test_the_loss_is_that_of_transformers(name):
    model, batch = make(name), batch_for(name, 3)
    batch["labels"][
        0, :
    ] = -100  # a record without an answer: where others have one, it has nothing to learn
    with torch.no_grad():
        loss, right = NextTokenObjective()(model, batch)
        torch.testing.assert_close(loss, model(**batch).loss, rtol=1e-4, atol=1e-5)
    assert right.shape == (3,)
