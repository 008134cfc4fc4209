"""Exports load in a process that never imports corda_vlm, and give the same outputs."""

from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from corda_vlm.__main__ import main
from corda_vlm.adapter import attach_adapter, export_adapter, load_adapter, restore, scaled
from corda_vlm.adapter.exchange.factors import recompress
from corda_vlm.adapter.folder import save_model
from corda_vlm.adapter.paired import paired_layers
from corda_vlm.covariance import collect_covariance
from corda_vlm.errors import CordaError, ForeignFileError, UnknownNameError
from corda_vlm.families import detect_family, load_model
from corda_vlm.families.layers.attention import is_packed
from corda_vlm.methods import prepare_method
from corda_vlm.plan import plan_adapter
from corda_vlm.train import Head
from corda_vlm.train.trained import load_trained
from corda_vlm.train.weights import save_weights

MODELS = ("tiny_clip_hf", "tiny_open_clip", "tiny_siglip")
BASES = ("untouched", "residual")


def make_batch(size: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 98, (size, 12), generator=generator)
    ids[:, -1] = 99
    return {
        "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
        "input_ids": ids,
    }


@torch.no_grad()
def embed(model: nn.Module) -> torch.Tensor:
    family, batch = detect_family(model), make_batch(seed=2)
    batch["pixel_values"] = batch["pixel_values"].to(next(model.parameters()).dtype)
    image, text = (
        family.need_contrastive(model).encode_image(model, batch),
        family.need_contrastive(model).encode_text(model, batch),
    )
    return torch.cat([image.float().flatten(), text.float().flatten()])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def trained(model: nn.Module, base: str = "untouched", **options):
    """A model with an adapter that has learned something."""
    freeze_a = options.pop("freeze_a", False)
    plan = plan_adapter(
        model,
        None,
        **dict[str, Any]({"method": "pissa", "rank": 3, "show_progress": False, **options}),
    )
    attached = attach_adapter(model, plan, base=base, freeze_a=freeze_a)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return attached


PLAIN = """
import json, sys, torch
from pathlib import Path
from peft import LoraConfig, PeftModel, get_peft_model
import open_clip, transformers

jobs, batch = json.loads(sys.argv[1]), torch.load(sys.argv[2], weights_only=True)
for job in jobs:
    if job["kind"] == "open_clip":
        model = open_clip.create_model("local-dir:" + job["model"]).eval()
    else:
        model = getattr(transformers, job["kind"]).from_pretrained(job["model"]).eval()
    if job.get("adapter"):
        model = PeftModel.from_pretrained(model, job["adapter"]).eval()
    with torch.no_grad():
        if job["kind"] == "open_clip":
            image, text = model.encode_image(batch["pixel_values"]), model.encode_text(batch["input_ids"])
        else:
            image = model.get_image_features(batch["pixel_values"])
            text = model.get_text_features(batch["input_ids"])
            image, text = (getattr(out, "pooler_output", out) for out in (image, text))  # transformers 5
    torch.save(torch.cat([image.float().flatten(), text.float().flatten()]), job["out"])
assert not [m for m in sys.modules if m.startswith("corda_vlm")]
"""


def run_plain(jobs: list[dict[str, str]], folder) -> list[torch.Tensor]:
    """Load and run each job in one process that does not know us."""
    torch.save(make_batch(seed=2), folder / "batch.pt")
    for number, job in enumerate(jobs):
        job["out"] = str(folder / f"out{number}.pt")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(jobs), str(folder / "batch.pt")],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "missing adapter keys" not in done.stderr
    return [torch.load(job["out"], weights_only=True) for job in jobs]


