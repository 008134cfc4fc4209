"""A model that accelerate has spread over places: weights that rest on the disk are on the device 'meta' between two calls."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model

from corda_vlm.covariance import collect_covariance
from corda_vlm.errors import CordaError
from corda_vlm.plan import plan_adapter
from tests.families import language_toy, moe_toy

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than their width")


def batches() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [language_toy.inputs_of(language_toy.text_batch(4)) for _ in range(3)]


@pytest.fixture
def spread(tmp_path):
    """The model of `language_toy`, its second block on the disk."""
    here = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    where = {**dict.fromkeys(here, "cpu"), "model.layers.1": "disk"}
    model = language_toy.make("llama")
    return dispatch_model(model, where, main_device="cpu", offload_dir=str(tmp_path))


def test_offloaded_weights_are_read_from_where_they_rest(spread):
    assert {parameter.device.type for parameter in spread.parameters()} == {"cpu", "meta"}
    whole = language_toy.make("llama")
    one, other = (collect_covariance(m, batches(), show_progress=False) for m in (whole, spread))
    assert one.model_fingerprint == other.model_fingerprint
    assert all(torch.equal(one[site].matrix, other[site].matrix) for site in one)
    plans = [plan_adapter(m, one, rank=2, show_progress=False) for m in (whole, spread)]
    for name, factor in plans[0].factors.items():
        assert torch.equal(factor.A, plans[1].factors[name].A), name


@pytest.mark.parametrize("make", [language_toy.make, moe_toy.make])
def test_a_weight_that_is_nowhere_is_named(make):
    model = make("llama" if make is language_toy.make else "mixtral").to("meta")
    with pytest.raises(CordaError, match="is not in memory"):
        plan_adapter(model, None, method="pissa", rank=2, show_progress=False)
