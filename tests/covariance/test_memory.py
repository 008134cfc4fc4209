"""What covariances take is told before the run, and is what they take."""

from __future__ import annotations

import dataclasses

import pytest
import transformers as t

from corda_vlm.covariance import collect_covariance
from corda_vlm.covariance.memory import Memory, memory_of
from corda_vlm.sites import find_sites
from tests.families.language_toy import inputs_of, text_batch
from tests.families.moe_toy import make


@pytest.mark.skipif(t.__version__.startswith("4."), reason="experts are stacks in transformers 5")
@pytest.mark.filterwarnings("ignore:.*fewer tokens than")
def test_it_is_what_the_sums_take():
    model = make("mixtral")
    sites = find_sites(model)
    told = memory_of(model, sites)
    store = collect_covariance(model, [inputs_of(text_batch(4))], show_progress=False)
    sums = [m for stream in {s.stream for s in sites} for m in store.moments(stream)]
    assert told.streams == len(sums)
    assert told.total == sum(moment.packed.nbytes for moment in sums)
    assert told.block * 2 == told.total  # both blocks are alike
    assert memory_of(model, sites, rounds=3, precision="float64").total == 6 * told.total


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (9e9, r"^covariances of 96 inputs take 4\.0 GB of memory, 50\.0 MB with --blockwise$"),
        (5e9, r" of memory, 50\.0 MB with --blockwise; 5\.0 GB are free$"),
        (1e9, r"1\.0 GB are free, which is less: take --blockwise"),
        (1e6, r"which is less: adapt fewer sites \(--roles, --targets\)"),
    ],
)
def test_what_to_do_where_it_is_too_much(free, said):
    memory = Memory(96, int(4e9), int(5e7), int(free))
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(str(memory))
    assert "free" not in str(dataclasses.replace(memory, free=None))
