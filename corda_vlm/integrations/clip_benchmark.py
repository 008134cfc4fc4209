"""CLIP_benchmark: a model of ours as one of theirs, and their webdatasets as a suite of ours.

    python -m corda_vlm.integrations.clip_benchmark eval --model emoji-clip --pretrained adapter \
        --dataset wds/openmoji --dataset_root "data/{dataset}" --no_amp --output "results/after/{dataset}.json"

takes the words of `clip_benchmark`. `--model` is what `load_model` takes, and `--pretrained` a folder of a training, or "" for
the model before it; of both, `corda-vlm report` then reads the files of `--output`. In Python, `loader()` gives what `clip_benchmark`
calls a model. CLIP_benchmark 1.6.2 needs a NumPy before 2.4, and computes in bfloat16 without `--no_amp`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corda_vlm.families import family_of, load_model
from corda_vlm.families.base import Family, Processor
from corda_vlm.files import home_path, read_text
from corda_vlm.integrations.command import run_command
from corda_vlm.integrations.theirs import module_of
from corda_vlm.train.trained import load_trained

NAME = "corda_vlm"
"""What `--model_type` calls our models."""


class Tokens(dict[str, Tensor]):
    """A tokenized batch, which moves between devices as theirs does."""

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens({name: tensor.to(device) for name, tensor in self.items()})


class Model(nn.Module):
    """A live model of any family that compares images with texts, as CLIP_benchmark calls it.

    Args:
        model: bare or a `PeftModel`.
        family: its family.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        self.model = model
        self._contrastive = family.need_contrastive(model)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), not normalized."""
        return self._contrastive.encode_image(self.model, pixels)

    def encode_text(self, tokens: Tokens) -> Tensor:
        """n texts -> (n, D), not normalized."""
        return self._contrastive.encode_text(self.model, tokens)


def as_theirs(
    model: nn.Module, processor: Processor
) -> tuple[Model, Callable[[Any], Tensor], Callable[[Sequence[str]], Tokens]]:
    """What CLIP_benchmark's metrics take: a model, its transform of a picture, and its tokenizer.

    Raises:
        CordaError: the model does not compare images with texts.
    """
    return Model(model, family_of("auto", model)).eval(), processor.image, _tokenizer(processor)


def _tokenizer(processor: Processor) -> Callable[[Sequence[str]], Tokens]:
    return lambda texts: Tokens(processor.text(list(texts)))


def load(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: str = "cpu"
) -> tuple[Model, Callable[[Any], Tensor], Callable[[Sequence[str]], Tokens]]:
    """CLIP_benchmark's loader for `--model_type corda_vlm`.

    Args:
        model_name: what `load_model` takes.
        pretrained: the folder of a training of it, or nothing.
        cache_dir: theirs; ours are where `load_model` finds them.
    """
    loaded = load_model(model_name)
    model = load_trained(loaded.model, pretrained).model if pretrained else loaded.model
    return as_theirs(model.to(device), loaded.processor)


def register() -> None:
    """Make `corda_vlm` one of CLIP_benchmark's model types.

    Raises:
        CordaError: CLIP_benchmark is not installed.
    """
    models = _theirs("models")
    models.TYPE2FUNC[NAME] = load
    if NAME not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(NAME)


def suite_of(
    folder: str | Path, split: str = "test", *, name: str = "", role: str = "retention"
) -> dict[str, Any]:
    """A folder of CLIP_benchmark's webdataset layout as a suite for `corda_vlm.evaluate`: the same images, class names and prompts.

    Args:
        folder: with `classnames.txt`, `zeroshot_classification_templates.txt` and a folder of shards for each split.
        name: of the task; without it "wds/FOLDER".

    Raises:
        ForeignFileError: no class names or prompts there.
    """
    place = home_path(folder).resolve()
    names = read_text(place / "classnames.txt", "list of class names").splitlines()
    templates = read_text(place / "zeroshot_classification_templates.txt", "list of prompts")
    classes = [one.strip() for one in names if one.strip()]
    task = {
        "name": name or f"wds/{place.name}",
        "role": role,
        "kind": "zero_shot",
        "data": {"source": f"webdataset:{place / split}/*.tar", "label": "cls"},
        # by number, as a split need not have images of them all
        "classes": {"names": {str(number): one for number, one in enumerate(classes)}},
        "templates": [
            one.strip().replace("{c}", "{}") for one in templates.splitlines() if one.strip()
        ],
        "metrics": ["top1", "top5", "mean_per_class"],
    }
    return {"name": place.name, "version": 1, "tasks": [task]}


def _theirs(module: str) -> Any:
    return module_of("clip_benchmark", module, "CLIP_benchmark", "clip_benchmark 'numpy<2.4'")


def main(words: Sequence[str] | None = None) -> None:
    """CLIP_benchmark's own command, in which models of ours are the usual type."""
    given = list(sys.argv[1:] if words is None else words)
    register()
    told = any(word.partition("=")[0] == "--model_type" for word in given)
    usual = [] if told or given[:1] != ["eval"] else ["--model_type", NAME]
    before, sys.argv = sys.argv, ["clip_benchmark", *given, *usual]
    try:
        _theirs("cli").main()
    finally:
        sys.argv = before


if __name__ == "__main__":
    run_command("corda_vlm.integrations.clip_benchmark", main)
