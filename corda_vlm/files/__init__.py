"""Files: shipped assets, paths, reads of plain files, and writes that leave either the old file or the new one in full."""

from __future__ import annotations

from corda_vlm.files.folder import HOLDER, LOCK, clear, entries, is_ours_for_now
from corda_vlm.files.json_file import as_json, read_json, write_json
from corda_vlm.files.paths import asset, check_path, home_path, resolve, shown
from corda_vlm.files.read import (
    file_digest,
    pieces,
    plain_file,
    read_bytes,
    read_text,
    text_digest,
    unreadable,
)
from corda_vlm.files.write import (
    atomic_folder,
    atomic_write,
    cannot_write,
    put_back,
    replaced_folder,
    sweep,
    write_text,
)

__all__ = [
    "HOLDER",
    "LOCK",
    "as_json",
    "asset",
    "atomic_folder",
    "atomic_write",
    "cannot_write",
    "check_path",
    "clear",
    "entries",
    "file_digest",
    "home_path",
    "is_ours_for_now",
    "pieces",
    "plain_file",
    "put_back",
    "read_bytes",
    "read_json",
    "read_text",
    "replaced_folder",
    "resolve",
    "shown",
    "sweep",
    "text_digest",
    "unreadable",
    "write_json",
    "write_text",
]
