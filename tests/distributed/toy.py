"""What the ranks of these tests do; run as a script, which forks them and writes what happened as files.

python -m tests.distributed.toy OUTPUT
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

from corda_vlm.__main__ import main as run_command
from corda_vlm.adapter import attach_adapter, export_adapter
from corda_vlm.anchor import anchor_penalty
from corda_vlm.covariance import CovarianceStore, collect_covariance, collect_gradient, together
from corda_vlm.distributed.pieces import is_in_pieces, whole
from corda_vlm.errors import CordaError
from corda_vlm.evaluation import evaluate
from corda_vlm.families import Loaded, detect_family, load_model
from corda_vlm.families.generative.language import language_processor
from corda_vlm.plan import plan_adapter
from corda_vlm.sites import get_linear
from corda_vlm.tensors import save_tensors
from tests.distributed.forked import in_ranks
from tests.families import language_toy
from tests.train.processes_toy import llama as tiny_llama

SIZES = (1, 2, 4)
COUNT = 7  # batches: as many for no number of ranks
FAILS = 5  # the batch with which a rank fails, dies or is stopped


def llama() -> LlamaForCausalLM:
    return tiny_llama(layers=2).eval()


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
    labelled = [{**batch, "labels": batch["input_ids"]} for batch in batches()]
    gradients = {"whole": labelled, "few": labelled[:3]}
    for name, given in gradients.items():
        found = collect_gradient(llama(), given, show_progress=False)
        found.save(output / f"gradient {name}.{size}.{rank}.safetensors")
    stored = output / f"gradient.{size}.safetensors"
    collect_gradient(llama(), labelled, show_progress=False, path=stored)
    none = said(lambda: collected(iter([])))
    return {"none": none, "rounds": said(lambda: collected(few, rounds=4))}


PLANS: dict[str, dict[str, Any]] = {
    "kpm": {"rank": 2},
    "dynamic": {
        "rank": 3, "dynamic_covariance": True, "dynamic_rank": True, "rank_rule": "compactness", "method": "corda",
    },
    "without data": {"rank": 2, "method": "pissa"},
}  # fmt: skip


def plans(rank: int, size: int, output: Path) -> dict[str, Any]:
    """Plans of several kinds, written by each rank."""
    store = CovarianceStore.load(output / "float64 in rounds.1.0.safetensors")
    for kind, options in PLANS.items():
        given = None if kind == "without data" else store
        plan = plan_adapter(llama(), given, show_progress=False, **options)
        plan.save(output / f"{kind}.{size}.{rank}.json")
    other = said(lambda: plan_adapter(llama(), store, rank=2 + rank, show_progress=False))
    singular = said(
        lambda: plan_adapter(_broken(), None, rank=2, method="pissa", show_progress=False)
    )
    return {"other": other, "singular": singular}


def _broken() -> LlamaForCausalLM:
    """A model with a weight that no decomposition takes."""
    model = llama()
    get_linear(model, "model.layers.1.mlp.down_proj").weight.data[0, 0] = float("nan")
    return model


WHOLE = "model.layers.1.mlp.down_proj"  # trained whole, beside the adapters


def start_folder(output: Path) -> Path:
    """A start that is computed once: a plain adapter of PEFT's, and the residual base that it belongs to."""
    store = CovarianceStore.load(output / "float32.1.0.safetensors")
    plan = plan_adapter(llama(), store, rank=2, roles="q,v,up", show_progress=False)
    model = attach_adapter(llama(), plan, modules_to_save=[WHOLE])
    return export_adapter(model, output / "start", format="residual")


