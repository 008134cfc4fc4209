"""What a training gained and what it lost, example by example: the pictures and questions with both answers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from corda_vlm.data import load_records
from corda_vlm.data.paths import find_one
from corda_vlm.data.spec import parse_spec
from corda_vlm.errors import CordaError
from corda_vlm.evaluation.predictions import (
    Change,
    ModelPrediction,
    by_model,
    changes,
    read_predictions,
)
from corda_vlm.evaluation.scores import BASE
from corda_vlm.names import listed
from corda_vlm.report.document import Gallery, Picture, Section, Tile
from corda_vlm.report.markup import bold, printable, shortened
from corda_vlm.report.plots.gallery import contact_sheet
from corda_vlm.report.words import FEW
from corda_vlm.run_files import GALLERIES, PREDICTIONS

SHOWN = 8
"""So many gained and so many lost examples of a task are shown of a model."""

_SIDE = 144
"""Pixels of a thumbnail's longer side; smaller pictures are enlarged to it by whole factors, as they are."""


def gallery_sections(folder: Path, files: Sequence[str | Path] = ()) -> list[Section]:
    """A section for each model that there are predictions of beside those of another; none where there are no predictions.

    The model before training is what the others are compared with, or where it is not there the first model of the files.

    Args:
        folder: of the report, which the pictures for Markdown are drawn into. Its own file of predictions counts where there
            is one.
        files: further predictions.

    Raises:
        ForeignFileError: a file that holds no predictions.
    """
    own = [folder / PREDICTIONS] if (folder / PREDICTIONS).is_file() else []
    models = by_model(read_predictions(*own, *files))
    if len(models) < 2:
        return []
    first = next((key for key in models if key[0] == BASE), next(iter(models)))
    base, names, stored = models.pop(first), _names([first, *models]), _Stored()
    sections = [
        _section(folder, number, (names[first], names[key]), base, of, stored)
        for number, (key, of) in enumerate(models.items(), start=1)
    ]
    return [
        Section(s.heading, s.paragraphs, galleries=s.galleries, folded=len(models) > FEW)
        for s in sections
        if s is not None
    ]


def _names(models: Sequence[tuple[str, float | None, int | None, float]]) -> dict[Any, str]:
    """What people call each model: its method, and what else tells it from the others of that method."""
    names = {}
    for key in models:
        method, rate, seed, scale = key
        own = [other for other in models if other[0] == method]
        told = [] if rate is None or len(own) < 2 else [f"learning rate {rate:g}"]
        told += [] if seed is None or len({s for _, _, s, _ in own}) < 2 else [f"seed {seed}"]
        told += [] if scale == 1.0 else [f"scale {scale:g}"]
        names[key] = ", ".join([method, *told])
    return names


def _section(
    folder: Path,
    number: int,
    names: tuple[str, str],
    before: Sequence[ModelPrediction],
    after: Sequence[ModelPrediction],
    stored: _Stored,
) -> Section | None:
    """What one model gained and lost against another; None where they have no example in common."""
    tasks = list(dict.fromkeys(one.task for one in after))
    galleries, sentences = [], []
    for task in tasks:
        changed, common = changes(
            [one for one in before if one.task == task], [one for one in after if one.task == task]
        )
        if not common:
            continue
        gained, lost = [c for c in changed if c.is_gain], [c for c in changed if not c.is_gain]
        sentences.append(_counted(task, common, len(gained), len(lost)))
        for what, some in (("gained", gained), ("lost", lost)):
            if some:
                path = folder / GALLERIES.replace("*", f"{number}-{len(galleries) + 1}")
                galleries.append(_gallery(path, task, what, names, some, stored))
    if not sentences:
        return None
    sentences += stored.told()
    return Section(f"Examples that {names[1]} gained and lost", sentences, galleries=galleries)


def _counted(task: str, common: int, gained: int, lost: int) -> str:
    return (
        f"{bold(task)}: of {common:,} examples {gained:,} {'was' if gained == 1 else 'were'} wrong before and "
        f"{'is' if gained == 1 else 'are'} right now, {lost:,} the other way round."
    )


