"""Terms of the loss: what a training minimizes besides the loss of its task, each in a file of its own.

distill = distillation(model, batches)    # after the adapter is attached, before the first step
loss = task_loss + 30 * distill(step)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.train.terms.distill import distillation
    from corda_vlm.train.terms.ewc import consolidation
    from corda_vlm.train.terms.kl_new import NewTaskDivergence
    from corda_vlm.train.terms.make import KnowledgeData, TaskData, make_terms
    from corda_vlm.train.terms.options import TermOptions
    from corda_vlm.train.terms.replay import replayed
    from corda_vlm.train.terms.start_decay import StartDecay, StartPull
    from corda_vlm.train.terms.term import BatchPenalty, DataPenalty, Penalty, Term

_HOMES = {
    "BatchPenalty": "term",
    "DataPenalty": "term",
    "KnowledgeData": "make",
    "NewTaskDivergence": "kl_new",
    "Penalty": "term",
    "StartDecay": "start_decay",
    "StartPull": "start_decay",
    "TaskData": "make",
    "Term": "term",
    "TermOptions": "options",
    "consolidation": "ewc",
    "distillation": "distill",
    "make_terms": "make",
    "replayed": "replay",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
