"""The kinds of sources: each reader turns a `DataSpec` into a `Table` without decoding a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from corda_vlm.data.folders import read_folder, read_webdataset
from corda_vlm.data.libraries import read_hf, read_sklearn, read_torchvision
from corda_vlm.data.lines import read_csv, read_documents, read_json, read_jsonl
from corda_vlm.data.parquet import read_parquet
from corda_vlm.data.spec import DataSpec
from corda_vlm.data.table import Table

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
