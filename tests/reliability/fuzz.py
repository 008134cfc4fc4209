"""Every kind of file that is read, damaged in thousands of ways: refused in words, or read as it was."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability import forks
from tests.reliability.mutate import damaged
from tests.reliability.world import main

Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Format:
    """A kind of file and what reads it.

    Attributes:
        name: says which.
        files: those that are damaged, by their place in the world; a pattern stands for all that it matches.
        read: reads them in a folder that has a copy of `beside`; returns what decides about results, or None.
        beside: what is copied: files and folders of the world.
        sealed: the file has a checksum, so that what is read from it must be what was written.
    """

    name: str
    files: tuple[str, ...]
    read: Read
    beside: tuple[str, ...]
    sealed: bool = False


@dataclass(frozen=True)
class Finding:
    """A damaged file that raised something raw, or was read as something else without a word."""

    format: str
    file: str
    seed: str
    end: forks.End

    def __str__(self) -> str:
        return f"{self.format}: {self.file} [{self.seed}] {self.end.kind} at {self.end.place}: {self.end.told}"


def digest(tensors: Any) -> str:
    """Of what was read, to the bit."""
    found = hashlib.sha256()
    for name, tensor in sorted(dict(tensors).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return found.hexdigest()


def train_on(world: Path, output: Path) -> None:
    """A training of three steps with a checkpoint after each; goes on with the one in `output`."""
    from corda_vlm.adapter import attach_adapter
    from corda_vlm.data import load_records
    from corda_vlm.families import load_model
    from corda_vlm.plan import AdapterPlan
    from corda_vlm.train import TrainOptions, train

    loaded = load_model(world / "clip")
    model = attach_adapter(loaded.model, AdapterPlan.load(world / "plan.json", model=loaded.model))
    options = TrainOptions(
        loss="prompt", steps=3, batch_size=4, save_every=1, log_every=1, bf16=False
    )
    records = load_records(f"folder:{world}/images")
    train(model, records, loaded.processor, options=options, output_dir=output, show_progress=False)


def calibrate_half(world: Path) -> None:
    """A calibration that an error stops after two of its three batches."""
    from corda_vlm.covariance import collect_covariance
    from corda_vlm.data import load_records, make_batches
    from corda_vlm.families import load_model
    from corda_vlm.sites import find_sites

    loaded = load_model(world / "clip")
    batches = make_batches(
        load_records(f"folder:{world}/images"), loaded.processor, batch_size=4, limit=12
    )

    class Half:
        fingerprint = batches.fingerprint

        def __len__(self) -> int:
            return len(batches)

        def __iter__(self) -> Any:
            yield from list(batches)[:2]
            raise ZeroDivisionError

    with suppress(ZeroDivisionError):
        sites = find_sites(loaded.model, towers="vision")
        collect_covariance(
            loaded.model, Half(), sites, path=world / "unfinished.safetensors", show_progress=False
        )


def write_gguf(path: Path) -> None:
    """A tiny Llama in llama.cpp's format."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", "w", "0", "w0", *(f"x{n}" for n in range(58))])
    writer.add_token_types([gguf.TokenType.NORMAL] * 64)
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (64, 32), "output_norm": (32,), "output": (64, 32), "blk.0.attn_norm": (32,),
              "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
              "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32),
              "blk.0.ffn_down": (32, 48)}  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32) / 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare(world: Path) -> None:
    """What the formats need beyond what the verbs have made."""
    shutil.copytree(world / "run" / "full" / "0.0001-0" / "weights", world / "weights")
    shutil.copy(world / "run" / "linear-probe" / "0.1-0" / "weights" / "head.safetensors", world)
    log = world.parent / "log"
    for work in (partial(calibrate_half, world), partial(write_gguf, world / "tiny.gguf")):
        end = forks.run(work, folder=world, log=log)
        assert end.kind == "ok", end
    rehearsal = forks.run(
        partial(train_on, world, world / "whole"), folder=world, log=log, watch=True
    )
    at = rehearsal.events.index("mkdir weights")
    assert (
        forks.run(partial(train_on, world, world / "torn"), folder=world, log=log, kill_at=at).kind
        == "killed"
    )
    assert list((world / "torn").glob("checkpoint-*"))


