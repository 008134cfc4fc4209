"""The picture of a plan: which layers it shows, where, and that it can be read."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from corda_vlm.decompose import Decomposition
from corda_vlm.plan import AdapterPlan, SitePlan
from corda_vlm.report.plots import plan as heatmap
from corda_vlm.report.plots.plan import heatmap_picture, plan_heatmap
from corda_vlm.sites import Site


def site(name: str, tower: str, block: int | None, role: str, rank: int = 4, **changes) -> SitePlan:
    return SitePlan(
        **{
            "site": Site(name, tower, block, role, f"{name}.in"),
            "shape": (6, 8),
            "rank": rank,
            "round": None,
            "components": "smallest",
            "side": "output",
            "power": 1.0,
            "spectrum": (0.5,) * rank,
            "predicted_damage": 0.01,
            "floored": 0,
            "chosen_energy": 0.1,
            "total_energy": 1.0,
            "route": "exact",
            "compactness": 10.0 ** (3 + rank / 2),
            "scores": None,
            **changes,
        }
    )


def plan(sites: list[SitePlan], **changes) -> AdapterPlan:
    factors = {
        s.site.name: Decomposition(
            B=torch.zeros(6, s.rank),
            A=torch.zeros(s.rank, 8),
            singular_values=torch.tensor(s.spectrum),
            spectrum=None,
            total_energy=1.0,
            chosen_energy=0.1,
            floored=0,
            side="output",
            route="exact",
        )
        for s in sites
    }
    return AdapterPlan(
        **{
            "method": "corda",
            "mode": "kpm",
            "rank": 4,
            "budget": 14 * sum(s.rank for s in sites),
            "damping": 1e-4,
            "a_norm": None,
            "beta": None,
            "model_fingerprint": "m",
            "data_fingerprint": "d",
            "task_fingerprint": None,
            "family": "clip_hf",
            "sites": tuple(sites),
            "factors": factors,
            **changes,
        }
    )


@pytest.fixture
def two_towers() -> AdapterPlan:
    blocks = [
        site(f"{tower}_model.layers.{block}.{role}", tower, block, role, 1 + block + len(role))
        for tower in ("vision", "text")
        for block in range(3)
        for role in ("down", "q", "o")
    ]
    return plan(
        [
            *blocks,
            site("vision_model.head.attention.q_proj", "vision", None, "q", 5),
            site("vision_model.head.mlp.fc2", "vision", None, "down", 6, compactness=None),
            site("visual_projection", "vision", None, "proj", 3),
            site("text_projection", "text", None, "proj", 2),
        ]
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = heatmap.save
    monkeypatch.setattr(
        heatmap, "save", lambda figure, path: figures.append(figure) or save(figure, path)
    )
    return figures


def panels(figure: Figure) -> list:
    return [axes for axes in figure.axes if axes.get_xlabel()]


def words(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_every_site_is_a_cell_of_its_tower_block_and_role(two_towers, drawn, tmp_path) -> None:
    path = plan_heatmap({"dynamic": two_towers}, tmp_path / "plans.png")
    assert path == tmp_path / "plans.png"
    assert list(tmp_path.iterdir()) == [path]
    assert imread(path).std() > 0.05
    vision, text, pi, _ = panels(drawn[0])
    assert [axes.get_xlabel() for axes in (vision, text)] == ["vision blocks", "text blocks"]
    assert [t.get_text() for t in vision.get_xticklabels()] == ["0", "1", "2", "head", "proj"]
    assert [t.get_text() for t in text.get_xticklabels()] == ["0", "1", "2", "proj"]
    assert [t.get_text() for t in vision.get_yticklabels()] == [
        "query", "attention out", "MLP down", "projection",
    ]  # fmt: skip
    ranks = vision.collections[0].get_array().reshape(4, 5)
    expected = [[2, 3, 4, 5, 0], [2, 3, 4, 0, 0], [5, 6, 7, 6, 0], [0, 0, 0, 0, 3]]
    assert np.array_equal(ranks.filled(0), expected)
    assert words(vision) == [str(n) for row in expected for n in row if n]
    compactness = pi.collections[0].get_array().reshape(4, 5)
    assert compactness.mask[2, 3]  # it has none
    assert compactness[0, 0] == pytest.approx(math.log10(10.0**4), abs=1e-5)
    assert f"dynamic: {two_towers.spent}" in {
        sub._suptitle.get_text() for sub in drawn[0].subfigs if sub._suptitle
    }


def test_layers_of_one_place_get_columns_of_their_own(drawn, tmp_path) -> None:
    projector = [site(f"projector.linear_{i}", "projector", None, "proj", i) for i in (1, 2)]
    twins = [site(f"layers.0.expert{i}.fc", "language", 0, "up", i) for i in (3, 4, 5)]
    plan_heatmap({"llava": plan([*projector, *twins])}, tmp_path / "p.png")
    first, second, *_ = panels(drawn[0])
    assert [t.get_text() for t in first.get_xticklabels()] == ["linear_1", "linear_2"]
    assert first.get_xlabel() == "projector"
    assert words(second) == ["3", "4", "5"]


def test_cells_are_numbered_only_where_all_numbers_fit(drawn, tmp_path) -> None:
    many = [site(f"layers.{b}.fc1", "language", b, "up", 1 + b % 9) for b in range(80)]
    plan_heatmap({"large": plan(many)}, tmp_path / "p.png")
    ranks, *_ = panels(drawn[0])
    assert words(ranks) == []
    assert 10 < len(ranks.get_xticklabels()) < 60
    assert drawn[0].get_size_inches()[0] < 16


def test_plans_share_their_scales_and_uniform_ones_can_be_drawn(drawn, tmp_path) -> None:
    low = plan([site(f"l.{b}", "vision", b, "q", 2) for b in range(3)])
    high = plan([site(f"l.{b}", "vision", b, "q", 9, compactness=None) for b in range(3)])
    plan_heatmap({"low": low, "high": high}, tmp_path / "p.png")
    meshes = [axes.collections[0] for axes in panels(drawn[0])]
    assert {mesh.norm.vmin for mesh in meshes[::2]} == {2}
    assert {mesh.norm.vmax for mesh in meshes[::2]} == {9}
    plan_heatmap({"alone": high}, tmp_path / "p.png")
    assert len(panels(drawn[1])) == 1  # no compactness to show
    assert plan_heatmap({}, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_of_a_start_by_the_gradient_the_share_that_is_held_is_drawn(drawn, tmp_path) -> None:
    held = [
        site(f"l.{b}", "vision", b, "q", b + 1, compactness=None, gradient_share=0.25 * (b + 1))
        for b in range(3)
    ]
    plan_heatmap({"natural": plan(held)}, tmp_path / "p.png")
    ranks, share = panels(drawn[0])
    assert share.get_title(loc="left") == "share of the gradient held, %"
    np.testing.assert_allclose(share.collections[0].get_array().reshape(-1), [25, 50, 75])
    assert len(ranks.collections[0].get_array().reshape(-1)) == 3


def test_the_picture_of_a_run_shows_the_plans_that_chose(two_towers, tmp_path, caplog) -> None:
    assert heatmap_picture(tmp_path) is None
    uniform = plan([site(f"l.{b}", "vision", b, "q", 3) for b in range(3)])
    rounds = dataclasses.replace(
        uniform,
        sites=tuple(
            dataclasses.replace(s, round=i % 2, scores=(2.0 - i % 2, 1.5))
            for i, s in enumerate(uniform.sites)
        ),
    )
    uniform.save(tmp_path / "a-uniform" / "plan.json")
    assert heatmap_picture(tmp_path) is None
    rounds.save(tmp_path / "b-rounds" / "plan.json")
    two_towers.save(tmp_path / "c-ranks" / "plan.json")
    (tmp_path / "c-ranks" / "plan.safetensors").unlink()  # it is not attached: no factors are read
    (tmp_path / "d-broken").mkdir()
    (tmp_path / "d-broken" / "plan.json").write_text(json.dumps({"format": "?"}))
    picture = heatmap_picture(tmp_path)
    assert picture is not None
    assert picture.path == tmp_path / "plans.png"
    assert "d-broken/plan.json" in caplog.text
    assert "uniform" not in picture.alt
    assert (
        "b-rounds: 126 of 126 parameters, rank 3, covariances of 2 calibration rounds"
        in picture.alt
    )
    assert "on average most in MLP down (6.0) and least in projection (2.5)" in picture.alt
    for name in "efg":
        two_towers.save(tmp_path / name / "plan.json")
    picture = heatmap_picture(tmp_path)
    assert picture is not None
    assert "g:" not in picture.alt
    assert picture.caption.endswith("Not drawn: g.")


def test_the_same_plans_make_the_same_bytes(two_towers, tmp_path: Path) -> None:
    first, second = (
        plan_heatmap({"x": two_towers}, tmp_path / name) for name in ("a.png", "b.png")
    )
    assert first is not None
    assert second is not None
    assert first.read_bytes() == second.read_bytes()
