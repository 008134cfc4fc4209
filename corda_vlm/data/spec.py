"""How a user says which data: one frozen record, from a string or from a mapping of a YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from corda_vlm.data.sources.registry import SOURCES
from corda_vlm.data.text.registry import FORMATS
from corda_vlm.errors import CordaError, DataError, UnknownNameError, brief
from corda_vlm.options import (
    Count,
    Items,
    Seed,
    Share,
    Text,
    check_options,
    option_names,
    read_options,
)

Name = str | int | float
"""Of a class. Not true or false, which YAML makes of a yes or no without quotes."""


@dataclass(frozen=True)
class DataSpec:
    """Which records to read, and what in them is picture, text and label.

    Attributes:
        source: `"kind:where"`: "sklearn:digits", "parquet:PATH_OR_GLOB", "folder:PATH" (one folder a class),
            "webdataset:PATTERN" (tar shards), "hf:NAME_OR_FOLDER", "torchvision:CIFAR10", "jsonl:PATH",
            "json:PATH" (a list of objects), "csv:PATH" and "tsv:PATH" (a line of column names, then one record a line),
            "text:PATTERN" (one document a file).
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
            (`instruction`, `input`, `output`, perhaps `history`), "prompt_completion" (TRL's, texts or messages), "preference"
            (`chosen` and `rejected`, of which the chosen is the answer), "text"
            (a document). None: images with texts or labels.
        system: the column with the system text of a conversation, or a sentence for all; "auto" takes `system` or
            `system_prompt` where there is one, None none.
        question, answer: with "qa": columns, or sentences, which may be format strings over the columns, e.g.
            "What is this?" about labeled images; "auto" finds the usual names. Of a column of class numbers the
            class's name is the answer. With "alpaca" in place of `instruction` with its `input`, and of `output`.
            With "preference" question is in place of `prompt`.
        choices: with "qa": the column that lists a question's choices, or columns of one choice each, of which empty ones
            are none; "auto" finds the usual names. A question that writes them, e.g. "{question}\\n{choices}\\nAnswer
            with the letter.", gets them as "A. …" on lines of their own, and its answer is the letter.
        expand: with "qa": the column in which one row holds several questions, as a list or as JSON; "auto" takes
            `qa_json` where there is one, None none.
        rows: of each JSON file only the records from `start` up to `stop`, in its own order: [start, stop], as numbers or
            as shares of the file, e.g. [0, 0.5]. Also of CSV.
        separator: what stands between the columns of "csv", one character; None: a comma. Of "tsv" it is a tab.
        chunk: with "text": a record is so many words of a document, and its last one fewer; None: all of it.
    """

    source: Text
    split: str | None = None
    image: str | None = "auto"
    text: str | None = "auto"
    label: str | None = "auto"
    where: Mapping[str, Any] = field(default_factory=dict)
    classes: Annotated[Sequence[Name], Items(least=1, distinct=True)] | str | None = None
    names: Mapping[Any, Name] | Sequence[Name] | str | None = None
    splits: Mapping[str, int | float] | None = None
    limit: Count | None = None
    per_class: Count | None = None
    seed: Seed = 0
    max_bad_share: Share = 0.01
    config: str | None = None
    root: str | None = None
    download: bool = False
    format: str | None = None
    system: str | None = "auto"
    question: str = "auto"
    answer: str | None = "auto"
    choices: str | Annotated[Sequence[str], Items(least=1, distinct=True)] = "auto"
    expand: str | None = "auto"
    rows: Sequence[int | float] | None = None
    chunk: Count | None = None
    separator: str | None = None

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
        check_options(spec)
        parsed = spec
    else:
        parsed = _read(spec)
    for check in (_check_names, _check_taken, _check_rows, _check_splits, _check_separator):
        check(parsed)
    return parsed


def names_source(text: str) -> bool:
    """Does a text name data by its kind, e.g. "folder:photos"? A path or a hub's id does not."""
    kind, colon, _ = text.partition(":")
    return bool(colon) and kind in SOURCES


def _read(spec: str | Mapping[str, Any]) -> DataSpec:
    """A spec of what a user wrote, each option of its type."""
    if not isinstance(spec, (str, Mapping)):
        raise DataError(
            f"{brief(spec)} names no data; give text such as parquet:images.parquet, or a mapping with a source"
        )
    options: Mapping[str, Any] = {"source": spec} if isinstance(spec, str) else spec
    known = option_names(DataSpec)
    for option in options:
        if option not in known:
            raise UnknownNameError("data option", option, known)
    if "source" not in options:
        raise DataError(
            f"data without a source: {brief(dict(options))}; give e.g. source: parquet:images.parquet"
        )
    try:
        return read_options(DataSpec, options, str(options["source"])[:200])
    except UnknownNameError:
        raise
    except CordaError as error:
        raise DataError(str(error)) from error


def _check_names(spec: DataSpec) -> None:
    if spec.kind not in SOURCES or not spec.location:
        raise UnknownNameError(
            "data source",
            spec.source,
            SOURCES,
            "A source is written kind:where, e.g. folder:photos.",
        )
    if spec.format is not None and spec.format not in FORMATS:
        raise UnknownNameError("data format", spec.format, FORMATS)


_REFUSED = {
    "root": "root is for records with paths of pictures, and for torchvision",
    "rows": "rows is for {takers}; give splits, or where, a filter",
    "separator": "separator is {value!r}; it is for {takers}",
}
"""What is said of the options of `corda_vlm.data.sources.registry.SOME_TAKE` to a source that does not take them."""


def _check_taken(spec: DataSpec) -> None:
    for option, message in _REFUSED.items():
        value = getattr(spec, option)
        if value is not None and option not in SOURCES[spec.kind].takes:
            *most, last = [kind for kind, source in SOURCES.items() if option in source.takes]
            takers = f"{', '.join(most)} and {last}" if most else last
            raise DataError(f"{spec}: {message.format(takers=takers, value=value)}")


def _check_rows(spec: DataSpec) -> None:
    rows = spec.rows
    if rows is None:
        return
    if len(rows) != 2 or not 0 <= rows[0] < rows[1]:
        raise DataError(
            f"{spec}: rows is {rows!r}; it is [start, stop], e.g. [0, 0.5] or [1000, 1319]"
        )
    if list(rows) == [0, 1] and not any(isinstance(at, float) for at in rows):
        raise DataError(
            f"{spec}: rows is {rows!r}, which may be the first record or all; write [0, 1.0] for all, limit: 1 for one"
        )
    if any(isinstance(at, float) for at in rows) and rows[1] > 1:
        raise DataError(f"{spec}: rows is {rows!r}; shares of a file are from 0 to 1")


def _check_splits(spec: DataSpec) -> None:
    splits = spec.splits
    if splits is not None and (not splits or min(splits.values()) <= 0):
        raise DataError(
            f"{spec}: splits is {brief(dict(splits))}; it names parts with shares or numbers above 0"
        )


def _check_separator(spec: DataSpec) -> None:
    separator = spec.separator
    if separator is not None and (len(separator) != 1 or separator in '\r\n"\0'):
        raise DataError(
            f"{spec}: separator is {separator!r}; it is one character such as ';' or '\\t'"
        )


def with_root(spec: str | Mapping[str, Any], root: str | Path) -> dict[str, Any]:
    """The options of a spec, with `root` for `{data_root}` in its strings."""
    options: Mapping[str, Any] = {"source": spec} if isinstance(spec, str) else spec
    return {
        key: value.replace("{data_root}", str(root)) if isinstance(value, str) else value
        for key, value in options.items()
    }
