"""Methods that start from the gradient of the new task's loss: what is attached, what plain PEFT makes of it, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from corda_vlm.adapter import adapt, load_adapter
from corda_vlm.adapter.paired import PairedConfig, base_of, paired_layers, trained
from corda_vlm.covariance import (
    CovarianceStore,
    GradientStore,
    collect_covariance,
    collect_gradient,
)
from corda_vlm.decompose import decompose_gradient
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.families import detect_family
from corda_vlm.families.layers.attention import unpack
from corda_vlm.methods import MethodRequest, get_method, prepare_method, restore_method
from corda_vlm.plan import AdapterPlan, plan_adapter
from corda_vlm.plan.share import MOST, _ceiling
from corda_vlm.sites import find_sites, get_linear
from corda_vlm.train.terms.before import Before
from corda_vlm.train.weights import check_signature, signature

METHODS = ("corda-natural", "lora-ga", "keep-lora")


def make_batch(size: int = 40, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(size, 3, 32, 32, generator=generator)}


def image_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    features = (
        detect_family(model).need_contrastive(model).encode_image(model, batch["pixel_values"])
    )
    generator = torch.Generator().manual_seed(3)
    return (features @ torch.randn(features.shape[1], 4, generator=generator)).logsumexp(1).mean()


def made_from(model: nn.Module) -> dict[str, Any]:
    store = collect_covariance(model, [make_batch()], towers="vision", show_progress=False)
    task = collect_gradient(
        model, [make_batch(seed=2)], image_loss, towers="vision", show_progress=False
    )
    return {"store": store, "gradient": task}


def prepared(name: str, model: nn.Module, given: dict, **options) -> PeftModel:
    needed = {k: v for k, v in given.items() if name != "lora-ga" or k != "store"}
    found = prepare_method(
        name, model, **needed, towers="vision", **{"rank": 4, "show_progress": False, **options}
    )
    assert isinstance(found, PeftModel)
    return found


def outputs(model: nn.Module) -> Tensor:
    bare = base_of(model)
    with torch.no_grad():
        encode = detect_family(bare).need_contrastive(bare).encode_image
        return encode(bare.eval(), make_batch(4, seed=5)["pixel_values"])


def disturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", ["tiny_clip_hf", "tiny_open_clip"])
@pytest.mark.parametrize("name", METHODS)
def test_it_starts_where_the_base_is_and_comes_off_again(name, kind, request):
    model = request.getfixturevalue(kind)
    before, given = outputs(model), made_from(model)
    peft_model = prepared(name, model, given)
    # unpacked attention rounds otherwise than packed
    exact = {"atol": 0, "rtol": 0} if kind == "tiny_clip_hf" else {"atol": 2e-6, "rtol": 1e-4}
    torch.testing.assert_close(outputs(peft_model), before, **exact)
    disturb(peft_model)
    assert not torch.allclose(outputs(peft_model), before)
    restored = restore_method(name, peft_model)
    torch.testing.assert_close(outputs(restored), before, atol=0, rtol=0)


def test_the_natural_start_is_the_decomposition_of_gradient_and_covariance(tiny_clip_hf):
    given = made_from(tiny_clip_hf)
    plan = plan_adapter(
        tiny_clip_hf, **given, method="corda-natural", rank=4, damping=1e-2, towers="vision", show_progress=False
    )  # fmt: skip
    assert [s.site.name for s in plan.sites] == [
        s.name for s in find_sites(tiny_clip_hf, towers="vision")
    ]
    for site in plan.sites:
        name = site.site.name
        wanted = decompose_gradient(
            given["gradient"][name],
            given["store"][name].matrix,
            rank=4,
            damping=1e-2,
            a_norm=None,
            route="auto",
            seed=0,
        )
        torch.testing.assert_close(plan.factors[name].A, wanted.A, atol=1e-4, rtol=1e-4)
        assert not plan.factors[name].B.any()
        assert site.predicted_damage is None
    assert plan.starts_at_zero
    assert plan.task_fingerprint == given["gradient"].data_fingerprint


def test_a_plan_file_keeps_it(tiny_clip_hf, tmp_path):
    given = made_from(tiny_clip_hf)
    plan = plan_adapter(
        tiny_clip_hf, **given, method="corda-natural", rank=4, towers="vision", show_progress=False
    )
    again = AdapterPlan.load(plan.save(tmp_path / "plan.json"), model=tiny_clip_hf)
    assert again == plan
    assert again.starts_at_zero
    assert "corda-natural: 13 sites" in str(again)


@pytest.mark.parametrize("name", ["corda-natural", "keep-lora"])
def test_what_is_trained_is_a_lora_that_plain_peft_loads_on_the_original(
    name, tiny_clip_hf, tmp_path
):
    """Nothing needs a residual, and nothing this package: `PeftModel.from_pretrained` is enough."""
    import copy

    original = copy.deepcopy(tiny_clip_hf)
    peft_model = prepared(name, tiny_clip_hf, made_from(tiny_clip_hf))
    config = peft_model.peft_config["default"]
    assert type(config) is LoraConfig
    assert not paired_layers(peft_model)
    disturb(peft_model)
    peft_model.save_pretrained(str(tmp_path))
    wanted = outputs(peft_model)
    plain = PeftModel.from_pretrained(copy.deepcopy(original), str(tmp_path))
    torch.testing.assert_close(outputs(plain), wanted)
    torch.testing.assert_close(outputs(load_adapter(original, tmp_path)), wanted)


def test_keep_lora_trains_b_alone(tiny_clip_hf):
    peft_model = prepared("keep-lora", tiny_clip_hf, made_from(tiny_clip_hf))
    for layer in peft_model.modules():
        if isinstance(layer, LoraLayer):
            B, A = trained(layer, "default")
            assert B.requires_grad
            assert not A.requires_grad
            torch.testing.assert_close(A.norm(dim=1), torch.ones(4))


def test_lora_ga_has_a_pair_of_its_own(tiny_clip_hf):
    peft_model = prepared("lora-ga", tiny_clip_hf, made_from(tiny_clip_hf))
    assert type(peft_model.peft_config["default"]) is PairedConfig
    assert paired_layers(peft_model)


def test_a_further_adapter_beside_one_of_ours(tiny_clip_hf):
    """PEFT takes one kind of adapter a model; beside a pair of ours the natural start is one too."""
    from corda_vlm.adapter import attach_adapter

    given = made_from(tiny_clip_hf)
    plans = [
        plan_adapter(tiny_clip_hf, **more, rank=4, towers="vision", show_progress=False)
        for more in ({"store": given["store"]}, {**given, "method": "corda-natural"})
    ]
    before = outputs(tiny_clip_hf)
    peft_model = attach_adapter(tiny_clip_hf, plans[0])
    attach_adapter(peft_model, plans[1], adapter_name="second")
    peft_model.set_adapter("second")
    torch.testing.assert_close(outputs(peft_model), before, atol=0, rtol=0)


def test_adapt_takes_the_new_task_in_one_call(tiny_clip_hf):
    options = {"rank": 4, "towers": "vision", "method": "corda-natural", "show_progress": False}
    batches, task = [make_batch()], [make_batch(seed=2)]
    first = adapt(tiny_clip_hf, batches, task_batches=task, loss=image_loss, **options)
    starts = {n: p.detach().clone() for n, p in first.named_parameters() if p.requires_grad}
    bare = restore_method("corda-natural", first)
    gradient = collect_gradient(bare, task, image_loss, towers="vision", show_progress=False)
    second = adapt(bare, batches, gradient=gradient, **options)
    for name, parameter in second.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, starts[name])


def test_sites_that_the_loss_does_not_reach_are_not_adapted_which_is_said(tiny_clip_hf, caplog):
    batch = {**make_batch(), "input_ids": torch.full((40, 8), 5)}
    store = collect_covariance(tiny_clip_hf, [batch], show_progress=False)
    gradient = collect_gradient(tiny_clip_hf, [make_batch(seed=2)], image_loss, show_progress=False)
    caplog.clear()
    plan = plan_adapter(
        tiny_clip_hf, store, gradient=gradient, method="corda-natural", rank=4, show_progress=False
    )
    assert "13 of 26 sites are not adapted" in caplog.text
    assert {s.site.tower for s in plan.sites} == {"vision"}


def test_a_folder_takes_no_training_of_another_plan(tiny_clip_hf, tmp_path):
    """A plain LoRA's file says nothing of its plan; what is noted of a training does."""
    given = made_from(tiny_clip_hf)
    first = prepared("corda-natural", tiny_clip_hf, given)
    begun = json.loads(json.dumps(signature(first)))
    check_signature(begun, first, tmp_path)
    second = prepared("corda-natural", restore_method("corda-natural", first), given, damping=1e-2)
    with pytest.raises(CordaError, match="training of another adapter"):
        check_signature(begun, second, tmp_path)
    del begun["adapter"]["origin"]["damping"]  # of a version that did not note it
    check_signature(begun, second, tmp_path)


