"""The training picture: one panel a method, and below it the forecast of forgetting where histories have it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from corda_vlm.report.plots import training as pictures
from corda_vlm.report.plots.training import training_curves


def write_histories(folder: Path, anchors: dict[str, float | None]) -> None:
    """Method -> the anchor after 20 steps at the rate 1e-3, growing as the square of steps; None: not noted."""
    for method, last in anchors.items():
        for rate in (1e-3, 2e-3):
            rows = [{"step": step, "loss": 2.0 / (1 + rate * 1e2 * step)} for step in range(1, 21)]
            for row in rows:
                if last is not None:
                    row["anchor"] = last * (rate / 1e-3) * (row["step"] / 20) ** 2
            file = folder / method / f"{rate:g}-0" / "history.jsonl"
            file.parent.mkdir(parents=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure))
    return figures


def panels_of(figure: Figure) -> list:
    return [panel for panel in figure.axes if panel.get_visible()]


def test_nothing_to_draw(tmp_path, drawn):
    assert not training_curves(tmp_path, tmp_path / "training.png")
    assert not drawn


def test_losses_alone(tmp_path, drawn):
    write_histories(tmp_path, {"lora": None, "full": None})
    assert training_curves(tmp_path, tmp_path / "training.png")
    panels = panels_of(drawn[0])
    assert [panel.get_title(loc="left") for panel in panels] == ["full", "lora"]
    assert all(len(panel.get_lines()) == 2 for panel in panels)
    assert drawn[0].get_suptitle() == ""


def test_the_forecast_below_the_losses(tmp_path, drawn):
    write_histories(tmp_path, {"lora": 0.2, "full": 0.4, "lora-anchor": 0.001, "old": None})
    assert training_curves(tmp_path, tmp_path / "training.png")
    panels = panels_of(drawn[0])
    above = {p.get_title(loc="left"): p for p in panels if p.get_title(loc="left")}
    below = [p for p in panels if not p.get_title(loc="left")]
    assert list(above) == ["full", "lora", "lora-anchor", "old"]
    assert len(below) == 4
    assert "forecast of forgetting" in drawn[0].get_suptitle()
    assert {p.get_yscale() for p in above.values()} == {"linear"}
    assert {p.get_yscale() for p in below if p.get_lines()} == {"log"}, "it spans decades"
    assert [len(p.get_lines()) for p in below] == [2, 2, 2, 0]


def test_a_forecast_within_a_decade_or_two_is_linear(tmp_path, drawn):
    folder = tmp_path / "lora" / "0.001-0"
    folder.mkdir(parents=True)
    rows = [{"step": s, "loss": 1.0, "anchor": 0.01 * s} for s in range(1, 21)]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training_curves(tmp_path, tmp_path / "training.png")
    assert panels_of(drawn[0])[1].get_yscale() == "linear"
