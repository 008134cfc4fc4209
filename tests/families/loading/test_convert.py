"""open_clip models as transformers `CLIPModel`: equal outputs, equal token ids, equal pixels."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.families import detect_family, load_model
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.families.loading.convert import (
    convert_loaded,
    converts,
    image_processor_config,
    open_clip_to_hf,
    save_hf,
    site_name_open_to_hf,
)
from corda_vlm.files import asset
from corda_vlm.sites import find_sites, get_linear

TEXTS = [
    "a photo of a cat",
    "Grinning Face with BIG eyes!!",
    "don't: it's 3.14 (approx.)",
    "naïve café — 日本 🙂",
    "  spaces\n\tand tabs ",
    "",
    "word " * 40,
]


def randomised(model):
    """Norms and biases start at ones and zeros, which would hide a weight that is lost or misplaced."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def assert_same_outputs(model, converted, batch, tolerance=1e-5):
    one, other = detect_family(model), detect_family(converted)
    with torch.no_grad():
        expected: Any = one.forward(model, batch)
        found: Any = other.forward(converted, batch)
    for tower, value in expected.items():
        torch.testing.assert_close(found[tower], value, atol=tolerance, rtol=tolerance, msg=tower)
    torch.testing.assert_close(
        other.need_contrastive(converted).logit_scale(converted),
        one.need_contrastive(model).logit_scale(model),
    )


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize(
    ("vision", "text", "options"),
    [
        ({}, {}, {}),
        ({}, {}, {"quick_gelu": True}),
        ({"act_kwargs": {"approximate": "tanh"}}, {"act_kwargs": {"approximate": "tanh"}}, {}),
        ({"norm_kwargs": {"eps": 1e-3}}, {"norm_kwargs": {"eps": 1e-4}}, {}),
        (
            {"final_ln_after_pool": True},
            {"pool_type": "eos", "eos_id": 99},
            {"nonscalar_logit_scale": True},
        ),
        ({"mlp_ratio": 2.0, "head_width": 8}, {"heads": 4, "mlp_ratio": 3.0}, {}),
    ],
)
def test_same_outputs(make_open_clip, batch, kind, vision, text, options):
    model = randomised(make_open_clip(kind, vision, text, **options))
    assert converts(model) is None
    assert_same_outputs(model, open_clip_to_hf(model), batch)


def test_an_unpacked_model_converts_too(tiny_open_clip, batch):
    model = randomised(tiny_open_clip)
    with unpacked(model):
        converted = open_clip_to_hf(model)
    assert_same_outputs(model, converted, batch)


def test_the_model_is_copied_not_shared(tiny_open_clip):
    converted = open_clip_to_hf(tiny_open_clip)
    storages = {p.untyped_storage().data_ptr() for p in tiny_open_clip.parameters()}
    assert not storages & {p.untyped_storage().data_ptr() for p in converted.parameters()}


def test_dtype_is_kept(tiny_open_clip):
    assert {p.dtype for p in open_clip_to_hf(tiny_open_clip.half()).parameters()} == {torch.float16}


def test_an_adapter_is_not_dropped_silently(tiny_open_clip):
    from peft import LoraConfig, get_peft_model

    with unpacked(tiny_open_clip):
        wrapped = get_peft_model(tiny_open_clip, LoraConfig(target_modules=r".*\.c_fc"))
        with pytest.raises(CordaError, match=r"layers\.0\.mlp\.fc1 still has an adapter"):
            open_clip_to_hf(wrapped)


@pytest.mark.parametrize(
    ("vision", "text", "options", "reason"),
    [
        ({"ls_init_value": 0.1}, {}, {}, "image tower scales its residual branches"),
        ({}, {"ls_init_value": 0.1}, {}, "text tower scales its residual branches"),
        ({"pool_type": "avg"}, {}, {}, "pools by attention or by mean"),
        ({"attentional_pool": True}, {}, {}, "pools by attention or by mean"),
        ({"no_ln_pre": True}, {}, {}, "no norm before the blocks"),
        ({"image_size": (32, 24)}, {}, {}, "not square"),
        ({"qk_norm": True}, {}, {}, "blocks of CustomResidualAttentionBlock"),
        ({}, {"no_causal_mask": True}, {}, "not causal"),
        ({}, {"pool_type": "last"}, {}, "pools with pool_type='last'"),
        ({}, {"pool_type": "eos", "eos_id": 2}, {}, "eos_id=2"),
        ({}, {"proj_bias": True}, {}, "projection is missing or has a bias"),
        ({}, {"proj_type": "none"}, {}, "projection is missing or has a bias"),
        ({}, {}, {"init_logit_bias": -10}, "logit bias"),
        (
            {"layers": (1, 1, 1, 1), "width": 8, "head_width": 8},
            {},
            {},
            "image tower is a ModifiedResNet",
        ),
        (
            {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 160},
            {},
            {},
            "image tower is a TimmModel",
        ),
    ],
)
def test_what_does_not_convert_says_why(make_open_clip, vision, text, options, reason):
    model = make_open_clip("CLIP", vision, text, **options)
    assert re.search(re.escape(reason), converts(model) or "")
    with pytest.raises(
        CordaError, match="does not convert to transformers' CLIPModel: it.*" + re.escape(reason)
    ):
        open_clip_to_hf(model)


def test_a_transformers_model_has_nothing_to_convert(tiny_clip_hf):
    assert converts(tiny_clip_hf) == "CLIPModel is not open_clip's CLIP or CustomTextCLIP"


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_site_names_point_at_the_same_weights(make_open_clip, kind):
    model = make_open_clip(kind)
    converted = open_clip_to_hf(model)
    with unpacked(model):
        for site in find_sites(model):
            there = get_linear(converted, site_name_open_to_hf(site.name))
            here = get_linear(model, site.name)
            assert torch.equal(there.weight, here.weight), site.name
            assert torch.equal(there.bias, here.bias), site.name
    names = {site_name_open_to_hf(site.name): site for site in find_sites(model)}
    for site in find_sites(converted):
        if site.role != "proj":
            assert (names[site.name].tower, names[site.name].role) == (site.tower, site.role)


