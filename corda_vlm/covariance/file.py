"""Covariance files: safetensors, written in pieces, with JSON about the contents and checksums in the header.

Plain safetensors readers open them. What this adds to `corda_vlm.tensors`: a tensor never has to exist as a whole, and is
read when it is asked for; damage to its values is noticed then.
"""

from __future__ import annotations

import json
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from corda_vlm.errors import ForeignFileError
from corda_vlm.files import check_path
from corda_vlm.tensors import Pieces, write_pieces

FORMAT = "corda_vlm.covariance"
FORMAT_VERSION = 1
_DTYPES = {torch.float64: "F64", torch.float32: "F32"}


def write(path: str | Path, about: Mapping[str, Any], tensors: Mapping[str, Pieces]) -> None:
    """Write `tensors` to `path`, atomically, with `about` (JSON values) in the header."""

    def metadata(crc32: dict[str, str]) -> dict[str, str]:
        contents = json.dumps({**about, "format_version": FORMAT_VERSION, "crc32": crc32})
        return {"format": FORMAT, "about": contents}

    write_pieces(path, tensors, metadata)


class CovarianceFile:
    """A file opened for reading; `about` is its JSON. Values are read when they are asked for.

    Held open, so that a store goes on reading the file it opened when another one takes its place on the disk.

    Raises:
        ForeignFileError: no such file, truncated, damaged, not a covariance file, or of another version of the format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = check_path(path)
        if self.path.is_dir():
            raise ForeignFileError(
                f"{path} is a folder, and covariances are one file; name a file, e.g. {self.path / 'covariance.safetensors'}"
            )
        if not self.path.is_file():
            raise ForeignFileError(
                f"no covariance file at {path}; collect_covariance(..., path=...) writes one"
            )
        try:
            # Plain reads: pages of a mapping would count as this process's memory until somebody else wants them.
            self._bytes = self.path.open("rb")
            weakref.finalize(self, self._bytes.close)
            with safe_open(str(path), framework="pt"):  # checks the header against the length
                pass
            length = int.from_bytes(self._bytes.read(8), "little")
            self._tensors: dict[str, Any] = json.loads(self._bytes.read(length))
            self._start = 8 + length
            metadata = self._tensors.pop("__metadata__", {})
        except (SafetensorError, OSError, ValueError) as error:
            raise self.damaged(str(error)) from error
        if metadata.get("format") != FORMAT:
            raise ForeignFileError(
                f"{path} is a safetensors file, but not one of covariances; give the file that collect_covariance or "
                "`corda-vlm calibrate` wrote"
            )
        try:
            self.about: Mapping[str, Any] = json.loads(metadata["about"])
            version = self.about["format_version"]
            self._checksums = dict(self.about["crc32"])
        except (KeyError, TypeError, ValueError) as error:
            raise self.damaged(f"its header is incomplete ({error!r})") from error
        if version != FORMAT_VERSION:
            raise ForeignFileError(
                f"{path} has version {version} of the format, and this corda_vlm reads version {FORMAT_VERSION}; "
                f"use the corda_vlm that wrote it ({self.about.get('package_version')}), or collect it again"
            )

    def dtype_and_shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """What the header says of a tensor; `ValueError` if the file lacks it."""
        if name not in self._tensors or name not in self._checksums:
            raise ValueError(f"no tensor {name}")
        tensor = self._tensors[name]
        dtypes = {text: dtype for dtype, text in _DTYPES.items()}
        if tensor["dtype"] not in dtypes:
            raise ValueError(f"{name} is of type {tensor['dtype']}")
        return dtypes[tensor["dtype"]], tuple(tensor["shape"])

    def pieces(self, name: str, lengths: Sequence[int]) -> Iterator[Tensor]:
        """The tensor, `lengths` rows at a time; damage is found when the last piece has been taken."""
        dtype, (_, *row) = self.dtype_and_shape(name)
        start, checksum = self._start + self._tensors[name]["data_offsets"][0], 0
        for length in lengths:
            shape = torch.Size((length, *row))
            data = bytearray(shape.numel() * dtype.itemsize)
            self._bytes.seek(start)
            if self._bytes.readinto(data) != len(data):
                raise self.damaged(f"it ends within {name}")
            checksum = zlib.crc32(data, checksum)
            start += len(data)
            yield torch.frombuffer(data, dtype=dtype).view(shape)
        if f"{checksum:08x}" != self._checksums[name]:
            raise self.damaged(f"the values of {name} are not those that were written")

    def damaged(self, why: str) -> ForeignFileError:
        return ForeignFileError(
            f"{self.path} is not a readable covariance file: {why}. It is truncated, damaged or of another kind; "
            "delete it (or give another path) and collect it again"
        )
