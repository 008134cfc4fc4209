"""open_clip's own training, with an adapter of ours on the model that it creates, and terms of ours in its loss.

    python -m corda_vlm.integrations.open_clip_train --model ViT-B-32 --pretrained laion2b_s34b_b79k \\
        --train-data pairs.csv --dataset-type csv --lr 5e-4 --epochs 2 --name digits \\
        --corda-plan plan.json --corda-distill 30 --corda-knowledge folder:photos

All flags but those that begin with `--corda-` are open_clip_train's own (`open_clip_torch[training]`), and mean what they
mean there: `--resume latest` goes on from its checkpoint, `torchrun -m` trains in several processes. The plan is what
`corda-vlm plan` wrote for the same model and weights. When the training ends, LOGS/NAME has `adapter/`, which
`corda_vlm.load_adapter` loads, and `merged/`, a plain model: `open_clip.create_model("local-dir:LOGS/NAME/merged")`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corda_vlm.adapter import attach_adapter, export_adapter
from corda_vlm.adapter.base import base_fingerprint
from corda_vlm.anchor import anchor_penalty
from corda_vlm.command_line import Command
from corda_vlm.covariance import CovarianceStore
from corda_vlm.covariance.options import CalibrationOptions
from corda_vlm.data import load_records, make_batches
from corda_vlm.errors import CordaError
from corda_vlm.families.clip_open import processor
from corda_vlm.files import atomic_folder
from corda_vlm.integrations.command import run_command
from corda_vlm.options import Count, NotNegative, Seed, check_options
from corda_vlm.plan import AdapterPlan
from corda_vlm.train.terms import Term, distillation
from corda_vlm.train.weights import save_weights

OURS = "--corda-"


@dataclass(frozen=True, kw_only=True)
class OpenClipOptions:
    """What open_clip_train is told beside its own flags.

    Attributes:
        corda_plan: The file that `corda-vlm plan` wrote for this model.
        corda_anchor: Weight of the anchor in the loss.
        corda_covariance: The file that `corda-vlm calibrate` wrote of the knowledge, for the anchor.
        corda_distill: Weight of distillation: on records of the knowledge, the model is to give what it gave before.
        corda_distill_every: Distillation is added at every so many steps only, with so many times the weight.
        corda_knowledge: Records of the knowledge, for distillation: a data spec, e.g. folder:photos.
        corda_samples: At most so many of them, drawn at random.
        corda_batch_size: Records of the knowledge a step.
        corda_seed: Of the draw.
    """

    corda_plan: str = "plan.json"
    corda_anchor: NotNegative = 0.0
    corda_covariance: str | None = None
    corda_distill: NotNegative = 0.0
    corda_distill_every: Count = 3
    corda_knowledge: str | None = None
    corda_samples: Count = CalibrationOptions.samples
    corda_batch_size: Count = 16
    corda_seed: Seed = CalibrationOptions.seed

    def __post_init__(self) -> None:
        check_options(self)
        if self.corda_anchor > 0 and self.corda_covariance is None:
            raise CordaError(
                "--corda-anchor needs to know what to hold to: give --corda-covariance, the file that `corda-vlm calibrate` "
                "wrote"
            )
        if self.corda_distill > 0 and self.corda_knowledge is None:
            raise CordaError(
                "--corda-distill looks at records of the knowledge: give --corda-knowledge, a data spec as for `corda-vlm "
                "calibrate`"
            )


def main(words: Sequence[str] | None = None) -> Path | None:
    """Train as open_clip_train does; returns the folder of its logs, None where it has trained nothing.

    Raises:
        CordaError: open_clip_train is not installed, a flag of ours cannot be, or the plan is of another model.
    """
    ours, theirs = split(sys.argv[1:] if words is None else words)
    options = Command("open_clip_train", _flags).read(ours)["options"]
    try:
        import open_clip_train.main as tool
    except ImportError as error:
        raise CordaError(
            f"open_clip's own training is not installed ({error}): pip install 'open_clip_torch[training]'"
        ) from error
    training = Training(options)
    with training.within(tool):
        status = tool.main(theirs)
    if status == -1:  # it has said why
        raise SystemExit(1)
    return training.finish()


def _flags(*, options: OpenClipOptions) -> None:
    """open_clip's own training, with an adapter of ours."""


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of our flags, and those of open_clip_train."""
    ours: list[str] = []
    theirs: list[str] = []
    into = theirs
    for word in words:
        if word.startswith("--"):
            into = ours if word.startswith(OURS) else theirs
        into.append(word)
    return ours, theirs


@dataclass
class Training:
    """One run of open_clip_train.

    Attributes:
        options: what it was told of ours.
        model: the model that it trains, once it was created, with the adapter.
        terms: what its loss holds besides.
        step: the number of the step that is under way, from 0 on, also of a training that was resumed.
    """

    options: OpenClipOptions
    model: Any = None
    terms: list[Term] = field(default_factory=list)
    step: int = 0
    args: Any = None
    _calls: int = 0

    @contextmanager
    def within(self, tool: Any) -> Iterator[None]:
        """What the tool calls by these names is ours, until this ends."""
        own = {name: getattr(tool, name) for name in ("parse_args", "create_model_and_transforms",
                                                      "create_loss", "train_one_epoch")}  # fmt: skip

        def parse_args(words: Sequence[str]) -> Any:
            self.args = own["parse_args"](words)
            return self.args

        def create(*given: Any, **named: Any) -> Any:
            made = own["create_model_and_transforms"](*given, **named)
            if self.model is None:  # a teacher of its --distill-model comes after
                self.prepare(made[0])
            return made

        def train_one_epoch(model: nn.Module, data: Any, loss: Any, epoch: int, *rest: Any, **named: Any) -> Any:  # fmt: skip
            every = self.args.accum_freq
            self._calls = epoch * (data["train"].dataloader.num_batches // every) * every
            return own["train_one_epoch"](model, data, loss, epoch, *rest, **named)

        changed = {
            "parse_args": parse_args,
            "create_model_and_transforms": create,
            "create_loss": lambda args: Holding(own["create_loss"](args), self),
            "train_one_epoch": train_one_epoch,
        }
        for name, function in changed.items():
            setattr(tool, name, function)
        try:
            yield
        finally:
            for name, function in own.items():
                setattr(tool, name, function)

    def prepare(self, model: nn.Module) -> None:
        """Attach the plan to a model and make the terms, while it is as it was loaded."""
        told = self.options
        if self.args.lock_image or self.args.lock_text:
            raise CordaError(
                "--lock-image and --lock-text would freeze the adapter; leave them out: the plan says what is trained"
            )
        if not (self.args.train_data or self.args.dataset_type == "synthetic"):
            raise CordaError("nothing is trained without --train-data; evaluate by open_clip_train")
        plan = AdapterPlan.load(told.corda_plan, model=model)
        store = None
        if told.corda_covariance is not None:
            store = CovarianceStore.load(told.corda_covariance, model=model)
        self.model = attach_adapter(model, plan)
        if store is not None:
            self.terms.append(Term("anchor", anchor_penalty(self.model, store), told.corda_anchor))
        if told.corda_distill > 0:
            self.terms.append(self._distilled(model))

    def _distilled(self, model: nn.Module) -> Term:
        import open_clip

        told = self.options
        assert told.corda_knowledge is not None  # see `OpenClipOptions`
        feeds = processor(model, open_clip.get_tokenizer(self.args.model))
        batches = make_batches(
            load_records(told.corda_knowledge), feeds, batch_size=told.corda_batch_size,
            shuffle=True, seed=told.corda_seed, limit=told.corda_samples,
        )  # fmt: skip
        distill = distillation(self.model, batches)
        return Term("distill", distill, told.corda_distill, told.corda_distill_every)

    def values(self) -> dict[str, Tensor]:
        """The weighted terms of a call of the loss: a step's first call has them all, its others none."""
        step, call = divmod(self._calls, self.args.accum_freq)
        self._calls, self.step = self._calls + 1, step
        if call:
            return {}
        due = [term for term in self.terms if step % term.every == 0]
        with torch.autocast(torch.device(self.args.device).type, enabled=False):
            return {term.name: term.weight * term.every * self._value(term) for term in due}

    def _value(self, term: Term) -> Tensor:
        if term.weight > 0:
            return term.value(self.step)
        with torch.no_grad():
            return term.value(self.step)

    def finish(self) -> Path | None:
        """Write the adapter and the merged model beside the logs."""
        args = self.args
        if self.model is None or not args.save_logs:
            return None
        folder = Path(args.logs) / args.name
        self.model.eval()
        # Not `new_folder`: a training that was resumed writes its adapter again, in place of the former.
        with atomic_folder(folder / "adapter") as partial:
            save_weights(self.model, None, partial, base=base_fingerprint(self.model))
        export_adapter(self.model, folder / "merged", format="merged", source=_source(args.model))
        return folder


def _source(model: str) -> str | None:
    """Where the configuration of a model is read from; None for off the model itself."""
    schema, colon, rest = model.partition(":")
    if not colon:
        return model
    return rest if schema == "local-dir" else None


class Holding(nn.Module):
    """A loss of open_clip with further terms, which its log lists too, weighted."""

    def __init__(self, loss: Any, training: Training) -> None:
        super().__init__()
        self.loss, self.training_run = loss, training

    def forward(self, *given: Any, **named: Any) -> dict[str, Tensor]:
        return {**self.loss(*given, **named), **self.training_run.values()}


if __name__ == "__main__":
    run_command("corda_vlm.integrations.open_clip_train", main)
