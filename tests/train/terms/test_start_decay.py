"""Decay towards where a training started."""

from __future__ import annotations

import copy

import pytest
import torch

from corda_vlm.errors import CordaError
from corda_vlm.methods import prepare_method
from corda_vlm.train import TrainOptions, train
from corda_vlm.train.terms import TaskData, TermOptions, make_terms
from corda_vlm.train.terms.start_decay import StartPull
from tests.train.terms.conftest import OPTIONS, Stop, weights


def run(base, digits, processor, folder, kind, rate, *callbacks, **changes):
    options = TrainOptions(**{**OPTIONS, "save_every": 2, **changes})
    model = prepare_method(
        "milora", copy.deepcopy(base), rank=4, towers="vision", show_progress=False
    )
    first = weights(model)
    asked = TermOptions(start_decay=rate, start_decay_kind=kind)
    terms = make_terms(asked, model, processor, None, TaskData(digits, options))
    result = train(model, digits, processor, options=options, output_dir=folder, terms=terms, callbacks=callbacks,
                   show_progress=False)  # fmt: skip
    last = weights(model)
    return last, sum(float((last[n] - first[n]).square().sum()) for n in first), result


@pytest.mark.parametrize(("kind", "rate"), [("decoupled", 30.0), ("l2", 30.0)])
def test_it_holds_and_is_gone_on_with_to_the_bit(
    kind, rate, tiny_open_clip, digits, processor, tmp_path
):
    given = (tiny_open_clip, digits, processor)
    _, free, _ = run(*given, tmp_path / "free", kind, 0.0)
    straight, held, result = run(*given, tmp_path / "straight", kind, rate)
    assert held < 0.8 * free
    assert result.history[-1]["start_decay"] > 0
    with pytest.raises(RuntimeError, match="killed"):
        run(*given, tmp_path / "cut", kind, rate, Stop(5))
    again, _, _ = run(*given, tmp_path / "cut", kind, rate)
    for name, value in again.items():
        assert torch.equal(value, straight[name]), name


def test_the_pull_is_the_rate_times_the_way_back():
    layer = torch.nn.Linear(3, 2)
    pull = StartPull(layer)
    optimizer = torch.optim.AdamW([layer.weight, layer.bias], lr=0.1, weight_decay=0.0)
    start, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
        layer.bias.add_(1.0)
    pull.pull(optimizer, 2.0)
    torch.testing.assert_close(layer.weight.detach() - start, torch.full((2, 3), 0.8))
    torch.testing.assert_close(layer.bias.detach() - bias, torch.ones(2))
    assert float(pull().detach()) == pytest.approx(6 * 0.8**2 / 2)


def test_two_pulls_that_contradict(tiny_open_clip, digits, processor, tmp_path):
    with pytest.raises(
        CordaError, match=r"start_decay \(1\) pulls .* weight_decay \(0\.1\) pulls them to zero"
    ):
        run(tiny_open_clip, digits, processor, tmp_path, "l2", 1.0, weight_decay=0.1)
