"""Names of the original LLaVA repository, and its recipe with a stand-in of its training, on shapes-llava's language model."""

from __future__ import annotations

import json
import re
import runpy
import sys
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from corda_vlm import asset, attach_adapter, export_adapter, load_model, plan_adapter
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.integrations.llava import main, rename_adapter
from corda_vlm.tensors import read_header, save_tensors

pytestmark = [pytest.mark.sees, pytest.mark.unchecked]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A start of shapes-llava's language model, as a plain LoRA."""
    loaded = load_model("shapes-llava")
    folder = tmp_path_factory.mktemp("start") / "start"
    plan = plan_adapter(loaded.model, None, method="pissa", rank=2, towers="language", roles="q,v")
    export_adapter(attach_adapter(loaded.model, plan), folder, format="lora", source="shapes-llava")
    return folder


def test_there_and_back(start, tmp_path):
    """a LoRA gets the names of the original repository, and those of transformers back"""
    main([str(start), str(tmp_path / "llava")])
    there = load_file(tmp_path / "llava" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in there
    told = json.loads((tmp_path / "llava" / "adapter_config.json").read_text())
    assert "model.layers.0.self_attn.q_proj" in told["target_modules"]
    rename_adapter(str(tmp_path / "llava"), str(tmp_path / "back"), "transformers")
    first, back = load_file(start / "adapter_model.safetensors"), load_file(tmp_path / "back" / "adapter_model.safetensors")  # fmt: skip
    assert first.keys() == back.keys()
    assert all(torch.equal(first[name], back[name]) for name in first)
    with pytest.raises(CordaError, match="is there already"):
        rename_adapter(str(start), str(tmp_path / "back"))


def test_patterns_and_the_header_are_renamed_and_kept(start, tmp_path):
    """ranks and alphas that differ stay with their layers, and what the header of the weights says is kept"""
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = load_file(start / "adapter_model.safetensors")
    save_tensors(folder / "adapter_model.safetensors", tensors, {"corda_vlm.base": "abc"})
    config = json.loads((start / "adapter_config.json").read_text())
    site = r"^model\.language_model\.layers\.0\.self_attn\.q_proj"
    config |= {"rank_pattern": {site: 7}, "alpha_pattern": {"v_proj": 5, "k_proj": 3}}
    config |= {"modules_to_save": ["model.language_model.norm"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    rename_adapter(folder, tmp_path / "new")
    told = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert told["rank_pattern"] == {r"^model\.layers\.0\.self_attn\.q_proj": 7}
    values = [site for site in told["target_modules"] if site.endswith("v_proj")]
    assert told["alpha_pattern"] == {f"^{re.escape(site)}": 5 for site in values}
    assert told["modules_to_save"] == ["model.norm"]
    _, header = read_header(tmp_path / "new" / "adapter_model.safetensors", "adapter", "")
    assert header["corda_vlm.base"] == "abc"


def test_a_command_that_cannot_be_ends_in_words(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llava", "--corda-plann", "x"])
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that it was imported before
        runpy.run_module("corda_vlm.integrations.llava", run_name="__main__")
    assert ended.value.code == 2
    assert "corda_vlm.integrations.llava: " in capsys.readouterr().err


def language_model() -> nn.Module:
    """A plain Llama with the language weights of shapes-llava: its layers are named as those of the repository's class are."""
    from transformers import LlamaForCausalLM

    whole: Any = load_model("shapes-llava").model
    model = LlamaForCausalLM(whole.config.text_config).eval()
    model.model.load_state_dict(whole.model.language_model.state_dict())
    model.lm_head.load_state_dict(whole.lm_head.state_dict())
    return model


def test_the_recipe_starts_its_training_at_the_base(start, tmp_path, monkeypatch):
    """the recipe starts at the base, with a stand-in of the repository's training, which was not installed but read"""
    import peft

    rename_adapter(str(start), str(tmp_path / "llava"))
    seen: dict[str, Any] = {}

    def train() -> None:
        from peft import LoraConfig, get_peft_model  # where it is called, as the repository does

        model: Any = language_model()
        ids = torch.arange(3, 11)[None]
        before = model(input_ids=ids).logits
        model = get_peft_model(model, LoraConfig(r=128, target_modules=["q_proj"]))
        seen["apart"] = (model(input_ids=ids).logits - before).abs().max().item()
        seen["trained"] = sorted({n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad})  # fmt: skip
        seen["rank"] = model.peft_config["default"].r

    script = ModuleType("llava.train.train")
    script.train = train  # type: ignore[attr-defined]
    for name in ("llava", "llava.train"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "llava.train.train", script)
    monkeypatch.setattr(peft, "get_peft_model", peft.get_peft_model)
    monkeypatch.setenv("CORDA_START", str(tmp_path / "llava"))
    runpy.run_path(str(asset("configs/integrations/llava_repository.py")), run_name="__main__")
    assert seen["rank"] == 4, "2r of the start, not what the command line says"
    assert seen["trained"] == ["lora_A", "lora_B"]
    assert seen["apart"] < 1e-4


@pytest.mark.parametrize("damage", ["nothing", "ours", "full"])
def test_what_is_no_plain_lora_is_refused(damage, start, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    if damage != "nothing":
        kind = "CORDA_VLM" if damage == "ours" else "LORA"
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        save_tensors(folder / "adapter_model.safetensors", {"base_model.model.lm_head.weight": torch.ones(2)})  # fmt: skip
    with pytest.raises(ForeignFileError, match=r"no adapter|format lora"):
        rename_adapter(str(folder), str(tmp_path / "new"))
