"""Records: decoded when they are looked at, with a cheap fingerprint of what they say.

`Records` is what all kinds have in common; `ImageTextData` has an image, a text and a label each, and
`text.instruction.InstructionData` a conversation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, overload

import numpy as np
from PIL import Image

from corda_vlm.data.sources.images import fetched, is_data_url, to_rgb
from corda_vlm.data.sources.table import Table
from corda_vlm.data.spec import DataSpec
from corda_vlm.data.text.registry import written_as
from corda_vlm.errors import DataError
from corda_vlm.files import read_bytes

Record = dict[str, Any]
"""`image` (RGB PIL image or None), `text` (str or None), `label` (int or None), and the source's other columns."""


_Records = TypeVar("_Records", bound="Records")


# Not `Sequence[Record]`: beartype would then decode a record at each call that is checked.
class Records(Sequence):
    """Records in a fixed order.

    `data[i]` decodes record i and raises `DataError` if it is of no use; iterating skips such records and counts
    them, up to the share that the spec allows. `data[a:b]` and `select` give a part of the same source.

    Attributes:
        conversational: does a record hold what a model that generates text learns from?
        spec: what was asked for.
        labels: (n,) whole numbers, or None.
        texts: (n,) strings, or None.
        class_names: the names of the labels in index order, or None.
        bad: record number -> why it is of no use, for those met so far.
        cache: what batch builders keep about these records, e.g. their pixels.
    """

    conversational: ClassVar[bool] = False
    _trouble: ClassVar[str] = "records cannot be used"

    def __init__(
        self,
        table: Table,
        rows: np.ndarray,
        spec: DataSpec,
        *,
        texts: list[str] | None,
        labels: list[int] | None,
        class_names: tuple[str, ...] | None,
        image_column: str | None = None,
    ) -> None:
        self.spec, self.labels, self.texts, self.class_names = spec, labels, texts, class_names
        self.bad: dict[int, str] = {
            number: table.faults[int(row)]
            for number, row in enumerate(rows if table.faults else ())
            if int(row) in table.faults
        }
        self.cache: dict[Any, Any] = {}
        self._table, self._rows, self._image_column = table, rows, image_column
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        parts = [f"{len(self)} records of {self.spec}"]
        if self.class_names is not None:
            parts.append(f"{len(self.class_names)} classes")
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def has_images(self) -> bool:
        raise NotImplementedError

    def image(self, index: int) -> Image.Image | None:
        """The picture of record `index` in RGB, its first of several; None if it has none.

        Raises:
            DataError: as `to_rgb` does.
        """
        raise NotImplementedError

    def _decoded(self, index: int) -> Record:
        """What has to be decoded of a record. Raises `DataError` if it is of no use."""
        raise NotImplementedError

    def _stored(self, index: int) -> list[Any]:
        """The stored pictures of a record."""
        raise NotImplementedError

    @property
    def written_as(self) -> str | None:
        """The line that a spec of these records lacks, going by their columns; None where none is known."""
        return written_as(self._table.columns)

    @property
    def skipped(self) -> int:
        """How many records are of no use, of those looked at so far."""
        return len(self.bad)

    @property
    def left_out(self) -> str | None:
        """What people are told of the records of no use met so far; None where there was none."""
        if not self.bad:
            return None
        index, why = next(iter(self.bad.items()))
        are = "1 record is" if self.skipped == 1 else f"{self.skipped:,} records are"
        return f"{are} left out, the first {self.place(index)}: {why}"

    def place(self, index: int) -> str:
        """Where a person finds record `index`: the file and the row or line."""
        return self._table.place(int(self._rows[index]))

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        record = self.get(range(len(self))[index])
        if record is None:
            number = range(len(self))[index]
            raise DataError(f"{self.place(number)}: {self.bad[number]}")
        return record

    def __iter__(self) -> Iterator[Record]:
        for index in range(len(self)):
            record = self.get(index)
            if record is not None:
                yield record

    def get(self, index: int) -> Record | None:
        """Record `index`, or None if it is of no use.

        Raises:
            DataError: more than `max_bad_share` of the records are of no use; lists the first of them.
        """
        if index in self.bad:
            return None
        row = int(self._rows[index])
        record: Record = {
            name: values[row]
            for name, values in self._table.columns.items()
            if name != self._image_column
        }
        try:
            record |= self._decoded(index)
        except DataError as error:
            return self.reject(index, str(error))
        record["text"] = None if self.texts is None else self.texts[index]
        record["label"] = None if self.labels is None else self.labels[index]
        return record

    def reject(self, index: int, why: str) -> None:
        """Count record `index` among those that are of no use; from now on it is skipped.

        Raises:
            DataError: they are more than `max_bad_share` of all; lists the first of them.
        """
        self.bad[index] = why
        self.check()

    def select(self: _Records, indices: Sequence[int] | range | np.ndarray) -> _Records:
        """The records at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return type(self)(
            self._table,
            self._rows[chosen],
            self.spec,
            texts=take(self.texts, chosen),
            labels=take(self.labels, chosen),
            class_names=self.class_names,
            image_column=self._image_column,
        )

    def shared_with(self, other: Records) -> int:
        """How many of these records `other` has too, as far as that shows: those selected of the same records, or all where both
        say the same."""
        if self._table is other._table:
            return len(np.intersect1d(self._rows, other._rows))
        return len(self) if self.fingerprint == other.fingerprint else 0

    @property
    def fingerprint(self) -> str:
        """A hash of the number of records, all labels and texts, and the stored bytes of up to 16 pictures.

        It does not depend on where the files lie, only on what the records say.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            # Length-prefixed by JSON, so that no two lists give one byte string.
            digest.update(json.dumps(self._said()).encode())
            if self.has_images:
                for index in np.unique(np.linspace(0, len(self) - 1, num=16).round().astype(int)):
                    for stored in self._readable(int(index)):
                        digest.update(_content(stored, self._table.base))
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def _said(self) -> list[Any]:
        """What the records say, as JSON, but for their pictures."""
        return [len(self), self.labels, self.texts, self.class_names, self.has_images]

    def _readable(self, index: int) -> list[Any]:
        """As `_stored`, for a fingerprint: what cannot be read is as if it were not there."""
        try:
            return self._stored(index)
        except DataError:
            return [None]

    def check(self) -> None:
        """Raises `DataError` if more than `max_bad_share` of the records are of no use; lists the first of them."""
        allowed = self.spec.max_bad_share
        if len(self.bad) <= allowed * len(self):
            return
        listed = [f"  {self.place(index)}: {why}" for index, why in list(self.bad.items())[:10]]
        raise DataError(
            f"{self.spec}: {len(self.bad)} of {len(self)} {self._trouble}, more than the {allowed:.3g} "
            "that max_bad_share allows:\n" + "\n".join(listed)
        )


