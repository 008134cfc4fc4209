"""A table of bad inputs: words, numbers, paths and disks that cannot be, each to be answered in words."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.reliability import forks
from tests.reliability.world import FAST, main

LONG, NUL = "x" * 300, "a\0b"
PLACES = (
    "file.txt/x",
    "folder",
    "full",
    "full/x",
    LONG,
    NUL,
    "loop/x",
    "/proc/corda/x",
    "~nosuchuser/x",
    "",
)
"""Where nothing can be written: `file.txt` is a file, `folder` a folder that holds somebody's work, `full` a device that
is always full. It is the case's own: whoever may write to `/dev` could lose the system's to a mistake that this looks for."""


@dataclass(frozen=True)
class Input:
    """A command that cannot be meant, by its words."""

    args: tuple[str, ...]
    disk: int | None = None  # bytes that a file may have, as on a full disk

    def __str__(self) -> str:
        words = " ".join(repr(arg) if not arg.isprintable() else arg for arg in self.args)
        return f"{words[:200]}" + (
            "" if self.disk is None else f" (a disk with room for {self.disk})"
        )


@dataclass(frozen=True)
class Answer:
    """What came of one."""

    input: Input
    end: forks.End

    def __str__(self) -> str:
        return f"{self.input}: {self.end.kind} at {self.end.place}: {self.end.told}"


def inputs(world: Path) -> list[Input]:
    """The table."""
    return [Input(args) for args in _words(world)] + list(_full(world))


def _verbs(world: Path) -> dict[str, tuple[str, ...]]:
    """Each verb in a form that works, but for where it writes."""
    clip, images = f"{world}/clip", f"folder:{world}/images"
    return {
        "calibrate": ("calibrate", clip, images, "--samples=8", "--batch-size=4", "--towers=vision"),
        "init": ("init", clip, "--covariance", f"{world}/covariance.safetensors", "--rank=2", "--towers=vision"),
        "train": ("train", clip, images, "--plan", f"{world}/plan.json", *FAST),
        "evaluate": ("evaluate", clip, f"{world}/suite.yaml"),
        "export": ("export", clip, f"{world}/adapter/weights"),
        "run": ("run", f"{world}/experiment.yaml"),
    }  # fmt: skip


def _words(world: Path) -> Iterator[tuple[str, ...]]:
    verbs = _verbs(world)
    for verb, words in verbs.items():
        for place in PLACES:
            yield (*words, place) if verb == "export" else (*words, "--output", place)
    calibrate, init, train, evaluate, run = (
        verbs[verb] for verb in ("calibrate", "init", "train", "evaluate", "run")
    )
    model, images = calibrate[1], calibrate[2]
    for bad in (
        "nothing-of-the-kind",
        "folder",
        "file.txt",
        "/dev/null",
        LONG,
        NUL,
        "",
        "~nosuchuser",
        "a/b/c",
        f"{world}/adapter",
    ):
        yield "sites", bad
        yield "calibrate", bad, images
        yield "report", bad
        yield "run", bad
        yield "evaluate", model, bad
        yield "evaluate", model, f"{world}/suite.yaml", "--adapter", bad
        yield "train", model, images, "--plan", bad, "--output=new"
        yield "init", model, "--covariance", bad
        yield "export", model, bad, "new"
    sources = ("", "folder", "folder:", "folder:nothing", f"folder:{NUL}", f"folder:{LONG}", "parquet:file.txt", "parquet:nothing.*",
               "jsonl:file.txt", "json:file.txt", "text:nothing", "webdataset:file.txt", "sklearn:nothing", "torchvision:Nothing",
               "hf:nothing/nothing", "{", "[1, 2]", "{source: 3}", "{sauce: x}", f"{{source: '{images}', limit: 0}}",
               f"{{source: '{images}', limit: x}}", f"{{source: '{images}', seed: -1}}", f"{{source: '{images}', where: 3}}",
               f"{{source: '{images}', classes: [red]}}", f"{{source: '{images}', splits: {{a: 2}}}}", "jsonl:/dev/zero",
               f"{{source: '{images}', splits: [1]}}", f"{{source: '{images}', label: [x]}}", f"{{source: '{images}', format: x}}",
               f"{{source: 'jsonl:{world}/qa.jsonl', format: qa, question: 3}}", f"{{source: 'jsonl:{world}/qa.jsonl', rows: [2, 1]}}",
               "{source: null}", "parquet:~nosuchuser/x", "folder:.")  # fmt: skip
    for source in sources:
        yield "calibrate", model, source, "--samples=4"
    numbers = {
        calibrate: ("samples", "batch-size", "rounds", "seed"),
        init: ("rank", "damping", "a-norm", "beta", "budget", "min-rank", "max-rank"),
        train: ("steps", "epochs", "batch-size", "learning-rate", "weight-decay", "seed", "anchor", "label-smoothing",
                "gradient-accumulation", "max-tokens", "projector-learning-rate"),
        evaluate: ("limit", "batch-size", "scales"),
    }  # fmt: skip
    for words, options in numbers.items():
        for option in options:
            for value in ("-1", "0", "nan", "inf", "x", "", "1e30"):
                yield *words, f"--{option}={value}"
    choices = {
        calibrate: ("towers", "roles", "precision", "tokens", "chat", "dtype", "device", "device-map", "too-long"),
        init: ("method", "mode", "side", "towers", "roles", "dtype", "device", "picture", "task-covariance"),
        train: ("loss", "augment", "chat", "learn", "modules-to-save", "covariance", "classes", "templates", "dtype"),
        evaluate: ("tasks", "missing", "data-root", "dtype", "device", "bf16"),
    }  # fmt: skip
    for words, options in choices.items():
        for option in options:
            for value in ("nothing", "", NUL, LONG):
                yield *words, f"--{option}={value}"
    sets = ("rank=0", "rank=x", "rank=[1]", "seeds=[]", "seeds=[-1]", "seeds=x", "seeds=[0, 0]", "name=../../x", "name=", "name=3", "variants={}",
            "variants=x", "variants.full=3", "variants.full.learning_rates=[]", "variants.full.learning_rates=[x]", "variants.$x={}",
            "variants.full.learning_rates=[-1]", "variants.full.scales=[nan]", "variants.full.scales=x", "variants.a/b={method: full}",
            "training.batch_size=0", "training.steps=-1", "training.steps=1.5", "training.weight_decay=-1", "training.nothing=1",
            "training=3", "towers=[x]", "towers=3", "dtype=int8", "device_map=x", "suite=nothing", "suite=3", "model=nothing", "model=3",
            "model=", "calibration=3", "calibration.samples=0", "calibration.rounds=99", "calibration.batch_size=x", "calibration.data=3",
            "calibration.precision=x", "calibration.tokens=x", "task=3", "task.data=nothing:x", "task.classes=3", "task.templates=[x]",
            "task.classes=nothing", "evaluation=3", "evaluation.batch_size=0", "evaluation.scales=[2, x]", "forecast=x", "title=[1]",
            "family=nothing", "data_root=3", "data_root=nothing", "=", "x", "a.b.c.d=1", "rank", "rank=", "seeds=[&a [*a]]", "x={", f"name={LONG}",
            f"name={NUL}", "variants.full.method=nothing", "variants.full.rank=-1", "variants.corda-kpm.a_norm=-1", "variants.full.anchor=-1")  # fmt: skip
    for one in sets:
        yield *run, "--output=new", "--set", one
    yield *run, "--output=new", "--only=nothing"
    yield *run, "--output=new", "--device=nothing"
    yield *run, "--output=folder", "--fresh"
    yield ("nothing",)
    yield ()
    yield "run", "--set"
    yield *evaluate, "--scales=0.5"
    yield "export", model, f"{world}/adapter/weights", "new", "--rank=0", "--format=lora"
    yield "export", model, f"{world}/adapter/weights", "new", "--rank=99", "--format=lora"
    yield "export", model, f"{world}/adapter/weights", "new", "--format=x"


def _full(world: Path) -> Iterator[Input]:
    """Every writer on a disk that is full at the start, after a little, and after some more."""
    for verb, words in _verbs(world).items():
        output = (
            ("out",) if verb == "export" else ("--output", "out.json" if verb == "init" else "out")
        )
        for room in (0, 100, 3000, 30_000):
            yield Input((*words, *output), room)
    for room in (0, 1000):
        yield Input(("report", "run"), room)
        yield Input(("run", f"{world}/study.yaml", "--output=out"), room)


def mislead(
    world: Path, *, seconds: float, every: int = 1, show: Callable[[Answer], None] | None = None
) -> tuple[int, list[Answer]]:
    """Give all of the table; returns how many, and those that were answered by something raw.

    Args:
        every: one of so many.
    """
    folder = world.parent / "misuse" / "work"
    began, count, raw = time.monotonic(), 0, []
    for input in inputs(world)[::every]:
        if time.monotonic() - began > seconds:
            break
        _prepare(world, folder)
        log = (
            None if input.disk is not None else world.parent / "log"
        )  # the log is on the same disk
        end = forks.run(_limited(input), folder=folder, log=log)
        count += 1
        answer = Answer(input, end)
        if show is not None:
            show(answer)
        if end.kind not in ("ok", "refused"):
            raw.append(answer)
        elif not _unharmed(folder):
            raw.append(Answer(input, forks.End("raw", "somebody's work is gone", "the folder")))
    return count, raw


def _unharmed(folder: Path) -> bool:
    """Is what was there before as it was?"""
    works = (folder / "folder" / "thesis.tex", "years of work"), (folder / "file.txt", "a file")
    texts = all(path.is_file() and path.read_text() == text for path, text in works)
    full = folder / "full"
    return texts and full.exists() and not full.is_file() and not full.is_dir()


def always_full(path: Path) -> None:
    """A device that is always full, or where none can be made a pipe that nobody reads."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
    except OSError:
        os.mkfifo(path)


def _limited(input: Input) -> Callable[[], None]:
    def call() -> None:
        if input.disk is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (input.disk, input.disk))
        main(*input.args)()

    return call


def _prepare(world: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "folder").mkdir(parents=True)
    (folder / "folder" / "thesis.tex").write_text("years of work")
    (folder / "file.txt").write_text("a file")
    (folder / "loop").symlink_to(folder / "loop")
    always_full(folder / "full")
    shutil.copytree(world / "run", folder / "run")
