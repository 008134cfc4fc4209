"""What servers refuse, or would leave out, is refused when an adapter is exported for them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from corda_vlm.__main__ import main
from corda_vlm.adapter import attach_adapter, export_adapter
from corda_vlm.adapter.exchange.serving import SERVERS, VLLM_RANKS, Written, commands
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.plan import plan_adapter
from tests.adapter.exchange.test_export import trained
from tests.families.language_toy import LANGUAGE, VLM


def attached(model: nn.Module, *, modules_to_save: tuple[str, ...] = (), **options) -> PeftModel:
    plan = plan_adapter(model, None, method="pissa", rank=3, show_progress=False, **options)
    return attach_adapter(model, plan, modules_to_save=modules_to_save)


def exported(model: PeftModel, folder: Path, **options) -> dict:
    return json.loads((export_adapter(model, folder, **options) / "corda_export.json").read_text())


def test_vllm_is_told_the_rank_and_where_the_adapter_is(tmp_path):
    folder = tmp_path / "a colour"
    report = exported(attached(LANGUAGE["llama"]()), folder, serve="vllm", source="owner/llama")
    (command,) = report["serve_commands"]
    assert shlex.split(command) == [
        "vllm", "serve", "owner/llama", "--enable-lora", "--max-lora-rank", "8",
        "--lora-modules", f"a colour={folder}",
    ]  # fmt: skip
    assert command in (folder / "README.md").read_text()


def test_vllm_is_told_names_that_its_own_form_would_part():
    folder = Path("/runs/lr=0.001,seed=0")
    (command,) = commands("vllm", Written(folder, "lora", "owner/base", 4))
    assert json.loads(shlex.split(command)[-1]) == {"name": folder.name, "path": str(folder)}


def test_llama_cpp_converts_the_base_and_the_adapter(tmp_path):
    model = attached(LANGUAGE["llama"]())
    report = exported(model, tmp_path / "on-id", serve="llama.cpp", source="owner/llama")
    base, adapter, serve = map(shlex.split, report["serve_commands"])
    assert base[2:4] == ["--remote", "owner/llama"]
    assert adapter[2:5] == [str(tmp_path / "on-id"), "--base-model-id", "owner/llama"]
    assert serve[-1] == adapter[-1]
    report = exported(model, tmp_path / "own", serve="llama.cpp", format="residual")
    base, adapter, _ = map(shlex.split, report["serve_commands"])
    assert base[2] == adapter[4] == str(tmp_path / "own" / "base")


@pytest.mark.parametrize("server", SERVERS)
def test_a_merged_model_is_a_model_as_any_other(server, tmp_path):
    model = attached(LANGUAGE["gpt2"](), modules_to_save=("transformer.ln_f",))
    report = exported(model, tmp_path / "merged", format="merged", serve=server)
    assert str(tmp_path / "merged") in report["serve_commands"][0]
    assert "lora" not in "".join(report["serve_commands"])


@pytest.mark.parametrize("server", SERVERS)
def test_what_would_be_left_out_is_refused_before_anything_is_written(server, tmp_path):
    llama, llava = LANGUAGE["llama"](), VLM["llava"]()
    seen = attached(llava, towers="vision,language")
    for model, message in (
        (attached(LANGUAGE["gpt2"]()), "stored transposed.*this adapter has 8"),
        (attached(llama, modules_to_save=("model.norm",)), "trained in full.*first 'model.norm'"),
        (seen, "language model alone.* first 'model.vision_tower"),
    ):
        with pytest.raises(CordaError, match=f"{message}.*Take format='merged'"):
            export_adapter(model, tmp_path / "out", serve=server)
    assert not (tmp_path / "out").exists()
    export_adapter(attached(VLM["llava"](), towers="language"), tmp_path / "out", serve=server)


def test_a_head_that_is_tied_is_none_of_its_own(tmp_path):
    options = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    for tied in (True, False):
        torch.manual_seed(0)
        config = LlamaConfig(**options, num_attention_heads=2, tie_word_embeddings=tied)
        model: Any = get_peft_model(
            LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["lm_head"])
        )
        export_adapter(model, tmp_path / f"vllm-{tied}", serve="vllm")
        if tied:
            with pytest.raises(CordaError, match=r"tied to the embeddings.*first 'lm_head'"):
                export_adapter(model, tmp_path / "tied", serve="llama.cpp")
        else:
            export_adapter(model, tmp_path / "free", serve="llama.cpp")


def test_ranks_end_where_vllm_ends():
    written = Written(Path("/a"), "lora", "owner/base", 320)
    assert "--max-lora-rank 320" in commands("vllm", written)[0]
    with pytest.raises(CordaError, match="rank 513, and vllm takes at most 512; give rank=512"):
        commands("vllm", Written(Path("/a"), "lora", "owner/base", VLLM_RANKS[-1] + 1))
    assert commands("llama.cpp", Written(Path("/a"), "lora", "owner/base", 513))


def test_wrong_words(tiny_clip_hf, tmp_path):
    model = trained(tiny_clip_hf)
    with pytest.raises(UnknownNameError, match=r"unknown server 'vlm'.*Did you mean 'vllm'"):
        export_adapter(model, tmp_path / "a", serve="vlm")
    with pytest.raises(CordaError, match="for models that generate text, and CLIPModel is none"):
        export_adapter(model, tmp_path / "a", serve="vllm")
    with pytest.raises(CordaError, match="take layout='ours'"):
        model = attached(LANGUAGE["llama"]())
        export_adapter(model, tmp_path / "a", serve="vllm", format="residual", layout="peft")


def test_the_verb_prints_the_commands(tmp_path, capsys):
    model = LANGUAGE["llama"]().eval()
    model.save_pretrained(tmp_path / "base")
    attached(model).save_pretrained(tmp_path / "adapter")
    base, adapter, out = (str(tmp_path / name) for name in ("base", "adapter", "out"))
    main(["export", base, adapter, out, "--format", "lora", "--serve", "vllm"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"vllm serve {base} --enable-lora --max-lora-rank 8 ")