class ImageTextData(Records):
    """Records of images, texts and labels."""

    _trouble = "images do not decode"

    @property
    def has_images(self) -> bool:
        return self._image_column is not None

    def image(self, index: int) -> Image.Image | None:
        """The picture of record `index` in RGB, None if the data has none. Raises `DataError` as `to_rgb` does."""
        if self._image_column is None:
            return None
        return to_rgb(self._stored(index)[0], self._table.base)

    def _decoded(self, index: int) -> Record:
        return {"image": self.image(index)}

    def _stored(self, index: int) -> list[Any]:
        row, column = int(self._rows[index]), str(self._image_column)
        get = self._table.images.get(column)
        return [fetched(get, row) if get is not None else self._table.columns[column][row]]


def take(values: list[Any] | None, indices: np.ndarray) -> list[Any] | None:
    """The values at `indices`."""
    return None if values is None else [values[int(index)] for index in indices]


def _content(stored: Any, base: Path | None) -> bytes:
    if isinstance(stored, Mapping):
        stored = stored["bytes"] if stored.get("bytes") is not None else stored.get("path")
    if is_data_url(stored):
        stored = stored.encode()
    if isinstance(stored, (str, Path)):
        path = Path(stored) if base is None else base / stored
        try:
            stored = read_bytes(path, error=DataError)
        except DataError:
            stored = b"missing"
    if isinstance(stored, (Image.Image, np.ndarray)):
        stored = stored.tobytes()
    if not isinstance(stored, (bytes, bytearray, memoryview)):  # no picture, whatever else it is
        stored = b"" if stored is None else repr(stored).encode("utf-8", "backslashreplace")
    return hashlib.sha256(stored).digest()
