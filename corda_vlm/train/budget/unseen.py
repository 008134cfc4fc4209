"""A probe that is trained on tells of memory, not of what is kept."""

from __future__ import annotations

from corda_vlm.data import Records
from corda_vlm.errors import CordaError
from corda_vlm.train.terms.make import KnowledgeData


def check_unseen(
    probe: Records | None,
    knowledge: KnowledgeData | None,
    task: Records,
    drawn_from: Records | None = None,
) -> None:
    """Raise `CordaError` if a training looks at records of its probe, as far as that shows: both were selected of the same
    records, or the records that they were drawn from say the same.

    Args:
        probe: None for ready batches, of which it does not show.
        knowledge: whose records the terms of the loss look at.
        task: what is learned.
        drawn_from: all the records that the probe was drawn from; None where these are all.
    """
    if probe is None:
        return
    every = probe if drawn_from is None else drawn_from
    _refuse(probe, every, task, task, "the task")
    if knowledge is not None:
        _refuse(probe, every, knowledge.looked_at, knowledge.records, "the knowledge")


def _refuse(probe: Records, every: Records, seen: Records, all_seen: Records, what: str) -> None:
    shared = probe.shared_with(seen)
    if not shared and every is not all_seen:
        shared = len(seen) if every.fingerprint == all_seen.fingerprint else 0
    if shared:
        raise CordaError(
            f"the probe ({every.spec}) holds records of {what} ({all_seen.spec}): what is trained on does not tell what is kept. "
            "Give a probe of other records, or the knowledge alone, of which some are then held out"
        )
