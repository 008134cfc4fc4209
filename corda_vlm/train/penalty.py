"""Terms of the loss that look at the weights and at no batch, for any Trainer of transformers or TRL."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from corda_vlm.anchor import Anchor, anchor_penalty
from corda_vlm.covariance import CovarianceStore
from corda_vlm.distributed import alike_everywhere, made_everywhere
from corda_vlm.errors import CordaError, NotFiniteError
from corda_vlm.sites import Site

Penalty = Callable[[], Tensor]
"""() -> scalar, differentiable."""


@dataclass
class _Term:
    """One penalty, and its unweighted values since they were last logged."""

    penalty: Penalty
    weight: float
    every: int
    seen: list[Tensor] = field(default_factory=list)


class PenaltyMixin:
    """Adds penalties to what a `transformers.Trainer` minimizes, once for each optimizer step.

        class Mine(PenaltyMixin, Trainer): pass

    A penalty has a backward pass of its own, before that of the step's last batch. So it does not matter how the Trainer
    computes its loss or how many batches it accumulates, and losses, those of evaluations too, are logged without it.
    Of several processes each adds its gradient before DistributedDataParallel takes the mean over all of them: they
    stay alike to the bit, also on machines that round differently. FSDP and DeepSpeed are refused.
    """

    def penalize(self, name: str, penalty: Penalty, weight: float = 1.0, *, every: int = 1) -> None:
        """From now on, add `weight * penalty()`; `name` is its key in the logs, where it is not weighted.

        With weight 0 it is only logged, without gradients, and computed no more often than that.

        Args:
            every: only at every so many steps, with so many times the weight: the sum over steps is the same. Adam
                takes rare large gradients for noise and answers them with somewhat smaller steps: keep it below 5.

        Raises:
            CordaError: a weight that is negative or not finite, `every` below 1, or a training that cuts weights into
                pieces (FSDP, DeepSpeed).
        """
        check_weight(weight, name)
        _refuse_pieces(self, name)
        if every < 1:
            raise CordaError(f"{name!r}: every is {every}; it counts steps, from 1 on")
        self._terms()[name] = _Term(penalty, weight, every)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            trains = getattr(self.optimizer, "train", None)  # type: ignore[attr-defined]
            if callable(trains):  # schedule-free optimizers keep other weights for evaluations
                trains()
            for name, term in self._terms().items():
                if term.weight > 0 and self.state.global_step % term.every == 0:  # type: ignore[attr-defined]
                    self._minimize(name, term)
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **{name: _mean(term) for name, term in self._terms().items()}}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _minimize(self, name: str, term: _Term) -> None:
        weight = term.every * term.weight
        # not `backward()` of its own: in float16 the accelerator scales gradients
        through = self.accelerator.backward  # type: ignore[attr-defined]
        if isinstance(term.penalty, Anchor):
            value = term.penalty.backward(weight, through)
        else:
            value = term.penalty()
            through(weight * value)
        if not torch.isfinite(value):
            raise NotFiniteError(
                f"{name!r} is {float(value.detach())} at step {self.state.global_step + 1}: the weights have grown "  # type: ignore[attr-defined]
                "beyond all measure; lower the learning rate"
            )
        term.seen.append(value.detach().float())

    def penalties_seen(self) -> dict[str, list[float]]:
        """The unweighted values since they were last logged, for a checkpoint."""
        return {name: [float(v) for v in term.seen] for name, term in self._terms().items()}

    def see_penalties(self, values: Mapping[str, list[Tensor]]) -> None:
        """Take up the values that `penalties_seen` gave before a training was interrupted."""
        for name, term in self._terms().items():
            term.seen = list(values.get(name, ()))

    def _terms(self) -> dict[str, _Term]:
        # made on demand, as a mixin that has no say in how its Trainer is constructed
        return self.__dict__.setdefault("_penalties", {})


class AnchorMixin(PenaltyMixin):
    """`anchor_to(store, weight)` for any Trainer of transformers or TRL: hold down what it would forget.

    class Trainer(AnchorMixin, SFTTrainer): pass
    trainer = Trainer(model=..., ...)
    trainer.anchor_to(store, weight=30)

    Logs get "anchor": the mean relative change of the layers' outputs on the knowledge.
    """

    def anchor_to(
        self,
        store: CovarianceStore | Anchor,
        weight: float,
        *,
        every: int = 1,
        sites: Iterable[Site | str] | None = None,
        energy: float | None = None,
    ) -> Anchor:
        """From now on, add `weight` times the anchor; to be called before `train()`.

        Args:
            store: covariances of the knowledge, collected from the model before it was adapted; or an anchor that
                was built already.
            weight: 0 only logs it, as a forecast of forgetting.
            every: as in `penalize`; worth it for full fine-tuning on a CPU, where the anchor takes a tenth of a step.
            sites, energy: as in `anchor_penalty`, which also says what is raised.

        Raises:
            CordaError: as `penalize`; or processes of a distributed training whose matrices differ, on all of them.
        """
        check_weight(weight, "anchor")
        _refuse_pieces(self, "anchor")

        def made() -> Anchor:
            if isinstance(store, Anchor):
                return store
            return anchor_penalty(self.model, store, sites=sites, energy=energy)  # type: ignore[attr-defined]

        anchor = made_everywhere("the anchor", made)
        alike_everywhere(
            "the matrices of the anchor",
            anchor.sketch(),
            "Each would hold to another knowledge. Calibrate once, in one process (collect_covariance(..., path=...) or "
            "`corda-vlm calibrate`), and let every process load that file: CovarianceStore.load(path)",
        )
        self.penalize("anchor", anchor, weight, every=every)
        return anchor


def _refuse_pieces(trainer: Any, name: str) -> None:
    """Raise `CordaError` where no process has the whole weights that a penalty looks at."""
    args, accelerator = trainer.args, trainer.accelerator
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    model = type(trainer.model).__name__
    pieces = {
        "FSDP": bool(args.fsdp) or trainer.is_fsdp_enabled or kind in ("FSDP", "XLA_FSDP"),
        "DeepSpeed": bool(args.deepspeed) or trainer.is_deepspeed_enabled or kind == "DEEPSPEED",
        "Megatron": kind == "MEGATRON_LM",
        f"{model}, a wrapped model,": model in _WRAPPERS,
        "a model of distributed tensors": any(
            hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters()
        ),
    }
    if found := [what for what, there in pieces.items() if there]:
        raise CordaError(
            f"{name!r} looks at whole weights, of which {found[0]} leaves each process a piece; train with one process, or "
            "with plain DistributedDataParallel"
        )


_WRAPPERS = ("FullyShardedDataParallel", "XlaFullyShardedDataParallel", "DeepSpeedEngine")


def check_weight(weight: float, name: str) -> None:
    """Raise `CordaError` unless `weight` is a number from zero on."""
    if not (math.isfinite(weight) and weight >= 0):
        raise CordaError(
            f"the weight of {name!r} is {weight}; it must be a number from 0 (only logged) on"
        )


def _mean(term: _Term) -> float:
    """The mean since this was last asked; of a penalty that is only logged, the value now."""
    if term.seen:
        value = float(torch.stack(term.seen).mean())
        term.seen.clear()
        return value
    with torch.no_grad():
        return float(term.penalty())
