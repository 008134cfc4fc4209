"""How a user says which data: one frozen record, from a string or from a mapping of a YAML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from corda_vlm.errors import CordaError, DataError, UnknownNameError
from corda_vlm.files import asset, resolve
from corda_vlm.options import check_options

KINDS = ("sklearn", "parquet", "folder", "webdataset", "hf", "torchvision", "jsonl", "json", "text")
"""The kinds of sources; `corda_vlm.data.readers.READERS` has a reader for each."""

FORMATS = ("llava", "sharegpt", "chat", "qa", "alpaca", "prompt_completion", "text")
"""What rows mean for a model that generates text; `corda_vlm.data.formats.FORMATS` has a function for each."""


@dataclass(frozen=True)
class DataSpec:
    """Which records to read, and what in them is picture, text and label.

    Attributes:
        source: `"kind:where"`: "sklearn:digits", "parquet:PATH_OR_GLOB", "folder:PATH" (one folder a class),
            "webdataset:PATTERN" (tar shards), "hf:NAME_OR_FOLDER", "torchvision:CIFAR10", "jsonl:PATH",
            "json:PATH" (a list of objects), "text:PATTERN" (one document a file).
            Paths may be relative to the file that names them or to what ships with the package, and may hold
            `~` and environment variables.
        split: the part to read: the source's own split, a value of a column named `split`, or a key of `splits`.
        image, text, label: columns; "auto" finds the usual names, None leaves the thing out (pictures of "llava" and
            "chat" with the `<image>` that stand for them in texts). `text` may be a format string over the columns,
            e.g. "a photo of a {class_name}".
        where: only records whose columns have these values: {column: value or list of values}.
        classes: class names in index order, or a file of them (JSON list, or one a line). Without it, string
            labels are numbered in sorted order.
        names: what prompts should say for a class: {class: name}, or a list in index order, or such a file.
        splits: cut the records into parts of their own, e.g. {"train": 0.8, "test": 0.2} (shares) or
            {"train": 1000, "test": 500} (numbers): disjoint, stratified by label, the same for every seed.
        limit: at most so many records, drawn at random; a smaller limit draws a subset of a larger one's.
        per_class: at most so many records of each class, drawn at random.
        seed: of `limit` and `per_class`.
        max_bad_share: the share of undecodable images that is skipped and counted; beyond it, an error.
        config: the configuration of a Hugging Face data set.
        root: the folder of a torchvision data set; of records with paths of pictures, the folder that these are
            relative to (else that of the file).
        download: let torchvision fetch what is not in `root`.
        format: what a row means for a model that generates text: "llava" (`conversations` with `<image>`), "sharegpt"
            (`conversations`), "chat" (`messages` of role and content), "qa" (question and answers), "alpaca"
            (`instruction`, `input`, `output`, perhaps `history`), "prompt_completion" (TRL's, texts or messages), "text"
            (a document). None: images with texts or labels.
        system: the column with the system text of a conversation, or a sentence for all; "auto" takes `system` or
            `system_prompt` where there is one, None none.
        question, answer: with "qa" (and "alpaca", for `instruction` with its `input`, and `output`): columns, or sentences, which may be format strings over the columns, e.g.
            "What is this?" about labelled images; "auto" finds the usual names. Of a column of class numbers the
            class's name is the answer.
        choices: with "qa": the column that lists a question's choices, or columns of one choice each, of which empty ones
            are none; "auto" finds the usual names. A question that writes them, e.g. "{question}\\n{choices}\\nAnswer
            with the letter.", gets them as "A. …" on lines of their own, and its answer is the letter.
        expand: with "qa": the column in which one row holds several questions, as a list or as JSON; "auto" takes
            `qa_json` where there is one, None none.
        rows: of each JSON file only the records from `start` up to `stop`, in its own order: [start, stop], as numbers or
            as shares of the file, e.g. [0, 0.5].
        chunk: with "text": a record is so many words of a document, and its last one fewer; None: all of it.
    """

    source: str
    split: str | None = None
    image: str | None = "auto"
    text: str | None = "auto"
    label: str | None = "auto"
    where: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[Any] | str | None = None
    names: Mapping[Any, Any] | Sequence[Any] | str | None = None
    splits: Mapping[str, float | int] | None = None
    limit: int | None = None
    per_class: int | None = None
    seed: int = 0
    max_bad_share: float = 0.01
    config: str | None = None
    root: str | None = None
    download: bool = False
    format: str | None = None
    system: str | None = "auto"
    question: str = "auto"
    answer: str | None = "auto"
    choices: str | Sequence[str] = "auto"
    expand: str | None = "auto"
    rows: Sequence[float] | None = None
    chunk: int | None = None

    @property
    def kind(self) -> str:
        return self.source.partition(":")[0]

    @property
    def location(self) -> str:
        return self.source.partition(":")[2]

    def __str__(self) -> str:
        return self.source + (f" [{self.split}]" if self.split else "")


def parse_spec(spec: str | Mapping[str, Any] | DataSpec) -> DataSpec:
    """A `DataSpec` from what a user wrote.

    Raises:
        UnknownNameError: an unknown kind of source or an unknown option.
        DataError: no source, or numbers out of range.
    """
    if isinstance(spec, DataSpec):
        found = spec
    else:
        options: dict[str, Any] = {"source": spec} if isinstance(spec, str) else dict(spec)
        known = {f.name for f in fields(DataSpec)}
        for option in options:
            if option not in known:
                raise UnknownNameError("data option", option, known)
        if "source" not in options:
            raise DataError(
                f"data without a source: {options}; give e.g. source: parquet:images.parquet"
            )
        found = DataSpec(**{**options, "source": str(options["source"])})
    check_options(found)
    if found.kind not in KINDS or not found.location:
        raise UnknownNameError(
            "data source",
            found.source,
            KINDS,
            "A source is written kind:where, e.g. folder:photos.",
        )
    if found.format is not None and found.format not in FORMATS:
        raise UnknownNameError("data format", found.format, FORMATS)
    for name in ("limit", "per_class", "chunk"):
        value = getattr(found, name)
        if value is not None and value < 1:
            raise DataError(f"{found}: {name} is {value}; it must be at least 1")
    if found.rows is not None:
        _check_rows(found)
    if not 0 <= found.max_bad_share < 1:
        raise DataError(
            f"{found}: max_bad_share is {found.max_bad_share}; it is a share from 0 to below 1"
        )
    return found


def _check_rows(spec: DataSpec) -> None:
    if spec.kind not in ("jsonl", "json"):
        raise DataError(f"{spec}: rows is for jsonl and json; give splits, or where, a filter")
    rows = spec.rows
    if not isinstance(rows, Sequence) or len(rows) != 2 or not 0 <= rows[0] < rows[1]:
        raise DataError(
            f"{spec}: rows is {rows!r}; it is [start, stop], e.g. [0, 0.5] or [1000, 1319]"
        )
    if list(rows) == [0, 1] and not any(isinstance(at, float) for at in rows):
        raise DataError(
            f"{spec}: rows is {rows!r}, which may be the first record or all; write [0, 1.0] for all, limit: 1 for one"
        )
    if any(isinstance(at, float) for at in rows) and rows[1] > 1:
        raise DataError(f"{spec}: rows is {rows!r}; shares of a file are from 0 to 1")


def with_root(spec: str | Mapping[str, Any], root: str | Path) -> dict[str, Any]:
    """The options of a spec, with `root` for `{data_root}` in its strings."""
    options: Mapping[str, Any] = {"source": spec} if isinstance(spec, str) else spec
    return {
        key: value.replace("{data_root}", str(root)) if isinstance(value, str) else value
        for key, value in options.items()
    }


def find_paths(pattern: str | Path, beside: str | Path | None = None) -> list[Path]:
    """The files or folders that `pattern` names: as given, else beside the file that names it, else shipped.

    `{000..012}` and `{a,b}` are expanded as webdataset does, then shell wildcards. Sorted, no duplicates.

    Raises:
        DataError: nothing matches; the message says where was looked.
    """
    written = os.path.expandvars(Path(pattern).expanduser())
    if "$" in written:
        raise DataError(f"{pattern}: an environment variable in this path is not set ({written})")
    return sorted({path for one in _braces(written) for path in _matches(one, beside)})


def find_one(pattern: str | Path, beside: str | Path | None = None) -> Path:
    """The only path that `pattern` names. Raises `DataError` for none or several."""
    paths = find_paths(pattern, beside)
    if len(paths) != 1:
        raise DataError(
            f"{pattern} names {len(paths)} paths, {paths[0]} and others; it must name one"
        )
    return paths[0]


def _matches(pattern: str, beside: str | Path | None) -> list[Path]:
    """What one pattern without braces names, in the order of `corda_vlm.files.resolve`."""
    parts = Path(pattern).parts
    wild = next(
        (i for i, part in enumerate(parts) if any(mark in part for mark in "*?[")), len(parts)
    )
    try:
        if wild == len(parts):
            return [resolve(pattern, beside)]
        bases = [Path(), *([Path(beside).parent] if beside is not None else []), asset(".")]
        for base in bases:
            if found := list((base / Path(*parts[:wild])).glob(str(Path(*parts[wild:])))):
                return found
    except CordaError as error:
        raise DataError(f"no such data: {error}") from error
    looked = ", ".join(str(base / pattern) for base in bases)
    raise DataError(f"no data matches {pattern!r}; looked at: {looked}")


def _braces(pattern: str) -> list[str]:
    """`a{0..2}b` -> a0b a1b a2b (leading zeros kept); `a{x,y}` -> ax ay."""
    before, opening, rest = pattern.partition("{")
    inside, closing, after = rest.partition("}")
    if not opening or not closing:
        return [pattern]
    first, dots, last = inside.partition("..")
    if dots and first.isdigit() and last.isdigit():
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",")
    return [before + choice + tail for tail in _braces(after) for choice in choices]
