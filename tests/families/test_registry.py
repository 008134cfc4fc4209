"""FAMILIES: detection, registration, and the names that `load_model` understands."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.families import (
    FAMILIES,
    Family,
    detect_family,
    family_of,
    load_model,
    register_family,
    token_masks,
)
from corda_vlm.families.base import Rule
from corda_vlm.families.loading import sources
from corda_vlm.sites import find_sites


@pytest.fixture
def own_family():
    """What a user declares for a model class of their own."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 8)])

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    family = Family(
        "own",
        matches=lambda model: isinstance(model, Own),
        rules=(Rule(r"layers\.(?P<block>\d+)", "vision", "up", "layers.{block}.in"),),
    )
    return family, Own()


def test_keys_are_the_names():
    assert {name: family.name for name, family in FAMILIES.items()} == {
        name: name for name in FAMILIES
    }
    assert set(FAMILIES) == {"clip_hf", "siglip_hf", "image_text_hf", "clip_open", "llava", "llm"}


def test_detection(tiny_clip_hf, tiny_siglip, tiny_open_clip):
    assert [detect_family(model).name for model in (tiny_clip_hf, tiny_siglip, tiny_open_clip)] == [
        "clip_hf",
        "siglip_hf",
        "clip_open",
    ]


def test_family_of(tiny_open_clip):
    clip_open = FAMILIES["clip_open"]
    assert family_of("auto", tiny_open_clip) is family_of("clip_open", tiny_open_clip) is clip_open
    assert family_of(clip_open, tiny_open_clip) is clip_open
    with pytest.raises(
        UnknownNameError, match=r"unknown family 'clip-open'.*Did you mean 'clip_open'"
    ):
        family_of("clip-open", tiny_open_clip)


def test_a_registered_family_is_found(registry, own_family):
    family, model = own_family
    with pytest.raises(CordaError, match=r"no family knows the model class .*Own.*register_family"):
        detect_family(model)
    assert register_family(family) is family
    assert detect_family(model) is family
    assert [(site.name, site.block) for site in find_sites(model)] == [
        ("layers.0", 0),
        ("layers.1", 1),
    ]
    register_family(family)  # twice the same is fine
    with pytest.raises(CordaError, match="a family named 'own' is registered already"):
        register_family(dataclasses.replace(family, classes=("Other",)))


def test_three_fields_are_enough_and_what_is_missing_is_named_when_it_is_needed(own_family):
    family, model = own_family
    batch = {"x": torch.ones(2, 4)}
    assert torch.equal(family.forward(model, batch), model(torch.ones(2, 4)))
    assert token_masks(family, model)(batch) == {}
    with pytest.raises(CordaError, match=r"'own' of Own declares nothing contrastive"):
        family.need_contrastive(model)
    with pytest.raises(CordaError, match=r"'own' of Own declares nothing generative"):
        family.need_generative(model)
    with pytest.raises(CordaError, match=r"'own' does not say how its models are loaded"):
        load_model("some/model", family=family)


class TestNames:
    @pytest.fixture
    def zoo(self, tmp_path, monkeypatch):
        for name, files in {
            "emoji-clip": ["card.yaml"],
            "draft": ["train.py"],
            "hub-clip": ["card.yaml"],
        }.items():
            (tmp_path / name).mkdir()
            for file in files:
                (tmp_path / name / file).write_text(
                    "source: nobody/some-clip\n" if name == "hub-clip" else "{}\n"
                )
        monkeypatch.setattr(sources, "asset", lambda path: tmp_path)
        return tmp_path

    def test_an_unknown_name_lists_the_zoo_and_the_forms(self, zoo):
        with pytest.raises(UnknownNameError) as caught:
            load_model("emoji_clip")
        message = str(caught.value)
        assert "choose one of: emoji-clip, emoji-clip-hf, hub-clip, hub-clip-hf" in message
        assert "Did you mean 'emoji-clip" in message
        assert "draft" not in message
        for form in ("open_clip_config.json", "ViT-B-32/laion2b_s34b_b79k", "hf-hub:ORG/NAME"):
            assert form in message

    def test_a_built_in_model_without_weights_says_which_files_are_missing(self, zoo):
        with pytest.raises(CordaError, match=r"open_clip_model\.safetensors.*It has: card\.yaml"):
            load_model("emoji-clip")

    def test_a_built_in_name_wins_over_a_folder_of_that_name(self, zoo, tmp_path, monkeypatch):
        (tmp_path / "here" / "emoji-clip").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "here")
        with pytest.raises(CordaError, match=r"It has: card\.yaml"):
            load_model("emoji-clip")
        with pytest.raises(CordaError, match="It has: nothing"):
            load_model("./emoji-clip")

    def test_a_card_may_name_a_hub_model(self, zoo):
        with pytest.raises(CordaError, match="could not load 'nobody/some-clip' from its hub"):
            load_model("hub-clip")

    @pytest.mark.parametrize(
        "source", ["./no/such/folder", "/no/such/folder", "runs/x/merged", "~/nothing"]
    )
    def test_a_path_that_is_no_folder(self, source):
        with pytest.raises(CordaError, match=f"no folder '{source}'"):
            load_model(source)

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(CordaError, match=r"no model of a known format.*It has: nothing"):
            load_model(tmp_path)

    def test_an_unknown_family(self, tmp_path):
        with pytest.raises(UnknownNameError, match="unknown family 'lava'"):
            load_model(tmp_path, family="lava")

    @pytest.mark.parametrize("device", ["graphics", "cuda:99"])
    def test_a_device_that_is_not_there(self, device):
        with pytest.raises(CordaError, match=f"device '{device}' cannot be used .*give auto, cpu"):
            load_model("emoji-clip", device=device)

    def test_the_device_may_be_left_to_us(self):
        there = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model("emoji-clip", device="auto").model
        assert {p.device.type for p in model.parameters()} == {there}


def test_the_names_told_before_pytorch_is_imported_are_those_of_the_registry():
    from corda_vlm.families.loading.sources import FAMILY_NAMES

    own = [name for name, family in FAMILIES.items() if family.load.__module__.startswith("corda_vlm.")]  # fmt: skip
    assert sorted(FAMILY_NAMES) == sorted(own)
