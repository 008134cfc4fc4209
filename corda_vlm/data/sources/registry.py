"""The kinds of sources: each reader turns a `DataSpec` into a `Table` without decoding a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from corda_vlm.data.sources.folders import read_folder, read_webdataset
from corda_vlm.data.sources.libraries import read_hf, read_sklearn, read_torchvision
from corda_vlm.data.sources.lines import read_csv, read_documents, read_json, read_jsonl
from corda_vlm.data.sources.parquet import read_parquet
from corda_vlm.data.sources.table import Table
from corda_vlm.data.spec import DataSpec

Reader = Callable[[DataSpec, str | Path | None], Table]

READERS: dict[str, Reader] = {
    "sklearn": read_sklearn,
    "parquet": read_parquet,
    "folder": read_folder,
    "webdataset": read_webdataset,
    "hf": read_hf,
    "torchvision": read_torchvision,
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "tsv": read_csv,
    "text": read_documents,
}
