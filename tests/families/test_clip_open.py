"""open_clip: its own towers, timm towers, Hugging Face text towers; masks, running, loading."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from corda_vlm.adapter import attach_adapter, export_adapter
from corda_vlm.errors import CordaError, ForeignFileError, NoSitesError, UnknownNameError
from corda_vlm.families import detect_family, load_model
from corda_vlm.families.clip_open import processor
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.plan import plan_adapter
from corda_vlm.sites import find_sites, get_layer, model_fingerprint, site_shapes, sites_table


def roles(model, **options):
    """role -> how many sites."""
    counts: dict[str, int] = {}
    for site in find_sites(model, **options):
        counts[site.role] = counts.get(site.role, 0) + 1
    return counts


def check_every_site_is_live(model, batch):
    """Each site's layer is called, its stream's sites see one tensor, and editing its weight changes an output."""
    family = detect_family(model)
    seen: dict[str, list[torch.Tensor]] = {}
    with unpacked(model), torch.no_grad():
        before = family.forward(model, batch)
        handles = []
        for site in find_sites(model):
            layer = get_layer(model, site.name)
            handles.append(
                layer.register_forward_pre_hook(
                    lambda module, args, stream=site.stream: seen.setdefault(stream, []).append(
                        args[0].clone()
                    )
                )
            )
        family.forward(model, batch)
        for handle in handles:
            handle.remove()
        for site in find_sites(model):
            weight = get_layer(model, site.name).weight
            saved = weight.clone()
            weight.add_(torch.randn_like(weight))
            after = family.forward(model, batch)
            weight.copy_(saved)
            if site.role not in ("q", "k") or "pool" not in site.name:
                assert not torch.equal(after[site.tower], before[site.tower]), site
    counts: dict[str, int] = {}
    for site in find_sites(model):
        counts[site.stream] = counts.get(site.stream, 0) + 1
    assert {stream: len(inputs) for stream, inputs in seen.items()} == counts
    for stream, inputs in seen.items():
        assert all(torch.equal(inputs[0], other) for other in inputs), stream


@pytest.fixture
def large_batch(batch):
    return {
        **batch,
        "pixel_values": torch.randn(2, 3, 160, 160),
        "input_ids": batch["input_ids"][:2],
    }


class TestSites:
    def test_plain_clip(self, tiny_open_clip, batch):
        assert roles(tiny_open_clip) == dict.fromkeys(("q", "k", "v", "o", "up", "down"), 4)
        sites = {site.name: site for site in find_sites(tiny_open_clip)}
        one = sites["visual.transformer.resblocks.1.attn.k_proj"]
        assert (one.tower, one.block, one.role) == ("vision", 1, "k")
        assert one.stream == sites["visual.transformer.resblocks.1.attn.q_proj"].stream
        assert sites["transformer.resblocks.0.mlp.c_fc"].tower == "text"
        check_every_site_is_live(tiny_open_clip, batch)

    def test_custom_text_clip_has_the_same_sites_under_text(self, make_open_clip, batch):
        model = make_open_clip("CustomTextCLIP")
        assert (
            sum(site.name.startswith("text.transformer.resblocks.") for site in find_sites(model))
            == 12
        )
        check_every_site_is_live(model, batch)

    def test_custom_blocks(self, make_open_clip, batch):
        model = make_open_clip(
            vision={"qk_norm": True, "scale_fc": True}, text={"scale_heads": True}
        )
        assert roles(model) == dict.fromkeys(("q", "k", "v", "o", "up", "down"), 4)
        check_every_site_is_live(model, batch)

    def test_attentional_pooler(self, make_open_clip, batch):
        model = make_open_clip(
            vision={"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
        )
        head = {site.role: site for site in find_sites(model) if "attn_pool" in site.name}
        assert set(head) == {"q", "k", "v", "o"}
        assert head["k"].stream == head["v"].stream != head["q"].stream
        check_every_site_is_live(model, batch)

    def test_timm_tower_has_a_fused_qkv(self, tiny_timm, large_batch):
        blocks = len(tiny_timm.visual.trunk.blocks)
        assert roles(tiny_timm, towers="vision") == {
            "qkv": blocks,
            "o": blocks,
            "up": blocks,
            "down": blocks,
            "proj": 1,
        }
        check_every_site_is_live(tiny_timm, large_batch)

    def test_siglip_in_open_clip(self, tiny_timm_siglip, large_batch):
        found = {site.name: site for site in find_sites(tiny_timm_siglip)}
        assert found["visual.trunk.attn_pool.kv"].role == "kv"
        assert found["visual.trunk.attn_pool.q"].stream != found["visual.trunk.attn_pool.kv"].stream
        assert found["text.text_projection"].role == "proj"
        check_every_site_is_live(tiny_timm_siglip, large_batch)

    @pytest.mark.parametrize(
        ("kind", "options", "expected"),
        [
            (
                "RobertaConfig",
                {
                    "hidden_size": 32,
                    "intermediate_size": 40,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                },
                {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2, "proj": 2},
            ),
            (
                "BertConfig",
                {
                    "hidden_size": 32,
                    "intermediate_size": 40,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                },
                {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2, "proj": 3},
            ),
            (
                "M2M100Config",
                {
                    "d_model": 32,
                    "encoder_layers": 2,
                    "encoder_attention_heads": 2,
                    "encoder_ffn_dim": 40,
                    "decoder_layers": 1,
                },
                {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2, "proj": 2},
            ),
            (
                "MT5Config",
                {"d_model": 32, "d_kv": 16, "d_ff": 40, "num_layers": 2, "num_heads": 2},
                {"q": 2, "k": 2, "v": 2, "o": 2, "gate": 2, "up": 2, "down": 2, "proj": 2},
            ),
        ],
    )
    def test_hugging_face_text_towers(
        self, make_open_clip, hf_text_folder, batch, kind, options, expected
    ):
        folder = hf_text_folder(kind, vocab_size=100, pad_token_id=0, eos_token_id=99, **options)
        pooler = "cls_pooler" if kind in ("BertConfig", "M2M100Config") else "mean_pooler"
        text = {
            "hf_model_name": folder,
            "hf_model_pretrained": False,
            "hf_pooler_type": pooler,
        }
        model = make_open_clip("CustomTextCLIP", text=text)
        assert roles(model, towers="text") == expected
        linears = {
            name for name, module in model.text.named_modules() if isinstance(module, nn.Linear)
        }
        assert {
            site.name.removeprefix("text.") for site in find_sites(model, towers="text")
        } == linears
        check_every_site_is_live(model, batch)

    @pytest.mark.parametrize(
        ("trunk", "expected"),
        [
            ("vit_base_patch16_siglip_224", {"qkv", "kv", "q", "o", "up", "down"}),
            ("vit_pe_core_tiny_patch16_384", {"qkv", "kv", "q", "o", "up", "down"}),
            ("eva02_base_patch16_clip_224", {"q", "k", "v", "o", "gate", "up", "down"}),
            ("eva02_enormous_patch14_clip_224", {"qkv", "o", "up", "down"}),
            ("vitamin_small_224", {"qkv", "o", "gate", "up", "down"}),
            ("swin_base_patch4_window7_224", {"qkv", "o", "up", "down"}),
        ],
    )
    def test_the_timm_trunks_that_open_clip_uses(self, trunk, expected):
        import timm

        model = type("CustomTextCLIP", (nn.Module,), {"__module__": "open_clip.model"})()
        model.visual = nn.Module()
        with torch.device("meta"):
            model.visual.trunk = timm.create_model(trunk, num_classes=0)
        sites = find_sites(model, towers="vision")
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        missing = {
            name for name in linears - {site.name for site in sites} if "downsample" not in name
        }
        assert not missing
        assert {site.role for site in sites} == expected

    def test_a_tower_that_no_rule_knows_is_named(self, make_open_clip):
        vision = {
            "timm_model_name": "test_mambaout",
            "timm_pool": "",
            "timm_proj": "none",
            "image_size": 160,
        }
        model = make_open_clip("CustomTextCLIP", vision)
        model.visual.trunk.stages = nn.Sequential()
        with pytest.raises(
            NoSitesError,
            match=r"no layer of the vision tower.*stems and patch embeddings are none.*towers='text'",
        ):
            find_sites(model)
        assert {site.tower for site in find_sites(model, towers="text")} == {"text"}

    def test_coca_is_refused_with_the_reason(self):
        from open_clip.coca_model import CoCa

        vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
        text = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
        model = CoCa(24, {**text, "attn_pooler_heads": 2}, {**text, "embed_cls": True}, vision)
        with pytest.raises(
            CordaError, match="CoCa cannot be adapted: CoCa's text tower appends a class token"
        ):
            find_sites(model)


class TestTransformersOfTimm:
    """PE-Core, and the base of MobileCLIP 2, whose patches come from convolutions, in miniature."""

    @pytest.fixture(params=["PE-Core", "MobileCLIP2-B"])
    def model(self, request, make_open_clip):
        import timm

        trunk, size, options = {
            "PE-Core": ("vit_pe_core_tiny_patch16_384", 32, {"depth": 2, "embed_dim": 32, "num_heads": 2}),
            "MobileCLIP2-B": ("vit_base_mci_224", 64, {"depth": 1}),
        }[request.param]  # fmt: skip
        vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "none", "image_size": 160}  # fmt: skip
        text = {"no_causal_mask": request.param == "MobileCLIP2-B"}
        model = make_open_clip("CustomTextCLIP", vision, text)
        model.visual.trunk = timm.create_model(trunk, img_size=size, num_classes=24, **options)
        model.size = size
        return model.eval()

    def test_from_layers_to_plain_peft(self, model, batch, tmp_path):
        batch = {**batch, "pixel_values": torch.randn(3, 3, model.size, model.size)}
        found = roles(model, towers="vision")
        pooled = {"q": 1, "kv": 1} if "q" in found else {}
        blocks = len(model.visual.trunk.blocks)
        many = blocks + bool(pooled)  # the pooling head of PE-Core is a block in itself
        expected = {"qkv": blocks, "o": many, "up": many, "down": many, "proj": 1, **pooled}
        assert {role: number for role, number in found.items() if role != "conv"} == expected
        linears = {n for n, module in model.visual.named_modules() if isinstance(module, nn.Linear)}
        sites = find_sites(model, towers="vision")
        assert {f"visual.{name}" for name in linears} <= {site.name for site in sites}
        check_every_site_is_live(model, batch)

        def embedded(net):
            with torch.no_grad():
                return detect_family(net).need_contrastive(net).encode_image(net, batch)

        before, original = embedded(model), copy.deepcopy(model)
        plan = plan_adapter(model, None, method="pissa", towers="vision", rank=2, show_progress=False)  # fmt: skip
        attached = attach_adapter(model, plan)
        assert torch.equal(embedded(attached), before)
        with torch.no_grad():
            for parameter in attached.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02)
        export_adapter(attached, tmp_path, format="lora")
        plain = PeftModel.from_pretrained(original, str(tmp_path)).eval()
        torch.testing.assert_close(embedded(plain), embedded(attached), rtol=1e-3, atol=1e-4)


def timm_clip(make_open_clip, name: str, proj: str = "linear") -> Any:
    vision = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": proj, "image_size": 160}
    model = make_open_clip("CustomTextCLIP", vision)
    livened(model)
    return model


def livened(model: Any) -> None:
    """Normalizations and scales of layers that start at zero hide what comes before them."""
    with torch.no_grad():
        for name, parameter in model.visual.named_parameters():
            if parameter.dim() == 1 and name.endswith(("weight", "gamma")):
                parameter.uniform_(0.5, 1)


class TestConvolutionalTowers:
    def test_a_resnet_with_its_attention_pool(self, tiny_resnet, batch):
        assert roles(tiny_resnet, towers="vision") == {"conv": 16, "q": 1, "k": 1, "v": 1, "o": 1}
        sites = {site.name: site for site in find_sites(tiny_resnet)}
        assert not any(name in sites for name in ("visual.conv1", "visual.conv2", "visual.conv3"))
        pool = [sites[f"visual.attnpool.{part}_proj"].stream for part in "qkvc"]
        assert pool[1] == pool[2]
        assert len(set(pool)) == 3
        shapes = site_shapes(tiny_resnet, sites)
        assert shapes["visual.layer4.0.conv2"] == (64, 64 * 9)
        check_every_site_is_live(tiny_resnet, batch)

    @pytest.mark.parametrize(
        ("trunk", "proj", "expected"),
        [
            ("test_resnet", "none", {"conv"}),
            ("test_convnext", "linear", {"up", "down", "conv", "proj"}),
            ("test_efficientnet", "linear", {"conv", "proj"}),
        ],
    )
    def test_towers_of_timm(self, make_open_clip, large_batch, trunk, proj, expected):
        model = timm_clip(make_open_clip, trunk, proj)
        assert set(roles(model, towers="vision")) == expected
        left = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        left -= {site.name for site in find_sites(model)}
        modules = dict(model.named_modules())
        assert all(
            modules[name].groups > 1 or ".se." in name or "stem" in name or ".conv1." in name
            for name in left
        )
        check_every_site_is_live(model, large_batch)

    def test_mobileclip(self, make_open_clip, large_batch):
        """Its trunk in miniature."""
        from timm.models.fastvit import FastVit

        model = timm_clip(make_open_clip, "test_convnext", "none")
        model.visual.trunk = FastVit(
            layers=(1, 1, 1, 1),
            token_mixers=("repmixer", "repmixer", "repmixer", "attention"),
            embed_dims=(8, 16, 32, 64),
            se_downsamples=(False, False, True, True),
            lkc_use_act=True,
            num_classes=24,
        )
        livened(model)
        assert roles(model.eval(), towers="vision") == {
            "qkv": 1, "o": 1, "up": 4, "down": 4, "conv": 3, "proj": 1,
        }  # fmt: skip
        check_every_site_is_live(model, large_batch)

    def test_the_trunks_that_open_clip_uses(self):
        import timm

        for trunk, expected in (
            ("convnext_base", {"up": 36, "down": 36, "conv": 3}),
            ("fastvit_mci2", {"up": 44, "down": 44, "conv": 3, "qkv": 4, "o": 4}),
            ("fastvit_mci4", {"up": 46, "down": 46, "conv": 4, "qkv": 8, "o": 8}),
            ("efficientnet_b0", {"conv": 32}),
        ):
            model = type("CustomTextCLIP", (nn.Module,), {"__module__": "open_clip.model"})()
            model.visual = nn.Module()
            with torch.device("meta"):
                model.visual.trunk = timm.create_model(trunk, num_classes=0)
            assert roles(model, towers="vision") == expected

    def test_the_table_has_kernels_and_says_what_is_left_out(self, make_open_clip, tiny_open_clip):
        model = timm_clip(make_open_clip, "test_convnext")
        table = sites_table(model, find_sites(model, towers="vision"))
        assert "out × in    kernel  stream" in table
        assert "2×2  visual.trunk.stages.*.downsample.*.in" in table
        assert (
            "convolutions are no sites, grouped: 'visual.trunk.stages.0.blocks.0.conv_dw'" in table
        )
        other = sites_table(tiny_open_clip, find_sites(tiny_open_clip))
        assert "kernel" not in other
        assert "no sites" not in other

    def test_a_fingerprint_sees_its_convolutions(self, tiny_resnet):
        before = model_fingerprint(tiny_resnet)
        assert model_fingerprint(tiny_resnet.to(memory_format=torch.channels_last)) == before
        with unpacked(tiny_resnet):
            assert model_fingerprint(tiny_resnet) == before
        with torch.no_grad():
            tiny_resnet.visual.layer2[0].conv2.weight.neg_()
        assert model_fingerprint(tiny_resnet) != before


class TestRunning:
    def test_embeddings_are_those_of_the_model_itself(self, tiny_open_clip, batch):
        family = detect_family(tiny_open_clip)
        with torch.no_grad():
            image, text, scale = tiny_open_clip(batch["pixel_values"], batch["input_ids"])
            found = family.forward(tiny_open_clip, batch)
        torch.testing.assert_close(nn.functional.normalize(found["vision"], dim=-1), image)
        torch.testing.assert_close(nn.functional.normalize(found["text"], dim=-1), text)
        torch.testing.assert_close(
            family.need_contrastive(tiny_open_clip).logit_scale(tiny_open_clip), scale
        )

    def test_short_texts_are_padded_to_the_context(self, tiny_open_clip, batch):
        family = detect_family(tiny_open_clip)
        with torch.no_grad():
            whole = family.need_contrastive(tiny_open_clip).encode_text(
                tiny_open_clip, {"input_ids": batch["input_ids"][:2]}
            )
            short = family.need_contrastive(tiny_open_clip).encode_text(
                tiny_open_clip, {"input_ids": batch["input_ids"][:2, :8]}
            )
        torch.testing.assert_close(short, whole)

    def test_texts_that_are_too_long_are_named(self, tiny_open_clip):
        ids = torch.ones(1, 13, dtype=torch.long)
        with pytest.raises(CordaError, match="texts of 13 tokens; CLIP reads 12"):
            detect_family(tiny_open_clip).need_contrastive(tiny_open_clip).encode_text(
                tiny_open_clip, {"input_ids": ids}
            )

    @pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
    def test_towers_that_return_tokens_too(self, make_open_clip, batch, kind):
        plain = make_open_clip(kind)
        model = make_open_clip(
            kind, {"output_tokens": True}, {"output_tokens": kind == "CustomTextCLIP"}
        )
        model.load_state_dict(plain.state_dict())
        family = detect_family(model)
        with torch.no_grad():
            expected: Any = family.forward(plain, batch)
            found: Any = family.forward(model, batch)
        for tower, value in expected.items():
            torch.testing.assert_close(found[tower], value)

    def test_low_precision_models_take_float32_pixels(self, tiny_open_clip, batch):
        family = detect_family(tiny_open_clip)
        with torch.no_grad():
            expected = family.need_contrastive(tiny_open_clip).encode_image(
                tiny_open_clip, batch["pixel_values"]
            )
            found = family.need_contrastive(tiny_open_clip).encode_image(
                tiny_open_clip.to(torch.bfloat16), batch["pixel_values"]
            )
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)

    def test_a_wrapped_and_unpacked_model_runs_with_its_adapter(self, tiny_open_clip, batch):
        from peft import LoraConfig, get_peft_model

        family = detect_family(tiny_open_clip)
        with unpacked(tiny_open_clip):
            config = LoraConfig(target_modules=r"visual\..*\.q_proj", init_lora_weights=False)
            wrapped = get_peft_model(tiny_open_clip, config)
            with torch.no_grad():
                adapted = family.forward(wrapped, batch)
                with wrapped.disable_adapter():
                    plain = family.forward(wrapped, batch)
        assert not torch.allclose(adapted["vision"], plain["vision"])
        assert torch.equal(adapted["text"], plain["text"])


class TestMasks:
    def test_tokens_up_to_the_end_of_text_count(self, tiny_open_clip, batch):
        family = detect_family(tiny_open_clip)
        assert family.masks(batch)["text"].sum(1).tolist() == [4, 7, 12]
        assert family.masks({"pixel_values": batch["pixel_values"]}) == {}

    def test_the_processor_marks_them(self, make_open_clip):
        import open_clip

        model = make_open_clip(text={"vocab_size": 49408})
        found = processor(model, open_clip.SimpleTokenizer(context_length=12)).text(
            ["a photo of a cat", "", "!"]
        )
        assert found["attention_mask"].sum(1).tolist() == [7, 2, 3]
        assert (found["input_ids"] * ~found["attention_mask"]).sum() == 0
        long = processor(model, open_clip.SimpleTokenizer(context_length=12)).text(["cat " * 50])
        assert long["attention_mask"].all()

    @pytest.mark.parametrize("pad_is_end", [False, True])
    def test_a_hugging_face_tokenizer(self, make_open_clip, pad_is_end):
        class Words:
            pad_token_id = 2 if pad_is_end else 1
            eos_token_id, sep_token_id = 2, None

        class Tokenizer:
            tokenizer = Words()

            def __call__(self, texts):
                pad = self.tokenizer.pad_token_id
                return torch.tensor([[0, 5, 6, 2, pad, pad], [0, 5, 6, 7, 8, 2]])

        mask = processor(make_open_clip(), Tokenizer()).text(["", ""])["attention_mask"]
        assert mask.sum(1).tolist() == [4, 6]

    def test_the_pooled_position_counts_where_the_last_is_pooled(self, tiny_timm_siglip):
        import open_clip

        found = processor(tiny_timm_siglip, open_clip.SimpleTokenizer(context_length=12)).text(
            ["cat"]
        )
        assert found["attention_mask"][0].tolist() == [True] * 3 + [False] * 8 + [True]


class TestLoading:
    @pytest.fixture
    def folder(self, tmp_path, tiny_open_clip):
        config = {
            "model_cfg": {
                "embed_dim": 24,
                "vision_cfg": {
                    "layers": 2,
                    "width": 32,
                    "head_width": 16,
                    "patch_size": 8,
                    "image_size": 32,
                },
                "text_cfg": {
                    "context_length": 12,
                    "vocab_size": 100,
                    "width": 32,
                    "heads": 2,
                    "layers": 2,
                },
            },
            "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
        }
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        state = {key: value.half() for key, value in tiny_open_clip.state_dict().items()}
        save_file(state, tmp_path / "open_clip_model.safetensors")
        return tmp_path

    @pytest.mark.parametrize("prefix", ["", "local-dir:"])
    def test_a_folder(self, folder, tiny_open_clip, prefix):
        loaded = load_model(f"{prefix}{folder}")
        assert loaded.family.name == "clip_open"
        assert loaded.processor.image_size == (32, 32)
        assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
        assert model_fingerprint(loaded.model) == model_fingerprint(
            tiny_open_clip
        )  # stored as float16

    def test_images_come_out_at_the_model_s_size_whatever_their_mode(self, folder):
        from PIL import Image

        image = load_model(folder).processor.image
        for mode in ("RGB", "L", "P", "RGBA", "1"):
            pixels = image(Image.new(mode, (50, 40), 1))
            assert pixels.shape == (3, 32, 32)
            assert pixels.dtype == torch.float32
        assert image(Image.new("RGB", (8, 8), "white")).eq(1).all()

    def test_bfloat16(self, folder):
        model = load_model(folder, dtype=torch.bfloat16).model
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_no_weights(self, folder):
        (folder / "open_clip_model.safetensors").unlink()
        with pytest.raises(
            CordaError, match=r"holds no weights; expected open_clip_model\.safetensors"
        ):
            load_model(folder)

    def test_truncated_weights(self, folder):
        path = folder / "open_clip_model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(CordaError, match="files may be truncated"):
            load_model(folder)

    def test_weights_of_another_model(self, folder):
        save_file({"a": torch.zeros(2)}, folder / "open_clip_model.safetensors")
        with pytest.raises(CordaError, match="does not load as clip_open"):
            load_model(folder)

    def test_a_config_of_another_kind(self, folder):
        (folder / "open_clip_config.json").write_text("{}")
        with pytest.raises(ForeignFileError, match="has no 'model_cfg'"):
            load_model(folder)
        (folder / "open_clip_config.json").write_text("{")
        with pytest.raises(ForeignFileError, match="is not a model configuration file"):
            load_model(folder)

    def test_unknown_pretrained_tag_lists_the_choices(self):
        with pytest.raises(
            UnknownNameError, match=r"pretrained tag of ViT-B-32 'laion2b'.*laion2b_s34b_b79k"
        ):
            load_model("ViT-B-32/laion2b")

    def test_unknown_model_of_open_clip(self):
        with pytest.raises(
            UnknownNameError, match=r"unknown open_clip model 'ViT-B-33'.*Did you mean 'ViT-B-32'"
        ):
            load_model("ViT-B-33/openai", family="clip_open")

    @pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("laion2b_s34b_b79k", False)])
    def test_the_activation_is_that_of_the_weights(self, monkeypatch, tiny_open_clip, tag, quick):
        import open_clip

        asked = {}

        def create(name, **options):
            asked.update(options)
            return tiny_open_clip

        monkeypatch.setattr(open_clip, "create_model", create)
        load_model(f"ViT-B-32/{tag}")
        assert (asked["pretrained"], asked["force_quick_gelu"]) == (tag, quick)

    @pytest.mark.parametrize("both", [False, True])
    def test_a_folder_with_files_of_both_libraries(self, folder, tiny_clip_hf, both):
        tiny_clip_hf.config.save_pretrained(folder)
        if both:
            tiny_clip_hf.save_pretrained(folder)
        assert load_model(folder).family.name == ("clip_hf" if both else "clip_open")
        assert load_model(folder, family="clip_open").family.name == "clip_open"

    @pytest.mark.parametrize("source", ["ViT-B-32/laion2b_s34b_b79k", "hf-hub:nobody/nothing"])
    def test_a_hub_that_cannot_be_reached(self, source, monkeypatch):
        import open_clip.factory as factory

        def offline(*args, **kwargs):
            raise OSError("no route to host")

        monkeypatch.setattr(factory, "download_pretrained", offline)
        monkeypatch.setattr(factory, "download_pretrained_from_hf", offline)
        with pytest.raises(
            CordaError, match=f"could not load '{source}' from its hub.*no route to host"
        ) as caught:
            load_model(source)
        assert caught.value.__cause__ is not None
