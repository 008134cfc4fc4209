"""What plain PEFT trained from an export of ours comes home as an adapter of ours."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, CLIPModel

from corda_vlm.__main__ import main
from corda_vlm.adapter import (
    at_scale,
    attach_adapter,
    export_adapter,
    import_adapter,
    load_adapter,
    restore,
)
from corda_vlm.adapter.paired import paired_layers, trained
from corda_vlm.anchor import anchor_penalty
from corda_vlm.covariance import collect_covariance
from corda_vlm.errors import CordaError, ForeignFileError
from tests.adapter.exchange.test_export import embed, relative
from tests.adapter.exchange.test_export_for_peft import IDS, learn, llama, logits, plan_of  # noqa: F401


def of(model: Any) -> Any:
    return model.peft_config["default"]


def by_plain_peft(
    base: nn.Module, adapter: Path, out: Path, **where: Any
) -> tuple[Path, PeftModel]:
    """A few steps of plain PEFT from an exported adapter, saved."""
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True, **where)
    learn(model)
    model.save_pretrained(out)
    return out, model


@pytest.mark.parametrize(
    ("format", "layout", "base"),
    [("residual", "ours", "base"), ("residual", "peft", "."), ("lora", "ours", "../original")],
)
def test_it_gives_what_the_tool_gives_and_is_one_of_ours(llama, tmp_path, format, layout, base):  # noqa: F811
    before = logits(llama)
    attached = attach_adapter(llama, plan_of(llama))
    start = export_adapter(attached, tmp_path / "start", format=format, layout=layout)
    theirs, model = by_plain_peft(
        AutoModelForCausalLM.from_pretrained(start / base),
        start,
        tmp_path / "theirs",
        **({"subfolder": "corda_init"} if layout == "peft" else {}),
    )
    after = logits(model)
    original = restore(attached)
    home = import_adapter(original, trained=theirs, start=start if format == "lora" else None)
    assert torch.allclose(logits(home), after, atol=1e-4)
    with at_scale(home, 0.0):
        assert torch.equal(logits(home), before)
    layers = paired_layers(home)
    assert {layer.r["default"] for layer in layers.values()} == {6 if format == "lora" else 3}
    assert of(home).origin["method"] == "pissa"

    batch = {"input_ids": torch.randint(3, 60, (8, 12))}
    store = collect_covariance(original_of(tmp_path), [batch], show_progress=False)
    assert 0 < float(anchor_penalty(home, store)().detach()) < 10
    home.save_pretrained(tmp_path / "home")
    again = load_adapter(original_of(tmp_path), tmp_path / "home")
    assert torch.allclose(logits(again), after, atol=1e-4)
    small = export_adapter(again, tmp_path / "small", rank=3)
    assert json.loads((small / "corda_export.json").read_text())["relative_error"] < 1


def original_of(tmp_path: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tmp_path / "original").eval()


def changed(start: Path, out: Path, **options: Any) -> Path:
    """What a tool may have written: the start's factors, changed, under its own configuration."""
    out.mkdir()
    config = json.loads((start / "adapter_config.json").read_text()) | options
    (out / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(start / "adapter_model.safetensors")
    save_file(
        {k: t * 1.1 if "lora_B" in k else t for k, t in tensors.items()},
        out / "adapter_model.safetensors",
    )
    return out


def test_an_open_clip_comes_home_from_the_names_of_transformers(tiny_open_clip, tmp_path):
    attached = attach_adapter(tiny_open_clip, plan_of(tiny_open_clip))
    start = export_adapter(attached, tmp_path / "start", format="residual")
    original = restore(attached)
    theirs = changed(start, tmp_path / "theirs")
    plain = PeftModel.from_pretrained(CLIPModel.from_pretrained(start / "base"), str(theirs))
    home = import_adapter(original, trained=theirs)
    assert relative(embed(home), embed(plain.eval())) < 1e-4
    assert any("resblocks" in name for name in paired_layers(home))
    # A was left as it was: the adapter is as one that freezes it
    assert all(layer.a_is_frozen("default") for layer in paired_layers(home).values())


def test_a_lora_that_had_learned_before_it_left(tiny_clip_hf, tmp_path):
    """The change is that of the original weights: what had been learned before counts."""
    bare = copy.deepcopy(tiny_clip_hf)
    attached = attach_adapter(tiny_clip_hf, plan_of(tiny_clip_hf))
    with torch.no_grad():
        for layer in paired_layers(attached).values():
            trained(layer, "default")[0].mul_(1.3)
    start = export_adapter(attached, tmp_path / "start")
    theirs = changed(start, tmp_path / "theirs")
    plain = PeftModel.from_pretrained(copy.deepcopy(bare), str(theirs)).eval()
    home = import_adapter(copy.deepcopy(bare), trained=theirs, start=start)
    assert relative(embed(home), embed(plain)) < 1e-4
    with at_scale(home, 0.0):
        assert torch.equal(embed(home), embed(bare))


def test_the_scaling_of_the_tool_is_heeded(tiny_clip_hf, tmp_path):
    bare = copy.deepcopy(tiny_clip_hf)
    start = export_adapter(attach_adapter(tiny_clip_hf, plan_of(tiny_clip_hf)), tmp_path / "start")
    for number, options in enumerate(({"lora_alpha": 12}, {"use_rslora": True})):
        theirs = changed(start, tmp_path / str(number), **options)
        plain = PeftModel.from_pretrained(copy.deepcopy(bare), str(theirs)).eval()
        home = import_adapter(copy.deepcopy(bare), trained=theirs, start=start)
        assert relative(embed(home), embed(plain)) < 1e-4


def test_modules_trained_in_full_come_home_too(tiny_clip_hf, tmp_path):
    bare = copy.deepcopy(tiny_clip_hf)
    plan = plan_of(tiny_clip_hf, roles="q")
    attached = attach_adapter(tiny_clip_hf, plan, modules_to_save=["visual_projection"])
    start = export_adapter(attached, tmp_path / "start")
    model = PeftModel.from_pretrained(copy.deepcopy(bare), str(start), is_trainable=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "theirs")
    home = import_adapter(copy.deepcopy(bare), trained=tmp_path / "theirs", start=start)
    assert relative(embed(home), embed(model.eval())) < 1e-4


def test_pefts_own_start_before_training(llama, tmp_path):  # noqa: F811
    """Not from an export: PEFT's own CorDA or PiSSA, of which the adapter was saved before training."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(llama, config)
    of(model).init_lora_weights = True
    model.save_pretrained(tmp_path / "init")
    learn(model)
    model.save_pretrained(tmp_path / "theirs")
    home = import_adapter(
        original_of(tmp_path), trained=tmp_path / "theirs", start=tmp_path / "init"
    )
    assert torch.allclose(logits(home), logits(model), atol=1e-4)


def test_on_the_command_line(llama, tmp_path, capsys):  # noqa: F811
    attached = attach_adapter(llama, plan_of(llama))
    start = export_adapter(attached, tmp_path / "start", format="residual")
    theirs = changed(start, tmp_path / "theirs")
    main(["import", str(tmp_path / "original"), str(theirs), str(tmp_path / "home")])
    assert "Next: corda-vlm evaluate" in capsys.readouterr().out
    home = load_adapter(original_of(tmp_path), tmp_path / "home")
    assert torch.allclose(
        logits(home), logits(import_adapter(original_of(tmp_path), trained=theirs)), atol=1e-6
    )
    with pytest.raises(SystemExit):
        main(["import", str(tmp_path / "original"), str(theirs), str(tmp_path / "theirs")])
    assert "is not empty and no export" in capsys.readouterr().err


class TestRefused:
    @pytest.fixture
    def start(self, tiny_clip_hf, tmp_path) -> Path:
        self.bare = copy.deepcopy(tiny_clip_hf)
        return export_adapter(
            attach_adapter(tiny_clip_hf, plan_of(tiny_clip_hf)),
            tmp_path / "start",
            format="residual",
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"use_dora": True}, "trained with use_dora=True"),
            ({"bias": "all"}, "trained with bias='all'"),
            ({"lora_alpha": 0}, "leaves nothing"),
            ({"peft_type": "CORDA_VLM"}, "is an adapter of this package already"),
            ({"base_model_name_or_path": "elsewhere"}, "start of .* is not found.*--start"),
        ],
    )
    def test_a_configuration(self, start, tmp_path, options, message):
        theirs = changed(start, tmp_path / "theirs", **options)
        with pytest.raises(CordaError, match=message):
            import_adapter(self.bare, trained=theirs)
        assert not paired_layers(self.bare)

    def test_another_model(self, start, tmp_path, request):
        theirs = changed(start, tmp_path / "theirs")
        with torch.no_grad():
            for parameter in self.bare.parameters():
                parameter.neg_()
        with pytest.raises(
            ForeignFileError, match=r"other layers or other weights. Load the original"
        ):
            import_adapter(self.bare, trained=theirs)
        other = request.getfixturevalue("tiny_open_clip")
        report = json.loads((start / "corda_export.json").read_text())
        (start / "corda_export.json").write_text(json.dumps({**report, "original": {}}))
        with pytest.raises(ForeignFileError, match=r"other layers|has no layer|is another model"):
            import_adapter(other, trained=theirs)

    def test_another_start(self, start, tmp_path):
        theirs = changed(start, tmp_path / "theirs")
        other = attach_adapter(copy.deepcopy(self.bare), plan_of(self.bare, rank=2))
        second = export_adapter(other, tmp_path / "second", format="residual")
        with pytest.raises(ForeignFileError, match=r"not the one that belongs to"):
            import_adapter(self.bare, trained=theirs, start=second)
        (second / "base.json").unlink()
        with pytest.raises(ForeignFileError, match="has rank 3 and 2"):
            import_adapter(self.bare, trained=theirs, start=second)
        merged = export_adapter(restore_and_attach(other), tmp_path / "merged", format="merged")
        with pytest.raises(ForeignFileError, match="is no export to train from"):
            import_adapter(self.bare, trained=theirs, start=merged)

    def test_tensors(self, start, tmp_path):
        theirs = changed(start, tmp_path / "theirs")
        path = theirs / "adapter_model.safetensors"
        whole = load_file(path)
        first = sorted(whole)[0]
        save_file({k: t for k, t in whole.items() if k != first}, path)
        with pytest.raises(ForeignFileError, match="lacks one of the two factors"):
            import_adapter(self.bare, trained=theirs)
        save_file({k: t for k, t in whole.items() if first.rpartition(".lora_")[0] not in k}, path)
        with pytest.raises(ForeignFileError, match="are in one of them only"):
            import_adapter(self.bare, trained=theirs)
        save_file({**whole, "base_model.model.logit_scale": torch.ones(1)}, path)
        with pytest.raises(CordaError, match="'logit_scale', which is no part of a plain LoRA"):
            import_adapter(self.bare, trained=theirs)


def restore_and_attach(attached: Any) -> Any:
    bare = restore(attached)
    return attach_adapter(bare, plan_of(bare))
