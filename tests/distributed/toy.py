"""What the ranks of these tests do; run as a script, which forks them and writes what happened as files.

python -m tests.distributed.toy OUTPUT
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from corda_vlm.covariance import CovarianceStore, collect_covariance, together
from corda_vlm.errors import CordaError
from tests.distributed.forked import in_ranks

SIZES = (1, 2, 4)
COUNT = 7  # batches: as many for no number of ranks
FAILS = 5  # the batch with which a rank fails, dies or is stopped


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def batches(count: int = COUNT, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(3, 32, (4, 5 + number % 3), generator=generator)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return made


def collected(given: Any = None, **options: Any) -> CovarianceStore:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return collect_covariance(
            llama(), batches() if given is None else given, show_progress=False, **options
        )


WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64 in rounds": {"precision": "float64", "rounds": 3},
    "with an output side": {"output_side": True, "draws": 2, "rounds": 2},
    "blockwise": {"blockwise": True, "rounds": 2},
}


def collects(rank: int, size: int, output: Path) -> dict[str, Any]:
    """Every way to collect, with a path and without; each rank writes what it got."""
    for way, options in WAYS.items():
        collected(**options).save(output / f"{way}.{size}.{rank}.safetensors")
        path = output / f"{way}.{size}.safetensors"
        stored = collected(path=path, checkpoint_share=1.0, **options)
        assert stored.progress is not None
        assert stored.progress.complete
    few = batches()[:3]
    collected(few).save(output / f"few.{size}.{rank}.safetensors")
    collected(iter(few)).save(output / f"few of an iterator.{size}.{rank}.safetensors")
    more = collected(few)
    collected(batches(seed=1), store=more).save(output / f"added.{size}.{rank}.safetensors")
    none = said(lambda: collected(iter([])))
    return {"none": none, "rounds": said(lambda: collected(few, rounds=4))}


def said(call: Any) -> str:
    """The message of the `CordaError` that `call` ends with, and how long that took where it was too long."""
    began = time.monotonic()
    try:
        call()
    except CordaError as error:
        late = time.monotonic() - began
        return str(error) if late < 20 else f"after {late:.0f} s: {error}"
    return ""


class Failing(list):
    """Batches of which one does something when it is taken."""

    def __init__(self, what: str) -> None:
        super().__init__(batches())
        self.what, self.fingerprint = what, "seven"

    def batch_at(self, number: int) -> dict[str, torch.Tensor]:
        if number == FAILS:
            match self.what:
                case "raise":
                    raise OSError("the disk is gone")
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stop":
                    os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.02)
        return self[number]


def breaks(rank: int, what: str, path: Path) -> dict[str, Any]:
    """A calibration of which a rank fails, dies or is stopped at a batch."""
    try:
        told = said(lambda: collected(Failing(what), path=path, checkpoint_share=1.0))
    except KeyboardInterrupt as stopped:
        return {"stopped": str(stopped)}
    except OSError as error:
        return {"raised": str(error)}
    return {"told": told}


def goes_on(rank: int, path: Path) -> dict[str, Any]:
    store = collected(Failing("nothing"), path=path)
    return {"counts": store.counts("model.layers.0.mlp.down_proj")}


def main(output: Path) -> None:
    told: dict[str, Any] = {}
    together._SPAN = 0.0  # they meet after each batch
    for size in SIZES:
        told[f"collects {size}"] = in_ranks(
            size, partial(collects, size=size, output=output), output / f"collects{size}"
        )
    for what, sizes in {"raise": (2, 4), "die": (4, 2), "stop": (2, 1)}.items():
        path, (before, after) = output / f"{what}.safetensors", sizes
        told[what] = in_ranks(before, partial(breaks, what=what, path=path), output / what)
        saved = CovarianceStore.load(path, unfinished=True)
        assert saved.progress is not None
        told[f"{what} saved"] = [saved.progress.batches, saved.progress.complete]
        on = output / f"{what}-on"
        told[f"{what}, goes on"] = in_ranks(after, partial(goes_on, path=path), on)
    (output / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
