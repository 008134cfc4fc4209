"""A source of one's own: `kind:where` names it everywhere, checks before PyTorch included."""

from __future__ import annotations

import pytest
from PIL import Image

from corda_vlm import CordaError, register_source
from corda_vlm.data import DataSpec, Table, load_records, parse_spec
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
