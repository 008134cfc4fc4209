"""Tensors in safetensors files: written with a checksum of each, and read only if they are what was written.

Plain safetensors readers open the files: the checksums are one more entry of the header, which other tools drop when they
write the tensors again. A file without them (of another tool, or of an earlier version) is read all the same. NaN and Inf
are neither written nor read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.files import atomic_write, shown

CHECKSUMS = "corda_vlm.crc32"
"""The header's entry: JSON of tensor name -> CRC-32 of its name, dtype, shape and values; "" -> that of the other entries."""

# What opening, or a library that believes a header, raises for a file that is not what it says.
_DAMAGE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to `path` as safetensors, atomically, with checksums, readable by whom the umask lets.

    Args:
        tensors: on any device, with any strides; those that share memory are written once each.
        metadata: further entries of the header.

    Raises:
        CordaError: NaN or Inf among the values, or nothing can be written there.
    """
    if in_pieces := [name for name, tensor in tensors.items() if hasattr(tensor, "full_tensor")]:
        raise CordaError(
            f"{in_pieces[0]} is a distributed tensor, of which this process holds a piece, so it is not written to "
            f"{shown(path)}: gather the weights first, torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True, cpu_offload=True)), and write them on the first process"
        )
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if strange := not_finite(plain.items()):
        raise CordaError(
            f"{strange} holds NaN or Inf, which is not written to {shown(path)}: the training diverged, or the model was "
            "damaged. Train again with a lower learning rate, or load an intact model"
        )
    header = {"format": "pt", **(metadata or {})}

    def checked(crc32: dict[str, str]) -> dict[str, str]:
        checksums = {"": _header_checksum(header), **dict(sorted(crc32.items()))}
        return {**header, CHECKSUMS: json.dumps(checksums)}

    # Not safetensors' own writer, which puts the entries of the header in another order each time.
    pieces = {name: replace(Pieces.of(t), start=_begun(name, t)) for name, t in plain.items()}
    write_pieces(path, pieces, checked)


@dataclass(frozen=True)
class Pieces:
    """A tensor to be written.

    Attributes:
        make: gives its values in order, in pieces.
        start: the CRC-32 that its checksum goes on from.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Iterable[Tensor]]
    start: int = 0

    @classmethod
    def of(cls, tensor: Tensor) -> Pieces:
        return cls(tensor.dtype, tuple(tensor.shape), lambda: (tensor,))

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_pieces(
    path: str | Path,
    tensors: Mapping[str, Pieces],
    metadata: Callable[[dict[str, str]], Mapping[str, str]],
) -> None:
    """Write a safetensors file atomically, without any tensor having to exist as a whole.

    Args:
        metadata: CRC-32 of the values of each tensor, eight digits -> the other entries of the header, whose length
            may not depend on the digits.

    Raises:
        CordaError: a dtype that safetensors lack, or nothing can be written there.
    """
    if unknown := [name for name, tensor in tensors.items() if tensor.dtype not in _NAMES]:
        raise CordaError(
            f"{unknown[0]} is of {tensors[unknown[0]].dtype}, which a safetensors file cannot hold"
        )
    # the widest first, so that every tensor is aligned to its own size
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    crcs = {name: tensor.start for name, tensor in ordered.items()}

    def header() -> bytes:
        entries: dict[str, Any] = {
            "__metadata__": dict(metadata({name: f"{crc:08x}" for name, crc in crcs.items()}))
        }
        start = 0
        for name, tensor in ordered.items():
            end = start + tensor.nbytes
            offsets = (start, end)
            entries[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": tensor.shape,
                "data_offsets": offsets,
            }
            start = end
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    with atomic_write(path) as partial, partial.open("wb") as file:
        file.write(header())
        for name, tensor in ordered.items():
            for piece in tensor.make():
                data = as_bytes(piece)
                crcs[name] = zlib.crc32(data, crcs[name])
                file.write(data)
        file.seek(0)
        file.write(header())  # of the same length as before