def test_the_model_before_is_the_adapter_switched_off(tiny_clip_hf):
    """No copy of the model for `kl_new`; once B has moved, the adapter's state is not the base any more."""
    peft_model = prepared("corda-natural", tiny_clip_hf, made_from(tiny_clip_hf))
    assert Before(peft_model)._copy is None
    disturb(peft_model)
    assert Before(peft_model)._copy is not None


def test_where_the_gradient_is_given_it_is_what_the_start_looks_at(tiny_clip_hf):
    given = made_from(tiny_clip_hf)
    options = {"rank": 4, "towers": "vision", "show_progress": False}
    assert plan_adapter(tiny_clip_hf, **given, **options).method == "corda-natural"
    assert plan_adapter(tiny_clip_hf, given["store"], **options).method == "corda"
    model = adapt(tiny_clip_hf, [make_batch()], gradient=given["gradient"], rank=4, towers="vision")
    assert model.peft_config["default"].peft_type == "LORA"


class TestSharedRanks:
    @pytest.mark.parametrize("name", METHODS)
    def test_ranks_follow_the_gradient_in_the_metric_of_the_method(self, name, tiny_clip_hf):
        given = made_from(tiny_clip_hf)
        options = {"rank": 4, "towers": "vision", "show_progress": False}
        if name == "lora-ga":
            given["store"] = None
        plan = plan_adapter(tiny_clip_hf, **given, method=name, dynamic_rank=True, **options)
        equal = plan_adapter(tiny_clip_hf, **given, method=name, **options)
        assert plan.rank_rule == "gradient"
        assert "by gradient" in plan.table()
        assert "gradient: the share" in equal.table()
        assert equal.rank_rule is None
        assert equal.parameters - 96 < plan.parameters <= equal.parameters
        assert len({site.rank for site in plan.sites}) > 1
        # a step from the one to the other gains, in the sum that the rule weighs
        assert _gain(plan, tiny_clip_hf, given["store"]) > _gain(
            equal, tiny_clip_hf, given["store"]
        )
        for site in plan.sites:
            if name == "lora-ga":
                assert 2 * site.rank <= min(site.shape)
            factor = plan.factors[site.site.name]
            assert factor.A.shape[0] == site.rank
            assert site.gradient_share == pytest.approx(factor.energy_share, rel=1e-5)

    def test_a_store_that_only_tells_the_damage_has_no_say(self, tiny_clip_hf):
        given = made_from(tiny_clip_hf)
        options = {"rank": 4, "towers": "vision", "dynamic_rank": True, "show_progress": False}
        with_store, without = (
            plan_adapter(
                tiny_clip_hf, store, gradient=given["gradient"], method="lora-ga", **options
            )
            for store in (given["store"], None)
        )
        assert [s.rank for s in with_store.sites] == [s.rank for s in without.sites]

    def test_small_matrices_do_not_make_a_budget_impossible(self):
        shapes = {f"small{n}": (4, 1000) for n in range(20)} | {"large": (1000, 1000)}
        budget, equal = 400_000, 18
        most = _ceiling(shapes, budget, MOST * equal)
        assert sum(sum(s) * min(most, min(s) - 1) for s in shapes.values()) >= budget
        assert _ceiling({"one": (64, 64)}, 100, 8) == 8

    @pytest.mark.parametrize("rule", ["task", "gradient", "energy", "compactness"])
    def test_corda_by_each_rule(self, rule, tiny_clip_hf, tmp_path):
        store, task = made_from(tiny_clip_hf).values()
        of_task = {"gradient": task} if rule in ("task", "gradient") else {}
        options = {"rank": 4, "towers": "vision", "dynamic_rank": True, "rank_rule": rule}
        plan = plan_adapter(tiny_clip_hf, store, **of_task, method="corda", **options, show_progress=False)  # fmt: skip
        assert plan.rank_rule == rule
        assert len({site.rank for site in plan.sites}) > 1
        read = AdapterPlan.load(plan.save(tmp_path / "plan.json"), model=tiny_clip_hf)
        assert read == plan
        model = prepare_method(
            "corda-kpm", tiny_clip_hf, store=store, **of_task, **options, show_progress=False
        )
        rows = [
            p.shape[0] for n, p in model.named_parameters() if "lora_A" in n and p.requires_grad
        ]
        assert sorted(rows) == sorted(site.rank for site in plan.sites)

    def test_without_a_name_it_is_the_task_where_its_gradient_is_given(self, tiny_clip_hf, caplog):
        store, task = made_from(tiny_clip_hf).values()
        options = {"rank": 4, "towers": "vision", "dynamic_rank": True, "show_progress": False}
        plan = plan_adapter(tiny_clip_hf, store, gradient=task, method="corda", **options)
        assert plan.rank_rule == "task"
        assert plan.task_fingerprint == task.data_fingerprint
        assert not caplog.records
        plan = plan_adapter(tiny_clip_hf, store, method="corda", **options)
        assert plan.rank_rule == "compactness"
        assert "kept less than equal ranks" in caplog.text
        assert plan_adapter(tiny_clip_hf, store, gradient=task, **options).rank_rule == "gradient"
        kpm, request = get_method("corda-kpm"), MethodRequest(dynamic_rank=True)
        assert kpm.takes_gradient(request)
        assert not kpm.takes_gradient(replace(request, rank_rule="compactness"))
        assert not kpm.takes_gradient(MethodRequest())

    def test_a_rank_by_the_task_is_one_where_the_loss_falls(self, tiny_clip_hf):
        """The site whose gradient is made large gets more than it had."""
        store, task = made_from(tiny_clip_hf).values()
        options = {"rank": 4, "towers": "vision", "dynamic_rank": True, "rank_rule": "task"}
        options |= {"method": "corda", "show_progress": False}
        before = plan_adapter(tiny_clip_hf, store, gradient=task, **options)
        least = min(before.sites, key=lambda site: site.rank)
        gradients = {name: task[name] * (100 if name == least.site.name else 1) for name in task}
        larger = GradientStore(
            gradients, model_fingerprint=task.model_fingerprint, data_fingerprint="x", batches=1
        )
        after = plan_adapter(tiny_clip_hf, store, gradient=larger, **options)
        ranks = {site.site.name: site.rank for site in after.sites}
        assert ranks[least.site.name] > least.rank
        assert after.parameters <= before.budget

    def test_the_task_is_looked_at_by_adapt(self, tiny_clip_hf):
        model = adapt(
            tiny_clip_hf, [make_batch()], task_batches=[make_batch(seed=2)], loss=image_loss, rank_rule="task", method="corda",
            dynamic_rank=True, rank=4, towers="vision", show_progress=False,
        )  # fmt: skip
        assert len({p.shape[0] for n, p in model.named_parameters() if "lora_A" in n}) > 1

    def test_a_plan_of_a_former_version_has_no_rule(self, tiny_clip_hf, tmp_path):
        store, _ = made_from(tiny_clip_hf).values()
        plan = plan_adapter(tiny_clip_hf, store, rank=4, towers="vision", dynamic_rank=True, show_progress=False)  # fmt: skip
        path = plan.save(tmp_path / "plan.json")
        content = json.loads(path.read_text())
        del content["rank_rule"]
        for site in content["sites"]:
            del site["gradient_share"]
        path.write_text(json.dumps(content))
        read = AdapterPlan.load(path, model=tiny_clip_hf)
        assert read.rank_rule is None
        assert read.sites == plan.sites


