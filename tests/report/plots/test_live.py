"""The trade-off that a page shows: valid SVG, with the values of each mark, at places that are in order."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from corda_vlm.report.analysis.results import Results
from corda_vlm.report.plots.live import tradeoff_svg
from tests.report.invented import BASE, DEMO, large_study, rows_of, study


def parsed(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{html}</div>")


def marks(svg: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """What each mark tells -> where it is."""
    found = {}
    for group in svg.iter("g"):
        if group.get("class") == "point":
            place = re.fullmatch(r"translate\((\S+) (\S+)\)", group.get("transform", ""))
            title = group.find("title")
            assert place is not None
            assert title is not None
            assert title.text is not None
            found[title.text] = (float(place[1]), float(place[2]))
    return found


def test_each_mark_tells_its_values() -> None:
    svg = parsed(tradeoff_svg(Results.of(study(DEMO))))
    told = marks(svg)
    assert len(told) == 1 + 9
    lora = {
        rate: told[f"lora, learning rate {rate:g}, mean of 2 seeds: new task {task:.1%}, kept {kept:.1%}"]
        for rate, task, kept in DEMO["lora"]
    }  # fmt: skip
    across = [x for x, _ in lora.values()]
    down = [y for _, y in lora.values()]
    assert across == sorted(across), "more of the task is further to the right"
    assert down == sorted(down), "less kept is further down"
    assert "base model: new task 10.0%, kept 100.0%" in told
    assert all(0 <= x <= 860 and 0 <= y <= 500 for x, y in told.values())
    owners = [group.get("data-method") for group in svg.iter("g") if group.get("data-method")]
    assert owners == list(DEMO)


def test_of_many_methods_each_is_in_the_legend_and_scaled_ones_are_dashed() -> None:
    svg = parsed(tradeoff_svg(Results.of(large_study(scales=(0.5,)))))
    assert len(list(svg.iter("li"))) == 18
    assert sum("stroke-dasharray" in line.attrib for line in svg.iter("polyline")) == 18


def test_names_are_shown_as_they_are() -> None:
    svg = parsed(tradeoff_svg(Results.of(study({'<b>"&': [(1e-3, 0.5, 0.5)]}, seeds=1))))
    assert [item.get("data-method") for item in svg.iter("g") if item.get("data-method")] == [
        '<b>"&'
    ]


@pytest.mark.parametrize("kept", [0.95, 1.0])
def test_methods_that_lose_nothing_are_looked_at_closely(kept: float) -> None:
    svg = parsed(tradeoff_svg(Results.of(study({"lora": [(1e-3, 0.5, kept)]}, seeds=1))))
    assert all(0 < y < 442 for _, y in marks(svg).values())
    assert len(list(svg.iter("text"))) > 6


def test_nothing_is_drawn_of_nothing() -> None:
    assert tradeoff_svg(Results.of(rows_of("base", BASE))) == ""