def formats(world: Path) -> list[Format]:
    """All of them; the models are loaded here, once, for the children to copy."""
    import copy

    import torch

    from corda_vlm.adapter import load_adapter
    from corda_vlm.covariance import CovarianceStore, collect_covariance
    from corda_vlm.data import ChatOptions, load_records, make_batches
    from corda_vlm.evaluation import load_suite, read_rows
    from corda_vlm.evaluation.class_names import load_class_names, load_templates
    from corda_vlm.experiment.load import load_experiment, load_study
    from corda_vlm.families import load_model
    from corda_vlm.plan import AdapterPlan
    from corda_vlm.sites import find_sites
    from corda_vlm.train import Head
    from corda_vlm.train.trained import load_trained

    clip, llm = load_model(world / "clip"), load_model(world / "llm")

    def covariance(folder: Path) -> str:
        store = CovarianceStore.load(
            folder / "covariance.safetensors", model=clip.model, unfinished=True
        )
        return digest({f"{name} {store.counts(name)}": store[name].matrix for name in store})

    def checkpoint(folder: Path) -> str:
        sites = find_sites(clip.model, towers="vision")
        batches = make_batches(
            load_records(f"folder:{world}/images"), clip.processor, batch_size=4, limit=12
        )
        store = collect_covariance(
            clip.model, batches, sites, path=folder / "unfinished.safetensors", show_progress=False
        )
        return digest({f"{name} {store.counts(name)}": store[name].matrix for name in store})

    def plan(folder: Path) -> str:
        read = AdapterPlan.load(folder / "plan.json", model=clip.model)
        return digest({f"{n}.{k}": v for n, f in read.factors.items() for k, v in vars(f).items()
                       if isinstance(v, torch.Tensor)})  # fmt: skip

    def adapter(folder: Path) -> str:
        return digest(
            load_adapter(copy.deepcopy(clip.model), folder / "adapter" / "weights").state_dict()
        )

    def head(folder: Path) -> str:
        return digest(Head.load(folder / "head.safetensors").state_dict())

    def trained(folder: Path) -> str:
        return digest(
            load_trained(copy.deepcopy(clip.model), folder / "weights").model.state_dict()
        )

    def goes_on(folder: Path) -> None:
        train_on(world, folder / "torn")

    def batch(spec: dict[str, Any], loaded: Any, folder: Path, **chat: Any) -> None:
        spec = {**spec, "source": spec["source"].format(folder)}
        options: dict[str, Any] = {"chat": ChatOptions(**chat)} if chat else {}
        made = make_batches(load_records(spec), loaded.processor, batch_size=4, **options)
        for _ in made:
            pass

    def model(name: str, folder: Path) -> str:
        return digest(load_model(folder / name).model.state_dict())

    def listed(read: Callable[..., Any], name: str, folder: Path) -> None:
        read(str(folder / name))

    def reported(folder: Path) -> None:
        main("report", folder / "run")()

    def run_again(folder: Path) -> None:
        main("run", world / "experiment.yaml", "--output", folder / "run")()

    def gguf(folder: Path) -> None:
        import os

        os.environ["CORDA_VLM_CACHE"] = str(folder / "cache")
        load_model(folder / "tiny.gguf")

    qa = {"source": "jsonl:{}/qa.jsonl", "format": "qa"}
    made = [
        Format("covariances", ("covariance.safetensors",), covariance, ("covariance.safetensors",), True),
        Format("checkpoint of covariances", ("unfinished.safetensors",), checkpoint, ("unfinished.safetensors",), True),
        Format("plan", ("plan.json",), plan, ("plan.json", "plan.safetensors")),
        Format("factors of a plan", ("plan.safetensors",), plan, ("plan.json", "plan.safetensors"), True),
        Format("adapter", ("adapter/weights/*.json",), adapter, ("adapter",)),
        Format("weights of an adapter", ("adapter/weights/adapter_model.safetensors",), adapter, ("adapter",), True),
        Format("head", ("head.safetensors",), head, ("head.safetensors",), True),
        Format("trained weights", ("weights/trained.safetensors",), trained, ("weights",), True),
        Format("note of the base", ("weights/*.json",), trained, ("weights",)),
        Format("training checkpoint", ("torn/checkpoint-*/*", "torn/*.json*"), goes_on, ("torn",)),
        Format("scores", ("run/scores.jsonl",), lambda f: read_rows(f / "run/scores.jsonl") and None, ("run",)),
        Format("files of a run, reported", ("run/scores.jsonl", "run/run.json", "run/config.yaml",
                                            "run/corda-kpm/0.001-0/history.jsonl"), reported, ("run",)),
        Format("files of a run, gone on with", ("run/made-from.json", "run/config.yaml", "run/scores.jsonl",
                                                "run/covariance.safetensors"), run_again, ("run",)),
        Format("overview of a study", ("study/study.json", "study/low/scores.jsonl"),
               lambda f: main("report", f / "study")(), ("study",)),
        Format("experiment", ("experiment.yaml",), partial(listed, load_experiment, "experiment.yaml"), ("experiment.yaml",)),
        Format("study", ("study.yaml",), partial(listed, load_study, "study.yaml"), ("study.yaml",)),
        Format("suite", ("suite.yaml",), partial(listed, load_suite, "suite.yaml"), ("suite.yaml",)),
        Format("class names", ("names.yaml",), partial(listed, load_class_names, "names.yaml"), ("names.yaml",)),
        Format("templates", ("templates.txt",), partial(listed, load_templates, "templates.txt"), ("templates.txt",)),
        Format("classes of data", ("names.json",),
               lambda f: batch({"source": f"folder:{world}/images", "classes": str(f / "names.json")}, clip, f), ("names.json",)),
        Format("parquet", ("pictures.parquet",), partial(batch, {"source": "parquet:{}/pictures.parquet"}, clip), ("pictures.parquet",)),
        Format("pictures", ("images/*/*.png",), partial(batch, {"source": "folder:{}/images", "max_bad_share": 0.5}, clip), ("images",)),
        Format("JSON lines", ("qa.jsonl",), partial(batch, qa, llm, chat_template="plain"), ("qa.jsonl",)),
        Format("JSON of chats", ("chats.json",), partial(batch, {"source": "json:{}/chats.json", "format": "chat"}, llm, chat_template="plain"),
               ("chats.json",)),
        Format("CSV", ("pictures.csv",), partial(batch, {"source": "csv:{}/pictures.csv"}, clip), ("pictures.csv", "images")),
        Format("chat template", ("template.jinja",), lambda f: batch({**qa, "source": f"jsonl:{world}/qa.jsonl"}, llm, f,
               chat_template=str(f / "template.jinja")), ("template.jinja",)),
        Format("open_clip's folder", ("clip/*",), partial(model, "clip"), ("clip",)),
        Format("transformers' folder", ("llm/*.json",), partial(model, "llm"), ("llm",)),
        Format("transformers' weights", ("llm/*.safetensors",), partial(model, "llm"), ("llm",)),
        Format("GGUF", ("tiny.gguf",), gguf, ("tiny.gguf",)),
    ]  # fmt: skip
    return made