def test_a_name_without_counterpart():
    with pytest.raises(UnknownNameError, match=r"visual\.attn_pool\.attn\.q_proj"):
        site_name_open_to_hf("visual.attn_pool.attn.q_proj")


class TestImageProcessor:
    def test_a_mode_it_cannot_do_is_named(self, tiny_open_clip):
        tiny_open_clip.visual.preprocess_cfg = {"size": 32, "resize_mode": "longest"}
        with pytest.raises(CordaError, match="'longest' pads images"):
            image_processor_config(tiny_open_clip)

    @pytest.mark.parametrize("mode", ["shortest", "squash"])
    @pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
    def test_pixels_equal_open_clip_s(self, make_open_clip, mode, interpolation):
        import open_clip
        from PIL import Image

        from corda_vlm.families.clip_open import processor

        model = make_open_clip(text={"vocab_size": 49408})
        model.visual.preprocess_cfg = {
            "size": 32,
            "resize_mode": mode,
            "interpolation": interpolation,
            "mean": (0.4, 0.5, 0.6),
            "std": (0.2, 0.3, 0.4),
        }
        here = processor(model, open_clip.SimpleTokenizer())
        _, there = convert_loaded(model)
        assert there.image_size == here.image_size == (32, 32)
        for size in ((50, 40), (32, 32), (20, 64), (100, 100)):
            picture = Image.frombytes(
                "RGB",
                size,
                torch.randint(0, 256, (size[0] * size[1] * 3,)).byte().numpy().tobytes(),
            )
            torch.testing.assert_close(
                there.image(picture), here.image(picture), atol=1e-5, rtol=1e-5
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    model = CLIP(
        24,
        CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=32),
        CLIPTextCfg(context_length=16, vocab_size=49408, width=32, heads=2, layers=1),
    ).eval()
    folder = tmp_path_factory.mktemp("hf")
    assert save_hf(model, folder) == folder
    return folder, model


class TestTokenizer:
    def test_files_load_with_transformers_alone(self, folder, batch):
        import transformers

        directory, model = folder
        names = {path.name for path in directory.iterdir()}
        assert {
            "config.json",
            "model.safetensors",
            "vocab.json",
            "merges.txt",
            "preprocessor_config.json",
        } <= names
        assert not any(path.suffix in (".bin", ".partial") for path in directory.iterdir())
        assert_same_outputs(model, transformers.CLIPModel.from_pretrained(directory), batch)
        assert transformers.CLIPImageProcessor.from_pretrained(directory).crop_size["height"] == 32

    def test_ids_equal_open_clip_s_up_to_the_end_of_text(self, folder):
        import open_clip
        import transformers

        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder[0])
        assert len(tokenizer) == 49408
        assert tokenizer.model_max_length == 16
        expected = open_clip.SimpleTokenizer(context_length=16)(TEXTS)
        found = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
        mask = found["attention_mask"].bool()
        assert torch.equal(mask, torch.arange(16) <= expected.argmax(1, keepdim=True))
        assert torch.equal(found["input_ids"][mask], expected[mask])

    def test_the_folder_loads_with_its_processor(self, folder):
        loaded = load_model(folder[0])
        assert loaded.family.name == "clip_hf"
        inputs = loaded.processor.text(TEXTS)
        with torch.no_grad():
            found = loaded.family.need_contrastive(loaded.model).encode_text(loaded.model, inputs)
            expected = folder[1].encode_text(
                inputs["input_ids"]
            )  # pooled at the first end of text by both
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def test_another_vocabulary_is_refused_before_anything_is_written(
        self, tiny_open_clip, tmp_path
    ):
        with pytest.raises(CordaError, match=r"100 tokens.*49408.*tokenizer=False"):
            save_hf(tiny_open_clip, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        save_hf(tiny_open_clip, tmp_path / "new", tokenizer=False)
        assert not (tmp_path / "new" / "vocab.json").exists()


@pytest.fixture(scope="module")
def both():
    if not (asset("model_zoo") / "emoji-clip" / "open_clip_model.safetensors").is_file():
        pytest.skip("model_zoo/emoji-clip has no weights yet")
    return load_model("emoji-clip"), load_model("emoji-clip-hf")


class TestEmojiClip:
    def test_same_embeddings_from_the_same_words_and_drawings(self, both):
        from PIL import Image

        here, there = both
        assert (here.family.name, there.family.name) == ("clip_open", "clip_hf")
        assert type(there.model).__name__ == "CLIPModel"
        pictures = [Image.effect_noise((70, 50), 80), Image.new("RGB", (64, 64), "orange")]
        embedded = []
        for loaded in both:
            pixels = torch.stack([loaded.processor.image(picture) for picture in pictures])
            with torch.no_grad():
                image = loaded.family.need_contrastive(loaded.model).encode_image(
                    loaded.model, pixels
                )
                text = loaded.family.need_contrastive(loaded.model).encode_text(
                    loaded.model, loaded.processor.text(TEXTS)
                )
            embedded.append(nn.functional.normalize(torch.cat([image, text]), dim=-1))
        torch.testing.assert_close(*embedded, atol=1e-5, rtol=1e-5)

    def test_it_converts(self, both):
        assert converts(both[0].model) is None
        with pytest.raises(CordaError, match="is not open_clip's"):
            open_clip_to_hf(both[1].model)
