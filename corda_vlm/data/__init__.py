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
    from corda_vlm.data.chat import TEMPLATES, Chat
    from corda_vlm.data.conversations import ChatOptions, ConversationMaker, no_labels
    from corda_vlm.data.images import to_rgb
    from corda_vlm.data.instruction import InstructionData
    from corda_vlm.data.load import load_records
    from corda_vlm.data.readers import READERS
    from corda_vlm.data.records import ImageTextData, Record
    from corda_vlm.data.spec import DataSpec, parse_spec, with_root

_HOMES = {
    "READERS": "readers",
    "TEMPLATES": "chat",
    "BatchLoader": "batches",
    "BatchMaker": "batches",
    "Chat": "chat",
    "ChatOptions": "conversations",
    "ConversationMaker": "conversations",
    "DataSpec": "spec",
    "ImageTextData": "records",
    "InstructionData": "instruction",
    "Maker": "batches",
    "Record": "records",
    "load_records": "load",
    "losses": "batches",
    "make_batches": "batches",
    "make_maker": "batches",
    "no_labels": "conversations",
    "parse_spec": "spec",
    "to_rgb": "images",
    "with_root": "spec",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