def trained_in_pieces(rank: int, size: int, output: Path) -> dict[str, Any]:
    """Three steps from the folder's start, held by an anchor; of several processes each has a piece of the weights."""
    base = LlamaForCausalLM.from_pretrained(output / "start" / "base")
    model = PeftModel.from_pretrained(base, str(output / "start"), is_trainable=True)
    store = CovarianceStore.load(output / "float32.1.0.safetensors")
    before = anchor_penalty(model, store)
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for block in base.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    after = anchor_penalty(model, store)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    values = []
    for step in range(3):
        ids = batches(1, seed=step)[0]["input_ids"]  # of all processes
        own = ids.chunk(size)[rank]
        values.append([float(before.backward(3.0)), float(after().detach())])
        model(input_ids=own, labels=own).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    refused = said(lambda: save_tensors(output / "x", dict(model.named_parameters())))
    state = None
    if size > 1:
        how = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=how)
    if rank == 0:
        model.save_pretrained(str(output / f"trained{size}"), state_dict=state)
    seen = batches(1, seed=9)[0]["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=seen).logits
    return {
        "values": values,
        "trained": torch.cat([whole(p).detach().flatten() for p in parameters]).tolist(),
        "logits": logits.flatten().tolist(),
        "refused": refused,
        "pieces": sum(is_in_pieces(p) for p in parameters),
    }


def loaded_again(output: Path, size: int) -> list[float]:
    """What a model says that has what was trained and written, in one process."""
    base = LlamaForCausalLM.from_pretrained(output / "start" / "base")
    model = PeftModel.from_pretrained(base, str(output / f"trained{size}"))
    with torch.no_grad():
        return model(input_ids=batches(1, seed=9)[0]["input_ids"]).logits.flatten().tolist()


DATA = "parquet:model_zoo/emoji-clip/data/noto.parquet"
PICTURES = {
    "name": "pictures",
    "version": 1,
    "tasks": [
        {"name": "digits", "role": "gain", "kind": "zero_shot", "data": {"source": "sklearn:digits", "split": "test"},
         "classes": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
         "templates": "digits", "metrics": ["top1", "mean_per_class"]},
        {"name": "captions", "role": "retention", "kind": "retrieval",
         "data": {"source": DATA, "text": "a drawing of {class_name}"}},
    ],
}  # fmt: skip
_ASKED: dict[str, Any] = {"chat_template": "plain"}
TEXTS = {
    "name": "texts",
    "version": 1,
    "tasks": [
        {"name": "open", "kind": "qa", "options": {**_ASKED, "max_new_tokens": 3}},
        {"name": "sure", "kind": "likelihood", "options": _ASKED},
        {"name": "choice", "kind": "multiple_choice", "metrics": "acc", "options": _ASKED},
        {"name": "text", "kind": "perplexity", "options": {**_ASKED, "stride": 4, "window": 8}},
    ],
}  # fmt: skip


def talker() -> Loaded:
    model = language_toy.make("llama")
    processor = language_processor(model, language_toy.tokenizer())
    return Loaded(model, processor, detect_family(model), "talker")


def questions(path: Path) -> dict[str, Any]:
    """A suite of tasks on 11 questions of different lengths."""
    words = ["cat", "dog", "red", "blue", "it"]
    with path.open("w") as file:
        for n in range(11):
            asked = " and ".join(words[: 1 + n % 5])
            row = {"question": f"What is {asked} ?", "choices": words[n % 3 :][:2], "answer": n % 2}
            file.write(f"{json.dumps(row)}\n")
    data = {"source": f"jsonl:{path}", "format": "qa"}
    tasks = [{"role": "retention", "data": data, **task} for task in TEXTS["tasks"]]
    return {**TEXTS, "tasks": tasks}


def evaluates(
    rank: int, size: int, output: Path, clip: Loaded, llm: Loaded, suite: dict[str, Any]
) -> dict[str, Any]:
    """The scores of pictures and of texts; the first writes what the models said."""
    told: dict[str, Any] = {}
    said_by = output / f"predictions.{size}.jsonl"
    for name, model, what, limit in (("texts", llm, suite, None), ("pictures", clip, PICTURES, 50)):
        scores = evaluate(
            model, what, batch_size=8 if limit else 3, limit=limit, resamples=50, predictions=said_by
        )  # fmt: skip
        told[name] = [[s.task, s.metric, s.value, s.low, s.high, s.n] for s in scores]
    with torch.no_grad():
        next(llm.model.parameters())[:] = float("nan")
    told["diverged"] = said(lambda: evaluate(llm, suite, batch_size=3, tasks=["sure"]))
    return told


def commands(work: Path) -> dict[str, list[str]]:
    """The verbs as a person types them, and two that end with an error."""
    stored, planned, scores = work / "c.safetensors", work / "plan.json", work / "scores.jsonl"
    drawn = ["--towers=vision", "--samples=40", "--batch-size=8"]
    return {
        "calibrate": ["calibrate", "emoji-clip", DATA, *drawn, f"--output={stored}"],
        "plan": ["plan", "emoji-clip", f"--covariance={stored}", "--rank=2", "--towers=vision", f"--output={planned}"],
        "evaluate": ["evaluate", "emoji-clip", "emoji-digits", "--limit=24", "--tasks=digits", f"--output={scores}", "--resamples=20"],
        "train": ["train", "emoji-clip", DATA],
        "wrong": ["plan", "emoji-clip", "--rank=two"],
    }  # fmt: skip


def commanded(rank: int, words: list[str]) -> list[Any]:
    """A command's status, and what this process printed."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            run_command(words)
        except SystemExit as ended:
            return [ended.code, printed.getvalue()]
    return [0, printed.getvalue()]


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
    for size in SIZES:
        told[f"plans {size}"] = in_ranks(
            size, partial(plans, size=size, output=output), output / f"plans{size}"
        )
    clip, llm, suite = load_model("emoji-clip"), talker(), questions(output / "questions.jsonl")
    measured = partial(evaluates, output=output, clip=clip, llm=llm, suite=suite)
    for size in SIZES:
        told[f"evaluates {size}"] = in_ranks(
            size, partial(measured, size=size), output / f"evaluates{size}"
        )
    start_folder(output)
    for size in SIZES:
        told[f"trains {size}"] = in_ranks(
            size, partial(trained_in_pieces, size=size, output=output), output / f"trains{size}"
        )
        told[f"loaded {size}"] = loaded_again(output, size)
    for size in (1, 2):
        for name, words in commands(output / f"commands{size}").items():
            if size == 1 and name != "evaluate":
                continue  # others tell of that
            told[f"{name} {size}"] = in_ranks(
                size,
                partial(commanded, words=words),
                output / f"commands{size}" / name,
                group=False,
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
