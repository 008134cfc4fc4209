"""Data: read records from many kinds of sources, and make batches of them.

`load_records` gives the records (PIL images, texts, labels), `make_batches` the tensors a model takes.
"""

from corda_vlm.data.batches import BatchLoader, BatchMaker, make_batches
from corda_vlm.data.images import to_rgb
from corda_vlm.data.readers import READERS
from corda_vlm.data.records import ImageTextData, Record, load_records
from corda_vlm.data.spec import DataSpec, parse_spec, with_root

__all__ = [
    "READERS",
    "BatchLoader",
    "BatchMaker",
    "DataSpec",
    "ImageTextData",
    "Record",
    "load_records",
    "make_batches",
    "parse_spec",
    "to_rgb",
    "with_root",
]
