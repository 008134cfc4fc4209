"""Two processes over gloo: what they hold is the same, and what would tear them apart is refused on both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch

from corda_vlm.errors import CordaError
from tests.train.processes_toy import collected, llama, trained, trainer_of

TIMEOUT = 240.0


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What happened on each of two processes."""
    output = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.processes_toy", str(output)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in running:
            process.kill()
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def same(ranks: list[dict], key: str) -> str:
    """The message that both ranks ended with."""
    assert ranks[0][key] == ranks[1][key], key
    return ranks[0][key]


@pytest.mark.parametrize("kind", ["lora 1", "lora 2", "full 1", "terms 1"])
def test_two_processes_end_alike_and_as_one_with_the_same_batches(kind, ranks, tmp_path):
    method, accumulation = kind.split()
    assert ranks[0][kind]["digest"] == ranks[1][kind]["digest"]
    model = llama()
    alone = trained(
        tmp_path, collected(model, 3), 8 // int(accumulation), method, int(accumulation)
    )
    values = [torch.tensor(found["values"]) for found in (ranks[0][kind], alone)]
    assert torch.allclose(*values, atol=1e-5), (values[0] - values[1]).abs().max()
    logged = [torch.tensor(found["terms"]) for found in (ranks[0][kind], alone)]
    if method == "terms":  # what the model answers is of each process's own part of the batch
        own = torch.tensor(ranks[1][kind]["terms"])
        logged[0][:, 1] = (logged[0][:, 1] + own[:, 1]) / 2
    assert torch.allclose(*logged, rtol=1e-3), logged
    assert bool((logged[1][-1] > 0).all())


def test_processes_of_other_matrices_are_refused_on_each(ranks):
    assert "differ in the matrices of the anchor" in same(ranks, "other matrices")
    assert "CovarianceStore.load(path)" in ranks[0]["other matrices"]


def test_other_terms_that_differ_are_refused_on_each(ranks):
    records = same(ranks, "other records")
    assert "differ in a term of the loss" in records
    assert "the same weights and records" in records
    assert "weight is 1.0 on rank 0, 2.0 on rank 1" in same(ranks, "other weights")


def test_processes_that_wait_for_each_other_at_different_calls_are_told_so(ranks):
    told = [found["elsewhere"] for found in ranks]
    calls = "a term of the loss", "the calibration batches"
    assert all("Every process has to make the same calls" in one for one in told)
    assert all(all(call in one for call in calls) for one in told)


def test_anchors_that_differ_cannot_tear_the_weights_apart(ranks):
    """The mean over the processes is taken of the anchor's gradient too."""
    assert ranks[0]["unlike in secret"]["digest"] == ranks[1]["unlike in secret"]["digest"]


def test_an_error_of_one_process_is_an_error_of_all(ranks):
    assert "an anchor needs the covariances" in ranks[1]["wrong on one"]
    assert "rank 1 could not make the anchor" in ranks[0]["wrong on one"]


def test_batches_that_are_dealt_out_already_are_refused_on_each(ranks):
    assert "differ in the calibration batches" in same(ranks, "shards")
    assert "DistributedSampler" in ranks[0]["shards"]
    assert "no process group" in same(ranks, "no group")


def test_two_processes_write_one_file(ranks):
    assert "differ in the path of what is collected" in same(ranks, "own paths")
    assert same(ranks, "finished") == "", "it was not written, and is read by both"


def test_a_process_that_does_not_come_is_named(ranks):
    assert "rank 1 of 2 did not come to compare the dinner" in ranks[0]["absent"]


def test_fsdp_is_refused_also_where_the_anchor_is_only_logged(ranks):
    assert "FSDP leaves each process a piece" in same(ranks, "fsdp")


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_deepspeed_and_wrapped_models_are_refused(weight, tmp_path):
    store = collected(llama(), 3)
    for kind in ("args", "accelerator", "wrapped"):
        trainer = trainer_of(tmp_path, 4)
        if kind == "args":
            trainer.args.deepspeed = {"zero_optimization": {"stage": 3}}
        elif kind == "accelerator":
            trainer.is_deepspeed_enabled = True
        else:
            name = "FullyShardedDataParallel"
            wrapped: Any = trainer.model
            wrapped.__class__ = type(name, (type(wrapped),), {})
        with pytest.raises(
            CordaError, match=r"(DeepSpeed|FullySharded.*) leaves each process a piece"
        ):
            trainer.anchor_to(store, weight)
        with pytest.raises(CordaError, match="leaves each process a piece"):
            trainer.penalize("x", lambda: torch.zeros(()), weight)
