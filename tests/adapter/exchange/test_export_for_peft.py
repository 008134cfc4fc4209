"""What we export is as PEFT itself lays it out, and former versions of PEFT read it without a warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, CLIPModel

from corda_vlm.__main__ import main
from corda_vlm.adapter import attach_adapter, export_adapter
from corda_vlm.adapter.exchange.plain_lora import KNOWN
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.plan import plan_adapter
from tests.adapter.exchange.test_export import embed, relative, trained
from tests.families.language_toy import LANGUAGE

IDS = torch.arange(3, 15)[None]


def plan_of(model: nn.Module, **options: Any):
    return plan_adapter(
        model, None, **{"method": "pissa", "rank": 3, "show_progress": False, **options}
    )


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def learn(model: nn.Module, steps: int = 3) -> None:
    """A few steps of a plain optimizer on what plain PEFT has made trainable."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert parameters
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def llama(tmp_path) -> nn.Module:
    model = LANGUAGE["llama"]().eval()
    model.save_pretrained(tmp_path / "original")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "original")


class TestLayoutOfPeft:
    def test_what_plain_peft_trains_it_converts_for_the_original_model(self, llama, tmp_path):
        before = logits(llama)
        folder = export_adapter(
            attach_adapter(llama, plan_of(llama)), tmp_path / "start", format="residual", layout="peft"
        )  # fmt: skip
        assert not (folder / "corda_trained").exists()
        base = AutoModelForCausalLM.from_pretrained(folder)
        model = PeftModel.from_pretrained(
            base, str(folder), subfolder="corda_init", is_trainable=True
        )
        assert torch.allclose(logits(model), before, atol=1e-5)
        learn(model)
        after = logits(model)
        assert not torch.allclose(after, before, atol=1e-2)
        model.save_pretrained(
            tmp_path / "lora", path_initial_model_for_weight_conversion=str(folder / "corda_init")
        )
        original = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
        converted = PeftModel.from_pretrained(original, str(tmp_path / "lora"))
        assert torch.allclose(logits(converted), after, atol=1e-4)
        assert config_in(tmp_path / "lora")["r"] == 6

    def test_what_has_been_learned_is_beside_it(self, tiny_clip_hf, tmp_path):
        attached = trained(tiny_clip_hf)
        folder = export_adapter(attached, tmp_path / "now", format="residual", layout="peft")
        for name, want in (("corda_trained", embed(attached)), ("corda_init", None)):
            model = PeftModel.from_pretrained(
                CLIPModel.from_pretrained(folder), str(folder), subfolder=name
            ).eval()
            with attached.disable_adapter():
                want = embed(attached) if want is None else want
            assert relative(embed(model), want) < 1e-4, name
        report = json.loads((folder / "corda_export.json").read_text())
        assert report["layout"] == "peft"
        assert "corda_trained" in report["load"]

    def test_packed_attention_is_written_under_the_names_of_transformers(
        self, tiny_open_clip, tmp_path
    ):
        attached = trained(tiny_open_clip)
        folder = export_adapter(attached, tmp_path / "now", format="residual", layout="peft")
        model = PeftModel.from_pretrained(
            CLIPModel.from_pretrained(folder), str(folder), subfolder="corda_trained"
        )
        assert relative(embed(model.eval()), embed(attached)) < 1e-4

    def test_on_the_command_line(self, llama, tmp_path):
        attach_adapter(llama, plan_of(llama)).save_pretrained(tmp_path / "adapter")
        original, adapter, out = (str(tmp_path / n) for n in ("original", "adapter", "out"))
        main(["export", original, adapter, out, "--format", "residual", "--layout", "peft"])
        assert (tmp_path / "out" / "corda_init" / "adapter_model.safetensors").is_file()
        assert (tmp_path / "out" / "model.safetensors").is_file()

    def test_wrong_words(self, tiny_clip_hf, tmp_path):
        attached = trained(tiny_clip_hf)
        with pytest.raises(UnknownNameError, match="unknown layout 'pefd'"):
            export_adapter(attached, tmp_path / "a", format="residual", layout="pefd")
        with pytest.raises(CordaError, match="layout='peft' is of format 'residual', not 'lora'"):
            export_adapter(attached, tmp_path / "a", layout="peft")


class TestConfiguration:
    def test_a_language_model_says_its_task(self, llama, tmp_path):
        attached = attach_adapter(llama, plan_of(llama))
        config = config_in(export_adapter(attached, tmp_path / "lora"))
        assert config["task_type"] == "CAUSAL_LM"
        assert config["auto_mapping"] is None

    def test_a_clip_has_none_and_says_its_class(self, tiny_clip_hf, tmp_path):
        config = config_in(export_adapter(trained(tiny_clip_hf), tmp_path / "lora"))
        assert config["task_type"] is None
        assert config["auto_mapping"]["base_model_class"] == "CLIPModel"

    def test_former_versions_of_peft_know_every_key(self, tiny_clip_hf, tmp_path):
        """PEFT before 0.18 has the fields of `KNOWN`, and warns of any other."""
        folder = export_adapter(trained(tiny_clip_hf), tmp_path / "lora")
        assert config_in(folder).keys() <= KNOWN
        ours, usual = LoraConfig.from_pretrained(str(folder)), LoraConfig()
        for key in LoraConfig.__dataclass_fields__.keys() - KNOWN:
            assert getattr(ours, key) == getattr(usual, key), key


def test_the_card_says_how_to_load_it(llama, tiny_clip_hf, tmp_path):
    folder = export_adapter(
        attach_adapter(llama, plan_of(llama)), tmp_path / "start", format="residual", layout="peft"
    )
    card: Any = ModelCard.load(folder / "README.md")
    assert "path_initial_model_for_weight_conversion='HERE/corda_init'" in card.text
    assert "corda-vlm import" in card.text
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None  # a folder is no id on the hub
    folder = export_adapter(
        trained(tiny_clip_hf), tmp_path / "lora", source="openai/clip-vit-base-patch32"
    )
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "openai/clip-vit-base-patch32"
    assert "Made by" in card.text
    assert "`pissa`" in card.text
