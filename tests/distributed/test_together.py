"""Several processes collect what one does, however many they are and whatever becomes of one of them."""

from __future__ import annotations

import pytest
import torch

from corda_vlm.covariance import CovarianceStore, GradientStore
from tests.distributed.toy import COUNT, FAILS, WAYS


def assert_same(one: CovarianceStore, other: CovarianceStore, most: float) -> None:
    """Of one data, with the same counts, and matrices that differ by rounding at most."""
    assert list(one) == list(other)
    assert one.data_fingerprint == other.data_fingerprint
    for site in one:
        assert one.counts(site) == other.counts(site)
        pairs = [*zip(one.rounds(site), other.rounds(site), strict=True)]
        if one.outputs is not None:
            pairs.append((one.output_side(site), other.output_side(site)))
        for a, b in pairs:
            assert a.count == b.count
            unit = a.matrix.diagonal().mean()
            assert float((a.matrix - b.matrix).abs().max() / unit) < most, site


def same_to_the_bit(one: CovarianceStore, other: CovarianceStore) -> bool:
    return all(torch.equal(one[site].matrix, other[site].matrix) for site in one)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_the_result_is_that_of_one_process(way, size, ranks):
    alone = ranks.store(f"{way}.1.0")
    first = ranks.store(f"{way}.{size}.0")
    assert_same(alone, first, 1e-14 if "float64" in way else 1e-5)
    assert same_to_the_bit(first, ranks.store(f"{way}.{size}.{size - 1}")), "each has the same"
    stored = ranks.store(f"{way}.{size}")
    assert_same(alone, stored, 1e-14 if "float64" in way else 1e-5)
    assert stored.progress.batches == COUNT


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["few", "few of an iterator", "added"])
def test_a_rank_may_have_no_data(name, size, ranks):
    alone = ranks.store(f"{name}.1.0")
    for rank in range(size):
        assert_same(alone, ranks.store(f"{name}.{size}.{rank}"), 1e-5)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["gradient whole.{}.{}", "gradient few.{}.{}", "gradient.{}"])
def test_the_gradient_is_that_of_one_process(name, size, ranks):
    def load(*place: int) -> GradientStore:
        return GradientStore.load(ranks.folder / f"{name.format(*place)}.safetensors")

    alone, last = load(1, 0), load(size, size - 1)
    assert list(alone) == list(last)
    assert alone.batches == last.batches
    assert alone.data_fingerprint == last.data_fingerprint
    for site in alone:
        assert torch.allclose(alone[site], last[site], rtol=1e-4, atol=1e-7), site


def test_too_little_is_refused_on_each(ranks):
    assert "no calibration batches" in ranks.same("collects 4", "none")
    assert "4 rounds need at least 4 batches" in ranks.same("collects 4", "rounds")


def test_an_error_of_one_is_an_error_of_all(ranks):
    first, second = ranks.told["raise"]
    assert second == {"raised": "the disk is gone"}
    assert "rank 1 could not make the batches: OSError: the disk is gone" in first["told"]


def test_a_process_that_dies_is_named_at_once_by_all_others(ranks):
    told = ranks.told["die"]
    assert told[1] is None
    assert told[0]["told"].startswith("rank 1 of 4 has ended"), told[0]
    for rank in (2, 3):  # the first may have gone before they looked
        of_first = f"rank {rank} of 4 lost the others"
        assert told[rank]["told"].startswith(("rank 1 of 4 has ended", of_first)), told[rank]


def test_a_stop_of_one_is_a_stop_of_all(ranks):
    assert "calibration stopped after 6 of 7 batches" in ranks.same("stop", "stopped")


@pytest.mark.parametrize("what", ["raise", "die", "stop"])
def test_another_number_of_processes_goes_on_from_the_checkpoint(what, ranks):
    batches, complete = ranks.told[f"{what} saved"]
    assert 0 < batches <= FAILS + 1
    assert not complete
    ranks.same(f"{what}, goes on", "counts")
    done = ranks.store(what)
    assert done.progress.batches == COUNT
    assert done.counts(next(iter(done))) == ranks.store("float32.1.0").counts(next(iter(done)))
    for site in done:
        a, b = done[site].matrix, ranks.store("float32.1.0")[site].matrix
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