def _gain(plan: AdapterPlan, model: nn.Module, store: CovarianceStore | None) -> float:
    total = 0.0
    for site in plan.sites:
        weight = get_linear(model, site.site.name).weight.detach().double()
        energy = 1.0
        if plan.method != "corda-natural":
            energy = float(weight.square().sum())
        elif store is not None:
            c = store[site.site.name].matrix.double()
            energy = float(torch.trace(weight @ c @ weight.mT))
        total += energy * site.chosen_energy**2
    return total


class TestRefusals:
    def test_adapt_is_given_the_task_once_and_where_it_is_looked_at(self, tiny_clip_hf):
        def never(*_):
            raise AssertionError("calibrated first")

        given = {"forward": never, "towers": "vision", "rank": 4}
        with pytest.raises(CordaError, match="one of the two"):
            adapt(tiny_clip_hf, [make_batch()], method="corda-natural", **given)
        with pytest.raises(CordaError, match="does not look at the new task's loss"):
            adapt(
                tiny_clip_hf, [make_batch()], task_batches=[make_batch()], method="corda", **given
            )
        with pytest.raises(CordaError, match="mode 'ipm' is of the method 'corda'"):
            adapt(tiny_clip_hf, [make_batch()], task_batches=[make_batch()], mode="ipm", **given)

    @pytest.mark.parametrize("name", METHODS)
    def test_no_gradient(self, name, tiny_clip_hf):
        store = made_from(tiny_clip_hf)["store"]
        with pytest.raises(CordaError, match="starts from the gradient"):
            prepare_method(name, tiny_clip_hf, store=store, towers="vision", rank=4)
        with pytest.raises(CordaError, match="pass gradient="):
            plan_adapter(tiny_clip_hf, store, method=name, rank=4, towers="vision")

    def test_a_gradient_where_none_is_taken(self, tiny_clip_hf):
        given = made_from(tiny_clip_hf)
        with pytest.raises(CordaError, match=r"takes no gradient.*corda-natural"):
            plan_adapter(tiny_clip_hf, **given, method="corda", rank=4, towers="vision")

    def test_of_another_model(self, tiny_clip_hf):
        given = made_from(tiny_clip_hf)
        given["gradient"].model_fingerprint = "other"
        with pytest.raises(ForeignFileError, match="gradient were collected from the model other"):
            plan_adapter(tiny_clip_hf, **given, method="corda-natural", rank=4, towers="vision")

    def test_a_site_that_was_not_asked_for(self, tiny_clip_hf):
        given = made_from(tiny_clip_hf)
        store = collect_covariance(
            tiny_clip_hf,
            [{**make_batch(), "input_ids": torch.full((40, 8), 5)}],
            show_progress=False,
        )
        with pytest.raises(CordaError, match="gradient has nothing of site 'text_"):
            plan_adapter(tiny_clip_hf, store, gradient=given["gradient"], method="corda-natural", rank=4)  # fmt: skip

    def test_rules_that_do_not_fit(self, tiny_clip_hf):
        given = {"rank": 4, "towers": "vision", "dynamic_rank": True}
        store, task = made_from(tiny_clip_hf).values()
        with pytest.raises(
            CordaError, match=r"'energy' weighs components of the weight.*take gradient"
        ):
            plan_adapter(tiny_clip_hf, store, gradient=task, method="corda-natural", rank_rule="energy", **given)  # fmt: skip
        with pytest.raises(
            CordaError,
            match=r"rank rule 'task' looks at the gradient.*pass gradient=.*corda-vlm gradient",
        ):
            plan_adapter(tiny_clip_hf, store, method="corda", rank_rule="task", **given)
        with pytest.raises(CordaError, match=r"takes no gradient.*rank_rule='task'"):
            plan_adapter(
                tiny_clip_hf, store, gradient=task, method="corda", rank_rule="energy", **given
            )
        with pytest.raises(CordaError, match="rank_rule=gradient looks at the gradient"):
            prepare_method("corda-kpm", tiny_clip_hf, store=store, rank_rule="gradient", **given)
        with pytest.raises(
            CordaError,
            match="rank rule 'task' looks at the gradient of the new task's loss: give task_batches",
        ):
            adapt(tiny_clip_hf, [make_batch()], method="corda", rank_rule="task", **given)
        with pytest.raises(
            CordaError, match=r"dynamic_covariance.*'corda-natural' does not use so"
        ):
            plan_adapter(tiny_clip_hf, store, gradient=task, method="corda-natural", dynamic_covariance=True)  # fmt: skip

    def test_a_packed_model_was_unpacked_by_somebody_else(self, tiny_open_clip):
        """The same sites, whether attention was packed when they were collected or not."""
        given = made_from(tiny_open_clip)
        unpack(tiny_open_clip)
        prepared("corda-natural", tiny_open_clip, given)