def fuzz(
    world: Path, *, seed: int, cases: int, seconds: float, only: list[str] | None = None
) -> tuple[int, list[Finding], dict[str, str]]:
    """Damage `cases` files of each format; returns how many there were, the findings, and formats that do not read.

    Args:
        seconds: for all; where it is short each format gets fewer.
    """
    chosen = [form for form in formats(world) if only is None or form.name in only]
    count, findings, broken = 0, [], {}
    began = time.monotonic()
    for number, form in enumerate(chosen):
        folder = world.parent / "fuzz" / "work"
        _copy(world, folder, form)
        whole = forks.run(partial(form.read, folder), folder=folder, log=world.parent / "log")
        if whole.kind != "ok":
            broken[form.name] = f"{whole.kind} {whole.told} {whole.place}"
            continue
        files = sorted(
            path for pattern in form.files for path in world.glob(pattern) if path.is_file()
        )
        until = began + seconds * (number + 1) / len(chosen)
        for case in range(cases):
            if time.monotonic() > until:
                break
            code = f"{seed} {form.name} {case}"
            chance = random.Random(code)
            file = chance.choice(files)
            content = file.read_bytes()
            bad = damaged(content, file.name, chance)
            if bad == content:
                continue
            _copy(world, folder, form)
            target = folder / file.relative_to(world)
            target.write_bytes(bad)
            end = forks.run(partial(form.read, folder), folder=folder, log=world.parent / "log")
            count += 1
            if end.kind == "ok" and form.sealed and end.value != whole.value:
                end = forks.End("silent", "read as something else without a word", form.name)
            if end.kind not in ("ok", "refused"):
                findings.append(Finding(form.name, str(file.relative_to(world)), code, end))
    return count, findings, broken


def _copy(world: Path, folder: Path, form: Format) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in form.beside:
        if (world / name).is_dir():
            shutil.copytree(world / name, folder / name)
        else:
            shutil.copy(world / name, folder / name)


def places(findings: list[Finding]) -> dict[str, int]:
    """Where the raw ones came from: a line of the package -> how many."""
    found: dict[str, int] = {}
    for finding in findings:
        if finding.end.kind != "silent":
            found[finding.end.place] = found.get(finding.end.place, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))
