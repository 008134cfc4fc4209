"""Work that is dealt out: who does what, and that everybody ends with the same."""

from __future__ import annotations

import pytest

from corda_vlm.distributed.deal import ALONE, Share, dealt
from tests.distributed.toy import PLANS


def test_each_number_is_owned_by_one_and_each_finds_its_own():
    shares = [Share(rank, 3) for rank in range(3)]
    for start in range(7):
        firsts = sorted(share.from_on(start) for share in shares)
        assert firsts == [start, start + 1, start + 2]
        assert all(share.owns(share.from_on(start)) for share in shares)
    assert ALONE.owns(5)
    assert ALONE.from_on(5) == 5


def test_the_largest_go_first_and_to_who_has_least():
    costs = {"a": 1.0, "b": 8.0, "c": 3.0, "d": 3.0, "e": 2.0}
    parts = [dealt(costs, Share(rank, 2)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(costs)
    assert parts == [["a", "b"], ["c", "d", "e"]]
    assert dealt(costs, ALONE) == list(costs)


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_is_the_same_to_the_bit_on_every_process(kind, ranks):
    alone = _files(ranks, kind, 1, 0)
    for size in (2, 4):
        for rank in range(size):
            assert _files(ranks, kind, size, rank) == alone, (size, rank)


def _files(ranks, kind, size, rank) -> list[bytes]:
    """What a rank wrote of a plan, but for the name of the file of factors."""
    name = f"{kind}.{size}.{rank}"
    text = (ranks.folder / f"{name}.json").read_text().replace(name, kind)
    return [text.encode(), (ranks.folder / f"{name}.safetensors").read_bytes()]


def test_processes_that_plan_different_things_are_told_so(ranks):
    told = ranks.same("plans 2", "other")
    assert "differ in what is to be planned: rank is 2 on rank 0, 3 on rank 1. They deal" in told


def test_a_site_that_fails_on_one_fails_on_all(ranks):
    told = [told["singular"] for told in ranks.told["plans 4"]]
    assert all("NaN" in one for one in told), told
