"""Terms of the loss: what a training minimizes besides the loss of its task, each in a file of its own.

distill = distillation(model, batches)    # after the adapter is attached, before the first step
loss = task_loss + 30 * distill(step)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.train.terms.distill import distillation
    from corda_vlm.train.terms.make import KnowledgeData, make_terms
    from corda_vlm.train.terms.options import TermOptions
    from corda_vlm.train.terms.replay import replayed
    from corda_vlm.train.terms.term import DataPenalty, Penalty, Term

_HOMES = {
    "DataPenalty": "term",
    "KnowledgeData": "make",
    "Penalty": "term",
    "Term": "term",
    "TermOptions": "options",
    "distillation": "distill",
    "make_terms": "make",
    "replayed": "replay",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
