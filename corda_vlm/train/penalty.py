"""Terms of the loss beside that of the task's batches, for any Trainer of transformers or TRL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from corda_vlm.anchor import Anchor, anchor_penalty
from corda_vlm.anchor.options import AnchorMetric, OutputSide
from corda_vlm.covariance import CovarianceStore
from corda_vlm.distributed.agree import alike_everywhere, made_everywhere, same_everywhere
from corda_vlm.distributed.pieces import is_in_pieces
from corda_vlm.errors import CordaError, NotFiniteError, UnknownNameError
from corda_vlm.sites import Site
from corda_vlm.train.budget.budget import Budget
from corda_vlm.train.budget.spent import Spent
from corda_vlm.train.budget.steering import Steering, Stopping
from corda_vlm.train.next_token import NextTokenObjective
from corda_vlm.train.objectives import Objective
from corda_vlm.train.terms.distill import distillation
from corda_vlm.train.terms.kl_new import NewTaskDivergence
from corda_vlm.train.terms.knowledge import Batches, Knowledge
from corda_vlm.train.terms.options import DistillLoss, TermOptions
from corda_vlm.train.terms.start_decay import StartPull
from corda_vlm.train.terms.term import BatchPenalty, DataPenalty, Penalty, Term, check_weight

logger = logging.getLogger(__name__)


@dataclass
class _Noted:
    """One term, its weight now, and its unweighted values since they were last logged."""

    term: Term
    weight: float
    seen: list[Tensor] = field(default_factory=list)


class PenaltyMixin:
    """Adds terms to what a `transformers.Trainer` minimizes, once for each optimizer step.

        class Mine(PenaltyMixin, Trainer): pass

    A penalty has a backward pass of its own, before that of the step's last batch. So it does not matter how the Trainer
    computes its loss or how many batches it accumulates, and losses, those of evaluations too, are logged without it.
    Of several processes each adds its gradient before DistributedDataParallel takes the mean over all of them: they
    stay alike to the bit, also on machines that round differently. FSDP2 leaves each process a piece of the weights: the anchor
    gathers what it looks at, A and B, and other terms are refused; so are FSDP1 and DeepSpeed.
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
        self.add_term(Term(name, penalty, weight, every))

    def add_term(self, term: Term) -> None:
        """From now on, add a term to the loss; otherwise as `penalize`.

        The batch that a term of records looks at is a function of the step: a training that is gone on with is the same.

        Raises:
            CordaError: as `penalize`; or processes of a distributed training whose terms differ, on all of them.
        """
        _refuse_pieces(self, term.name, gathers=isinstance(term.penalty, Anchor))
        decides: dict[str, Any] = term.plan
        if isinstance(term.penalty, Anchor):  # of which the matrices are compared
            decides = {"weight": term.weight, "every": term.every}
        same_everywhere(
            "a term of the loss",
            {"its name": term.name, "its kind": type(term.penalty).__name__, **decides},
            "Each would hold to something else. Give every process the same terms in the same order, with the same weights and records",
        )
        if isinstance(term.penalty, Anchor):
            alike_everywhere(
                "the matrices of the anchor",
                term.penalty.sketch(),
                "Each would hold to another knowledge. Calibrate once, in one process (collect_covariance(..., path=...) "
                "or `corda-vlm calibrate`), and let every process load that file: CovarianceStore.load(path)",
            )
        if isinstance(term.penalty, StartPull) and term.weight > 0:
            self.add_callback(_Pulling(term.penalty, term.weight))  # type: ignore[attr-defined]
        self._noted()[term.name] = _Noted(term, term.weight)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if any(isinstance(term.penalty, BatchPenalty) for term in self.terms):
            inputs = args[1] if len(args) > 1 else kwargs["inputs"]
            self._batch = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            trains = getattr(self.optimizer, "train", None)  # type: ignore[attr-defined]
            if callable(trains):  # schedule-free optimizers keep other weights for evaluations
                trains()
            for noted in self._noted().values():
                term = noted.term
                if _by_gradient(term) and self.state.global_step % term.every == 0:  # type: ignore[attr-defined]
                    self._minimize(noted)
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **{name: self._mean(noted) for name, noted in self._noted().items()}}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def forward_context(self) -> AbstractContextManager[Any]:
        """In which a term of records runs the model: with the precision of the training."""
        return self.compute_loss_context_manager()  # type: ignore[attr-defined]

    def _minimize(self, noted: _Noted) -> None:
        term = noted.term
        weight = term.every * noted.weight
        # not `backward()` of its own: in float16 the accelerator scales gradients
        through = self.accelerator.backward  # type: ignore[attr-defined]
        if isinstance(term.penalty, Anchor):
            value = term.penalty.backward(weight, through)
        else:
            value = self._value(term)
            through(weight * value)
        if not torch.isfinite(value):
            raise NotFiniteError(
                f"{term.name!r} is {float(value.detach())} at step {self.state.global_step + 1}: the weights have grown "  # type: ignore[attr-defined]
                "beyond all measure; lower the learning rate"
            )
        noted.seen.append(value.detach().float())

    def _value(self, term: Term) -> Tensor:
        step = int(self.state.global_step)  # type: ignore[attr-defined]
        if not isinstance(term.penalty, DataPenalty | BatchPenalty):
            return term.value(step)
        with self.forward_context():
            return term.value(step, self.__dict__.get("_batch"))

    def _mean(self, noted: _Noted) -> float:
        """The mean since this was last asked; of a term that is only logged, the value now."""
        if noted.seen:
            value = float(torch.stack(noted.seen).mean())
            noted.seen.clear()
            return value
        with torch.no_grad():
            return float(self._value(noted.term))

    def penalties_seen(self) -> dict[str, list[float]]:
        """The unweighted values since they were last logged, for a checkpoint."""
        return {name: [float(v) for v in noted.seen] for name, noted in self._noted().items()}

    def see_penalties(self, values: Mapping[str, list[Tensor]]) -> None:
        """Take up the values that `penalties_seen` gave before a training was interrupted."""
        for name, noted in self._noted().items():
            noted.seen = list(values.get(name, ()))

    def weight_of(self, name: str) -> float:
        """The weight of a term now.

        Raises:
            UnknownNameError: no such term.
        """
        return self._named(name).weight

    def set_weight(self, name: str, weight: float) -> None:
        """From the next step on, let a term that is minimized have this weight, which is above 0."""
        check_weight(weight, name)
        self._named(name).weight = weight

    def _named(self, name: str) -> _Noted:
        if name not in (noted := self._noted()):
            raise UnknownNameError("term of the loss", name, noted)
        return noted[name]

    @property
    def terms(self) -> list[Term]:
        """Those that were added."""
        return [noted.term for noted in self._noted().values()]

    def _noted(self) -> dict[str, _Noted]:
        # made on demand, as a mixin that has no say in how its Trainer is constructed
        return self.__dict__.setdefault("_penalties", {})


