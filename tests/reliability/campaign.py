"""The campaign: kills, damages files, misleads, and prints a table of how the package took it.

    python -m tests.reliability.campaign                          # all, within half an hour
    python -m tests.reliability.campaign --seconds 7200 --cases 500 --seed 7
    python -m tests.reliability.campaign --only fuzz --of plan --seed 0

A seed gives the same cases every time. Each finding is printed with what to run to see it again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability import forks, fuzz, kills, misuse
from tests.reliability import world as worlds


@dataclass(frozen=True)
class Figures:
    """What a campaign found.

    Attributes:
        rows: (what was done, how often, what went wrong, how often).
        findings: each with what to run to see it again.
    """

    rows: list[tuple[str, int, str, int]]
    findings: list[str]

    def __str__(self) -> str:
        lines = [f"{'':34}{'cases':>7}   {'':46}{'found':>6}"]
        lines += [f"{what:34}{n:>7,}   {wrong:46}{m:>6,}" for what, n, wrong, m in self.rows]
        return "\n".join([*self.findings, "", *lines])


def prepared(folder: Path) -> Path:
    """The world of `folder`, with everything in it; made unless it is there."""
    world = folder / "world"
    if not (world / "torn").is_dir():
        end = forks.run(partial(worlds.build, world), folder=folder, log=folder / "log")
        assert end.kind == "ok", end
        kills.build_on(world)
        fuzz.prepare(world)
    return world


def campaign(
    world: Path,
    *,
    seed: int,
    seconds: float,
    cases: int,
    only: str | None = None,
    of: list[str] | None = None,
    every: int = 1,
    at_most: int | None = None,
) -> Figures:
    """Run the three parts, or one of them.

    Args:
        seconds: for all together: a half for the kills, a quarter for each of the others.
        cases: damaged files a format.
        only: "kills", "fuzz" or "inputs".
        of: names of verbs or formats.
        every: one of so many bad inputs.
        at_most: kills a verb.
    """
    rows, findings = [], []
    share: Callable[[float], float] = lambda part: seconds if only else part * seconds  # noqa: E731
    again = f"python -m tests.reliability.campaign --seed {seed}"
    if only in (None, "kills"):
        count, lost = kills.kill_all(world, seed=seed, seconds=share(0.5), only=of, at_most=at_most)
        rows.append(("kills", count, "could not be gone on from", len(lost)))
        findings += [f"{kill}\n    {again} --only kills --of '{kill.verb}'" for kill in lost]
    if only in (None, "fuzz"):
        count, found, unread = fuzz.fuzz(
            world, seed=seed, cases=cases, seconds=share(0.25), only=of
        )
        silent = [finding for finding in found if finding.end.kind == "silent"]
        places = fuzz.places(found)
        rows.append(("damaged files", count, "raw tracebacks", sum(places.values())))
        rows.append(("", count, "… at so many places", len(places)))
        rows.append(("", count, "read as something else, in silence", len(silent)))
        rows.append(("", count, "kinds of file not read before damage", len(unread)))
        firsts = [next(f for f in found if f.end.place == place) for place in places]
        findings += [f"{f}\n    {again} --only fuzz --of '{f.format}'" for f in [*firsts, *silent]]
        findings += [f"{name} is not read at all: {why}" for name, why in unread.items()]
    if only in (None, "inputs"):
        count, raw = misuse.mislead(world, seconds=share(0.25), every=every)
        rows.append(("bad inputs", count, "answered by something raw", len(raw)))
        findings += [f"{answer}\n    {again} --only inputs" for answer in raw]
    return Figures(rows, findings)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1800, help="for all parts together")
    parser.add_argument("--cases", type=int, default=100, help="damaged files a format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("kills", "fuzz", "inputs"))
    parser.add_argument("--of", action="append", help="a verb or a format, by its name")
    parser.add_argument("--every", type=int, default=1, help="one of so many bad inputs")
    parser.add_argument("--keep", type=Path, help="a folder for the world, which is used again")
    options: dict[str, Any] = vars(parser.parse_args())
    keep = options.pop("keep")
    worlds.warm()
    with tempfile.TemporaryDirectory(prefix="reliability-") as temporary:
        folder = Path(temporary) if keep is None else keep
        folder.mkdir(parents=True, exist_ok=True)
        figures = campaign(prepared(folder), **options)
    print(figures)
    sys.exit(any(found for *_, found in figures.rows))


if __name__ == "__main__":
    main()
