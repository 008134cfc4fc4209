"""A source after reading and before decoding: columns, and how to reach row i's picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from corda_vlm.errors import DataError, UnknownNameError

Row = TypeVar("Row")


@dataclass(frozen=True)
class Table:
    """Rows of a source.

    Attributes:
        size: number of rows.
        columns: name -> values of all rows; what is small enough to read at once.
        images: name -> function from a row's index to a stored picture (see `corda_vlm.data.sources.images.to_rgb`),
            called only when the picture is wanted.
        place: row's index -> where a person finds it, e.g. "birds.parquet, row 12".
        class_names: column of whole numbers -> the names its source gives them.
        base: the folder that picture paths are relative to.
        splits: how the source is cut when it has no split of its own and the user names one.
        split: the source's own split was applied already.
        parents: for each row what it was made of, where several rows were made of one (the questions about one
            picture, the chunks of one document): cutting into splits keeps them together.
        pictures: row -> its stored pictures, for records with any number of them.
        faults: row -> why it is no usable record.
    """

    size: int
    columns: Mapping[str, Sequence[Any]]
    images: Mapping[str, Callable[[int], Any]]
    place: Callable[[int], str]
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    base: Path | None = None
    splits: Mapping[str, float | int] | None = None
    split: bool = False
    parents: Sequence[int] | None = None
    pictures: Callable[[int], list[Any]] | None = None
    faults: Mapping[int, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [*self.columns, *(name for name in self.images if name not in self.columns)]


def table_of(records: Sequence[Mapping[str, Any]], places: Sequence[str], base: Path) -> Table:
    """A table of records that are mappings, each with the place where a person finds it; what one lacks is None.

    Args:
        base: the folder that their paths of pictures are relative to.
    """
    names = dict.fromkeys(name for record in records for name in record)
    return Table(
        size=len(records),
        columns={name: [record.get(name) for record in records] for name in names},
        images={},
        place=lambda row: places[row],
        base=base,
    )


def asked_rows(records: list[Row], rows: Sequence[int | float] | None, source: object) -> list[Row]:
    """The records from `rows[0]` up to `rows[1]`, numbers or shares of all; None for all.

    Raises:
        DataError: there are none in this range.
    """
    if rows is None:
        return records
    count = len(records)
    shares = any(isinstance(at, float) for at in rows)
    start, stop = (round(at * count) if shares else int(at) for at in rows)
    if not start < stop <= count:
        raise DataError(
            f"{source}: has {count} records, so there are no rows from {start} up to {stop} in it"
        )
    return records[start:stop]


USUAL = {
    "image": ("image", "img", "jpg", "jpeg", "png", "webp", "image_path", "file_name", "filepath"),
    "images": ("images", "image", "img", "jpg", "jpeg", "png", "webp", "image_path", "image_paths"),
    "text": ("text", "caption", "txt", "captions", "sentence", "title"),
    "label": ("class_name", "label", "labels", "cls", "class", "target", "fine_label"),
}


def pick_column(table: Table, kind: str, asked: str | None, source: object) -> str | None:
    """The column that holds `kind` ("image", "images", "text" or "label"); None if it is left out or there is none.

    Raises:
        UnknownNameError: the column that was asked for does not exist.
    """
    if asked is None:
        return None
    # What holds pictures is read when one is wanted, and is neither a text nor a label.
    candidates = {*table.columns, *(table.images if kind in ("image", "images") else ())}
    if asked == "auto":
        if kind in ("image", "images") and len(table.images) == 1:
            return next(iter(table.images))
        return next((name for name in USUAL[kind] if name in candidates), None)
    if asked not in candidates:
        raise UnknownNameError(f"{kind} column of {source}", asked, candidates)
    return asked


def select_rows(table: Table, where: Mapping[str, Any], source: object) -> np.ndarray:
    """The rows (ascending) whose columns have the values in `where`.

    Raises:
        UnknownNameError: no such column.
        DataError: no row is left; the message lists the values that the column does have.
    """
    rows = np.arange(table.size)
    for column, wanted in where.items():
        if column not in table.columns:
            raise UnknownNameError(f"column of {source}", column, table.columns)
        allowed = list(wanted) if isinstance(wanted, (list, tuple, set, frozenset)) else [wanted]
        values = table.columns[column]
        kept = rows[
            np.fromiter((values[int(row)] in allowed for row in rows), dtype=bool, count=len(rows))
        ]
        if len(rows) and not len(kept):
            seen = sorted({str(values[int(row)]) for row in rows[:10_000]})
            shown = ", ".join(seen[:12]) + (", ..." if len(seen) > 12 else "")
            raise DataError(
                f"{source}: no record has {column} = {wanted!r}; its values are: {shown}"
            )
        rows = kept
    return rows


def shuffled_within_classes(labels: Sequence[int] | None, count: int, seed: int) -> np.ndarray:
    """An order of `count` rows of which every run of consecutive ones is stratified by label.

    Without labels it is a plain permutation. numpy's legacy generator is used because its streams are
    frozen: the same seed gives the same split on every version.
    """
    order = np.random.RandomState(seed).permutation(count)
    if labels is None:
        return order
    of_row = np.asarray(labels)[order]
    position = np.empty(count)
    for label in np.unique(of_row):
        members = np.flatnonzero(of_row == label)
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.lexsort((of_row, position))]


def cut(
    splits: Mapping[str, float | int],
    split: str,
    labels: Sequence[int] | None,
    count: int,
    source: object,
) -> np.ndarray:
    """The rows (ascending) of one part of `splits`: disjoint from the other parts whatever is asked for.

    Raises:
        UnknownNameError: no such part.
        DataError: the parts are more than there is.
    """
    if split not in splits:
        raise UnknownNameError(f"split of {source}", split, splits)
    shares = all(isinstance(share, float) and share <= 1 for share in splits.values())
    if any(share <= 0 for share in splits.values()) or (
        sum(splits.values()) > (1 + 1e-9 if shares else count)
    ):
        raise DataError(
            f"{source}: splits {dict(splits)} do not fit {count} records: shares must add up to at most 1, "
            "numbers to at most the records there are"
        )
    order = shuffled_within_classes(labels, count, seed=0)
    start = 0.0
    for name, share in splits.items():
        end = start + (share * count if shares else share)
        if name == split:
            return np.sort(order[round(start) : round(end)])
        start = end
    raise AssertionError("unreachable: the split is among the parts")
