"""The peer methods against their definitions, written out on raw activations with numpy, or against PEFT's own path."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.tuners.lora import EvaConfig, LoraLayer, get_eva_state_dict
from torch import nn

from corda_vlm.adapter import attach_adapter, load_adapter
from corda_vlm.adapter.eva import attach_eva, share_out
from corda_vlm.adapter.paired import base_of, paired_layers, trained
from corda_vlm.adapter.wrapped.targets import anchored
from corda_vlm.covariance import CovarianceStore, collect_covariance
from corda_vlm.decompose import decompose_contrast
from corda_vlm.errors import CordaError, ForeignFileError, UnknownNameError
from corda_vlm.families.layers.attention import is_packed
from corda_vlm.methods import MethodRequest, get_method, prepare_method, restore_method
from corda_vlm.plan import AdapterPlan, plan_adapter
from corda_vlm.sites import find_sites, get_linear

WIDE = "vision_model.encoder.layers.1.mlp.fc2"  # 32×64
TALL = "vision_model.encoder.layers.1.mlp.fc1"  # 64×32
SQUARE = "text_model.encoder.layers.0.self_attn.q_proj"
SITES = (WIDE, TALL, SQUARE)


def make_batch(size: int = 60, seed: int = 1, directions: int = 0) -> dict[str, torch.Tensor]:
    """With `directions`, pixels of so many unequal directions and little else."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 98, (size, 12), generator=generator)
    ids[:, -1] = 99
    pixels = torch.randn(size, 3, 32, 32, generator=generator)
    if directions:
        basis = torch.randn(directions, 3 * 32 * 32, generator=generator)
        basis *= (0.5 ** torch.arange(directions))[:, None]
        pixels = (torch.randn(size, directions, generator=generator) @ basis).view(size, 3, 32, 32)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def store_of(model: nn.Module, **options) -> CovarianceStore:
    return collect_covariance(model, [make_batch(**options)], show_progress=False)


