"""Retrieval: recall@k both ways with several captions an image, by hand and as CLIP_benchmark defines it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from corda_vlm.data import load_records
from corda_vlm.errors import DataError, NotFiniteError, UnknownNameError
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.tasks.retrieval import METRICS, Retrieval, _chance, recalled
from corda_vlm.families import detect_family

# Two images with two captions each; similarities of each image to captions 0, 0, 1, 1:
#   image 0: 0.9  0.1  0.5  0.3   nearest is its own
#   image 1: 0.8  0.7  0.6  0.2   its own come third and fourth
IMAGES, CAPTIONS = torch.eye(2), torch.tensor([[0.9, 0.8], [0.1, 0.7], [0.5, 0.6], [0.3, 0.2]])
IMAGE_IDS, CAPTION_IDS = torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("k", "right"), [(1, [True, False]), (2, [True, False]), (3, [True, True])]
)
def test_image_to_text_by_hand(k: int, right: list[bool]) -> None:
    assert recalled(IMAGES, IMAGE_IDS, CAPTIONS, CAPTION_IDS, k).tolist() == right


@pytest.mark.parametrize(
    ("k", "right"), [(1, [True, False, True, False]), (2, [True] * 4), (9, [True] * 4)]
)
def test_text_to_image_by_hand(k: int, right: list[bool]) -> None:
    # Caption 1 of image 0 is nearer to image 1, caption 3 of image 1 nearer to image 0.
    assert recalled(CAPTIONS, CAPTION_IDS, IMAGES, IMAGE_IDS, k, chunk=3).tolist() == right


def test_a_diverged_query_has_no_score() -> None:
    broken = IMAGES.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="1 of 2 queries"):
        recalled(broken, IMAGE_IDS, CAPTIONS, CAPTION_IDS, 4)


def test_chance_by_hand() -> None:
    assert _chance(1, 10, 1) == pytest.approx(0.1)
    assert _chance(1, 10, 5) == pytest.approx(0.5)
    assert _chance(2, 4, 2) == pytest.approx(
        1 - 1 / 6
    )  # both drawn are the other image's: 1 of 6 pairs
    assert _chance(1, 3, 10) == 1.0
    assert math.isclose(_chance(5, 25_000, 10), 1 - (1 - 5 / 25_000) ** 10, rel_tol=1e-3)


def test_from_end_to_end(tiny_clip_hf, tiny_processor, colour_parquet: Path) -> None:
    encoder = Encoder(tiny_clip_hf, detect_family(tiny_clip_hf), tiny_processor, batch_size=5)
    data = load_records({"source": f"parquet:{colour_parquet}", "text": "captions"})
    task = Retrieval(data, captions="captions")
    outcomes = {outcome.metric: outcome for outcome in task.outcomes(encoder)}
    assert tuple(outcomes) == METRICS
    assert len(outcomes["image_to_text_recall@1"].values) == 12
    assert (
        len(outcomes["text_to_image_recall@1"].values) == 16
    )  # the green pictures have two captions
    for direction in ("image_to_text", "text_to_image"):
        values = [outcomes[f"{direction}_recall@{k}"].values.mean() for k in (1, 5, 10)]
        assert values == sorted(values)
    assert dict(task.run(encoder))["text_to_image_recall@10"] == pytest.approx(values[-1])

    # The captions found without being named, and one caption a picture.
    assert len(next(iter(Retrieval(data, METRICS[3:]).outcomes(encoder))).values) == 16
    one = load_records({"source": f"parquet:{colour_parquet}", "text": "{colour}"})
    assert (
        len(next(iter(Retrieval(one, METRICS[3:], captions="text").outcomes(encoder))).values) == 12
    )


def test_no_caption(tiny_clip_hf, tiny_processor, colour_folder: Path) -> None:
    data = load_records(f"folder:{colour_folder}")
    encoder = Encoder(tiny_clip_hf, detect_family(tiny_clip_hf), tiny_processor)
    with pytest.raises(DataError, match="has no caption"):
        list(Retrieval(data).outcomes(encoder))
    with pytest.raises(UnknownNameError, match="image_to_text_recall@1,"):
        Retrieval(data, ("recall@1",))