def test_everything_loads_without_us_and_gives_the_same_outputs(request, tmp_path):
    """All models, base modes and formats; one process, because importing takes seconds."""
    jobs, expected, labels = [], [], []

    def job(label: str, attached, **fields: str | Path) -> None:
        labels.append(label)
        jobs.append({key: str(value) for key, value in fields.items()})
        expected.append(embed(attached))

    for base in BASES:
        folder = tmp_path / base
        clip = request.getfixturevalue("tiny_clip_hf")
        clip.save_pretrained(folder / "clip")
        attached = trained(clip, base)
        lora = export_adapter(attached, folder / "clip-lora")
        job(f"clip lora {base}", attached, kind="CLIPModel", model=folder / "clip", adapter=lora)
        exact = export_adapter(attached, folder / "clip-rank6", rank=6)
        job(f"clip rank 6 {base}", attached, kind="CLIPModel", model=folder / "clip", adapter=exact)
        rest = export_adapter(attached, folder / "clip-residual", format="residual")
        job(f"clip residual {base}", attached, kind="CLIPModel", model=rest / "base", adapter=rest)
        merged = export_adapter(attached, folder / "clip-merged", format="merged")
        job(f"clip merged {base}", attached, kind="CLIPModel", model=merged)
        restore(attached)

        attached = trained(request.getfixturevalue("tiny_open_clip"), base)
        lora = export_adapter(attached, folder / "open-lora")
        job(f"open lora {base}", attached, kind="CLIPModel", model=lora / "base", adapter=lora)
        rest = export_adapter(attached, folder / "open-residual", format="residual")
        job(f"open residual {base}", attached, kind="CLIPModel", model=rest / "base", adapter=rest)
        merged = export_adapter(attached, folder / "open-merged", format="merged")
        job(f"open merged {base}", attached, kind="open_clip", model=merged)
        bare = restore(attached)

        # no part of packed attention: plain peft takes it on open_clip itself, text tower only
        attached = trained(bare, base, towers="text", roles="up,down")
        lora = export_adapter(attached, folder / "mlp-lora")
        assert not (lora / "base").exists()
        rest = export_adapter(attached, folder / "mlp-residual", format="residual")
        job(
            f"open mlp residual {base}",
            attached,
            kind="open_clip",
            model=rest / "base",
            adapter=rest,
        )
        bare = restore(attached)
        original = trained(bare, base, towers="text", roles="up")
        with scaled(original, 0.0):  # an open_clip folder of the original
            plain = export_adapter(original, folder / "open", format="merged")
        restore(original)
        attached = trained(bare, base, towers="text", roles="up,down")
        job(f"open mlp lora {base}", attached, kind="open_clip", model=plain, adapter=lora)
        restore(attached)

        siglip = request.getfixturevalue("tiny_siglip")
        siglip.save_pretrained(folder / "siglip")
        attached = trained(siglip, base)
        merged = export_adapter(attached, folder / "siglip-merged", format="merged")
        job(f"siglip merged {base}", attached, kind="SiglipModel", model=merged)
        bare = restore(attached)
        attached = trained(bare, base, towers="text", freeze_a=base == "untouched")
        lora = export_adapter(attached, folder / "siglip-lora")
        job(
            f"siglip lora {base}",
            attached,
            kind="SiglipModel",
            model=folder / "siglip",
            adapter=lora,
        )
        restore(attached)

        resnet = request.getfixturevalue("tiny_resnet")
        save_model(resnet, folder / "resnet", None)
        attached = trained(resnet, base, roles="conv")
        lora = export_adapter(attached, folder / "resnet-lora")
        job(
            f"resnet lora {base}", attached, kind="open_clip", model=folder / "resnet", adapter=lora
        )
        rest = export_adapter(attached, folder / "resnet-residual", format="residual")
        job(
            f"resnet residual {base}", attached, kind="open_clip", model=rest / "base", adapter=rest
        )
        merged = export_adapter(attached, folder / "resnet-merged", format="merged")
        job(f"resnet merged {base}", attached, kind="open_clip", model=merged)
        restore(attached)

    for label, out, want in zip(labels, run_plain(jobs, tmp_path), expected, strict=True):
        assert relative(out, want) < 1e-4, label


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("base", BASES)
def test_the_model_in_memory_stays_as_it_was(name, base, request, tmp_path):
    attached = trained(request.getfixturevalue(name), base)
    before = {k: v.clone() for k, v in attached.state_dict().items()}
    pointers = {k: v.data_ptr() for k, v in attached.state_dict().items()}
    modules = list(attached.modules())
    outputs = embed(attached)
    for format in ("lora", "residual", "merged"):
        if name == "tiny_siglip" and format != "merged":
            with pytest.raises(CordaError, match=r"head\.attention.*format='merged'"):
                export_adapter(attached, tmp_path / format, format=format)
            assert not (tmp_path / format).exists()
        else:
            export_adapter(attached, tmp_path / format, format=format)
    after = attached.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert {k: v.data_ptr() for k, v in after.items()} == pointers
    assert all(a is b for a, b in zip(attached.modules(), modules, strict=True))
    assert torch.equal(embed(attached), outputs)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("base", BASES)
