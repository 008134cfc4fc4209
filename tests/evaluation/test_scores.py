"""What happened on each example becomes a score."""

from __future__ import annotations

import math

import numpy as np
import pytest

from corda_vlm.evaluation.scores import Outcome, Score, paired_gain


def test_an_outcome_becomes_a_score() -> None:
    score = Outcome("top1", np.array([1.0, 0.0]), chance=0.1).score("digits", "gain")
    assert score == Score("digits", "top1", 0.5, 0.0, 1.0, 2, "gain", 0.1)


def test_paired_gains_by_hand() -> None:
    base = Outcome("top1", np.array([1.0, 0, 0, 0]))
    gain = paired_gain(Outcome("top1", np.array([1.0, 1, 0, 1])), base)
    assert gain is not None
    assert gain.value == 0.5
    logs = np.log([0.5, 0.25])
    gain = paired_gain(
        Outcome("token_probability", logs + 0.1, exp=True),
        Outcome("token_probability", logs, exp=True),
    )
    level = math.exp(logs.mean())
    assert gain is not None
    assert (gain.value, gain.low, gain.high) == pytest.approx((level * (math.exp(0.1) - 1),) * 3)
    grouped = Outcome("top1", base.values, groups=np.array([0, 0, 1, 1]))
    assert paired_gain(grouped, base) is None
    assert paired_gain(base, Outcome("top1", np.array([1.0]))) is None
