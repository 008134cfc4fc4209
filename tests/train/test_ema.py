"""A moving average of what is trained."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from corda_vlm.errors import ForeignFileError
from corda_vlm.methods import prepare_method
from corda_vlm.train import TrainOptions, train
from corda_vlm.train.ema import FILE, MovingAverage
from tests.train.terms.conftest import OPTIONS, Stop, weights


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=30), st.floats(0.01, 0.99))
@settings(max_examples=30, deadline=None)
def test_it_is_the_average_by_hand(values: list[float], decay: float) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    average = MovingAverage([parameter], decay)
    for value in values:
        parameter.data.fill_(value)
        average.update()
    mean = np.average(values, weights=[decay**age for age in range(len(values))][::-1])
    with average.in_place():
        assert float(parameter) == pytest.approx(mean, abs=1e-5)
    assert float(parameter) == pytest.approx(values[-1])
    average.settle()
    assert float(parameter) == pytest.approx(mean, abs=1e-5)


def test_small_steps_of_bfloat16_weights_are_not_lost() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    average = MovingAverage([parameter], 0.999)
    average.update()
    for _ in range(3):
        parameter.data.fill_(1.0078125)  # the next number
        average.update()
    (mean,) = average._means()
    assert mean.dtype == torch.float32
    assert float(mean) == pytest.approx(1 + 0.75 * 0.0078125, abs=1e-5), "near the mean of all four"


def evaluated(result) -> list[float]:
    return [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]


class TestTraining:
    @staticmethod
    def trained(model, digits, held_out, processor, folder, callbacks=(), **options):
        torch.manual_seed(0)
        model = prepare_method("lora", copy.deepcopy(model), rank=2, towers="vision")
        result = train(
            model, digits, processor, options=TrainOptions(**{**OPTIONS, **options}), output_dir=folder,
            callbacks=callbacks, eval_data=held_out, show_progress=False,
        )  # fmt: skip
        return model, result

    def test_it_is_the_result_and_gone_on_with_to_the_bit(
        self, tiny_open_clip, digits, held_out, processor, tmp_path
    ) -> None:
        options = {"ema": 0.9, "train_head": True, "save_every": 2, "steps": 5, "batch_size": 8}
        given = tiny_open_clip, digits, held_out, processor
        whole, result = self.trained(*given, tmp_path / "whole", **options)
        with pytest.raises(RuntimeError, match="killed"):
            self.trained(*given, tmp_path / "cut", [Stop(3)], **options)
        assert (tmp_path / "cut" / "checkpoint-2" / FILE).is_file()
        again, resumed = self.trained(*given, tmp_path / "cut", **options)
        assert resumed.resumed_from == 2
        assert result.head is not None
        assert resumed.head is not None
        assert torch.equal(result.head.weight, resumed.head.weight)
        one, other = weights(whole), weights(again)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert evaluated(resumed) == evaluated(result)

        last, plain = self.trained(*given, tmp_path / "last", **{**options, "ema": 0.0})
        assert plain.head is not None
        assert not torch.equal(plain.head.weight, result.head.weight), "the head is averaged too"
        assert any(not torch.equal(one[n], value) for n, value in weights(last).items())
        losses = [[e["loss"] for e in r.history if "loss" in e] for r in (plain, result)]
        assert losses[0] == losses[1], "the steps are the same"
        assert evaluated(plain) != evaluated(result), "what is evaluated is the average"

    def test_a_checkpoint_that_lacks_it_is_said(self, tmp_path) -> None:
        average = MovingAverage([nn.Parameter(torch.zeros(2))], 0.9)
        with pytest.raises(ForeignFileError, match="average"):
            average.load(tmp_path)
        average.save(tmp_path)
        average.load(tmp_path)
        with pytest.raises(ForeignFileError, match="average of other weights"):
            MovingAverage([nn.Parameter(torch.zeros(3))], 0.9).load(tmp_path)