def _by_gradient(term: Term) -> bool:
    """Is it minimized, rather than only logged or applied apart from the gradients?"""
    return term.weight > 0 and not isinstance(term.penalty, StartPull)


def check_steered(budget: Budget, model: nn.Module, terms: Iterable[Term]) -> None:
    """Raise `CordaError` for a budget of another model, or of a term that is not there or whose weight cannot be steered."""
    budget.check_model(model)
    if (name := budget.term) is None:
        return
    named = {term.name: term for term in terms}
    if name not in named:
        raise UnknownNameError("term of the loss", name, named)
    if not _by_gradient(named[name]):
        raise CordaError(
            f"the budget steers the weight of {name!r}, which is only logged, or decays apart from the gradients: give it a "
            "weight to start from"
        )


class _Pulling(TrainerCallback):
    """Pulls the weights back before each step of the optimizer."""

    def __init__(self, penalty: StartPull, weight: float) -> None:
        self.penalty, self.weight = penalty, weight

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self.penalty.pull(optimizer, self.weight)


class AnchorMixin(PenaltyMixin):
    """`anchor_to(store, weight)` for any Trainer of transformers or TRL: hold down what it would forget.

    class Trainer(AnchorMixin, SFTTrainer): pass
    trainer = Trainer(model=..., ...)
    trainer.anchor_to(store, weight=30)

    Logs get "anchor": the mean relative change of the layers' outputs on the knowledge; of another metric e.g.
    "anchor_kfac". Where the records of the knowledge are at hand while it trains,
    `trainer.distill_from(batches, weight=30)` keeps more.

    Attributes:
        spent: what became of the budget of `keep`, once the training has ended.
    """

    spent: Spent | None = None

    def anchor_to(
        self,
        store: CovarianceStore | Anchor | None,
        weight: float,
        *,
        every: int = 1,
        sites: Iterable[Site | str] | None = None,
        energy: float | None = None,
        metric: AnchorMetric = "knowledge",
        output_side: OutputSide = "none",
        task_store: CovarianceStore | None = None,
    ) -> Anchor:
        """From now on, add `weight` times the anchor; to be called before `train()`.

        Args:
            store: covariances of the knowledge, collected from the model before it was adapted; or an anchor that
                was built already; None with the metric "identity".
            weight: 0 only logs it, as a forecast of forgetting.
            every: as in `penalize`; worth it for full fine-tuning on a CPU, where the anchor takes a tenth of a step.
            sites, energy, metric, output_side, task_store: as of `anchor_penalty`, which also says what is raised.

        Raises:
            CordaError: as `penalize`; or processes of a distributed training whose matrices differ, on all of them.
        """
        check_weight(weight, "anchor")
        _refuse_pieces(self, "anchor", gathers=True)

        def made() -> Anchor:
            if isinstance(store, Anchor):
                return store
            return anchor_penalty(
                self.model,  # type: ignore[attr-defined]
                store,
                metric=metric,
                output_side=output_side,
                task_store=task_store,
                sites=sites,
                energy=energy,
            )

        anchor = made_everywhere("the anchor", made)
        self.add_term(Term(anchor.name, anchor, weight, every, anchor.identity))
        return anchor

    def distill_from(
        self,
        batches: Batches | Knowledge,
        weight: float,
        *,
        every: int = TermOptions.distill_every,
        loss: DistillLoss = TermOptions.distill_loss,
        batch_size: int | None = None,
        seed: int = 0,
        cache: str | Path | None = None,
    ) -> DataPenalty:
        """From now on, add `weight` times the distance from what the model gave before training; to be called before
        `train()`.

        Logs get "distill", not weighted.

        Args:
            batches: of the knowledge to keep, as for `collect_covariance`; of models that generate text with labels.
            weight: 0 only logs it.
            every: as in `penalize`.
            loss, batch_size, seed, cache: as in `corda_vlm.train.terms.distillation`, which also says what is raised.
        """
        check_weight(weight, "distill")
        distill = distillation(
            self.model,  # type: ignore[attr-defined]
            batches,
            loss=loss,
            batch_size=batch_size,
            seed=seed,
            cache=cache,
        )
        self.add_term(Term("distill", distill, weight, every))
        return distill

    def stay_near(
        self,
        weight: float,
        *,
        every: int = TermOptions.kl_new_every,
        objective: Objective | None = None,
    ) -> BatchPenalty:
        """From now on, add `weight` times the KL divergence from what the model answered on this batch before training; to
        be called before `train()`.

        Logs get "kl_new", not weighted. Of batches that are accumulated it looks at the last.

        Args:
            weight: 0 only logs it.
            every: as in `penalize`.
            objective: what compares classes: of `make_objective`, for models that compare images with texts; None for the
                next tokens of batches with `labels`.

        Raises:
            CordaError: an objective without classes that the model had before.
        """
        check_weight(weight, "kl_new")
        near = NewTaskDivergence(self.model, objective or NextTokenObjective())  # type: ignore[attr-defined]
        self.add_term(Term("kl_new", near, weight, every))
        return near

    def keep(
        self, budget: Budget, measure: Callable[[], Mapping[str, float]] | None = None
    ) -> None:
        """From now on, steer the weight of the budget's term, and when the training ends take the largest strength that keeps
        the budget; to be called before `train()`, after the term was added.

        Logs get "keep" and "keep_weight"; after the training `trainer.spent` says what was kept.

        Args:
            budget: of `corda_vlm.train.budget.forgetting_budget(model, probe, 0.95, term="distill")`.
            measure: tells "loss", and "accuracy", of the task, for what the budget costs; None takes `evaluate()` where the
                Trainer has records for it.

        Raises:
            CordaError: a term that was not added, or one without a weight, a budget of another model, or a training that cuts
                weights into pieces.
        """
        self.steer(budget)
        self.add_callback(_Spending(self, budget, measure))  # type: ignore[attr-defined]

    def steer(self, budget: Budget) -> None:
        """`keep` without its end: the weight is steered, or the training stopped, alone."""
        _refuse_pieces(self, "keep")
        same_everywhere(
            "the budget",
            budget.identity,
            "Each would keep another share of other knowledge. Give every process the same budget",
        )
        check_steered(budget, self.model, self.terms)  # type: ignore[attr-defined]
        looks = (budget.keep, budget.every, budget.look)
        if budget.term is not None:
            self.add_callback(Steering(self, budget.term, *looks))  # type: ignore[attr-defined]
        elif budget.stops:
            # before those that do something at the last step: they are to see that this is it
            stopping = Stopping(self, *looks, len(budget.telling))
            self.callback_handler.callbacks.insert(1, stopping)  # type: ignore[attr-defined]


