"""A source of one's own: `kind:where` names it everywhere, checks before PyTorch included."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from corda_vlm import CordaError, register_source
from corda_vlm.data import SOURCES, DataSpec, Table, load_records, parse_spec
from corda_vlm.data.text.registry import FORMATS
from corda_vlm.errors import UnknownNameError
from corda_vlm.experiment.checks import check_data

pytestmark = pytest.mark.usefixtures("own_registrations")


def read_shades(spec: DataSpec, beside: object) -> Table:
    """`shades:4`: four grey pictures, dark and light in turn."""
    count = int(spec.location)
    return Table(
        size=count,
        columns={"class_name": [("dark", "light")[row % 2] for row in range(count)]},
        images={"image": lambda row: Image.new("RGB", (8, 8), (255 * (row % 2),) * 3)},
        place=lambda row: f"shade {row}",
    )


def test_a_registered_source_is_read_as_the_others():
    with pytest.raises(UnknownNameError, match="unknown data source 'shades:4'"):
        parse_spec("shades:4")
    assert register_source("shades", read_shades) is read_shades
    check_data("shades:4")
    records = load_records({"source": "shades:4", "where": {"class_name": "light"}})
    assert len(records) == 2
    assert list(records.class_names) == ["light"]
    assert records[0]["image"].getpixel((0, 0)) == (255, 255, 255)


def test_a_misspelt_one_is_told_with_it_among_the_choices():
    register_source("shades", read_shades)
    with pytest.raises(UnknownNameError, match="Did you mean 'shades'"):
        parse_spec("shade:4")


@pytest.mark.parametrize(("kind", "why"), [("csv", "registered already"), ("a:b", "kind:where")])
def test_its_name_is_its_own(kind, why):
    with pytest.raises(CordaError, match=why):
        register_source(kind, read_shades)


def test_what_it_says_before_a_model_is_loaded_and_what_it_takes_is_declared_with_it(tmp_path):
    def check(spec: DataSpec, beside: object) -> None:
        if not spec.location.isdigit():
            raise CordaError(f"{spec}: says no number")

    register_source("shades", read_shades, check=check, takes=("rows",))
    check_data("shades:4")
    with pytest.raises(CordaError, match="shades:four: says no number"):
        check_data("shades:four")
    assert parse_spec({"source": "shades:4", "rows": [1, 3]}).rows == [1, 3]
    with pytest.raises(CordaError, match="rows is for jsonl, json, csv, tsv and shades"):
        parse_spec({"source": f"folder:{tmp_path}", "rows": [1, 3]})
    with pytest.raises(CordaError, match="shades:4: root is for records with paths"):
        parse_spec({"source": "shades:4", "root": str(tmp_path)})
    with pytest.raises(UnknownNameError, match="Did you mean 'rows'"):
        register_source("tints", read_shades, takes=("row",))


def test_the_page_of_ones_own_data_names_every_kind_and_format():
    page = Path(__file__, "../../../../docs/pages/how-to/data.md").resolve().read_text("utf-8")
    assert [kind for kind in SOURCES if f"`{kind}:" not in page] == []
    assert [name for name in FORMATS if f"`{name}`" not in page] == []
