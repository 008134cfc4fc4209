"""Sites: their names do not depend on how the model is dressed, and bad requests name what is wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from corda_vlm.errors import CordaError, NoSitesError, UnknownNameError
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.families.options import ROLES, TOWERS
from corda_vlm.sites import (
    Site,
    find_sites,
    get_linear,
    model_fingerprint,
    site_shape,
    sites_table,
)

MODELS = ("tiny_clip_hf", "tiny_siglip", "tiny_open_clip")


@pytest.fixture(params=MODELS)
def model(request):
    return request.getfixturevalue(request.param)


def wrap(model, pattern=r".*(q_proj|fc1|c_fc)", **options):
    return get_peft_model(model, LoraConfig(target_modules=pattern, **options))


class TestFindSites:
    def test_packed_unpacked_and_wrapped_models_have_the_same_sites(self, model):
        sites = find_sites(model)
        with unpacked(model):
            assert find_sites(model) == sites
            wrapped = wrap(model)
            assert find_sites(wrapped) == sites
            assert find_sites(wrapped.get_base_model()) == sites
            assert not any(
                "base_" in site.name or "lora" in site.name for site in find_sites(wrapped)
            )

    def test_names_are_unique_and_all_values_known(self, model):
        sites = find_sites(model)
        assert len({site.name for site in sites}) == len(sites)
        assert {site.role for site in sites} <= set(ROLES)
        assert {site.tower for site in sites} <= set(TOWERS)

    def test_each_stream_stays_in_one_tower_and_one_width(self, model):
        streams: dict[str, set[tuple[str, int]]] = {}
        for site in find_sites(model):
            streams.setdefault(site.stream, set()).add(
                (site.tower, site_shape(model, site.name)[1])
            )
        assert all(len(values) == 1 for values in streams.values())

    def test_towers_and_roles_as_list_or_comma_string(self, model):
        sites = find_sites(model)
        assert find_sites(model, towers="vision") == [
            site for site in sites if site.tower == "vision"
        ]
        assert (
            find_sites(model, towers=["text", "vision"])
            == find_sites(model, towers="vision, text")
            == sites
        )
        assert find_sites(model, roles="q,down") == [
            site for site in sites if site.role in ("q", "down")
        ]
        both = find_sites(model, towers="text", roles=["up"])
        assert {(site.tower, site.role) for site in both} == {("text", "up")}

    def test_modules_that_peft_saves_whole_keep_their_name(self, tiny_clip_hf):
        sites = find_sites(tiny_clip_hf)
        assert find_sites(wrap(tiny_clip_hf, modules_to_save=["visual_projection"])) == sites

    def test_two_adapters(self, tiny_clip_hf):
        sites = find_sites(tiny_clip_hf)
        wrapped = wrap(tiny_clip_hf)
        wrapped.add_adapter("second", LoraConfig(target_modules=r".*fc2"))
        assert find_sites(wrapped) == sites

    def test_the_model_is_left_as_it_was(self, tiny_open_clip):
        modules = [id(module) for module in tiny_open_clip.modules()]
        find_sites(tiny_open_clip)
        assert [id(module) for module in tiny_open_clip.modules()] == modules

    def test_a_site_is_a_value(self):
        site = Site("a", "vision", 0, "q", "s")
        assert site == Site("a", "vision", 0, "q", "s")
        assert {site: 1}[Site("a", "vision", 0, "q", "s")] == 1


class TestRefusals:
    def test_unknown_tower(self, model):
        with pytest.raises(
            UnknownNameError,
            match="unknown tower 'visual'; choose one of: language, model, projector, text",
        ):
            find_sites(model, towers="visual")

    def test_unknown_role(self, model):
        with pytest.raises(UnknownNameError, match="unknown role 'query'"):
            find_sites(model, roles=["query"])

    def test_a_tower_the_model_does_not_have(self, model):
        with pytest.raises(NoSitesError, match="has no language tower; it has: vision, text"):
            find_sites(model, towers="language")

    def test_a_role_the_model_does_not_have(self, model):
        with pytest.raises(
            NoSitesError, match=r"no layer of \w+ has the role 'qkv'; it has: .*down"
        ):
            find_sites(model, roles="q,qkv")

    def test_an_empty_choice(self, model):
        with pytest.raises(CordaError, match="no tower given; choose from vision"):
            find_sites(model, towers="")
        with pytest.raises(CordaError, match="no role given"):
            find_sites(model, roles=[])

    def test_an_unknown_class_lists_the_families_and_says_how_to_add_one(self):
        with pytest.raises(
            CordaError, match=r"Linear: .*register_family[^\n]*\n.*clip_hf \(CLIPModel"
        ):
            find_sites(nn.Linear(2, 2))

    def test_a_rule_that_matches_nothing(self, tiny_open_clip):
        with pytest.raises(
            NoSitesError, match="no layer of the vision tower of CLIP matches a rule of family"
        ):
            find_sites(tiny_open_clip, family="clip_hf")

    def test_an_unknown_family(self, model):
        with pytest.raises(
            UnknownNameError, match="unknown family 'clip'; choose one of: auto, clip_hf, clip_open"
        ):
            find_sites(model, family="clip")


class TestGetLinear:
    def test_base_layers_inside_wrappers(self, model):
        with unpacked(model):
            expected = {site.name: get_linear(model, site.name) for site in find_sites(model)}
            wrapped = wrap(model)
            for name, linear in expected.items():
                assert isinstance(linear, nn.Linear)
                assert get_linear(wrapped, name) is linear
                assert tuple(linear.weight.shape) == site_shape(wrapped, name)

    def test_a_packed_part_says_how_to_reach_it(self, tiny_open_clip):
        name = "visual.transformer.resblocks.0.attn.q_proj"
        with pytest.raises(
            NoSitesError, match=r"resblocks\.0\.attn is packed.*attention\.unpacked"
        ):
            get_linear(tiny_open_clip, name)
        assert site_shape(tiny_open_clip, name) == (32, 32)

    def test_a_name_that_is_no_layer(self, model):
        with pytest.raises(NoSitesError, match=r"has no layer 'no\.such\.layer'"):
            get_linear(model, "no.such.layer")
        with pytest.raises(NoSitesError, match=r"has no layer 'no\.such\.layer'"):
            site_shape(model, "no.such.layer")

    def test_a_module_that_is_no_linear(self, tiny_clip_hf):
        with pytest.raises(NoSitesError, match=r"vision_model is a \w+, neither an nn\.Linear"):
            get_linear(tiny_clip_hf, "vision_model")


class TestFingerprint:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_equal_in_every_dtype(self, model, dtype):
        with torch.no_grad():  # values that vanish in float16, of both signs
            for parameter in model.parameters():
                parameter.view(-1)[::3] *= 1e-12
        assert model_fingerprint(copy.deepcopy(model).to(dtype)) == model_fingerprint(model)

    def test_equal_packed_unpacked_and_wrapped(self, model):
        expected = model_fingerprint(model)
        with unpacked(model):
            assert model_fingerprint(model) == expected
            assert model_fingerprint(wrap(model, init_lora_weights=False)) == expected

    def test_training_changes_it(self, model):
        expected = model_fingerprint(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * parameter.std(correction=0) * torch.randn_like(parameter)
        assert model_fingerprint(model) != expected

    def test_a_change_of_any_column_changes_it(self, tiny_open_clip):
        expected = model_fingerprint(tiny_open_clip)
        with torch.no_grad():
            for parameter in tiny_open_clip.visual.transformer.parameters():
                if parameter.dim() == 2:
                    parameter[:, 1:].neg_()  # all but the first column
        assert model_fingerprint(tiny_open_clip) != expected

    def test_other_weights_and_other_shapes_differ(self, make_clip):
        prints = {model_fingerprint(make_clip(layers)) for layers in (1, 2, 2, 3)}
        assert len(prints) == 4

    @pytest.fixture
    def make_clip(self):
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        def make(layers):
            return CLIP(
                24,
                CLIPVisionCfg(layers=layers, width=32, head_width=16, patch_size=8, image_size=32),
                CLIPTextCfg(context_length=12, vocab_size=100, width=32, heads=2, layers=1),
            )

        return make


class TestTable:
    def test_blocks_collapse_into_one_row_a_role(self, tiny_open_clip):
        table = sites_table(tiny_open_clip, find_sites(tiny_open_clip))
        lines = table.splitlines()
        assert lines[0].split() == [
            "tower",
            "blocks",
            "role",
            "out",
            "×",
            "in",
            "stream",
            "sites",
            "parameters",
        ]
        assert len(lines) == 2 + 12 + 2
        assert lines[2].split() == [
            "vision", "0–1", "q", "32", "×", "32", "visual.transformer.resblocks.*.attn.in", "2", "2,048",
        ]  # fmt: skip
        assert lines[-1] == "24 sites, 16 streams, 49,152 parameters"

    def test_the_full_listing_has_a_row_a_site(self, tiny_siglip):
        sites = find_sites(tiny_siglip)
        lines = sites_table(tiny_siglip, sites, full=True).splitlines()
        assert len(lines) == 2 + len(sites) + 2
        for site, line in zip(sites, lines[2:], strict=False):
            assert site.name in line.split()

    def test_gaps_between_blocks_show(self, tiny_clip_hf):
        sites = [
            Site(
                f"text_model.encoder.layers.{block % 2}.mlp.fc1",
                "text",
                block,
                "up",
                f"t.layers.{block}.mlp.in",
            )
            for block in (0, 1, 2, 5, 7, 8)
        ]
        assert "  0–2, 5, 7–8  " in sites_table(tiny_clip_hf, sites).splitlines()[2]

    def test_wrapped_models_print_the_same(self, model):
        table = sites_table(model, find_sites(model))
        with unpacked(model):
            wrapped = wrap(model)
            assert sites_table(wrapped, find_sites(wrapped)) == table