def _gallery(
    path: Path,
    task: str,
    what: str,
    names: tuple[str, str],
    changed: Sequence[Change],
    stored: _Stored,
) -> Gallery:
    chosen = _spread(changed)
    tiles = [_tile(one, names, stored) for one in chosen]
    some = "" if len(chosen) == len(changed) else f", {len(chosen)} of {len(changed):,}"
    caption = f"{what.capitalize()} on {task}{some}: "
    caption += f"the answers of {names[0]} and of {names[1]}, and the right one."
    picture = None
    if any(tile.image is not None for tile in tiles):
        contact_sheet(tiles, path)
        said = [f"{t.lines[0][1]} became {t.lines[1][1]}" for t in tiles]
        alt = f"Pictures that were {what} on {task}: {listed(said)}."
        picture = Picture(path, alt, caption)
    return Gallery(caption, tiles, picture)


def _spread(changed: Sequence[Change]) -> list[Change]:
    """Some of the changes, evenly over the data, as sorted classes lie in a row there."""
    order = sorted(changed, key=lambda change: change.after.index)
    if len(order) <= SHOWN:
        return order
    return [order[round(i * (len(order) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


def _tile(change: Change, names: tuple[str, str], stored: _Stored) -> Tile:
    before, after = change.before, change.after
    lines = [
        (names[0], _said(before), before.correct >= 0.5),
        (names[1], _said(after), after.correct >= 0.5),
        ("right answer", _right(after), None),
    ]
    title = "" if after.question is None else shortened(after.question, 160)
    return Tile(stored.picture(after), title, tuple(lines), place=printable(after.place))


def _said(one: ModelPrediction) -> str:
    return shortened(one.said, 80) if one.said.strip() else "(nothing)"


def _right(one: ModelPrediction) -> str:
    right = list(dict.fromkeys(one.right))
    more = f" and {len(right) - 3} more" if len(right) > 3 else ""
    return shortened(listed(right[:3]), 80) + more


@dataclass
class _Sources:
    """The records of one task, or why they cannot be shown."""

    records: Any = None
    why: str | None = None


class _Stored:
    """The pictures of predictions, of records that are read again where they still are the same."""

    def __init__(self) -> None:
        self._read: dict[str, _Sources] = {}

    def picture(self, one: ModelPrediction) -> bytes | None:
        """A thumbnail as PNG or JPEG; None where the example has no picture, or it cannot be had."""
        if one.records is None:
            return None
        key = str(one.records.get("fingerprint"))
        if key not in self._read:
            self._read[key] = _read(one.records, one.task)
        source = self._read[key]
        if source.records is None or one.index >= len(source.records):
            return None
        try:
            image = source.records.image(one.index)
        except CordaError:
            return None
        return None if image is None else thumbnail(image)

    def told(self) -> Iterator[str]:
        """What people are told of records whose pictures cannot be shown."""
        yield from dict.fromkeys(of.why for of in self._read.values() if of.why is not None)


def _read(told: Mapping[str, Any], task: str) -> _Sources:
    beside = told.get("beside")
    try:
        spec = parse_spec({**told["spec"], "download": False})
        if spec.kind == "hf":  # a report asks no hub, whatever a file of predictions names
            find_one(spec.location, beside)
        records = load_records(spec, beside=beside)
        same = records.fingerprint == told.get("fingerprint")
    except CordaError as error:
        return _Sources(why=f"The pictures of {task} are not shown: {error}")
    if not same:
        return _Sources(why=f"The pictures of {task} are not shown: {records.spec} has changed.")
    return _Sources(records if records.has_images else None)


def thumbnail(image: Image.Image) -> bytes:
    """A small picture of a picture, at most `_SIDE` pixels a side, or enlarged by a whole factor to about that."""
    longer = max(image.size)
    if longer * 2 <= _SIDE:
        by = _SIDE // longer
        image = image.resize((image.width * by, image.height * by), Image.Resampling.NEAREST)
    else:
        image = image.copy()
        image.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    if longer <= _SIDE:
        image.save(content, "PNG")
    else:
        image.save(content, "JPEG", quality=82)
    return content.getvalue()
