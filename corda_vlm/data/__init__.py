"""Data: read records from many kinds of sources, and make batches of them.

`load_records` gives the records (PIL images, texts, labels, conversations), `make_batches` the tensors a model takes.
"""

from corda_vlm.data.batches import BatchLoader, BatchMaker, Maker, losses, make_batches, make_maker
from corda_vlm.data.chat import TEMPLATES, Chat
from corda_vlm.data.conversations import ChatOptions, ConversationMaker, no_labels
from corda_vlm.data.images import to_rgb
from corda_vlm.data.instruction import InstructionData
from corda_vlm.data.load import load_records
from corda_vlm.data.readers import READERS
from corda_vlm.data.records import ImageTextData, Record
from corda_vlm.data.spec import DataSpec, parse_spec, with_root

__all__ = [
    "READERS",
    "TEMPLATES",
    "BatchLoader",
    "BatchMaker",
    "Chat",
    "ChatOptions",
    "ConversationMaker",
    "DataSpec",
    "ImageTextData",
    "InstructionData",
    "Maker",
    "Record",
    "load_records",
    "losses",
    "make_batches",
    "make_maker",
    "no_labels",
    "parse_spec",
    "to_rgb",
    "with_root",
]
