"""The batch of a step is a function of the step and the seed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from corda_vlm.data import ImageTextBatches, load_records
from corda_vlm.errors import DataError
from corda_vlm.train.steps import StepBatches, jitter


def _steps(digits, processor, **options):
    builder = ImageTextBatches(
        digits, processor, towers="vision", workers=options.pop("workers", 0)
    )
    return StepBatches(builder, **{"batch_size": 7, "steps": 30, "seed": 0, **options})


def test_epochs_go_through_all_records_in_orders_of_their_own(digits, processor):
    steps = _steps(digits, processor)
    assert (steps.per_epoch, len(steps)) == (13, 30)
    first = [int(i) for n in range(13) for i in steps.indices(n)]
    second = [int(i) for n in range(13, 26) for i in steps.indices(n)]
    assert sorted(first) == sorted(second) == list(range(90))
    assert first != second
    assert len(steps.indices(12)) == 90 - 12 * 7
    assert [int(i) for i in _steps(digits, processor, seed=1).indices(0)] != first[:7]


@pytest.mark.parametrize("options", [{}, {"augment": "light"}, {"workers": 2}, {"batch_size": 1}])
def test_any_step_alone_is_the_step_in_its_row(digits, processor, options):
    row = _steps(digits, processor, **options)
    batch = [row[number] for number in range(20)][-1]
    alone = _steps(digits, processor, **options)[19]
    assert torch.equal(batch["pixel_values"], alone["pixel_values"])
    assert torch.equal(batch["labels"], alone["labels"])
    with pytest.raises(IndexError):
        row[30]


def test_a_batch_of_bad_pictures_is_replaced(digits, processor, tmp_path):
    (tmp_path / "captions.jsonl").write_text(
        "\n".join(f'{{"image": "{n}.png", "text": "x"}}' for n in range(4))
    )
    digits[0]["image"].save(tmp_path / "2.png")
    spec = {"source": f"jsonl:{tmp_path}/captions.jsonl", "max_bad_share": 0.9}
    builder = ImageTextBatches(load_records(spec), processor)
    steps = StepBatches(builder, batch_size=1, steps=8, seed=0)
    assert all(len(steps[n]["pixel_values"]) == 1 for n in range(8))
    (tmp_path / "2.png").unlink()
    builder = ImageTextBatches(load_records(spec), processor)
    with pytest.raises(DataError, match="do not decode"):
        StepBatches(builder, batch_size=1, steps=8, seed=0)[0]


def test_jitter_moves_a_little_and_mirrors_nothing():
    image = torch.zeros(1, 3, 33, 33)
    image[:, :, 16, 20:] = 1.0  # a line from the middle to the right
    images = image.expand(200, -1, -1, -1)
    moved = jitter(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert torch.equal(moved, jitter(images, torch.Generator().manual_seed(0)))
    weight = moved[:, 0].clamp(min=0)  # (200, 33, 33)
    right, left = weight[..., 20:].sum((1, 2)), weight[..., :12].sum((1, 2))
    assert (right > left).all()
    still = jitter(images, torch.Generator(), degrees=0.0, shift=0.0, zoom=0.0)
    torch.testing.assert_close(still, images.contiguous(), atol=1e-5, rtol=0)


def test_seed_and_records_alone_decide(digits, processor):
    other = dataclasses.replace(processor)
    assert torch.equal(
        _steps(digits, processor)[3]["pixel_values"], _steps(digits, other)[3]["pixel_values"]
    )