@torch.no_grad()
def inputs_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Site -> X (tokens, inp), what the layer is given, in float64."""
    seen: dict[str, np.ndarray] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] = args[0].flatten(0, -2).double().numpy()

        return hook

    handles = [get_linear(model, n).register_forward_pre_hook(keep(n)) for n in SITES]
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def weight_of(model: nn.Module, name: str) -> np.ndarray:
    return get_linear(model, name).weight.detach().double().numpy()


def start_of(plan: AdapterPlan, name: str) -> tuple[np.ndarray, np.ndarray]:
    factor = plan.factors[name]
    return factor.B.double().numpy(), factor.A.double().numpy()


def plan_of(model: nn.Module, store: CovarianceStore | None, **options) -> AdapterPlan:
    return plan_adapter(model, store, **{"rank": 4, "show_progress": False, **options})


class TestScLora:
    @pytest.mark.parametrize("beta", [None, 0.0, 0.9])
    def test_algorithm(self, tiny_clip_hf, beta):
        """Algorithm 1 of the paper: eigenvectors of the outputs' second moments, B = Q, A = Qᵀ W."""
        knowledge, task = make_batch(), make_batch(seed=2)
        task["pixel_values"] *= 2
        keep, learn = (
            collect_covariance(tiny_clip_hf, [b], show_progress=False) for b in (knowledge, task)
        )
        plan = plan_of(tiny_clip_hf, keep, method="sc-lora", task_store=learn, beta=beta)
        assert plan.beta == (0.5 if beta is None else beta)
        assert plan.task_fingerprint == learn.data_fingerprint
        assert plan.data_fingerprint == keep.data_fingerprint
        weigh = plan.beta
        X_keep, X_task = inputs_of(tiny_clip_hf, knowledge), inputs_of(tiny_clip_hf, task)
        for name in SITES:
            W = weight_of(tiny_clip_hf, name)
            Y_keep, Y_task = X_keep[name] @ W.T, X_task[name] @ W.T  # (tokens, out)
            M = (1 - weigh) * Y_task.T @ Y_task / len(Y_task)
            M -= weigh * Y_keep.T @ Y_keep / len(Y_keep)
            values, vectors = np.linalg.eigh(M)
            Q = vectors[:, -4:]
            B, A = start_of(plan, name)
            if values[-4] - values[-5] > 1e-6:
                np.testing.assert_allclose(B @ B.T, Q @ Q.T, atol=2e-4)
            else:  # a tall W leaves outputs alone, and with a large beta any of those is as good
                assert (name, beta) == (TALL, 0.9)
                np.testing.assert_allclose(np.trace(B.T @ M @ B), values[-4:].sum(), atol=1e-5)
            np.testing.assert_allclose(B.T @ B, np.eye(4), atol=1e-5)
            np.testing.assert_allclose(A, B.T @ W, atol=1e-5)

    @given(
        shape=st.tuples(st.integers(2, 12), st.integers(2, 12)),
        beta=st.floats(0, 1),
        a_norm=st.sampled_from([None, 1.0, 10.0]),
        data=st.data(),
        seed=st.integers(0, 10_000),
    )
    @settings(max_examples=40, deadline=None)
    def test_no_other_directions_have_a_larger_reward(self, shape, beta, a_norm, data, seed):
        generator = torch.Generator().manual_seed(seed)
        out, inp = shape
        rank = data.draw(st.integers(1, min(shape)))
        W, X, Y = (
            torch.randn(n, inp, generator=generator, dtype=torch.float64) for n in (out, 40, 40)
        )
        keep, task = X.T @ X / 40, Y.T @ Y / 40
        found = decompose_contrast(W, keep, task, rank=rank, beta=beta, damping=1e-4, a_norm=a_norm)
        M = W @ ((1 - beta) * task - beta * keep) @ W.T
        best = torch.linalg.eigvalsh(M).flip(0)[:rank]
        torch.testing.assert_close(found.singular_values, best, atol=1e-8, rtol=1e-6)
        product = found.B.double() @ found.A.double()
        reach = torch.linalg.matrix_rank(product, atol=1e-4)
        assert int(reach) + found.floored == rank
        if a_norm is None:
            Q = found.B.double()
            assert float(torch.trace(Q.T @ M @ Q)) == pytest.approx(float(best.sum()), abs=1e-4)
        else:
            norms = found.A.norm(dim=1)
            torch.testing.assert_close(norms, torch.full_like(norms, a_norm), atol=0, rtol=1e-4)
        # a projection of W: what is left has nothing in its directions
        assert float((product.T @ (W - product)).abs().max()) < 1e-4

    def test_the_knowledge_counts_more_with_beta(self, tiny_clip_hf):
        keep, learn = store_of(tiny_clip_hf), store_of(tiny_clip_hf, seed=2, directions=6)
        damage = {}
        for beta in (0.0, 0.5, 0.95):
            plan = plan_of(tiny_clip_hf, keep, method="sc-lora", task_store=learn, beta=beta)
            damage[beta] = sum(s.predicted_damage or 0 for s in plan.sites)
        assert damage[0.0] > damage[0.5] > damage[0.95]

    def test_a_plan_file_keeps_it(self, tiny_clip_hf, tmp_path):
        store = store_of(tiny_clip_hf)
        plan = plan_of(tiny_clip_hf, store, method="sc-lora", task_store=store, beta=0.3)
        again = AdapterPlan.load(plan.save(tmp_path / "plan.json"), model=tiny_clip_hf)
        assert again == plan
        assert again.beta == 0.3
        assert "sc-lora" in str(again)


