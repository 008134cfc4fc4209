"""Plans: what is decided, what is refused, and the files."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from typing import Any

import pytest
import torch

from corda_vlm import ranks
from corda_vlm.covariance import CovarianceStore, GradientStore, collect_covariance
from corda_vlm.decompose import Root, damp, knowledge_energy
from corda_vlm.errors import CordaError, ForeignFileError, NoSitesError, UnknownNameError
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.plan import PLAN_METHODS, AdapterPlan, plan_adapter
from corda_vlm.sites import find_sites, get_linear, model_fingerprint

MODELS = ("tiny_clip_hf", "tiny_open_clip", "tiny_siglip")


def make_batches(n: int = 2, size: int = 80) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(n):
        ids = torch.randint(1, 98, (size, 12), generator=generator)
        ids[:, -1] = 99
        batches.append(
            {
                "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
            }
        )
    return batches


def make_store(model: torch.nn.Module, **options) -> CovarianceStore:
    return collect_covariance(model, make_batches(), show_progress=False, **options)


def plan_of(model: torch.nn.Module, store: CovarianceStore | None, **options) -> AdapterPlan:
    return plan_adapter(model, store, **{"rank": 4, "show_progress": False, **options})


def task_of(method: str, model: torch.nn.Module, store: CovarianceStore) -> dict:
    """What a method takes of the new task; here the same data, or a gradient of noise."""
    if PLAN_METHODS[method].of_gradient:
        generator = torch.Generator().manual_seed(0)
        noise = {
            name: torch.randn(weight_of(model, name).shape, generator=generator) for name in store
        }
        origin = {"model_fingerprint": store.model_fingerprint, "data_fingerprint": "noise"}
        return {"gradient": GradientStore(noise, **origin, batches=1)}
    return {"task_store": store} if PLAN_METHODS[method].contrast else {}


def weight_of(model: torch.nn.Module, name: str) -> torch.Tensor:
    with unpacked(model):
        return get_linear(model, name).weight.detach().clone()


@pytest.fixture
def clip(tiny_clip_hf):
    return tiny_clip_hf, make_store(tiny_clip_hf)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_covers_every_site_and_leaves_the_model_alone(name, request):
    model = request.getfixturevalue(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = plan_of(model, make_store(model))
    assert [s.site for s in plan.sites] == find_sites(model)
    assert plan.model_fingerprint == model_fingerprint(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    for site in plan.sites:
        factor = plan.factors[site.site.name]
        assert factor.B.shape == (site.shape[0], 4)
        assert factor.A.shape == (4, site.shape[1])
        assert factor.B.dtype == factor.A.dtype == torch.float32


def test_kpm_puts_less_knowledge_at_risk_than_ipm_and_the_prediction_is_the_definition(clip):
    model, store = clip
    kpm, ipm = plan_of(model, store, mode="kpm"), plan_of(model, store, mode="ipm")
    assert (kpm.mode, ipm.mode) == ("kpm", "ipm")
    for low, high in zip(kpm.sites, ipm.sites, strict=True):
        assert low.components == "smallest"
        assert high.components == "largest"
        assert 0 <= low.predicted_damage < high.predicted_damage <= 1
        name = low.site.name
        covariance = damp(store[name].matrix, kpm.damping)
        whole = (weight_of(model, name).double() @ covariance).norm() ** 2
        factor = ipm.factors[name]
        part = knowledge_energy((factor.B, factor.A), covariance) ** 2
        assert high.predicted_damage == pytest.approx(float(part / whole), rel=1e-4)


@pytest.mark.parametrize("method", ["pissa", "milora", "olora"])
def test_methods_without_data(clip, method):
    model, store = clip
    blind, sighted = plan_of(model, None, method=method), plan_of(model, store, method=method)
    assert blind.mode is None
    assert blind.data_fingerprint is None
    assert all(s.predicted_damage is None for s in blind.sites)
    assert all(0 <= s.predicted_damage <= 1 for s in sighted.sites)
    for site in blind.sites:
        B, A = blind.factors[site.site.name].B, blind.factors[site.site.name].A
        W = weight_of(model, site.site.name)
        # all are W seen through directions of its output: the projection has norm below W's and W − BA is orthogonal
        assert (W - B @ A).norm() ** 2 + (B @ A).norm() ** 2 == pytest.approx(
            float(W.norm() ** 2), rel=1e-4
        )


@pytest.mark.parametrize(("method", "init"), [("pissa", "pissa"), ("olora", "olora")])
def test_pissa_and_olora_start_where_peft_starts(clip, method, init):
    from peft import LoraConfig, get_peft_model

    name = "vision_model.encoder.layers.1.mlp.fc2"
    model, _ = clip
    plan = plan_of(model, None, method=method)
    peft_model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=4, target_modules=[name], init_lora_weights=init)
    )
    layer: Any = dict(peft_model.get_base_model().named_modules())[name]
    theirs = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    ours = plan.factors[name].B @ plan.factors[name].A
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_norm_sets_every_row_of_a_and_not_the_product(clip):
    model, store = clip
    plain = plan_of(model, store)
    for method in (m for m, basis in PLAN_METHODS.items() if not basis.corrects):
        plan = plan_of(model, store, a_norm=10.0, method=method, **task_of(method, model, store))
        for name, factor in plan.factors.items():
            norms = factor.A.norm(dim=1)
            assert torch.allclose(norms, torch.full_like(norms, 10.0), rtol=1e-4), name
            if method == "corda":
                other = plain.factors[name]
                assert torch.allclose(factor.B @ factor.A, other.B @ other.A, atol=1e-5)


def test_towers_and_roles_filter(clip):
    model, store = clip
    plan = plan_of(model, store, towers="text", roles=["q", "v"])
    assert {(s.site.tower, s.site.role) for s in plan.sites} == {("text", "q"), ("text", "v")}
    with pytest.raises(UnknownNameError, match="vision"):
        plan_of(model, store, towers="visoin")
    with pytest.raises(NoSitesError):
        plan_of(model, store, roles="gate")


def test_bfloat16_copies_can_be_planned_and_agree(clip):
    model, store = clip
    full = plan_of(model, store)
    half = plan_of(model.to(torch.bfloat16), store)
    assert half.model_fingerprint == full.model_fingerprint
    for a, b in zip(full.sites, half.sites, strict=True):
        assert b.predicted_damage == pytest.approx(a.predicted_damage, rel=0.3, abs=1e-5)


class TestRefusals:
    def test_names(self, clip):
        model, store = clip
        with pytest.raises(UnknownNameError, match="corda"):
            plan_of(model, store, method="cordda")
        with pytest.raises(UnknownNameError, match="ipm, kpm"):
            plan_of(model, store, mode="both")

    @pytest.mark.parametrize("rank", [0, -1, 33, 1000])
    def test_a_rank_that_does_not_fit_names_the_site(self, clip, rank):
        model, store = clip
        with pytest.raises(
            CordaError,
            match=r"'(text|vision|visual)\S*': rank .* outside 1 to|rank is (0|-1); it must be at least 1",
        ):
            plan_of(model, store, rank=rank)

    def test_no_store(self, clip):
        with pytest.raises(CordaError, match="milora, olora, pissa"):
            plan_of(clip[0], None)

    def test_dynamic_options_without_data(self, clip):
        with pytest.raises(CordaError, match="pissa"):
            plan_of(*clip, method="pissa", dynamic_rank=True)

    def test_a_norm(self, clip):
        with pytest.raises(CordaError, match="a_norm"):
            plan_of(*clip, a_norm=0.0)

    def test_a_site_that_was_not_calibrated(self, tiny_clip_hf):
        store = make_store(tiny_clip_hf, sites=find_sites(tiny_clip_hf, towers="text"))
        with pytest.raises(CordaError, match=r"vision_model.*not calibrated.*towers="):
            plan_of(tiny_clip_hf, store)

    def test_a_store_of_another_model(self, clip):
        model, store = clip
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.neg_()
        with pytest.raises(ForeignFileError, match=store.model_fingerprint):
            plan_of(model, store)


class TestDynamic:
    def test_ranks_share_the_uniform_budget(self, clip):
        model, store = clip
        uniform = plan_of(model, store)
        for mode in ("kpm", "ipm"):
            plan = plan_of(model, store, mode=mode, dynamic_rank=True)
            assert plan.parameters <= uniform.parameters
            assert plan.parameters > 0.9 * uniform.parameters
            assert len({s.rank for s in plan.sites}) > 1
            for site in plan.sites:
                assert 1 <= site.rank < min(site.shape)
                assert plan.factors[site.site.name].A.shape[0] == site.rank == len(site.spectrum)

    @pytest.mark.parametrize("mode", ["kpm", "ipm"])
    def test_they_are_the_ranks_of_the_definition(self, clip, mode):
        model, store = clip
        plan = plan_of(model, store, mode=mode, dynamic_rank=True)
        spectra = {
            s.site.name: ranks.spectrum(
                weight_of(model, s.site.name), store[s.site.name].matrix, damping=1e-4
            )
            for s in plan.sites
        }
        pi = {
            s.site.name: ranks.compactness(store[s.site.name].matrix, s.shape[0], damping=1e-4)
            for s in plan.sites
        }
        shapes = {s.site.name: s.shape for s in plan.sites}
        expected = ranks.allocate_ranks(spectra, pi, shapes, mode=mode, uniform_rank=4)
        assert {s.site.name: s.rank for s in plan.sites} == expected

    def test_a_budget_with_floor_and_ceiling(self, clip):
        model, store = clip
        full = plan_of(model, store, dynamic_rank=True, budget=12_000, min_rank=2, max_rank=9)
        assert full.budget == 12_000
        assert 12_000 - 96 < full.parameters <= 12_000
        assert {s.rank for s in full.sites} <= set(range(2, 10))
        name = full.sites[0].site.name
        plan = plan_of(
            model, store, dynamic_rank=True, min_rank={name: 3}, max_rank={name: 3}, mode="ipm"
        )
        assert plan.sites[0].rank == 3
        assert plan.budget == plan_of(model, store).parameters
        assert (
            plan_of(model, store, dynamic_rank=True, min_rank=None).sites
            == plan_of(model, store, dynamic_rank=True).sites
        )
        # the default rank does not fit this model, and need not
        plan_of(model, store, dynamic_rank=True, budget=8_000, rank=1000)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"budget": 1741}, r"1,741 parameters is too small for 26 sites: one rank a site takes 1,\d+"),
            ({"budget": 10**6}, r"1,000,000 parameters is too large for 26 sites: full rank less 1 everywhere takes"),
            ({"min_rank": 6}, r"parameters is too small for 26 sites: their floors \(min_rank, up to 6\)"),
            ({"max_rank": 3}, r"too large for 26 sites: their ceilings \(max_rank\) takes .*raise the ceilings"),
            ({"min_rank": 5, "max_rank": 3}, "max_rank 3 is below min_rank 5"),
            ({"min_rank": 40}, r"floor 40 \(min_rank\)"),
            ({"dynamic_rank": False, "budget": 9000}, "budget=9000 given without dynamic_rank.*--dynamic-rank"),
            ({"dynamic_rank": False, "min_rank": 2, "max_rank": 3}, "min_rank=2, max_rank=3 given without"),
            ({"rank": 1000}, "rank 1000 is outside"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_met_is_refused_before_the_work(
        self, clip, options, message, monkeypatch
    ):
        monkeypatch.setattr(CovarianceStore, "__getitem__", lambda *_: pytest.fail("data read"))
        with pytest.raises(CordaError, match=message):
            plan_of(*clip, **{"dynamic_rank": True, **options})

    def test_floors_of_sites_that_are_not_there(self, clip):
        with pytest.raises(UnknownNameError, match="site in max_rank 'q'"):
            plan_of(*clip, dynamic_rank=True, max_rank={"q": 3})

    @pytest.mark.parametrize("dynamic_rank", [False, True])
    def test_each_site_takes_the_round_of_the_lowest_score(self, tiny_clip_hf, dynamic_rank):
        model = tiny_clip_hf
        store = collect_covariance(model, make_batches(3), rounds=3, show_progress=False)
        plan = plan_of(model, store, dynamic_covariance=True, dynamic_rank=dynamic_rank)
        assert len({s.round for s in plan.sites}) > 1
        for site in plan.sites:
            name = site.site.name
            candidates = [c.matrix for c in store.rounds(name)]
            weight = weight_of(model, name)
            selection = ranks.select_covariance(candidates, {name: weight}, damping=1e-4)[name]
            assert site.scores is not None
            assert site.round is not None
            assert site.scores == pytest.approx(selection.scores, rel=1e-5)
            assert site.round == min(range(3), key=site.scores.__getitem__)
            assert site.compactness == pytest.approx(
                ranks.compactness(candidates[site.round], site.shape[0], damping=1e-4), rel=1e-5
            )
            covariance = damp(candidates[site.round], plan.damping)
            whole = (weight.double() @ covariance).norm() ** 2
            factor = plan.factors[name]
            part = knowledge_energy((factor.B, factor.A), covariance) ** 2
            assert site.predicted_damage == pytest.approx(float(part / whole), rel=1e-3)
        fixed = plan_of(model, store)
        assert all(s.round is None and s.scores is None for s in fixed.sites)

    def test_one_round_is_no_choice(self, clip):
        with pytest.raises(CordaError, match=r"hold one; collect them with rounds=4"):
            plan_of(*clip, dynamic_covariance=True)

    def test_compactness_is_recorded_where_whole_spectra_are_taken(self, clip, monkeypatch):
        model, store = clip
        seen = []
        compactness = ranks.compactness
        monkeypatch.setattr(
            ranks, "compactness", lambda *a, **o: seen.append(0) or compactness(*a, **o)
        )
        plan = plan_of(model, store, route="exact")
        assert len(seen) == len(set(store.site_streams.values()))
        for site in plan.sites:
            expected = compactness(store[site.site.name].matrix, site.shape[0], damping=1e-4)
            assert site.compactness == pytest.approx(expected, rel=1e-5)
        for plan in (
            plan_of(model, None, method="milora"),
            plan_of(model, store),
            plan_of(model, store, route="fast"),
        ):
            assert all(site.compactness is None for site in plan.sites)


@pytest.mark.parametrize("method", ["corda", "lora-null"])
def test_sites_of_one_stream_share_one_factor(clip, monkeypatch, method):
    model, store = clip
    roots = []
    init = Root.__init__

    def counted(self, covariance, *args):
        init(self, covariance, *args)
        roots.append(self.c)

    monkeypatch.setattr(Root, "__init__", counted)
    plan_of(model, store, method=method, route="exact")
    assert len(roots) == len(set(store.site_streams.values())) < len(store)


class TestFiles:
    def test_round_trip(self, clip, tmp_path):
        plan = plan_of(*clip)
        again = AdapterPlan.load(plan.save(tmp_path / "plan.json"), model=clip[0], mode="kpm")
        assert again == plan
        for name, factor in plan.factors.items():
            assert torch.equal(again.factors[name].B, factor.B)
            assert torch.equal(again.factors[name].A, factor.A)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]

    def test_readable(self, clip, tmp_path):
        plan = plan_of(*clip)
        described = json.loads(plan.save(tmp_path / "plan.json").read_text())
        assert described["sites"][0]["site"]["name"] == plan.sites[0].site.name
        assert described["mode"] == "kpm"
        text = str(plan)
        assert "corda-kpm: " in text
        assert all(s.site.name in text for s in plan.sites)
        assert f"{plan.parameters:,} parameters, rank 4" in text
        assert "score" not in text

    def test_the_table_tells_what_was_chosen_and_why(self, tiny_clip_hf):
        store = make_store(tiny_clip_hf, rounds=2)
        plan = plan_of(tiny_clip_hf, store, dynamic_covariance=True, dynamic_rank=True, side="auto")
        lines = str(plan).splitlines()
        for word in ("shape", "side", "round", "score", "others", "log₁₀ π", "rank", "at risk"):
            assert word in lines[1]
        for line, site in zip(lines[3:], plan.sites, strict=False):
            name, shape, side, taken, score, other, pi, rank, risk = line.split()
            assert (name, shape) == (site.site.name, "{}×{}".format(*site.shape))
            assert (side, int(taken), int(rank)) == (site.side, site.round, site.rank)
            assert (float(score), float(other)) == pytest.approx(sorted(site.scores), abs=0.006)
            assert float(pi) == pytest.approx(math.log10(site.compactness), abs=0.006)
            assert float(risk.rstrip("%")) == pytest.approx(100 * site.predicted_damage, rel=0.06)
        assert f"{plan.parameters:,} of {plan.budget:,} parameters, ranks 1 to " in str(plan)
        wide = dataclasses.replace(
            plan,
            sites=tuple(
                dataclasses.replace(
                    s,
                    site=dataclasses.replace(
                        s.site, name="vision_model.encoder.layers.11.self_attn.out_proj"
                    ),
                    shape=(3072, 768),
                    rank=1024,
                    scores=(12345.6, 12346.8, 12347.9),
                    floored=12,
                )
                for s in plan.sites
            ),
        )
        assert max(map(len, str(wide).splitlines())) <= 140

    def test_a_diff_shows_what_differs(self, tiny_clip_hf, tmp_path):
        store = make_store(tiny_clip_hf, rounds=2)
        plan = plan_of(tiny_clip_hf, store, dynamic_covariance=True)
        first, second = plan.sites[:2]
        other = dataclasses.replace(
            plan, sites=(dataclasses.replace(first, round=None, scores=None), *plan.sites[1:])
        )
        texts = [
            p.save(tmp_path / f"{i}" / "plan.json").read_text().splitlines()
            for i, p in enumerate((plan, other))
        ]
        differing = [(a, b) for a, b in zip(*texts, strict=True) if a != b]
        assert len(differing) == 2
        assert differing[1][1].strip() == '"scores": null,'
        assert f'      "spectrum": {list(second.spectrum)},' in texts[0]
        assert AdapterPlan.load(tmp_path / "0" / "plan.json") == plan

    def test_an_older_plan_is_refused(self, clip, tmp_path):
        path = plan_of(*clip).save(tmp_path / "plan.json")
        path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
        with pytest.raises(ForeignFileError, match=r"version 1, .*reads 2\. Make it again with"):
            AdapterPlan.load(path)

    def test_another_model_mode_method_or_family(self, clip, tiny_open_clip, tmp_path):
        plan = plan_of(*clip)
        path = plan.save(tmp_path / "plan.json")
        with pytest.raises(ForeignFileError, match=r"'kpm'.*'ipm'"):
            AdapterPlan.load(path, mode="ipm")
        with pytest.raises(ForeignFileError, match=r"'corda'.*'pissa'"):
            AdapterPlan.load(path, method="pissa")
        with pytest.raises(ForeignFileError, match=r"'clip_hf'.*'clip_open'"):
            AdapterPlan.load(path, model=tiny_open_clip)
        with torch.no_grad():
            for parameter in clip[0].parameters():
                parameter.neg_()
        with pytest.raises(
            ForeignFileError, match=f"{plan.model_fingerprint}.*{model_fingerprint(clip[0])}"
        ):
            AdapterPlan.load(path, model=clip[0])

    def test_corrupt_truncated_and_foreign(self, clip, tmp_path):
        plan = plan_of(*clip)
        path = plan.save(tmp_path / "plan.json")
        tensors, whole = path.with_suffix(".safetensors"), path.read_text()

        def refused(match: str) -> None:
            with pytest.raises(ForeignFileError, match=match):
                AdapterPlan.load(path)

        path.write_text(whole[: len(whole) // 2])
        refused("plan")
        path.write_text(json.dumps({"anything": 1}))
        refused("not a plan")
        path.write_text("[]")
        refused("not a plan")
        for key in ("sites", "method", "tensors", "damping"):
            path.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != key}))
            refused(key)
        path.write_text(json.dumps({**json.loads(whole), "version": 99}))
        refused("version")
        edited = json.loads(whole)
        edited["sites"][0]["rank"] = 3
        path.write_text(json.dumps(edited))
        refused("edited")
        path.write_text(whole)
        good = tensors.read_bytes()
        tensors.write_bytes(good[:-100])
        refused("hash differs")
        plan_of(clip[0], None, method="pissa").save(tmp_path / "other.json")
        tensors.write_bytes((tmp_path / "other.safetensors").read_bytes())
        refused("hash differs")
        tensors.unlink()
        refused("lost its factors")
        path.unlink()
        refused("no plan file")

    def test_name(self, clip, tmp_path):
        with pytest.raises(CordaError, match=r"plan\.json"):
            plan_of(*clip).save(tmp_path / "plan.safetensors")

    def test_covariances_of_the_same_name_are_not_written_over(self, clip, tmp_path):
        clip[1].save(tmp_path / "covariance.safetensors")
        before = (tmp_path / "covariance.safetensors").read_bytes()
        with pytest.raises(
            CordaError, match=r"covariance\.safetensors, which holds something else"
        ):
            plan_of(*clip).save(tmp_path / "covariance.json")
        assert (tmp_path / "covariance.safetensors").read_bytes() == before


def test_planning_is_silent(clip):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_of(*clip)