_NAMES = {
    dtype: name
    for name, known in {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
        "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
        "U64": "uint64", "U32": "uint32", "U16": "uint16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    }.items()
    if (dtype := getattr(torch, known, None)) is not None
}  # fmt: skip


def add_checksums(path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Add checksums to a file that another library has just written, readable by whom the umask lets.

    Args:
        metadata: further entries of the header.

    Raises:
        CordaError: NaN or Inf among the values, no safetensors file, or nothing can be written there.
    """
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = {**(file.metadata() or {}), **(metadata or {})}
    # Mapped, not read into memory: the file is replaced by another one, not written to.
    save_tensors(
        path, tensors, {name: value for name, value in header.items() if name != CHECKSUMS}
    )


def add_checksums_in(folder: str | Path) -> None:
    """`add_checksums` to every safetensors file that lies in a folder."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        add_checksums(path)


def load_tensors(path: str | Path, what: str, remedy: str) -> dict[str, Tensor]:
    """Every tensor of a file, checked against its checksums.

    Args:
        what: the kind of contents, for messages: "adapter", "head of a classifier".
        remedy: what to do about a file that is of no use, for messages.

    Raises:
        ForeignFileError: no such file, truncated, damaged, or with NaN or Inf.
    """

    def read(file: Any) -> dict[str, Tensor]:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check(path, tensors, file.metadata() or {}, what, remedy)
        if strange := not_finite(tensors.items()):
            raise ForeignFileError(
                f"{shown(path)}: {strange} holds NaN or Inf, so that this {what} is of no use; {remedy}"
            )
        return tensors

    return _opened(path, what, remedy, read)


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of a file, each read and checked against its checksum when it is asked for.

    The file is held open, so that what was opened is what is read, also when another one takes its place on the disk.

    Args:
        path, what, remedy: as of `load_tensors`.

    Attributes:
        metadata: the header's other entries.

    Raises:
        ForeignFileError: no such file, truncated or damaged; when a tensor is asked for also if that is damaged, or has
            NaN or Inf.
    """

    def __init__(self, path: str | Path, what: str, remedy: str) -> None:
        self._path, self._what, self._remedy = path, what, remedy
        self._names = list(read_header(path, what, remedy)[0])
        self._file: Any = safe_open(str(path), "pt")
        self.metadata: dict[str, str] = dict(self._file.metadata() or {})
        self._noted: dict[str, str] = self._checked_header()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor = self._file.get_tensor(name)
        crc = f"{zlib.crc32(as_bytes(tensor), _begun(name, tensor)):08x}"
        if self._noted.get(name, crc) != crc or not_finite([(name, tensor)]):
            raise ForeignFileError(
                f"{shown(self._path)} is damaged: {shown(name)} is not what was written. This {self._what} is of no use; "
                f"{self._remedy}"
            )
        return tensor

    def _checked_header(self) -> dict[str, str]:
        """Name -> checksum, once the header's other entries are what was written."""
        if CHECKSUMS not in self.metadata:
            return {}
        try:
            noted = json.loads(self.metadata[CHECKSUMS])
        except ValueError:
            noted = None
        if (
            not isinstance(noted, dict)
            or {*noted} != {"", *self._names}
            or noted[""] != _header_checksum(self.metadata)
        ):
            raise ForeignFileError(
                f"{shown(self._path)} is damaged: its header is not what was written (checksum). This {self._what} is of no "
                f"use; {self._remedy}"
            )
        return noted


def check_tensors(path: str | Path, what: str, remedy: str) -> None:
    """Check a file that another library is about to read against its checksums; one that has none passes.

    Raises:
        ForeignFileError: as `load_tensors`, but for NaN and Inf.
    """

    def read(file: Any) -> None:
        metadata = file.metadata() or {}
        if CHECKSUMS in metadata:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            _check(path, tensors, metadata, what, remedy)

    _opened(path, what, remedy, read)


def read_header(
    path: str | Path, what: str, remedy: str
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shape of every tensor of a file by its name, and the header's other entries; no values are read.

    Raises:
        ForeignFileError: no such file, or truncated.
    """

    def read(file: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return shapes, dict(file.metadata() or {})

    return _opened(path, what, remedy, read)


def as_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor on the CPU, of any dtype, as they lie in memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()  # Any: numpy's stubs hide that arrays are buffers
    return memoryview(array)


def _opened(path: str | Path, what: str, remedy: str, read: Callable[[Any], Any]) -> Any:
    try:
        if not Path(path).is_file():
            raise ForeignFileError(
                f"no {what} at {shown(path)} (only safetensors are read); {remedy}"
            )
        with safe_open(str(path), "pt") as file:
            return read(file)
    except CordaError:
        raise
    except _DAMAGE as error:
        raise ForeignFileError(
            f"{shown(path)}: not readable as {what} ({shown(str(error))}): truncated, damaged or of another kind; {remedy}"
        ) from error


def _check(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    what: str,
    remedy: str,
) -> None:
    noted = metadata.get(CHECKSUMS)
    if noted is None:
        return
    wanted = json.loads(noted)
    actual = _checksums(tensors, metadata)
    if wanted != actual:
        names = {**wanted, **actual} if isinstance(wanted, dict) else {"": ""}
        name = next(
            name
            for name in names
            if not isinstance(wanted, dict) or wanted.get(name) != actual.get(name)
        )
        raise ForeignFileError(
            f"{shown(path)} is damaged: {shown(name) or 'its header'} is not what was written (checksum). This {what} is of no "
            f"use; {remedy}"
        )


def _checksums(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Of tensors that were read: tensor name -> its checksum; "" -> that of the header's other entries."""
    crcs = {name: zlib.crc32(as_bytes(t), _begun(name, t)) for name, t in sorted(tensors.items())}
    return {"": _header_checksum(metadata), **{name: f"{crc:08x}" for name, crc in crcs.items()}}


def _begun(name: str, tensor: Tensor) -> int:
    """The CRC-32 of what a tensor is called and is, before its values."""
    return zlib.crc32(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())


def _header_checksum(metadata: Mapping[str, str]) -> str:
    others = sorted((name, value) for name, value in metadata.items() if name != CHECKSUMS)
    return f"{zlib.crc32(json.dumps(others).encode()):08x}"


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or Inf."""
    for name, tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            # the eight-bit types know no isfinite
            wide = tensor if tensor.element_size() > 1 else tensor.float()
            if not torch.isfinite(wide).all():
                return name
    return None
