"""CLIP, SigLIP and SigLIP 2 of transformers: names in both major versions, masks, running, loading."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from corda_vlm.errors import CordaError, DataError
from corda_vlm.families import detect_family, load_model
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.families.loading.convert import save_tokenizer
from corda_vlm.sites import find_sites, get_linear, model_fingerprint

LINEARS = (
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)
BLOCKS = tuple(f"encoder.layers.{block}.{name}" for block in (0, 1) for name in LINEARS)


def prefixed(prefix, names=BLOCKS):
    return tuple(f"{prefix}.{name}" for name in names)


# class -> {major version of transformers: the dotted paths of its nn.Linear}
KEYS: dict[str, Any] = {
    "CLIPModel": dict.fromkeys(
        (4, 5),
        (
            *prefixed("text_model"),
            *prefixed("vision_model"),
            "visual_projection",
            "text_projection",
        ),
    ),
    "CLIPVisionModel": {4: prefixed("vision_model"), 5: BLOCKS},
    "CLIPTextModel": {4: prefixed("text_model"), 5: BLOCKS},
    "CLIPVisionModelWithProjection": dict.fromkeys(
        (4, 5), (*prefixed("vision_model"), "visual_projection")
    ),
    "CLIPTextModelWithProjection": dict.fromkeys(
        (4, 5), (*prefixed("text_model"), "text_projection")
    ),
}


def model_of(kind, names):
    """A module of a class of that name in transformers, with an `nn.Linear` at each of `names`."""
    model = type(kind, (nn.Module,), {"__module__": "transformers.models.clip.modeling_clip"})()
    for name in names:
        parent = model
        *path, last = name.split(".")
        for key in path:
            if key not in parent._modules:
                parent.add_module(key, nn.Module())
            parent = parent._modules[key]
        parent.add_module(last, nn.Linear(4, 4))
    return model


@pytest.mark.parametrize(
    ("kind", "version"), [(kind, version) for kind in KEYS for version in (4, 5)]
)
def test_every_linear_of_both_versions_has_its_site(kind, version):
    names = KEYS[kind][version]
    model = model_of(kind, names)
    sites = find_sites(model)
    assert [site.name for site in sites] == list(names)
    towers = {"vision"} if "Vision" in kind else {"text"} if "Text" in kind else {"vision", "text"}
    assert {site.tower for site in sites} == towers
    roles = {site.name.rpartition(".")[2]: site.role for site in sites}
    wanted = {
        "q_proj": "q",
        "k_proj": "k",
        "v_proj": "v",
        "out_proj": "o",
        "fc1": "up",
        "fc2": "down",
    }
    assert {key: value for key, value in roles.items() if "projection" not in key} == wanted
    assert all(
        site.role == "proj" and site.block is None for site in sites if "projection" in site.name
    )
    for site in sites:
        assert get_linear(model, site.name) is not None


def test_streams_and_blocks_do_not_depend_on_the_version():
    old, new = (
        find_sites(model_of("CLIPVisionModel", KEYS["CLIPVisionModel"][version]))
        for version in (4, 5)
    )
    assert [(s.stream, s.block, s.role) for s in old] == [(s.stream, s.block, s.role) for s in new]


@pytest.mark.parametrize("kind", list(KEYS))
def test_the_key_lists_are_those_of_the_installed_version(kind):
    version = int(transformers.__version__.split(".")[0])
    config = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    if kind == "CLIPModel":
        vision = {**config, "image_size": 8, "patch_size": 4}
        config = transformers.CLIPConfig(
            text_config={**config, "vocab_size": 50}, vision_config=vision
        )
    elif "Vision" in kind:
        config = transformers.CLIPVisionConfig(**config, image_size=8, patch_size=4)
    else:
        config = transformers.CLIPTextConfig(**config, vocab_size=50)
    model = getattr(transformers, kind)(config)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears == set(KEYS[kind][version])


def test_q_k_v_share_one_stream_and_no_other_does(tiny_clip_hf):
    by_stream: dict[str, set[str]] = {}
    for site in find_sites(tiny_clip_hf):
        by_stream.setdefault(site.stream, set()).add(site.role)
    assert sorted(map(sorted, by_stream.values())) == sorted(
        [["k", "q", "v"], ["o"], ["up"], ["down"]] * 4 + [["proj"]] * 2
    )


def test_sites_of_one_stream_do_read_one_tensor(tiny_siglip, batch):
    seen: dict[str, list[torch.Tensor]] = {}
    family = detect_family(tiny_siglip)
    with unpacked(tiny_siglip), torch.no_grad():
        for site in find_sites(tiny_siglip):
            get_linear(tiny_siglip, site.name).register_forward_pre_hook(
                lambda module, args, stream=site.stream: seen.setdefault(stream, []).append(
                    args[0].clone()
                )
            )
        family.forward(tiny_siglip, batch)
    assert set(seen) == {site.stream for site in find_sites(tiny_siglip)}
    values = [inputs[0] for inputs in seen.values()]
    for inputs in seen.values():
        assert all(torch.equal(inputs[0], other) for other in inputs)
    assert not any(
        one.shape == other.shape and torch.equal(one, other)
        for number, one in enumerate(values)
        for other in values[:number]
    )


def test_the_siglip_pooling_head_reads_its_probe_and_the_tokens(tiny_siglip):
    head = {
        site.role: site
        for site in find_sites(tiny_siglip)
        if ".head." in site.name and site.tower == "vision"
    }
    assert set(head) == {"q", "k", "v", "o", "up", "down"}
    assert head["q"].name == "vision_model.head.attention.q_proj"
    assert head["k"].stream == head["v"].stream != head["q"].stream


@pytest.mark.parametrize("kind", ["SiglipModel", "Siglip2Model"])
def test_siglip_models_and_their_towers_have_the_same_sites(kind, siglip_configs):
    text, vision = siglip_configs
    family = kind.removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    whole = getattr(transformers, kind)(config).eval()
    sites = {(site.tower, site.block, site.role, site.stream) for site in find_sites(whole)}
    towers = [
        getattr(transformers, f"{family}VisionModel")(config.vision_config),
        getattr(transformers, f"{family}TextModel")(config.text_config),
    ]
    apart = {
        (site.tower, site.block, site.role, site.stream)
        for tower in towers
        for site in find_sites(tower)
    }
    assert apart == sites
    assert len(find_sites(whole)) == 2 * 6 * 2 + 6 + 1


class TestRunning:
    def test_embeddings_are_those_of_the_model_itself(self, tiny_clip_hf, batch):
        family = detect_family(tiny_clip_hf)
        with torch.no_grad():
            whole = tiny_clip_hf(**batch)
            image, text = (
                family.need_contrastive(tiny_clip_hf).encode_image(
                    tiny_clip_hf, batch["pixel_values"]
                ),
                family.need_contrastive(tiny_clip_hf).encode_text(tiny_clip_hf, batch),
            )
        torch.testing.assert_close(nn.functional.normalize(image, dim=-1), whole.image_embeds)
        torch.testing.assert_close(nn.functional.normalize(text, dim=-1), whole.text_embeds)
        logits = (
            family.need_contrastive(tiny_clip_hf).logit_scale(tiny_clip_hf)
            * whole.text_embeds
            @ whole.image_embeds.T
        )
        torch.testing.assert_close(logits, whole.logits_per_text)

    def test_a_mask_changes_no_embedding_of_clip(self, tiny_clip_hf, batch):
        tiny_clip_hf.text_model.eos_token_id = 99
        family = detect_family(tiny_clip_hf)
        masked = {**batch, "attention_mask": family.masks(batch)["text"]}
        torch.testing.assert_close(
            family.need_contrastive(tiny_clip_hf).encode_text(tiny_clip_hf, masked),
            family.need_contrastive(tiny_clip_hf).encode_text(tiny_clip_hf, batch),
            atol=1e-5,
            rtol=1e-5,
        )

    def test_siglip_ignores_the_mask_as_it_was_trained_to(self, tiny_siglip, batch):
        family = detect_family(tiny_siglip)
        assert family.name == "siglip_hf"
        mask = torch.arange(12) < torch.tensor([[4], [7], [12]])
        with torch.no_grad():
            whole = tiny_siglip(**batch)
            text = family.need_contrastive(tiny_siglip).encode_text(
                tiny_siglip, {**batch, "attention_mask": mask}
            )
        torch.testing.assert_close(nn.functional.normalize(text, dim=-1), whole.text_embeds)

    def test_unpacked_and_wrapped_models_run_and_agree(self, tiny_siglip, batch):
        from peft import LoraConfig, get_peft_model

        family = detect_family(tiny_siglip)
        with torch.no_grad():
            expected = family.forward(tiny_siglip, batch)
            wrapped = get_peft_model(tiny_siglip, LoraConfig(target_modules=r".*\.fc1"))
            assert detect_family(wrapped) is family
            with unpacked(wrapped):
                found = family.forward(wrapped, batch)
        for tower in ("vision", "text"):
            torch.testing.assert_close(found[tower], expected[tower], atol=1e-5, rtol=1e-5)
        assert family.need_contrastive(wrapped).logit_scale(wrapped).shape == ()

    def test_towers_alone(self, batch, tiny_clip_hf):
        vision = transformers.CLIPVisionModelWithProjection(
            tiny_clip_hf.config.vision_config
        ).eval()
        family = detect_family(vision)
        assert set(family.forward(vision, batch)) == {"vision"}
        assert family.need_contrastive(vision).encode_image(
            vision, batch["pixel_values"]
        ).shape == (
            3,
            vision.config.projection_dim,
        )
        plain = transformers.CLIPVisionModel(tiny_clip_hf.config.vision_config).eval()
        assert family.need_contrastive(plain).encode_image(plain, batch["pixel_values"]).shape == (
            3,
            32,
        )
        with pytest.raises(CordaError, match="CLIPVisionModel has no text tower"):
            family.need_contrastive(plain).encode_text(plain, batch)
        with pytest.raises(CordaError, match="no logit scale"):
            family.need_contrastive(plain).logit_scale(plain)
        text = transformers.CLIPTextModel(tiny_clip_hf.config.text_config).eval()
        assert set(family.forward(text, batch)) == {"text"}
        assert family.need_contrastive(text).encode_text(text, batch).shape == (3, 32)

    def test_a_batch_that_feeds_no_tower_is_named(self, tiny_clip_hf):
        with pytest.raises(
            DataError, match=r"takes 'pixel_values' or 'input_ids'; the batch has: labels"
        ):
            detect_family(tiny_clip_hf).forward(tiny_clip_hf, {"labels": torch.zeros(2)})


class TestMasks:
    def test_clip_counts_up_to_and_including_the_end_of_text(self, tiny_clip_hf, batch):
        mask = detect_family(tiny_clip_hf).masks(batch)["text"]
        assert mask.dtype == torch.bool
        assert mask.sum(1).tolist() == [4, 7, 12]
        assert mask.tolist() == (torch.arange(12) <= torch.tensor([[3], [6], [11]])).tolist()

    def test_a_mask_in_the_batch_is_used(self, tiny_clip_hf, batch):
        given = torch.zeros(3, 12, dtype=torch.long)
        given[:, 2] = 1
        mask = detect_family(tiny_clip_hf).masks({**batch, "attention_mask": given})["text"]
        assert torch.equal(mask, given.bool())

    def test_siglip_also_counts_the_position_it_pools(self, tiny_siglip, batch):
        given = torch.arange(12) < torch.tensor([[4], [7], [12]])
        mask = detect_family(tiny_siglip).masks({**batch, "attention_mask": given})["text"]
        assert mask.sum(1).tolist() == [5, 8, 12]
        assert given.sum(1).tolist() == [4, 7, 12]  # the batch's own mask is not written to

    def test_images_without_padding_have_no_mask(self, tiny_clip_hf, batch):
        assert detect_family(tiny_clip_hf).masks({"pixel_values": batch["pixel_values"]}) == {}


class TestNaFlex:
    @pytest.fixture
    def model(self, siglip_configs):
        text, vision = siglip_configs
        return transformers.Siglip2Model(
            transformers.Siglip2Config(text_config=text, vision_config=vision)
        ).eval()

    def test_whole_images_are_cut_as_the_image_processor_does(self, model, batch):
        pixels = torch.rand(3, 3, 32, 32)
        processor = transformers.Siglip2ImageProcessor(
            patch_size=8, max_num_patches=16, do_resize=False, do_rescale=False, do_normalize=False
        )
        inputs = processor(
            images=list(pixels), return_tensors="pt", do_rescale=False, do_normalize=False
        )
        family = detect_family(model)
        with torch.no_grad():
            expected = family.need_contrastive(model).encode_image(model, dict(inputs))
            torch.testing.assert_close(
                family.need_contrastive(model).encode_image(model, pixels),
                expected,
                atol=1e-5,
                rtol=1e-5,
            )

    def test_padding_patches_do_not_count_and_do_not_matter(self, model):
        family = detect_family(model)
        patches, mask = torch.randn(2, 16, 8 * 8 * 3), torch.ones(2, 16, dtype=torch.long)
        mask[1, 8:] = 0
        inputs = {
            "pixel_values": patches,
            "pixel_attention_mask": mask,
            "spatial_shapes": torch.tensor([[4, 4], [2, 4]]),
        }
        assert torch.equal(family.masks(inputs)["vision"], mask.bool())
        with torch.no_grad():
            expected = family.need_contrastive(model).encode_image(model, inputs)
            patches[1, 8:] = 100.0
            with unpacked(model):
                found = family.need_contrastive(model).encode_image(model, inputs)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def test_an_image_that_is_not_made_of_patches(self, model):
        with pytest.raises(CordaError, match="30×32 pixels are not made of 8×8 patches"):
            detect_family(model).need_contrastive(model).encode_image(
                model, torch.rand(1, 3, 30, 32)
            )


class TestLoading:
    @pytest.fixture
    def folder(self, tmp_path, tiny_clip_hf):
        tiny_clip_hf.save_pretrained(tmp_path)
        return tmp_path

    def test_a_folder_loads_as_what_it_is(self, folder, tiny_clip_hf, batch):
        loaded = load_model(folder)
        assert type(loaded.model).__name__ == "CLIPModel"
        assert (loaded.family.name, loaded.source) == ("clip_hf", str(folder))
        assert not loaded.model.training
        assert model_fingerprint(loaded.model) == model_fingerprint(tiny_clip_hf)
        with torch.no_grad():
            torch.testing.assert_close(
                loaded.family.need_contrastive(loaded.model).encode_image(
                    loaded.model, batch["pixel_values"]
                ),
                loaded.family.need_contrastive(tiny_clip_hf).encode_image(
                    tiny_clip_hf, batch["pixel_values"]
                ),
            )

    def test_dtype(self, folder):
        model = load_model(folder, dtype=torch.bfloat16).model
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_a_tower_with_projection_keeps_its_class(self, tmp_path, tiny_clip_hf):
        transformers.CLIPVisionModelWithProjection(
            tiny_clip_hf.config.vision_config
        ).save_pretrained(tmp_path)
        assert type(load_model(tmp_path).model).__name__ == "CLIPVisionModelWithProjection"

    def test_missing_processors_are_an_error_only_when_used(self, folder):
        from PIL import Image

        processor = load_model(folder).processor
        assert processor.image_size == (32, 32)
        with pytest.raises(CordaError, match=r"preprocessor_config\.json"):
            processor.image(Image.new("RGB", (8, 8)))
        with pytest.raises(CordaError, match=r"tokenizer\.json"):
            processor.text(["a"])

    def test_processors_beside_the_weights(self, folder):
        from PIL import Image

        save_tokenizer(folder, 12)
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(
            folder
        )
        processor = load_model(folder).processor
        assert processor.image(Image.new("L", (50, 40), 128)).shape == (3, 32, 32)
        found = processor.text(["a photo of a cat", "hi"])
        assert found["input_ids"].shape == found["attention_mask"].shape == (2, 12)
        assert found["attention_mask"].dtype == torch.bool
        assert found["attention_mask"].sum(1).tolist() == [7, 3]

    def test_siglip(self, tmp_path, tiny_siglip):
        tiny_siglip.save_pretrained(tmp_path)
        loaded = load_model(tmp_path)
        assert loaded.family.name == "siglip_hf"
        assert loaded.processor.image_size == (32, 32)

    def test_truncated_weights_name_the_folder(self, folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:500])
        with pytest.raises(CordaError, match="files may be truncated") as caught:
            load_model(folder)
        assert caught.value.__cause__ is not None
        assert str(folder) in str(caught.value)

    def test_missing_weights(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(CordaError, match=r"Expected.*model\.safetensors.*It has: config\.json"):
            load_model(folder)

    def test_siglip_2_images_come_at_one_size_as_its_own_processor_makes_them(
        self, tmp_path, siglip_configs
    ):
        from PIL import Image

        text, vision = siglip_configs
        config = transformers.Siglip2Config(text_config=text, vision_config=vision)
        transformers.Siglip2Model(config).save_pretrained(tmp_path)
        own = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
        own.save_pretrained(tmp_path)
        loaded = load_model(tmp_path)
        assert loaded.processor.image_size == (32, 32)
        picture = Image.effect_noise((60, 60), 90).convert("RGB")
        with torch.no_grad():
            expected = loaded.family.need_contrastive(loaded.model).encode_image(
                loaded.model, dict(own(images=picture, return_tensors="pt"))
            )
            found = loaded.family.need_contrastive(loaded.model).encode_image(
                loaded.model, loaded.processor.image(picture)[None]
            )
        torch.testing.assert_close(
            found, expected, atol=0.02, rtol=0.02
        )  # PIL's resize against torch's
        assert loaded.processor.image(Image.new("L", (50, 20))).shape == (3, 32, 32)

    def test_another_model_type(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
        with pytest.raises(CordaError, match=r"no model of a known format.*It has: config\.json"):
            load_model(tmp_path)

    def test_an_adapter_folder_is_recognised(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(CordaError, match="It holds an adapter"):
            load_model(tmp_path)

    def test_a_hub_that_cannot_be_reached(self):
        with pytest.raises(
            CordaError, match="could not load 'openai/no-such-clip' from its hub"
        ) as caught:
            load_model("openai/no-such-clip")
        assert caught.value.__cause__ is not None
