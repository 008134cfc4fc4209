"""Losses against open_clip's and against computations by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from corda_vlm.train import contrastive_loss, prompt_logits
from corda_vlm.train.losses import capped


def _pairs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(count, 8, generator=stream), torch.randn(count, 8, generator=stream)


@given(count=st.integers(1, 12), seed=st.integers(0, 99), scale=st.floats(1.0, 100.0))
@settings(max_examples=40, deadline=None)
def test_contrastive_loss_is_open_clips(count, seed, scale):
    from open_clip.loss import ClipLoss

    images, texts = _pairs(count, seed)
    expected = ClipLoss()(
        F.normalize(images, dim=-1), F.normalize(texts, dim=-1), torch.tensor(scale)
    )
    ids = torch.arange(count)[:, None]
    for text_ids in (None, ids):  # distinct texts: the mask changes nothing
        found = contrastive_loss(images, texts, torch.tensor(scale), text_ids=text_ids)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@given(count=st.integers(2, 9), smoothing=st.floats(0.01, 0.5))
@settings(max_examples=20, deadline=None)
def test_label_smoothing_is_torchs(count, smoothing):
    images, texts = _pairs(count)
    logits = 10 * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    target = torch.arange(count)
    expected = (
        sum(F.cross_entropy(x, target, label_smoothing=smoothing) for x in (logits, logits.T)) / 2
    )
    found = contrastive_loss(images, texts, torch.tensor(10.0), label_smoothing=smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_text_is_not_the_negative_of_its_duplicate():
    images, texts = _pairs(4)
    texts[2] = texts[0]
    ids = torch.tensor([[5, 1], [6, 1], [5, 1], [7, 1]])
    logits = 3 * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T

    def by_hand(matrix: torch.Tensor) -> torch.Tensor:
        total = torch.tensor(0.0)
        for i in range(4):
            choices = [j for j in range(4) if j == i or {i, j} != {0, 2}]
            total = total - matrix[i, i] + torch.logsumexp(matrix[i, choices], dim=0)
        return total / 4

    expected = (by_hand(logits) + by_hand(logits.T)) / 2
    found = contrastive_loss(images, texts, torch.tensor(3.0), text_ids=ids)
    torch.testing.assert_close(found, expected)
    assert found < contrastive_loss(images, texts, torch.tensor(3.0))


def test_all_texts_equal_leaves_nothing_to_tell_apart():
    images, _ = _pairs(5)
    images.requires_grad_()
    loss = contrastive_loss(
        images,
        torch.ones(5, 8),
        torch.tensor(10.0),
        text_ids=torch.ones(5, 3, dtype=torch.long),
        label_smoothing=0.1,
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert torch.isfinite(images.grad).all()


def test_prompt_logits_by_hand():
    features = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    prompts = torch.tensor([[10.0, 0.0], [0.0, 0.1], [-1.0, -1.0]])
    root = 2**-0.5
    expected = 7 * torch.tensor([[0.6, 0.8, -1.4 * root], [0.0, 1.0, -root]])
    torch.testing.assert_close(prompt_logits(features, prompts, torch.tensor(7.0)), expected)
    assert prompt_logits(features.bfloat16(), prompts, torch.tensor(7.0)).dtype == torch.float32


def test_the_cap_of_the_scale_lets_gradients_pass():
    for value in (10.0, 100.0, 150.0):
        scale = torch.tensor(value, requires_grad=True)
        found = capped(scale)
        assert found.item() == min(value, 100.0)
        found.backward()
        assert scale.grad.item() == 1.0
