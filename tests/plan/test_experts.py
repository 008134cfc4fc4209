"""Plans of experts: what each saw, the stand-ins of those that saw too little, and the table."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as t

from corda_vlm.covariance import collect_covariance, collect_gradient
from corda_vlm.plan import AdapterPlan, plan_adapter
from tests.families.language_toy import text_batch
from tests.families.moe_toy import make

pytestmark = [
    pytest.mark.skipif(
        t.__version__.startswith("4."), reason="experts are stacks in transformers 5"
    ),
    pytest.mark.filterwarnings("ignore:.*fewer tokens than"),
]


def test_what_an_expert_saw_is_in_the_plan_and_its_table(tmp_path):
    model, batch = make("mixtral"), text_batch(4)
    with pytest.warns(
        UserWarning, match=r"16 sites are experts that saw fewer tokens than their inputs are wide"
    ):
        store = collect_covariance(model, [batch], show_progress=False)
    plan = plan_adapter(model, store, rank=2, show_progress=False)
    experts = [s for s in plan.sites if s.site.pool is not None]
    kept = int(batch["attention_mask"].sum())
    layer = [s.tokens or 0 for s in experts if ".1.mlp.experts.gate_up" in s.site.name]
    assert sum(layer) == 2 * kept  # each token goes to two experts
    assert all(s.pooled == (s.tokens < s.shape[1]) for s in experts)
    few = next(s.site for s in experts if s.pooled)
    others = [s.site.name for s in experts if s.site.pool == few.pool]
    assert store[few.name].count == sum(store.counts(name)[0] for name in others)
    rows = [line for line in str(plan).splitlines() if ".mlp.experts." in line]
    assert len(rows) == 4
    assert rows[0].startswith("model.layers.0.mlp.experts.gate_up_proj.* (4)")
    assert "tokens: that the router sent to each expert" in str(plan)
    plan.save(tmp_path / "plan.json")
    assert AdapterPlan.load(tmp_path / "plan.json", model=model) == plan


def test_an_expert_without_a_gradient_takes_its_stacks_mean(caplog):
    model = make("qwen2_moe")
    store = collect_covariance(model, [text_batch(4)], show_progress=False)
    gradient = collect_gradient(model, [text_batch(1, 3)], show_progress=False)
    missed = [name for name in gradient.asked if name not in gradient]
    assert missed
    with caplog.at_level(logging.WARNING):
        plan = plan_adapter(
            model, store, method="corda-natural", gradient=gradient, rank=2, show_progress=False
        )
    assert "which take the mean gradient of their stack's others" in caplog.text
    assert {s.site.name for s in plan.sites} >= set(missed)
    assert torch.isfinite(plan.factors[missed[0]].A).all()