def test_bfloat16(tiny_open_clip, base, tmp_path):
    attached = trained(tiny_open_clip.to(torch.bfloat16), base)
    outputs = embed(attached)
    merged = load_model(
        export_adapter(attached, tmp_path / "merged", format="merged"), dtype=torch.bfloat16
    ).model
    assert {
        t.dtype for t in load_file(tmp_path / "merged/open_clip_model.safetensors").values()
    } == {torch.bfloat16}
    assert relative(embed(merged), outputs) < 0.1


class TestLora:
    def test_one_rank_and_alpha_everywhere_though_the_plan_varies(self, tiny_clip_hf, tmp_path):
        store = collect_covariance(tiny_clip_hf, [make_batch(80)], show_progress=False)
        plan = plan_adapter(tiny_clip_hf, store, rank=5, dynamic_rank=True, show_progress=False)
        attached = attach_adapter(tiny_clip_hf, plan)
        assert len({s.rank for s in plan.sites}) > 1
        folder = export_adapter(attached, tmp_path / "lora")
        config = json.loads((folder / "adapter_config.json").read_text())
        widest = 2 * max(s.rank for s in plan.sites)
        assert config["r"] == config["lora_alpha"] == widest
        assert not config["rank_pattern"]
        assert not config["alpha_pattern"]
        assert config["peft_type"] == "LORA"
        assert sorted(config["target_modules"]) == sorted(s.site.name for s in plan.sites)
        for key, tensor in load_file(folder / "adapter_model.safetensors").items():
            assert tensor.shape[0 if "lora_A" in key else 1] == widest

    def test_frozen_a_needs_half_the_rank(self, tiny_clip_hf, tmp_path):
        attached = trained(tiny_clip_hf, roles="up", freeze_a=True)
        config = json.loads(
            (export_adapter(attached, tmp_path / "lora") / "adapter_config.json").read_text()
        )
        assert config["r"] == 3

    def test_the_product_is_the_change(self, tiny_clip_hf, tmp_path):
        attached = trained(tiny_clip_hf)
        tensors = load_file(
            export_adapter(attached, tmp_path / "lora") / "adapter_model.safetensors"
        )
        for name, layer in paired_layers(attached).items():
            A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            (b0, a0) = layer.pair("default")
            b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            assert A.shape[0] == 6
            assert torch.allclose(B @ A, b @ a - b0 @ a0, atol=1e-5)

    def test_recompressed_says_what_it_lost(self, tiny_clip_hf, tmp_path):
        attached = trained(tiny_clip_hf)
        folder = export_adapter(attached, tmp_path / "lora", rank=2)
        report = json.loads((folder / "corda_export.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        lost = whole = 0.0
        for name, layer in paired_layers(attached).items():
            A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            assert A.shape[0] == 2
            full = layer.get_delta_weight("default").detach()
            lost += float((full - B @ A).square().sum())
            whole += float(full.square().sum())
            best = torch.linalg.svdvals(full)[2:].square().sum()
            assert (full - B @ A).square().sum() <= 1.001 * best + 1e-9
        assert report["rank"] == 2
        assert report["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
        assert 0 < report["relative_error"] < 1

    def test_recompress_of_nothing(self):
        small, error = recompress({"a": (torch.zeros(6, 4), torch.randn(4, 5))}, 2)
        assert error == 0
        assert torch.equal(small["a"][0] @ small["a"][1], torch.zeros(6, 5))
        with pytest.raises(CordaError, match="rank 0"):
            recompress({}, 0)
        with pytest.raises(
            CordaError, match="rank 9 is outside 1 to 4, the rank of what was learned"
        ):
            recompress({"a": (torch.zeros(6, 4), torch.randn(4, 5))}, 9)

    def test_our_own_lora_and_not_dora(self, tiny_clip_hf, tmp_path):
        attached = prepare_method("lora", tiny_clip_hf, rank=4)
        with torch.no_grad():
            for parameter in attached.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02)
        outputs = embed(attached)
        lora = export_adapter(attached, tmp_path / "lora")
        assert json.loads((lora / "adapter_config.json").read_text())["r"] == 4
        merged = load_model_hf(export_adapter(attached, tmp_path / "merged", format="merged"))
        assert relative(embed(merged), outputs) < 1e-4
        with pytest.raises(CordaError, match="no initial pair"):
            export_adapter(attached, tmp_path / "residual", format="residual")
        attached = prepare_method("dora", restore(attached), rank=4)
        with pytest.raises(CordaError, match=r"no plain LoRA.*'merged'"):
            export_adapter(attached, tmp_path / "dora")


def load_model_hf(folder) -> nn.Module:
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(folder).eval()


class TestMerged:
    def test_open_clip_comes_back_packed_and_our_loader_reads_it(self, tiny_open_clip, tmp_path):
        attached = trained(tiny_open_clip)
        folder = export_adapter(attached, tmp_path / "merged", format="merged")
        assert sorted(p.name for p in folder.iterdir()) == [
            "README.md", "corda_export.json", "open_clip_config.json", "open_clip_model.safetensors",
        ]  # fmt: skip
        loaded = load_model(folder).model
        assert any(is_packed(m) for m in loaded.modules())
        assert loaded.state_dict().keys() == restore(attached).state_dict().keys()

    def test_while_it_is_merged_in_memory(self, tiny_open_clip, tmp_path):
        attached = trained(tiny_open_clip)
        outputs = embed(attached)
        attached.merge_adapter()
        loaded = load_model(export_adapter(attached, tmp_path / "merged", format="merged")).model
        assert relative(embed(loaded), outputs) < 1e-4
        attached.unmerge_adapter()
        assert torch.equal(embed(attached), outputs)

    def test_a_source_gives_its_configuration_and_processor(self, tiny_clip_hf, tmp_path):
        source = tmp_path / "source"
        source.mkdir()
        (source / "preprocessor_config.json").write_text("{}")
        (source / "model.safetensors").write_text("not copied")
        folder = export_adapter(
            trained(tiny_clip_hf), tmp_path / "m", format="merged", source=source
        )
        assert (folder / "preprocessor_config.json").read_text() == "{}"
        assert relative(embed(load_model_hf(folder)), embed(tiny_clip_hf)) < 1e-4

    def test_open_clip_configuration_from_a_source(self, tiny_open_clip, tmp_path):
        first = export_adapter(trained(tiny_open_clip), tmp_path / "first", format="merged")
        config = json.loads((first / "open_clip_config.json").read_text())
        config["preprocess_cfg"] = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
        (first / "open_clip_config.json").write_text(json.dumps(config))
        loaded = load_model(first).model
        for source in (first, None):  # None: open_clip keeps the preprocessing on the model
            folder = export_adapter(
                attached := trained(loaded), tmp_path / "again", format="merged", source=source
            )
            again = json.loads((folder / "open_clip_config.json").read_text())
            assert again["preprocess_cfg"]["mean"] == [0.5, 0.5, 0.5]
            assert again["model_cfg"]["vision_cfg"]["layers"] == 2
            restore(attached)


def test_a_model_of_the_zoo(tmp_path):
    """Real weights: through open_clip merged, and through transformers as a LoRA on the converted base."""
    from transformers import CLIPModel

    loaded = load_model("emoji-clip")
    family = detect_family(loaded.model)
    texts, images = loaded.processor.text(["a red apple", "two cats"]), torch.randn(2, 3, 64, 64)

    @torch.no_grad()
    def run(model: nn.Module) -> torch.Tensor:
        family = detect_family(model)
        return torch.cat(
            [
                family.need_contrastive(model).encode_image(model, images),
                family.need_contrastive(model).encode_text(model, texts),
            ]
        )

    attached = trained(loaded.model)
    outputs = run(attached)
    merged = export_adapter(attached, tmp_path / "merged", format="merged", source="emoji-clip")
    again = load_model(merged)
    assert detect_family(again.model) is family
    assert relative(run(again.model), outputs) < 1e-4
    assert torch.equal(again.processor.text(["two cats"])["input_ids"], texts["input_ids"][1:])
    lora = export_adapter(attached, tmp_path / "lora")
    base = load_model(lora / "base")
    assert isinstance(base.model, CLIPModel)
    plain = PeftModel.from_pretrained(base.model, lora)
    assert relative(run(plain), outputs) < 1e-4


class TestOpenClipConfig:
    @pytest.mark.parametrize(
        ("vision", "text", "options"),
        [
            ({}, {}, {"quick_gelu": True}),
            ({"no_ln_pre": True, "pool_type": "avg"}, {"pool_type": "last", "no_causal_mask": True}, {}),
            ({"mlp_ratio": 2.0, "ls_init_value": 0.1}, {"proj_bias": True}, {"init_logit_bias": -10.0}),
            ({"final_ln_after_pool": True, "pool_type": "avg"}, {}, {"custom": True}),
            ({}, {"pool_type": "eos", "eos_id": 99}, {"custom": True, "nonscalar_logit_scale": True}),
        ],
    )  # fmt: skip
    def test_is_read_off_the_modules(self, vision, text, options):
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

        from corda_vlm.families.loading.open_clip_config import open_clip_config

        kind = CustomTextCLIP if options.pop("custom", False) else CLIP
        model = kind(
            embed_dim=24,
            vision_cfg=CLIPVisionCfg(
                layers=2, width=32, head_width=16, patch_size=8, image_size=32, **vision
            ),
            text_cfg=CLIPTextCfg(
                context_length=12, vocab_size=100, width=32, heads=2, layers=2, **text
            ),
            **options,
        )
        config = open_clip_config(model)["model_cfg"]
        for key, value in vision.items():
            if key != "ls_init_value":
                assert config["vision_cfg"][key] == value
        for key, value in text.items():
            assert config["text_cfg"].get(key) == value
        json.dumps(config)

    def test_what_cannot_be_read_off_asks_for_the_source(self, tiny_open_clip):
        from corda_vlm.families.loading.open_clip_config import open_clip_config

        tiny_open_clip.visual.transformer.resblocks[1].mlp.gelu = nn.Tanh()
        with pytest.raises(CordaError, match="source="):
            open_clip_config(tiny_open_clip)


class TestFolder:
    def test_refuses_what_it_did_not_write(self, tiny_clip_hf, tmp_path):
        attached = trained(tiny_clip_hf)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("years of work")
        with pytest.raises(CordaError, match=r"thesis\.txt"):
            export_adapter(attached, tmp_path / "mine")
        with pytest.raises(CordaError, match="is a file"):
            export_adapter(attached, tmp_path / "mine" / "thesis.txt")
        assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CordaError, match="a device or a pipe"):
            export_adapter(attached, tmp_path / "pipe")
        assert (tmp_path / "pipe").is_fifo(), "it was replaced"
        attached.save_pretrained(tmp_path / "checkpoint")
        with pytest.raises(CordaError, match="name a new folder"):
            export_adapter(attached, tmp_path / "checkpoint")

    def test_replaces_its_own_and_an_empty_one(self, tiny_clip_hf, tmp_path):
        attached = trained(tiny_clip_hf)
        (tmp_path / "out").mkdir()
        export_adapter(attached, tmp_path / "out", format="merged")
        export_adapter(attached, tmp_path / "out", format="lora")
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
            "README.md", "adapter_config.json", "adapter_model.safetensors", "base.json", "corda_export.json",
        ]  # fmt: skip

    def test_a_full_disk_leaves_the_former_export(self, tiny_clip_hf, tmp_path, monkeypatch):
        attached = trained(tiny_clip_hf)
        export_adapter(attached, tmp_path / "out")
        before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("corda_vlm.adapter.exchange.plain_lora.save_tensors", full)
        with pytest.raises(CordaError, match="No space left"):
            export_adapter(attached, tmp_path / "out")
        assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_a_process_killed_while_replacing_loses_nothing(self, tiny_clip_hf, tmp_path):
        attached = trained(tiny_clip_hf)
        export_adapter(attached, tmp_path / "out").rename(tmp_path / ".out.replaced")
        with pytest.raises(CordaError, match="rank 0"):
            export_adapter(attached, tmp_path / "out", rank=0)
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_nothing_of_the_working_folder_is_copied(self, tiny_clip_hf, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "vocab.json").write_text("{}")
        folder = export_adapter(trained(copy.deepcopy(tiny_clip_hf)), "out", format="merged")
        assert not (folder / "vocab.json").exists()

    def test_requests_that_make_no_sense(self, tiny_clip_hf, tmp_path):
        with pytest.raises(CordaError, match="CLIPModel"):
            export_adapter(tiny_clip_hf, tmp_path / "out")
        attached = trained(tiny_clip_hf)
        with pytest.raises(UnknownNameError, match="lora, merged, residual"):
            export_adapter(attached, tmp_path / "out", format="loras")
        with pytest.raises(CordaError, match="rank="):
            export_adapter(attached, tmp_path / "out", format="merged", rank=4)
        with pytest.raises(CordaError, match="rank 0"):
            export_adapter(attached, tmp_path / "out", rank=0)
        with scaled(attached, 0.5), pytest.raises(CordaError, match="scaled"):
            export_adapter(attached, tmp_path / "out", format="residual")
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The emoji-clip's adapter exported as "residual" and "lora", and each trained on with plain PEFT."""
    root = tmp_path_factory.mktemp("belongs")
    model = load_model("emoji-clip").model
    attached = trained(model, towers="vision", roles="up,down")
    for format in ("residual", "lora"):
        export_adapter(attached, root / format, format=format, source="emoji-clip")
    restore(attached)
    mixed = trained(model, towers="vision")  # parts of packed attention: converted
    for format in ("residual", "lora"):
        export_adapter(mixed, root / f"hf-{format}", format=format)
    restore(mixed)
    return root


