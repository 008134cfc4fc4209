"""The campaign in short, in one process whose children share what it has imported; prints figures and races."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.reliability import races
from tests.reliability import world as worlds
from tests.reliability.campaign import campaign, prepared

KILLED = ["calibrate --rounds", "init", "train", "evaluate", "export merged", "run"]
RACED = ["calibrate", "evaluate", "run"]
"""One that refuses the second, one that lets them write in turn, and one whose output is a folder."""
ENOUGH = 600.0
"""Seconds that no part takes: a short campaign does the same on every machine."""


def main(folder: Path) -> int:
    """Run the parts in `folder`; 1 where one of them found something. The last line is JSON, of the races."""
    worlds.warm()
    world = prepared(folder)
    parts = [
        campaign(world, seed=0, seconds=ENOUGH, cases=2, only="kills", of=KILLED, at_most=1),
        campaign(world, seed=0, seconds=ENOUGH, cases=2, only="fuzz"),
        campaign(world, seed=0, seconds=ENOUGH, cases=2, only="inputs", every=20),
    ]
    print(*parts, sep="\n")
    print(json.dumps(races.race_all(world, RACED)))
    return int(any(found for part in parts for *_, found in part.rows))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
