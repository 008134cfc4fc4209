"""Every verb, killed before each thing that it does to a file in turn, and then run again."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability import forks
from tests.reliability.world import KEPT, Verb, main, verbs

TIMES = ("seconds", "samples_per_second", "machine", "time")


@dataclass(frozen=True)
class Kill:
    """A kill that could not be recovered from."""

    verb: str
    number: int
    event: str
    why: str

    def __str__(self) -> str:
        return f"{self.verb}, killed before event {self.number} ({self.event}): {self.why}"


def tree(folder: Path) -> dict[str, str]:
    """Files below `folder` and what is in them, but for what no two runs have alike: times and drawings."""
    return {
        str(path.relative_to(folder)): _content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _content(path: Path) -> str:
    if path.suffix in (".md", ".html", ".png"):
        return "some" if path.stat().st_size else "nothing"
    if path.suffix == ".jsonl":
        return json.dumps([_timeless(json.loads(line)) for line in path.read_text().splitlines()])
    if path.suffix == ".json":
        return json.dumps(_timeless(json.loads(path.read_text())))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def build_on(world: Path) -> None:
    """Run the verbs whose work the others read, and keep it in the world."""
    for verb in verbs(world):
        if verb.name in KEPT:
            folder = world.parent / "making"
            verb.prepare(world, folder)
            end = forks.run(main(*verb.args), folder=folder, log=world.parent / "log")
            assert end.kind == "ok", (verb, end)
            for name, kept in KEPT[verb.name].items():
                shutil.move(folder / name, world / kept)


def kill_all(
    world: Path,
    *,
    seed: int,
    seconds: float,
    only: list[str] | None = None,
    at_most: int | None = None,
) -> tuple[int, list[Kill]]:
    """Kill and go on; returns how many kills there were, and those that could not be gone on from.

    Args:
        seconds: for all verbs together; events are drawn, each at most once, while there is time.
        at_most: kills a verb.
    """
    chosen = [verb for verb in verbs(world) if only is None or verb.name in only]
    began, count, failed = time.monotonic(), 0, []
    for number, verb in enumerate(chosen):
        folder = world.parent / "case" / "work"
        verb.prepare(world, folder)
        whole = forks.run(main(*verb.args), folder=folder, log=world.parent / "log", watch=True)
        assert whole.kind == "ok", (verb, whole)
        expected = tree(folder)
        order = list(range(len(whole.events)))
        random.Random(f"{seed} {verb.name}").shuffle(order)
        until = began + seconds * (number + 1) / len(chosen)
        for at in order[:at_most]:
            if time.monotonic() > until:
                break
            verb.prepare(world, folder)
            why = _kill(verb, folder, at, expected, world.parent / "log")
            count += 1
            if why is not None:
                failed.append(Kill(verb.name, at, whole.events[at], why))
    return count, failed


def _kill(verb: Verb, folder: Path, at: int, expected: dict[str, str], log: Path) -> str | None:
    """Kill, go on, and say what is wrong then."""
    first = forks.run(main(*verb.args), folder=folder, log=log, kill_at=at)
    if first.kind != "killed":
        return f"it was to die, and ended {first.kind}: {first.told} {first.place}"
    again = forks.run(main(*verb.args), folder=folder, log=log)
    if again.kind != "ok":
        return f"the second run ended {again.kind}: {again.told} {again.place}"
    found = tree(folder)
    if found != expected:
        different = sorted(
            k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k)
        )
        return f"the files differ from an uninterrupted run's: {', '.join(different[:6])}"
    return None
