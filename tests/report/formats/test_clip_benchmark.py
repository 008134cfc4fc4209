"""CLIP_benchmark's files, of its release 1.6.2."""

from __future__ import annotations

import json

import pytest

from corda_vlm.errors import ForeignFileError
from corda_vlm.report.formats.registry import read_results


def result(
    dataset: str,
    model: str = "ViT-B-32",
    pretrained: str = "openai",
    task: str = "zeroshot_classification",
    **metrics,
) -> str:
    """As `json.dump` writes it: of fewer than five classes acc5 is NaN."""
    metrics = metrics or {"acc1": 0.7, "acc5": 0.9, "mean_per_class_recall": 0.65}
    content = {
        "dataset": dataset,
        "model": model,
        "pretrained": pretrained,
        "task": task,
        "metrics": metrics,
        "language": "en",
    }
    return json.dumps(content)


def test_a_folder_of_files_is_one_model_for_each_checkpoint(tmp_path):
    (tmp_path / "a.json").write_text(result("wds/vtab/cifar10"))
    (tmp_path / "b.json").write_text(result("cars"))
    (tmp_path / "c.json").write_text(
        result("cars", pretrained="/runs/tuned/checkpoints/epoch_3.pt", acc1=0.5)
    )
    (tmp_path / "d.json").write_text(
        result("cars", model="local-dir:exports/digits-clip", pretrained="", acc1=0.4)
    )
    models = {model.name: model for model in read_results(tmp_path)}
    assert set(models) == {"ViT-B-32, openai", "tuned, epoch_3", "digits-clip"}
    base = models["ViT-B-32, openai"]
    assert base.tasks == ("wds/vtab/cifar10", "cars")
    assert base.metrics("cars") == ["acc1", "acc5", "mean_per_class_recall"]
    assert base.of("wds/vtab/cifar10").chance == 0.1
    assert base.of("cars", "acc5").chance == pytest.approx(5 / 196)


def test_of_two_classes_acc5_is_no_number(tmp_path):
    (tmp_path / "a.json").write_text(
        result("pcam", acc1=0.6, acc5=float("nan"), mean_per_class_recall=0.6)
    )
    (model,) = read_results(tmp_path)
    assert model.metrics("pcam") == ["acc1", "mean_per_class_recall"]
    assert model.of("pcam").chance == 0.5


def test_retrieval_and_data_sets_of_unknown_size(tmp_path):
    (tmp_path / "a.json").write_text(
        result("flickr30k", task="zeroshot_retrieval", **{"image_retrieval_recall@5": 0.8})
    )
    (tmp_path / "b.json").write_text(result("wds/mine", acc1=0.5))
    own = json.loads(result("wds/named", acc1=0.5)) | {"classnames": ["a", "b", "c", "d"]}
    (tmp_path / "c.json").write_text(json.dumps(own))
    (model,) = read_results(tmp_path)
    assert model.of("flickr30k zeroshot_retrieval").chance == 0.0
    assert model.of("wds/mine").chance is None
    assert model.of("wds/named").chance == 0.25


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (result("cars")[:-20], "may be truncated"),
        (
            '{"dataset": "cars", "model": "ViT-B-32"}',
            "it needs dataset, model, pretrained, task, metrics",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, content, expected):
    (tmp_path / "cars.json").write_text(content)
    with pytest.raises(ForeignFileError, match=expected) as error:
        read_results(tmp_path)
    assert "cars.json" in str(error.value)
