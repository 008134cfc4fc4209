"""What training wrote, loaded again and scaled: adapters, full fine-tuning, heads."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from corda_vlm.adapter import at_scale
from corda_vlm.adapter.base import base_fingerprint, save_base
from corda_vlm.adapter.options import check_scales
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.evaluation.measure import encoder_of, measure
from corda_vlm.methods import prepare_method
from corda_vlm.train import Head
from corda_vlm.train.trained import Trained, load_trained
from corda_vlm.train.weights import save_weights
from tests.embeddings import image_embeddings


@torch.no_grad()
def embed(model: nn.Module) -> torch.Tensor:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return image_embeddings(model, pixels)


def learn(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def trained_head() -> Head:
    head = Head("prompt", torch.eye(3, 24), 10.0)
    with torch.no_grad():
        head.weight.add_(1.0)
    return head


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_what_training_wrote(method: str, tiny_clip_hf: nn.Module, tmp_path: Path) -> None:
    start, before = copy.deepcopy(tiny_clip_hf), embed(tiny_clip_hf)
    options = {"towers": "vision"} if method == "full" else {"rank": 4}
    model = prepare_method(method, tiny_clip_hf, **options)  # pyright: ignore[reportArgumentType]
    learn(model)
    after = embed(model)
    with at_scale(model, 0.5, base=start):
        half = embed(model)
    save_weights(model, trained_head(), tmp_path / "run" / "weights")

    for folder in (tmp_path / "run", tmp_path / "run" / "weights"):
        loaded = load_trained(copy.deepcopy(start), folder)
        assert torch.equal(embed(loaded.model), after)
        with loaded.at_scale(1.0) as head:
            assert torch.equal(embed(loaded.model), after)
            assert torch.equal(head.weight, trained_head().weight)
        with loaded.at_scale(0.5) as head:
            assert torch.allclose(embed(loaded.model), half, atol=1e-6)
            assert torch.allclose(head.weight, torch.eye(3, 24) + 0.5)
        with loaded.at_scale(0.0) as head:
            assert torch.equal(embed(loaded.model), before)
            assert torch.equal(head.weight, torch.eye(3, 24))
        assert torch.equal(embed(loaded.model), after)
    if method == "full":
        assert isinstance(loaded.base, dict)
        assert not any(name.startswith("text_model") for name in loaded.base)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_of_another_base(method: str, tiny_clip_hf: nn.Module, tmp_path: Path) -> None:
    """Equal names and shapes do not make it the model that was trained."""
    start = copy.deepcopy(tiny_clip_hf)
    model = prepare_method(method, tiny_clip_hf)
    save_weights(model, None, tmp_path)
    save_base(base_fingerprint(model), tmp_path)
    load_trained(copy.deepcopy(start), tmp_path)
    learn(other := start.requires_grad_(True))
    with pytest.raises(ForeignFileError, match=r"Load the original model it was made from"):
        load_trained(other, tmp_path)


def test_of_a_run(tiny_clip_hf: nn.Module) -> None:
    """As an experiment has it: the trained copy, and the model it is a copy of."""
    model = prepare_method("full", copy.deepcopy(tiny_clip_hf))
    learn(model)
    with Trained(model, base=tiny_clip_hf).at_scale(0.0) as head:
        assert head is None
        assert torch.equal(embed(model), embed(tiny_clip_hf))


class TestHeads:
    def test_a_probe_from_prompts_leaves_the_model_alone(
        self, tiny_clip_hf: nn.Module, tmp_path: Path
    ) -> None:
        before = embed(tiny_clip_hf)
        model = prepare_method("linear-probe", tiny_clip_hf)
        save_weights(model, trained_head(), tmp_path)
        loaded = load_trained(copy.deepcopy(model), tmp_path)
        with loaded.at_scale(0.25) as head:
            assert torch.allclose(head.weight, torch.eye(3, 24) + 0.25)
            assert torch.equal(embed(loaded.model), before)

    def test_a_linear_head_has_nothing_to_be_mixed_with(
        self, tiny_clip_hf: nn.Module, tmp_path: Path
    ) -> None:
        save_weights(prepare_method("linear-probe", tiny_clip_hf), Head("linear", torch.zeros(3, 24)), tmp_path)  # fmt: skip
        loaded = load_trained(tiny_clip_hf, tmp_path)
        with loaded.at_scale(1.0) as head:
            assert head is not None
        with pytest.raises(CordaError, match="linear head cannot be scaled"), loaded.at_scale(0.5):
            pass

    def test_a_head_of_an_older_file(self, tmp_path: Path) -> None:
        trained_head().save(tmp_path / "head.safetensors")
        tensors = load_file(tmp_path / "head.safetensors")
        del tensors["start"]
        save_file(tensors, tmp_path / "old.safetensors", {"format": "corda_vlm.head", "kind": "prompt"})  # fmt: skip
        old = Head.load(tmp_path / "old.safetensors")
        assert old.at_scale(1.0) is old
        with pytest.raises(CordaError, match="without its class vectors from before"):
            old.at_scale(0.5)

    def test_the_start_is_no_part_of_what_is_trained(self) -> None:
        head = trained_head()
        assert sorted(head.state_dict()) == ["bias", "logit_scale", "weight"]
        assert not head.start.requires_grad  # pyright: ignore[reportOptionalMemberAccess]


def test_measured_at_a_scale(tiny_clip_hf, tiny_processor, colour_folder) -> None:
    """The whole chain: at scale 0 the scores are the base model's."""
    suite = {
        "name": "colours", "version": 1, "data_root": str(colour_folder.parent),
        "tasks": [{"name": "colours", "kind": "zero_shot", "role": "gain", "data": f"folder:{colour_folder}",
                   "classes": ["red", "green", "blue"], "templates": ["{}"], "metrics": ["top1"]}],
    }  # fmt: skip
    base = [s.value for r in measure(encoder_of(tiny_clip_hf, processor=tiny_processor), suite) for s in r.scores]  # fmt: skip
    model = prepare_method("full", copy.deepcopy(tiny_clip_hf))
    learn(model)
    with Trained(model, base=tiny_clip_hf).at_scale(0.0) as head:
        results = measure(encoder_of(model, processor=tiny_processor), suite, head=head)
        assert [s.value for r in results for s in r.scores] == base


def test_nothing_there(tiny_clip_hf: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ForeignFileError, match="no trained weights in"):
        load_trained(tiny_clip_hf, tmp_path)
    (tmp_path / "trained.safetensors").write_bytes(b"torn")
    with pytest.raises(ForeignFileError, match="not readable"):
        load_trained(tiny_clip_hf, tmp_path)
    save_file({"strange": torch.zeros(1)}, tmp_path / "trained.safetensors")
    with pytest.raises(ForeignFileError, match="another model, at strange"):
        load_trained(tiny_clip_hf, tmp_path)


def test_the_scales_of_a_sweep() -> None:
    assert check_scales([0.5, 1, 0.25, 0.5]) == (1.0, 0.5, 0.25)
    with pytest.raises(CordaError, match="at least one scale"):
        check_scales([])
    with pytest.raises(CordaError, match="is not between 0"):
        check_scales([0.5, -1])
