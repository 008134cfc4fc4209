"""Two processes that give the same command at once, in the same folder."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.reliability import forks, kills
from tests.reliability import world as worlds

RACED = ("calibrate", "init", "train", "evaluate", "export merged", "run")


def race(world: Path, verb: worlds.Verb) -> tuple[list[str], str, bool]:
    """How both ended, in order of their names; what the refused one was told; is what they wrote what one writes?"""
    folder, log = world.parent / "race" / "work", world.parent / "log"
    verb.prepare(world, folder)
    assert forks.run(worlds.main(*verb.args), folder=folder, log=log).kind == "ok"
    expected = kills.tree(folder)
    verb.prepare(world, folder)
    ends: list[forks.End] = []

    def start() -> None:
        ends.append(forks.run(worlds.main(*verb.args), folder=folder, log=log))

    both = [threading.Thread(target=start) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    told = " ".join(end.told + end.place for end in ends if end.kind != "ok")
    return sorted(end.kind for end in ends), told, kills.tree(folder) == expected


def race_all(world: Path, names: Sequence[str] = RACED) -> dict[str, tuple[list[str], str, bool]]:
    """Verb -> what `race` says of it."""
    return {verb.name: race(world, verb) for verb in worlds.verbs(world) if verb.name in names}


if __name__ == "__main__":
    worlds.warm()
    print(json.dumps(race_all(Path(sys.argv[1]) / "world")))
