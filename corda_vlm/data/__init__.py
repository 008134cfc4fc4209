"""Data: read records from many kinds of sources, and make batches of them.

`load_records` gives the records (PIL images, texts, labels, conversations), `make_batches` the tensors a model takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.data.batches import (
        BatchLoader,
        BatchMaker,
        Maker,
        losses,
        make_batches,
        make_maker,
    )
    from corda_vlm.data.load import load_records
    from corda_vlm.data.records import ImageTextData, Record
    from corda_vlm.data.sources.images import to_rgb
    from corda_vlm.data.sources.registry import READERS
    from corda_vlm.data.spec import DataSpec, parse_spec, with_root
    from corda_vlm.data.text.chat import TEMPLATES, Chat
    from corda_vlm.data.text.conversations import ChatOptions, ConversationMaker, no_labels
    from corda_vlm.data.text.instruction import InstructionData

_HOMES = {
    "READERS": "sources.registry",
    "TEMPLATES": "text.chat",
    "BatchLoader": "batches",
    "BatchMaker": "batches",
    "Chat": "text.chat",
    "ChatOptions": "text.conversations",
    "ConversationMaker": "text.conversations",
    "DataSpec": "spec",
    "ImageTextData": "records",
    "InstructionData": "text.instruction",
    "Maker": "batches",
    "Record": "records",
    "load_records": "load",
    "losses": "batches",
    "make_batches": "batches",
    "make_maker": "batches",
    "no_labels": "text.conversations",
    "parse_spec": "spec",
    "to_rgb": "sources.images",
    "with_root": "spec",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
