"""Data: read records from many kinds of sources, and make batches of them.

`load_records` gives the records (PIL images, texts, labels, conversations), `make_batches` the tensors a model takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.data.batches import BatchLoader, make_batches
    from corda_vlm.data.builders import BatchBuilder, batch_builder, data_warnings
    from corda_vlm.data.image_text import ImageTextBatches
    from corda_vlm.data.load import load_records
    from corda_vlm.data.records import ImageTextData, Record, Records
    from corda_vlm.data.sources.images import to_rgb
    from corda_vlm.data.sources.registry import SOURCES, SourceKind, register_source
    from corda_vlm.data.sources.table import Table
    from corda_vlm.data.spec import DataSpec, parse_spec, with_root
    from corda_vlm.data.text.chat import TEMPLATES, Chat
    from corda_vlm.data.text.conversations import ChatOptions, ConversationBatches, no_labels
    from corda_vlm.data.text.instruction import InstructionData

_HOMES = {
    "SOURCES": "sources.registry",
    "SourceKind": "sources.registry",
    "TEMPLATES": "text.chat",
    "BatchBuilder": "builders",
    "BatchLoader": "batches",
    "Chat": "text.chat",
    "ChatOptions": "text.conversations",
    "ConversationBatches": "text.conversations",
    "DataSpec": "spec",
    "ImageTextBatches": "image_text",
    "ImageTextData": "records",
    "InstructionData": "text.instruction",
    "Record": "records",
    "Records": "records",
    "Table": "sources.table",
    "batch_builder": "builders",
    "data_warnings": "builders",
    "load_records": "load",
    "make_batches": "batches",
    "no_labels": "text.conversations",
    "parse_spec": "spec",
    "register_source": "sources.registry",
    "to_rgb": "sources.images",
    "with_root": "spec",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
