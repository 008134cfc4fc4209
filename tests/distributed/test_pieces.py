"""Training whose weights are in pieces over processes (FSDP2), from a start that was computed once, held by an anchor."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("size", [2, 4])
def test_training_is_that_of_one_process_with_the_same_batches(size, ranks):
    alone = ranks.told["trains 1"][0]
    assert ranks.told[f"trains {size}"][0]["pieces"] > 10
    for told in ranks.told[f"trains {size}"]:
        for what in ("trained", "logits", "values"):
            pair = [torch.tensor(of[what]) for of in (alone, told)]
            assert torch.allclose(*pair, atol=2e-5), (what, (pair[0] - pair[1]).abs().max())


@pytest.mark.parametrize("size", [2, 4])
def test_the_anchor_is_the_same_whenever_it_was_made_and_on_each(size, ranks):
    values = ranks.same(f"trains {size}", "values")
    for before, after in values:
        assert before == pytest.approx(after, rel=1e-4, abs=1e-9)
    assert values[0][0] == pytest.approx(0.0, abs=1e-9)
    assert values[-1][0] > 1e-6


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_was_written_loads_again_in_one_process(size, ranks):
    told = ranks.told[f"trains {size}"][0]
    pair = torch.tensor(told["logits"]), torch.tensor(ranks.told[f"loaded {size}"])
    assert torch.allclose(*pair, atol=1e-5)


def test_a_piece_is_not_written_for_the_whole(ranks):
    assert "get_model_state_dict" in ranks.same("trains 2", "refused")
    assert ranks.told["trains 1"][0]["refused"] == ""
