"""Mixtures of experts: which matrices are sites, and what is left out unless it is asked for."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from torch import nn

from corda_vlm.errors import CordaError
from corda_vlm.families import FAMILIES, detect_family, load_model
from corda_vlm.families.layers.experts import stacked_weights
from corda_vlm.sites import find_sites, model_fingerprint, sites_table
from tests.families.moe_toy import MIXTURES, make

pytestmark = pytest.mark.skipif(
    t.__version__.startswith("4."), reason="experts are stacks in transformers 5"
)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_matrix_of_a_block_is_a_site(name):
    model = make(name)
    assert detect_family(model) is FAMILIES["llm"]
    sites, routers = find_sites(model), find_sites(model, roles="router")
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    stacks = [
        f"{n}.{parameter}.{expert}"
        for n, m in model.named_modules()
        if n.endswith(".experts")
        for parameter, expert, _ in stacked_weights(m)
    ]
    found = [site.name for site in sites + routers]
    assert len(found) == len(set(found))
    assert set(linear) | set(stacks) <= set(found)
    assert len(stacks) == sum(site.pool is not None for site in sites)
    assert all(site.role == "router" for site in routers)
    assert not {site.name for site in sites} & {site.name for site in routers}


def test_an_expert_has_a_stream_of_its_own_and_a_pool():
    sites = {site.name: site for site in find_sites(make("mixtral"))}
    prefix = "model.layers.1.mlp.experts"
    site = sites[f"{prefix}.gate_up_proj.3"]
    assert (site.role, site.block, site.stream, site.pool) == (
        "gate_up", 1, f"{prefix}.3.in", f"{prefix}.in",
    )  # fmt: skip
    assert sites[f"{prefix}.down_proj.3"].pool == f"{prefix}.mid"
    assert sites["model.layers.1.self_attn.q_proj"].pool is None


def test_a_layers_experts_are_one_row_of_the_table():
    model = make("qwen2_moe")
    table = sites_table(model, find_sites(model))
    assert "model.layers.*.mlp.experts.*.in" in table
    assert "model.layers.*.mlp.shared_expert.in" in table


def test_the_fingerprint_sees_one_expert():
    model = make("gpt_oss")
    before = model_fingerprint(model)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[3].neg_()
    assert model_fingerprint(model) != before


def test_a_folder_is_loaded_as_one(tmp_path):
    make("qwen3_moe").save_pretrained(tmp_path)
    assert load_model(tmp_path).family is FAMILIES["llm"]


def test_experts_of_an_unknown_layout_are_refused():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(2, 3, 4))

    model = make("mixtral")
    model.model.layers[1].mlp.experts = Experts()
    with pytest.raises(CordaError, match=r"layers\.1\.mlp\.experts keeps .* not known \(Experts\)"):
        find_sites(model)