class TestLoraNull:
    def test_definition(self, tiny_clip_hf):
        """Section 3.2: the SVD of X, `W P Pᵀ` for the last r directions, and its balanced SVD as B and A."""
        plan = plan_of(tiny_clip_hf, store_of(tiny_clip_hf), method="lora-null")
        X = inputs_of(tiny_clip_hf, make_batch())
        for name in SITES:
            W = weight_of(tiny_clip_hf, name)
            P = np.linalg.svd(X[name].T)[0][:, -4:]  # (inp, 4)
            null = W @ P @ P.T
            B, A = start_of(plan, name)
            np.testing.assert_allclose(B @ A, null, atol=1e-4)
            U, S, _ = np.linalg.svd(null)
            np.testing.assert_allclose(np.linalg.norm(B, axis=0), np.sqrt(S[:4]), atol=1e-4)
            np.testing.assert_allclose(np.linalg.norm(A, axis=1), np.sqrt(S[:4]), atol=1e-4)
            # the same directions: A's rows lie in the null space, B's columns in its image
            np.testing.assert_allclose(A @ P @ P.T, A, atol=1e-4)
            np.testing.assert_allclose(U[:, :4] @ U[:, :4].T @ B, B, atol=1e-4)
        assert {s.side for s in plan.sites} == {"input"}
        assert plan.mode is None

    def test_frozen_moves_the_knowledge_hardly_at_all(self, tiny_clip_hf):
        store = store_of(tiny_clip_hf)
        changed = {}
        for name in ("lora-null-frozen", "lora-null", "lora"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # an input-side basis is not blind
                prepared = prepare_method(
                    name,
                    tiny_clip_hf,
                    rank=4,
                    a_norm=1.0,
                    show_progress=False,
                    store=None if name == "lora" else store,
                )
            with torch.no_grad():
                torch.manual_seed(3)
                for parameter in prepared.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            layer = base_of(prepared).get_submodule(WIDE)
            assert isinstance(layer, LoraLayer)
            delta = layer.get_delta_weight("default").detach().double()  # pyright: ignore[reportCallIssue]
            if name != "lora":
                B0, A0 = paired_layers(prepared)[WIDE].pair("default")
                assert torch.equal(trained(layer, "default")[1], A0) == (name == "lora-null-frozen")
                assert B0.shape == (32, 4)
            changed[name] = float(((delta @ store[WIDE].matrix) * delta).sum())
            restore_method(name, prepared)
        # 0.05 times as much, give or take the random weights, which are others in transformers 4
        assert changed["lora-null-frozen"] < 0.06 * changed["lora-null"]
        assert changed["lora-null-frozen"] < 0.05 * changed["lora"]


class TestSide:
    @pytest.mark.parametrize("mode", ["kpm", "ipm"])
    def test_input_is_the_eigenvectors_of_c(self, tiny_clip_hf, mode):
        plan = plan_of(tiny_clip_hf, store_of(tiny_clip_hf), mode=mode, side="input")
        X = inputs_of(tiny_clip_hf, make_batch())
        for name in SITES:
            W = weight_of(tiny_clip_hf, name)
            vectors = np.linalg.eigh(X[name].T @ X[name])[1]  # ascending
            P = vectors[:, :4] if mode == "kpm" else vectors[:, -4:]
            B, A = start_of(plan, name)
            np.testing.assert_allclose(B @ A, W @ P @ P.T, atol=1e-4)
        assert {s.side for s in plan.sites} == {"input"}

    def test_auto_moves_the_wide_sites_alone(self, tiny_clip_hf):
        store = store_of(tiny_clip_hf)
        plain, auto = plan_of(tiny_clip_hf, store), plan_of(tiny_clip_hf, store, side="auto")
        for before, after in zip(plain.sites, auto.sites, strict=True):
            assert before.side == "output"
            assert after.side == ("input" if after.shape[1] > after.shape[0] else "output")
            if after.side == "output":
                assert after == before
            else:
                assert after.predicted_damage < before.predicted_damage
        assert plan_of(tiny_clip_hf, store, side="output") == plain

    def test_a_frozen_a_is_warned_of_where_its_basis_is_blind(self, tiny_clip_hf):
        store = store_of(tiny_clip_hf)
        for side, blind in (("auto", False), ("input", False), (None, True)):
            plan = plan_of(tiny_clip_hf, store, side=side, roles="down")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                prepared = attach_adapter(tiny_clip_hf, plan, freeze_a=True)
            assert any("null space" in str(w.message) for w in caught) == blind
            restore_method("corda-kpm", prepared)


class TestEva:
    def test_the_same_subspaces_and_ranks_as_peft_finds_with_a_loader(self, tiny_clip_hf):
        """Decaying spectra, so that PEFT's approximate SVD finds the same directions as the exact one."""
        batch = make_batch(200, directions=12)
        names = [
            site.name
            for site in find_sites(tiny_clip_hf, towers="vision", roles=["q", "up", "down"])
        ]
        config = LoraConfig(
            r=3, target_modules=anchored(names), init_lora_weights="eva",
            eva_config=EvaConfig(rho=2.0, tau=0.9999),
        )  # fmt: skip
        theirs = get_eva_state_dict(
            tiny_clip_hf,
            [batch],
            config,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
        store = collect_covariance(tiny_clip_hf, [batch], show_progress=False)
        model = attach_eva(tiny_clip_hf, store, rank=3, towers="vision", roles=["q", "up", "down"])
        ours = {n: m for n, m in base_of(model).named_modules() if isinstance(m, LoraLayer)}
        assert {n: m.r["default"] for n, m in ours.items()} == {
            n: len(rows) for n, rows in theirs.items() if len(rows)
        }
        for name, layer in ours.items():
            B, A = trained(layer, "default")
            assert not B.any()
            cosines = torch.linalg.svdvals(
                A.detach() @ theirs[name].float().T
            )  # of the principal angles
            assert float(cosines.min()) > 0.999, name

    def test_definition(self, tiny_clip_hf):
        batch = make_batch()
        store = collect_covariance(tiny_clip_hf, [batch], show_progress=False)
        X = inputs_of(tiny_clip_hf, batch)
        model = attach_eva(tiny_clip_hf, store, rank=4, rho=1)
        for name in SITES:
            layer = base_of(model).get_submodule(name)
            assert isinstance(layer, LoraLayer)
            centred = X[name] - X[name].mean(0)
            V = np.linalg.svd(centred, full_matrices=False)[2][:4]  # (4, inp)
            A = trained(layer, "default")[1].detach().double().numpy()
            np.testing.assert_allclose(np.abs(A @ V.T), np.eye(4), atol=2e-3)

    def test_ranks_are_shared_out_and_the_pattern_loads(self, tiny_open_clip, tmp_path):
        store = store_of(tiny_open_clip, directions=3)
        names = [site.name for site in find_sites(tiny_open_clip)]
        model = attach_eva(tiny_open_clip, store, rank=4)
        assert not any(is_packed(m) for m in model.modules())
        layers = {n: m for n, m in base_of(model).named_modules() if isinstance(m, LoraLayer)}
        ranks = {n: m.r["default"] for n, m in layers.items()}
        assert sum(ranks.values()) == 4 * len(names)
        assert max(ranks.values()) <= 8
        assert len(set(ranks.values())) > 1
        assert all(m.scaling["default"] == 1 for m in layers.values())
        with torch.no_grad():
            for layer in layers.values():
                trained(layer, "default")[0].normal_()
        before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
        model.save_pretrained(str(tmp_path / "adapter"))
        bare = restore_method("eva", model)
        again = load_adapter(bare, tmp_path / "adapter")
        after = {n: p for n, p in again.named_parameters() if "lora_" in n}
        assert after.keys() == before.keys()
        assert all(torch.equal(after[n], p) for n, p in before.items())

    def test_one_rho_gives_uniform_ranks(self, tiny_clip_hf):
        prepared = prepare_method(
            "eva", tiny_clip_hf, rank=3, rho=1.0, store=store_of(tiny_clip_hf)
        )
        assert isinstance(prepared, PeftModel)
        assert {p.shape[0] for n, p in prepared.named_parameters() if "lora_A" in n} == {3}

    @given(st.data())
    @settings(max_examples=50, deadline=None)
    def test_share_out(self, data):
        sites = data.draw(st.integers(1, 6))
        values = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=5)
        shares = {
            f"site{i}": torch.tensor(sorted(data.draw(values), reverse=True), dtype=torch.float64)
            for i in range(sites)
        }
        pool = [v for s in shares.values() for v in s.tolist()]
        budget = data.draw(st.integers(0, len(pool)))
        ranks = share_out(shares, budget)
        assert sum(ranks.values()) == budget
        taken = [v for name, r in ranks.items() for v in shares[name][:r].tolist()]
        assert sorted(taken, reverse=True) == sorted(pool, reverse=True)[:budget]

    def test_refusals(self, tiny_clip_hf, tiny_siglip):
        store = store_of(tiny_clip_hf)
        with pytest.raises(CordaError, match="rho"):
            attach_eva(tiny_clip_hf, store, rank=4, rho=0.5)
        with pytest.raises(ForeignFileError, match=store.model_fingerprint):
            attach_eva(tiny_siglip, store, rank=4)
        with pytest.raises(CordaError, match="rank 1000"):
            attach_eva(tiny_clip_hf, store, rank=1000)
        text = collect_covariance(
            tiny_clip_hf,
            [make_batch()],
            find_sites(tiny_clip_hf, towers="text"),
            show_progress=False,
        )
        with pytest.raises(UnknownNameError, match="vision_model"):
            attach_eva(tiny_clip_hf, text, rank=4)


class TestMica:
    def test_definition(self, tiny_clip_hf):
        prepared = prepare_method("mica", tiny_clip_hf, rank=4)
        for name in SITES:
            layer: Any = base_of(prepared).get_submodule(name)
            assert isinstance(layer, LoraLayer)
            B, A = trained(layer, "default")
            base: Any = layer.get_base_layer()
            W = base.weight.detach().double().numpy()
            U = np.linalg.svd(W, full_matrices=False)[0][:, -4:]
            np.testing.assert_allclose(
                np.abs(U.T @ B.detach().double().numpy()), np.eye(4), atol=1e-3
            )
            assert not A.any()
            assert (A.requires_grad, B.requires_grad) == (True, False)

    def test_what_it_cannot_take(self, tiny_clip_hf):
        with pytest.raises(CordaError, match="mica"):
            prepare_method("mica", tiny_clip_hf, rank=4, freeze_a=True)
        with pytest.raises(CordaError, match="mica"):
            prepare_method("mica", tiny_clip_hf, rank=4, a_norm=1.0)


class TestRefusals:
    def test_stores(self, tiny_clip_hf):
        model, store = tiny_clip_hf, store_of(tiny_clip_hf)
        with pytest.raises(CordaError, match="task_store="):
            plan_of(model, store, method="sc-lora")
        with pytest.raises(CordaError, match="pass the store"):
            plan_of(model, None, method="sc-lora", task_store=store)
        with pytest.raises(CordaError, match=r"one store.*mode='ipm'"):
            plan_of(model, store, task_store=store)
        with pytest.raises(CordaError, match="one store"):
            plan_of(model, store, method="lora-null", task_store=store)
        with pytest.raises(CordaError, match="task_store=, from collect_covariance of the task"):
            prepare_method("sc-lora", model, rank=4, store=store)

    def test_a_task_store_of_another_model(self, tiny_clip_hf, tiny_siglip):
        store, other = store_of(tiny_clip_hf), store_of(tiny_siglip)
        with pytest.raises(ForeignFileError, match=f"task's.*{other.model_fingerprint}"):
            plan_of(tiny_clip_hf, store, method="sc-lora", task_store=other)

    def test_a_task_store_that_lacks_a_site(self, tiny_clip_hf):
        text = collect_covariance(
            tiny_clip_hf,
            [make_batch()],
            find_sites(tiny_clip_hf, towers="text"),
            show_progress=False,
        )
        with pytest.raises(CordaError, match=r"vision_model.*not calibrated"):
            plan_of(tiny_clip_hf, store_of(tiny_clip_hf), method="sc-lora", task_store=text)

    def test_side(self, tiny_clip_hf):
        store = store_of(tiny_clip_hf)
        with pytest.raises(UnknownNameError, match="auto, input, output"):
            plan_of(tiny_clip_hf, store, side="left")
        for method, side in (("lora-null", "output"), ("pissa", "input"), ("olora", "auto")):
            with pytest.raises(CordaError, match=rf"{method}.*no choice.*corda"):
                plan_of(tiny_clip_hf, store, method=method, side=side)

    def test_beta_and_damping_before_any_work(self, tiny_clip_hf, monkeypatch):
        store = store_of(tiny_clip_hf)
        monkeypatch.setattr("corda_vlm.plan.make.model_fingerprint", None)
        for beta in (-0.1, 1.1, float("nan")):
            with pytest.raises(CordaError, match="beta"):
                plan_of(tiny_clip_hf, store, method="sc-lora", task_store=store, beta=beta)
        with pytest.raises(CordaError, match=r"beta.*sc-lora"):
            plan_of(tiny_clip_hf, store, beta=0.5)
        for damping in (-1e-4, float("nan"), float("inf")):
            with pytest.raises(CordaError, match="damping"):
                plan_of(tiny_clip_hf, store, damping=damping)

    def test_dynamic_options_of_two_stores(self, tiny_clip_hf):
        store = store_of(tiny_clip_hf)
        with pytest.raises(CordaError, match="sc-lora"):
            plan_of(tiny_clip_hf, store, method="sc-lora", task_store=store, dynamic_rank=True)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("lora", {"side": "input"}),
            ("dora", {"dynamic_rank": True}),
            ("full", {"budget": 1000}),
            ("mica", {"max_rank": 3}),
            ("lora", {"beta": 0.5}),
            ("pissa", {"rho": 2.0}),
            ("pissa", {"side": "input"}),
            ("milora", {"dynamic_rank": True}),
            ("full", {"a_norm": 10.0}),
            ("full", {"roles": "q"}),
            ("linear-probe", {"freeze_a": True}),
            ("lora", {"base": "residual"}),
            ("lora", {"damping": 1.0}),
        ],
    )
    def test_an_option_that_the_method_lacks(self, tiny_clip_hf, name, options):
        with pytest.raises(CordaError, match=name):
            get_method(name).prepare(tiny_clip_hf, MethodRequest(rank=4, **options))


def test_dynamic_ranks_of_corda_through_the_methods(tiny_clip_hf):
    prepared = prepare_method(
        "corda-kpm", tiny_clip_hf, rank=4, dynamic_rank=True, min_rank=2, max_rank=8, side="auto",
        store=store_of(tiny_clip_hf), show_progress=False,
    )  # fmt: skip
    ranks = {p.shape[0] for n, p in prepared.named_parameters() if "lora_A" in n}
    assert len(ranks) > 1
    assert min(ranks) >= 2
    assert max(ranks) <= 8
