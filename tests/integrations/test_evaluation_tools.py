"""What leads to lm-eval and CLIP_benchmark, as far as it can be looked at without them."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from corda_vlm import load_model
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.evaluation.suite import load_suite
from corda_vlm.integrations import clip_benchmark, lm_eval
from corda_vlm.yaml_file import read_yaml


def absent(monkeypatch, package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


def test_the_group_of_retention_tasks_ships():
    group = read_yaml(lm_eval.tasks_folder() / "corda_retention.yaml")
    assert group["group"] == lm_eval.RETENTION
    assert group["task"] == ["triviaqa", "nq_open", "webqs"]


@pytest.mark.unchecked
def test_lm_eval_that_is_not_installed_is_named(monkeypatch):
    absent(monkeypatch, "lm_eval")
    model = torch.nn.Linear(2, 2)
    model.generate = lambda: None
    with pytest.raises(CordaError, match="pip install lm_eval"):
        lm_eval.as_lm(model, SimpleNamespace(tokenizer=object()))


def test_a_model_that_writes_no_text_is_no_lm():
    with pytest.raises(CordaError, match="this Linear does not; evaluate it with"):
        lm_eval.as_lm(torch.nn.Linear(2, 2), SimpleNamespace(tokenizer=None))


def test_clip_benchmark_that_is_not_installed_is_named(monkeypatch):
    absent(monkeypatch, "clip_benchmark")
    with pytest.raises(CordaError, match="pip install clip_benchmark"):
        clip_benchmark.register()


def test_a_model_of_ours_is_called_as_theirs():
    loaded = load_model("emoji-clip")
    plain: Any = loaded.model
    model, transform, tokenizer = clip_benchmark.as_theirs(loaded.model, loaded.processor)
    pixels = transform(Image.new("RGB", (40, 30), "red"))[None]
    with torch.no_grad():
        image = model.encode_image(pixels)
        text = model.encode_text(tokenizer(["a cat", "a dog"]).to("cpu"))
        assert torch.equal(image, plain.encode_image(pixels))
    assert (image.shape[0], text.shape[0], image.shape[1]) == (1, 2, text.shape[1])


def test_it_becomes_a_model_type_of_theirs_and_the_usual_one(monkeypatch):
    """With a stand-in for the package, which keeps its loaders in a mapping and its command in `cli.main`."""
    asked: list[list[str]] = []
    package, models, cli = (ModuleType(f"clip_benchmark{end}") for end in ("", ".models", ".cli"))
    models.__dict__.update(TYPE2FUNC={"open_clip": print}, MODEL_TYPES=["open_clip"])
    cli.__dict__["main"] = lambda: asked.append(list(sys.argv))
    for module in (package, models, cli):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    clip_benchmark.main(["eval", "--model", "emoji-clip"])
    clip_benchmark.main(["eval", "--model_type", "open_clip"])
    clip_benchmark.main(["build", "a.json"])
    assert models.__dict__["MODEL_TYPES"] == ["open_clip", "corda_vlm"]
    assert models.__dict__["TYPE2FUNC"]["corda_vlm"] is clip_benchmark.load
    assert [words[1:] for words in asked] == [
        ["eval", "--model", "emoji-clip", "--model_type", "corda_vlm"],
        ["eval", "--model_type", "open_clip"],
        ["build", "a.json"],
    ]


def test_their_layout_is_a_suite_of_ours(tmp_path):
    folder = tmp_path / "pets"
    with pytest.raises(ForeignFileError, match=r"no list of class names at .*classnames\.txt"):
        clip_benchmark.suite_of(folder)
    folder.mkdir()
    (folder / "classnames.txt").write_text("cat\ndog\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}\n")
    (task,) = load_suite(clip_benchmark.suite_of(folder, role="gain")).tasks
    assert (task.name, task.role) == ("wds/pets", "gain")
    assert task.classes == {"names": {"0": "cat", "1": "dog"}}
    assert task.templates == ["a photo of a {}"]
