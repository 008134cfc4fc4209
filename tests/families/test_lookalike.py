"""Decoders that no row names: those that look like Llama are adapted as it is, which is said; of others `targets` are asked."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import transformers as t
from peft import PeftModel

from corda_vlm import AdapterPlan
from corda_vlm.adapter import attach_adapter, export_adapter
from corda_vlm.covariance import collect_covariance
from corda_vlm.errors import CalibrationError, CordaError
from corda_vlm.families import detect_family, load_model, register_family
from corda_vlm.families.architectures.decoders import LLAMA
from corda_vlm.families.base import block_rules
from corda_vlm.families.llm import family
from corda_vlm.families.lookalike import LOOKALIKE
from corda_vlm.plan import plan_adapter
from corda_vlm.sites import find_sites
from tests.families.language_toy import TEXT, inputs_of, text_batch, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than their width")


class StrangerConfig(t.LlamaConfig):
    model_type = "stranger"


class StrangerForCausalLM(t.LlamaForCausalLM):
    config_class = StrangerConfig


def stranger(kind: type = StrangerForCausalLM) -> Any:
    """Of a class that transformers does not have, as one that comes with code of its own."""
    torch.manual_seed(0)
    return kind(StrangerConfig(**TEXT)).eval()


@torch.no_grad()
def logits(model, batch):
    return model(**inputs_of(batch), use_cache=False).logits


def test_it_is_adapted_without_targets_and_a_line_says_so(tmp_path, caplog):
    class Foreign(StrangerForCausalLM):
        """A class of its own, as each is told of once."""

    model, batch = stranger(Foreign), text_batch(3)
    with caplog.at_level(logging.WARNING):
        sites = find_sites(model)
        find_sites(model)
    assert caplog.text.count("no family knows Foreign, but its blocks model.layers look like") == 1
    assert len(sites) == 14
    assert len({site.stream for site in sites}) == 8
    assert {site.tower for site in sites} == {"language"}
    before, original = logits(model, batch), copy.deepcopy(model)
    store = collect_covariance(model, [batch], tokens="response", show_progress=False)
    plan = plan_adapter(model, store, rank=2, a_norm=1.0, show_progress=False)
    assert plan.family == "decoder"
    plan.save(tmp_path / "plan.json")
    attached = attach_adapter(model, AdapterPlan.load(tmp_path / "plan.json", model=model))
    assert torch.equal(logits(attached, batch), before)
    assert detect_family(attached) is LOOKALIKE, "with adapters around its layers too"
    assert find_sites(attached) == sites
    attached(**batch).loss.backward()
    torch.optim.SGD([p for p in attached.parameters() if p.requires_grad], lr=0.1).step()
    after = logits(attached, batch)
    export_adapter(attached, tmp_path / "lora", format="lora")
    plain = PeftModel.from_pretrained(original, str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(plain, batch), after, rtol=1e-3, atol=1e-4)


def test_what_is_left_out_is_named(caplog):
    model: Any = stranger()
    for block in model.model.layers:
        block.self_attn.novelty = torch.nn.Linear(4, 4)
    with caplog.at_level(logging.WARNING):
        assert len(find_sites(model)) == 14
    assert "left out are self_attn.novelty" in caplog.text


@pytest.mark.parametrize("kind", ["Beam", "Dory", "Doge", "NanoChat"])
def test_those_of_transformers_that_no_row_names(kind):
    if not hasattr(t, f"{kind}ForCausalLM"):
        pytest.skip(f"transformers {t.__version__} has no {kind}")
    config = getattr(t, f"{kind}Config")(**TEXT)
    model = getattr(t, f"{kind}ForCausalLM")(config).eval()
    assert detect_family(model) is LOOKALIKE
    store = collect_covariance(model, [text_batch(3)], show_progress=False)
    assert len(store.streams) == 8


def test_a_router_that_is_given_more_than_its_input_runs():
    if not hasattr(t, "Lfm2MoeForCausalLM") or t.__version__.startswith("4."):
        pytest.skip(f"transformers {t.__version__}: its experts are none of a stack")
    mixed = {
        "num_experts": 2, "num_experts_per_tok": 1, "num_dense_layers": 1, "moe_intermediate_size": 16,
        "layer_types": ["conv", "full_attention"],
    }  # fmt: skip
    torch.manual_seed(0)
    model = t.Lfm2MoeForCausalLM(t.Lfm2MoeConfig(**TEXT, **mixed)).eval()
    with pytest.warns(UserWarning, match="experts that saw fewer tokens"):
        store = collect_covariance(model, [text_batch(3)], show_progress=False)
    # a short convolution and a dense part, attention, two experts
    assert len(store.sites) == 5 + 4 + 2 * 2


def test_streams_that_are_wrong_are_caught():
    model = stranger()
    for block in model.model.layers:  # its v reads something else than q and k
        block.self_attn.v_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    with pytest.raises(CalibrationError, match="are declared to read one input"):
        collect_covariance(model, [text_batch(3)], show_progress=False)


@pytest.mark.parametrize("kind", ["Falcon", "Mamba"])  # other names, and no attention
def test_others_are_told_of_targets(kind):
    config = getattr(t, f"{kind}Config")(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    model = getattr(t, f"{kind}ForCausalLM")(config)
    with pytest.raises(CordaError, match=r"no family knows the model class .*targets=\["):
        find_sites(model)


def test_a_row_of_its_own_goes_before(registry):
    register_family(family("mine", ("stranger",), block_rules(r"model\.layers", "language", LLAMA)))
    assert detect_family(stranger()).name == "mine"


@pytest.mark.parametrize(("kind", "fails"), [("Dory", False), ("Falcon", True)])
def test_folders(kind, fails, tmp_path):
    if not hasattr(t, f"{kind}ForCausalLM"):
        pytest.skip(f"transformers {t.__version__} has no {kind}")
    small = TEXT if kind == "Dory" else {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}  # fmt: skip
    model = getattr(t, f"{kind}ForCausalLM")(getattr(t, f"{kind}Config")(**small))
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    if fails:
        with pytest.raises(CordaError, match="no family knows the model class"):
            load_model(tmp_path)
        return
    loaded: Any = load_model(tmp_path)
    assert loaded.family is LOOKALIKE
    assert loaded.processor.text(["What is this ?"])["input_ids"].shape == (1, 4)