class TestWhereItBelongs:
    """An export notes the model that it belongs on, and another tool that trains it does not lose the note."""

    @staticmethod
    def retrained(folder, base, where):
        """As another tool would: it knows nothing of the notes."""
        model = PeftModel.from_pretrained(load_model(base).model, str(folder), is_trainable=True)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        model.save_pretrained(str(where))
        assert sorted(p.name for p in where.iterdir()) == [
            "README.md", "adapter_config.json", "adapter_model.safetensors",
        ]  # fmt: skip
        return where

    @pytest.mark.parametrize("which", ["residual", "hf-residual", "hf-lora"])
    def test_the_right_base_alone_is_taken(self, which, folders, tmp_path):
        export, base = folders / which, folders / which / "base"
        again = self.retrained(export, base, tmp_path / "again")
        wrong = "emoji-clip-hf" if which.startswith("hf") else "emoji-clip"
        right = load_model(base).model
        if (
            which == "hf-lora"
        ):  # its base is the converted original, so that another model has to be the wrong one
            wrong = folders / "hf-residual" / "base"
        for folder in (export, again):
            with pytest.raises(ForeignFileError, match=r"made for the model .*base"):
                load_adapter(load_model(wrong).model, folder)
            with pytest.raises(ForeignFileError, match="made for the model"):
                load_trained(load_model(wrong).model, folder)
            loaded = load_adapter(right, folder)
            right = restore(loaded)

    def test_a_lora_belongs_on_the_original(self, folders):
        load_adapter(load_model("emoji-clip").model, folders / "lora")
        with pytest.raises(ForeignFileError, match="made for the model"):
            load_adapter(load_model(folders / "residual" / "base").model, folders / "lora")
        (copied := folders / "copied").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (copied / name).write_bytes((folders / "lora" / name).read_bytes())
        with pytest.raises(ForeignFileError, match="made for the model"):  # the header says it too
            load_adapter(load_model(folders / "residual" / "base").model, copied)

    def test_the_command_refuses_the_wrong_base(self, folders, tmp_path, capsys):
        with pytest.raises(SystemExit):
            main(["export", "emoji-clip", str(folders / "residual"), str(tmp_path / "out"), "--format", "merged"])  # fmt: skip
        assert "made for the model" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_base_that_has_gone_is_said(self, folders, tmp_path, caplog):
        again = self.retrained(folders / "residual", folders / "residual" / "base", tmp_path / "a")
        config = json.loads((again / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str((folders / "residual" / "base").resolve())
        config["base_model_name_or_path"] = "/nowhere/base"
        (again / "adapter_config.json").write_text(json.dumps(config))
        load_adapter(load_model("emoji-clip").model, again)
        assert "cannot be checked" in caplog.text

    def test_local_bases_are_written_absolute(self, tiny_clip_hf, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        tiny_clip_hf.save_pretrained("clip")
        model = type(tiny_clip_hf).from_pretrained("clip")
        attached = trained(model)
        attached.save_pretrained("plain")
        export_adapter(attached, "lora")
        export_adapter(attached, "residual", format="residual")
        named = [
            json.loads((tmp_path / folder / "adapter_config.json").read_text())[
                "base_model_name_or_path"
            ]
            for folder in ("plain", "lora", "residual")
        ]
        assert named == [str(tmp_path / "clip"), str(tmp_path / "clip"), str(tmp_path / "residual/base")]  # fmt: skip


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_every_file_of_every_format_is_readable_by_whom_the_umask_lets(umask, request, tmp_path):
    former = os.umask(umask)
    try:
        for name in MODELS:
            attached = trained(request.getfixturevalue(name))
            for format in ("lora", "residual", "merged"):
                if name != "tiny_siglip" or format == "merged":
                    export_adapter(attached, tmp_path / name / format, format=format)
            save_weights(attached, Head("prompt", torch.eye(3, 24)), tmp_path / name / "weights")
            restore(attached)
    finally:
        os.umask(former)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) > 12
    for path in files:
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(0o666 & ~umask), path


@pytest.mark.parametrize("format", ["lora", "residual", "merged"])
def test_nan_is_not_exported(format, tiny_open_clip, tmp_path):
    attached = trained(tiny_open_clip)
    layer = next(iter(paired_layers(attached).values()))
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(CordaError, match="holds NaN or Inf"):
        export_adapter(attached, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["lora", "residual", "merged"])
@pytest.mark.parametrize("name", ["tiny_clip_hf", "tiny_open_clip"])
def test_a_damaged_export_is_not_loaded(format, name, request, tmp_path):
    folder = export_adapter(trained(request.getfixturevalue(name)), tmp_path / "out", format=format)
    for path in folder.rglob("*.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 4]) + data[-4:])
        with pytest.raises(ForeignFileError, match=rf"{path.name} is damaged"):
            if path.name == "adapter_model.safetensors":
                load_adapter(request.getfixturevalue("tiny_siglip"), folder)
            else:
                load_model(path.parent)
        path.write_bytes(data)


def test_a_training_is_loaded_by_its_folder(tiny_clip_hf, tmp_path):
    original = copy.deepcopy(tiny_clip_hf)
    attached = trained(tiny_clip_hf)
    save_weights(attached, None, tmp_path / "run" / "weights")
    for folder in (tmp_path / "run", tmp_path / "run" / "weights"):
        assert torch.equal(embed(load_adapter(copy.deepcopy(original), folder)), embed(attached))
    (tmp_path / "begun" / "checkpoint-7").mkdir(parents=True)
    with pytest.raises(ForeignFileError, match=r"not finished.*checkpoint-7"):
        load_adapter(original, tmp_path / "begun")
    full = prepare_method("full", original)
    save_weights(full, None, tmp_path / "full" / "weights")
    with pytest.raises(ForeignFileError, match="trained in full"):
        load_adapter(original, tmp_path / "full")


class TestNotesOfPlainPeft:
    """Adapters that plain PEFT trained on a residual export's base note it as it was written on the command line."""

    @pytest.fixture
    def retrained(self, tiny_clip_hf, tmp_path, monkeypatch):
        (work := tmp_path / "work").mkdir()
        monkeypatch.chdir(work)
        export_adapter(trained(copy.deepcopy(tiny_clip_hf)), "out", format="residual")
        residual = type(tiny_clip_hf).from_pretrained("out/base")
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(residual, config).save_pretrained("runs/again")
        monkeypatch.chdir(tmp_path)
        noted = json.loads((work / "runs/again/adapter_config.json").read_text())
        assert noted["base_model_name_or_path"] == "out/base"
        return work / "runs/again"

    def test_a_relative_base_is_found_from_elsewhere(self, retrained, tiny_clip_hf, tmp_path):
        right = type(tiny_clip_hf).from_pretrained(tmp_path / "work/out/base")
        load_adapter(right, retrained)
        with pytest.raises(ForeignFileError, match=r"made for the model .*base"):
            load_adapter(tiny_clip_hf, retrained)

    def test_one_that_has_gone_is_said(self, retrained, tiny_clip_hf, tmp_path, caplog):
        (tmp_path / "work/out").rename(tmp_path / "work/moved")
        load_adapter(tiny_clip_hf, retrained)
        assert "on the model in out/base, which is not there" in caplog.text

    @pytest.mark.parametrize("name", ["openai/clip-vit-base-patch32", "gpt2", None])
    def test_an_id_on_a_hub_is_no_folder_that_has_gone(self, retrained, tiny_clip_hf, caplog, name):
        path = retrained / "adapter_config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name})
        )
        load_adapter(tiny_clip_hf, retrained)
        assert "cannot be checked" not in caplog.text


@pytest.mark.parametrize("name", ["tiny_clip_hf", "tiny_open_clip"])
def test_saving_draws_no_bars_of_transformers(name, request, tmp_path, capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    attached = trained(request.getfixturevalue(name))
    for format in ("merged", "residual"):
        export_adapter(attached, tmp_path / format, format=format)
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")
    assert logging.is_progress_bar_enabled()
