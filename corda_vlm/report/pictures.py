"""The pictures of a report that its scores alone do not give, and the words that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from corda_vlm import run_files
from corda_vlm.errors import ForeignFileError
from corda_vlm.files import read_json, write_json
from corda_vlm.report.document import Picture
from corda_vlm.run_files import PICTURES, TRAINING

PLANS = "Rank of every adapted layer and what it was chosen by, blocks left to right, roles top to bottom."
PLANS_CAPTION = (
    "Which layers were given how much. Blue: the rank, darker for more (logarithmic). Orange: log₁₀ of the compactness π of "
    "the covariance that the layer took; lighter layers lose less by what is adapted. Green, of methods that start from the new "
    "task's gradient: the share of it that the adapter's directions hold."
)

# What pictures are of that were drawn before their words were kept.
_USUAL = {
    TRAINING: (
        "Training loss over steps, a panel for each method.",
        "Training loss, a running mean over a twentieth of the run; one line a seed.",
    ),
    run_files.PLANS: (PLANS, PLANS_CAPTION),
}


def kept_pictures(run_dir: Path) -> dict[str, Picture]:
    """Name -> the pictures in a run's folder that a former report had, in its order, and those that every report has.

    Raises:
        ForeignFileError: the list of them is not one of ours.
    """
    path = run_dir / PICTURES
    words = read_json(path, "list of pictures") if path.is_file() else {}
    for name, of in words.items() if isinstance(words, dict) else ():
        if Path(name).name != name or not name.endswith(".png") or not _are_words(of):
            words = None
            break
    if not isinstance(words, dict):
        raise ForeignFileError(f"{path} is no list of a report's pictures; delete it")
    words_of = {**_USUAL, **{name: (of["alt"], of["caption"]) for name, of in words.items()}}
    order = [*words, *(name for name in _USUAL if name not in words)]
    return {
        name: Picture(run_dir / name, *words_of[name])
        for name in order
        if (run_dir / name).is_file()
    }


def keep_pictures(run_dir: Path, pictures: Mapping[str, Picture]) -> None:
    """Keep the words of a report's pictures for the next time that it is written."""
    words = {name: {"alt": p.alt, "caption": p.caption} for name, p in pictures.items()}
    if words or (run_dir / PICTURES).is_file():
        write_json(run_dir / PICTURES, words)


def _are_words(of: object) -> bool:
    return isinstance(of, dict) and all(isinstance(of.get(key), str) for key in ("alt", "caption"))
