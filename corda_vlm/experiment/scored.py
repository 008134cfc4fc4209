"""Which scores are those of a training's folder: where they lie, and what they call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_vlm.adapter.folder import WEIGHTS
from corda_vlm.evaluation.score_file import read_rows
from corda_vlm.experiment.spec import Training
from corda_vlm.run_files import MARKER, SCORES


@dataclass(frozen=True)
class Scored:
    """The scores of one training.

    Attributes:
        path: the file.
        rows: of it, those of the model before training among them.
        which: what tells the training's rows from others: method, learning_rate, seed and scale.
    """

    path: Path
    rows: Sequence[Mapping[str, Any]]
    which: Mapping[str, Any]


def scores_of(adapter: str | Path) -> Scored | None:
    """The scores of what was trained into a folder, as it was trained, that lie where `run` or `evaluate` wrote them.

    That is the file of the run that the folder is in, or a `scores.jsonl` in the folder itself, for which `evaluate --output` was
    given its name. None where there is neither, or where it has no scores of this training.

    Raises:
        ForeignFileError: the file is damaged.
    """
    folder = Path(adapter).resolve()
    folder = folder.parent if folder.name == WEIGHTS else folder
    places: list[tuple[Path, dict[str, Any]]] = [(folder / SCORES, {"method": folder.name})]
    run = folder.parent.parent
    if (run / MARKER).is_file() and (training := _training(folder)) is not None:
        places.append((run / SCORES, training.identity))
    for path, which in places:
        wanted = {"learning_rate": None, "seed": None, **which, "scale": 1.0}
        if path.is_file():
            rows = read_rows(path)
            if any(all(row.get(key) == value for key, value in wanted.items()) for row in rows):
                return Scored(path, rows, wanted)
    return None


def _training(folder: Path) -> Training | None:
    """The training that a run calls its folder after; None where it is called otherwise."""
    rate, _, seed = folder.name.rpartition("-")
    try:
        training = Training(folder.parent.name, "", float(rate), int(seed))
    except ValueError:
        return None
    return training if training.folder == f"{folder.parent.name}/{folder.name}" else None
