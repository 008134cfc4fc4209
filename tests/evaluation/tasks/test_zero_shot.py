"""Zero-shot classification: open_clip's classifier, whatever the family; honest about ties and NaN."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from corda_vlm.data import load_records
from corda_vlm.errors import DataError, NotFiniteError, UnknownNameError
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.tasks.zero_shot import ZeroShot, _judged, _ranks_of
from corda_vlm.families import detect_family

NAMES = ["blue whale", "green tree", "red"]


TEMPLATES = ["a photo of a {}", "{}", "the {} thing"]


def encoder_of(model, processor, **options) -> Encoder:
    return Encoder(model, detect_family(model), processor, **options)


@pytest.mark.parametrize("family", ["tiny_open_clip", "tiny_clip_hf", "tiny_siglip"])
def test_every_metric_from_end_to_end(family, request, tiny_processor, colour_folder: Path) -> None:
    model = request.getfixturevalue(family)
    model.train()
    data = load_records(f"folder:{colour_folder}")
    task = ZeroShot(data, NAMES, TEMPLATES, ("top1", "top5", "mean_per_class"))
    encoder = encoder_of(model, tiny_processor, batch_size=5)
    values = dict(task.run(encoder))
    assert list(values) == ["top1", "top5", "mean_per_class"]
    assert values["top5"] == 1.0  # three classes
    assert model.training, "the model's own mode is put back"

    with torch.no_grad():
        pixels = torch.stack([tiny_processor.image(record["image"]) for record in data])
        vectors = detect_family(model).need_contrastive(model).encode_image(model.eval(), pixels)
    guesses = (F.normalize(vectors, dim=-1) @ encoder.classifier(NAMES, TEMPLATES)).argmax(1)
    assert values["top1"] == pytest.approx(
        (guesses == torch.tensor(data.labels)).float().mean().item()
    )

    smaller = dict(task.run(encoder_of(model, tiny_processor, batch_size=5, bf16=True)))
    assert set(smaller) == set(values)


def test_labels_follow_the_suites_order(
    tiny_open_clip, tiny_processor, colour_folder: Path
) -> None:
    data = load_records(f"folder:{colour_folder}")  # blue, green, red
    encoder = encoder_of(tiny_open_clip, tiny_processor)
    one = dict(ZeroShot(data, ["blue", "green", "red"], ["{}"]).run(encoder))
    two = dict(ZeroShot(data, ["red", "blue", "green"], ["{}"], remap=(1, 2, 0)).run(encoder))
    assert one == two


def ranks_of(vectors, classify, labels, chunk: int) -> torch.Tensor:
    (ranks,) = _judged(vectors, classify, labels, chunk, [_ranks_of])
    return torch.cat(ranks)


def test_ranks_by_hand() -> None:
    vectors = torch.eye(3)
    weights = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.2, 0.2], [0.3, 0.4, 0.1]])
    ranks = ranks_of(vectors, lambda v: v @ weights, torch.tensor([1, 1, 0]), chunk=2)
    # Second of three; among equals the lower index first, so second too.
    assert ranks.tolist() == [1, 1, 1]
    vectors[2, 2] = float("nan")
    with pytest.raises(NotFiniteError, match="on 1 of 3 images measured"):
        ranks_of(vectors, lambda v: v @ weights, torch.tensor([1, 1, 0]), chunk=2)


def test_a_collapsed_model_is_at_chance() -> None:
    labels = torch.arange(10).repeat(20)
    ranks = ranks_of(torch.ones(200, 4), lambda v: v @ torch.ones(4, 10), labels, chunk=64)
    assert (ranks == 0).float().mean().item() == pytest.approx(0.1)
    assert (ranks < 5).float().mean().item() == pytest.approx(0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tower", ["images", "texts"])
def test_a_diverged_model_has_no_score(
    tiny_open_clip, tiny_processor, colour_folder, tower, value
) -> None:
    projection = tiny_open_clip.visual.proj if tower == "images" else tiny_open_clip.text_projection
    with torch.no_grad():
        projection.fill_(value)
    task = ZeroShot(load_records(f"folder:{colour_folder}"), NAMES, ["{}"])
    count = 12 if tower == "images" else 3
    message = rf"NaN or Inf on {count} of {count} {tower} measured.*float32.*lower learning rate"
    with pytest.raises(NotFiniteError, match=message):
        dict(task.run(encoder_of(tiny_open_clip, tiny_processor)))


def test_a_diverged_head_has_no_score(tiny_open_clip, tiny_processor, colour_folder) -> None:
    data = load_records(f"folder:{colour_folder}")
    task = ZeroShot(data, NAMES, ["{}"], head=lambda v: v[:, :3] * float("nan"))
    with pytest.raises(NotFiniteError, match="12 of 12 images"):
        dict(task.run(encoder_of(tiny_open_clip, tiny_processor)))


def test_a_trained_head_judges_in_place_of_the_prompts(
    tiny_open_clip, tiny_processor, colour_folder: Path
) -> None:
    data = load_records(f"folder:{colour_folder}")

    def always_the_second(vectors: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 1.0, 0.0]).expand(len(vectors), 3)

    judged = ZeroShot(data, NAMES, ["{}"], head=always_the_second)
    share = sum(label == 1 for label in data.labels) / len(data)
    assert dict(judged.run(encoder_of(tiny_open_clip, tiny_processor))) == {"top1": share}


def test_too_few_class_names(tiny_open_clip, tiny_processor, colour_folder: Path) -> None:
    data = load_records(f"folder:{colour_folder}")
    with pytest.raises(DataError, match="label 2, but there are 2 class names"):
        dict(ZeroShot(data, NAMES[:2], ["{}"]).run(encoder_of(tiny_open_clip, tiny_processor)))
    with pytest.raises(UnknownNameError, match="top5"):
        ZeroShot(data, NAMES, ["{}"], ("top55",))