class _Spending(TrainerCallback):
    """Gives a model at the end of its training the strength that keeps its budget."""

    def __init__(
        self, trainer: Any, budget: Budget, measure: Callable[[], Mapping[str, float]] | None
    ) -> None:
        self.trainer, self.budget, self.measure = trainer, budget, measure

    def on_train_end(self, *_: Any, **__: Any) -> None:
        term = self.budget.term
        weight = None if term is None else self.trainer.weight_of(term)
        measure = self.measure
        if measure is None and getattr(self.trainer, "eval_dataset", None) is not None:
            measure = self._evaluated
        self.trainer.spent = self.budget.spend(measure, weight)
        logger.info("the model %s", self.trainer.spent)

    def _evaluated(self) -> dict[str, float]:
        """What the Trainer's own evaluation says of the task; not how long it took."""
        told = {n.removeprefix("eval_"): v for n, v in self.trainer.evaluate().items()}
        return {name: float(told[name]) for name in ("loss", "accuracy") if name in told}


def _refuse_pieces(trainer: Any, name: str, *, gathers: bool = False) -> None:
    """Raise `CordaError` where no process has the whole weights that a penalty looks at.

    Args:
        gathers: it gathers distributed tensors, as FSDP2 makes them, by itself.
    """
    args, accelerator = trainer.args, trainer.accelerator
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    model = type(trainer.model).__name__
    fsdp = bool(args.fsdp) or trainer.is_fsdp_enabled or kind in ("FSDP", "XLA_FSDP")
    in_pieces = any(is_in_pieces(parameter) for parameter in trainer.model.parameters())
    pieces = {
        "FSDP": fsdp and not (gathers and _is_fsdp2(accelerator)),
        "DeepSpeed": bool(args.deepspeed) or trainer.is_deepspeed_enabled or kind == "DEEPSPEED",
        "Megatron": kind == "MEGATRON_LM",
        f"{model}, a wrapped model,": model in _WRAPPERS,
        "a model of distributed tensors": in_pieces and not gathers,
    }
    if found := [what for what, there in pieces.items() if there]:
        raise CordaError(
            f"{name!r} looks at whole weights, of which {found[0]} leaves each process a piece; train with one process, or "
            "with plain DistributedDataParallel"
        )


def _is_fsdp2(accelerator: Any) -> bool:
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return getattr(plugin, "fsdp_version", None) == 2


_WRAPPERS = ("FullyShardedDataParallel", "XlaFullyShardedDataParallel", "DeepSpeedEngine")
