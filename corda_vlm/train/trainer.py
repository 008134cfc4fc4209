"""transformers' Trainer with our losses: the model it trains is the caller's own, PEFT wrapper and all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from corda_vlm.errors import CordaError, ForeignFileError, NotFiniteError
from corda_vlm.families.base import evaluating, frozen_norms, unwrap
from corda_vlm.files import read_json, shown, write_json
from corda_vlm.precision import bf16_is_faster
from corda_vlm.train.checkpoints import KEPT, break_seal, seal
from corda_vlm.train.ema import MovingAverage
from corda_vlm.train.model import projector_parameters
from corda_vlm.train.objectives import Objective
from corda_vlm.train.options import TrainOptions
from corda_vlm.train.penalty import AnchorMixin
from corda_vlm.train.steps import StepBatches
from corda_vlm.train.trackers import check_trackers
from corda_vlm.train.weights import all_finite, load_weights, save_weights

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class _BatchLoss(Trainer):
    """The Trainer whose loss is an `Objective` over our batches."""

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        batches: StepBatches,
        options: TrainOptions,
        image_size: tuple[int, int],
        **rest: Any,
    ) -> None:
        super().__init__(model=net, **rest)
        self.net = net  # as `self.model`, which transformers types as optional
        self.objective, self.batches, self.options = objective, batches, options
        self.math_backend = takes_math(options, net, image_size)
        self.loss_seen: list[Tensor] = []
        self.seconds = 0.0
        self.average = MovingAverage(self._trained(), options.ema) if options.ema > 0 else None
        # The loss is a mean over the batch, which the Trainer then divides by the accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self._frozen_norms = frozen_norms(self.net)

    def get_train_dataloader(self) -> DataLoader:
        # One item is one ready batch. A plain loader, since skipping to step n must load nothing before it.
        return DataLoader(self.batches, batch_size=1, shuffle=False, collate_fn=_only)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with attention(self.math_backend):
            loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise NotFiniteError(self._not_finite(f"the loss is {float(loss)}"))
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        for norm in self._frozen_norms:
            norm.eval()
        with self.autocast():
            loss, right = self.objective(unwrap(model), inputs)
        if model.training:
            self.loss_seen.append(loss.detach().float())
        return (loss, right) if return_outputs else loss

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 autocast of our own: accelerate's would wrap `forward`, which the losses do not call."""
        enabled = self.options.bf16 is True  # `train` has decided what "auto" means here
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=enabled)

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            options, head = self.options, self.objective.head
            own = options.projector_learning_rate or options.learning_rate
            projector = set(projector_parameters(self.net))
            named = [
                (p, own if p in projector else options.learning_rate)
                for p in self.net.parameters()
                if p.requires_grad
            ]
            named.sort(
                key=lambda pair: pair[1] != options.learning_rate
            )  # the first is what is logged
            if head is not None:
                rate = options.head_learning_rate or options.learning_rate
                named += [(p, rate) for p in head.parameters() if p.requires_grad]
            groups: dict[tuple[float, float], list[Tensor]] = {}
            for parameter, rate in named:
                decay = options.weight_decay if parameter.ndim >= 2 else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [{"params": found, "lr": r, "weight_decay": d} for (r, d), found in groups.items()],
                lr=options.learning_rate,
                betas=options.betas,
                fused=self.args.device.type in ("cpu", "cuda"),
            )
            if head is not None:
                # The Trainer clips and clears the gradients of its model, and the head is no part of that.
                self.optimizer.register_step_pre_hook(lambda *_: self._clip(head))
                self.optimizer.register_step_post_hook(lambda *_: head.zero_grad())
            if (average := self.average) is not None:
                self.optimizer.register_step_post_hook(lambda *_: average.update())
        return self.optimizer

    def _trained(self) -> list[nn.Parameter]:
        """What the optimizer steps, the head's included."""
        head = () if self.objective.head is None else self.objective.head.parameters()
        return [p for p in (*self.net.parameters(), *head) if p.requires_grad]

    def settle(self) -> None:
        """At the end: the average is the result, where one is kept."""
        if self.average is not None:
            self.average.settle()
            self.average = None  # what is measured from now on is the weights themselves, at whichever strength

    def _clip(self, head: nn.Module) -> None:
        if self.options.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(head.parameters(), self.options.max_grad_norm)

    @torch.no_grad()
    def measure(self, batches: Any) -> dict[str, float]:
        """Mean loss and accuracy of the objective over evaluation batches."""
        loss_sum, right, count = 0.0, 0, 0
        averaged = contextlib.nullcontext() if self.average is None else self.average.in_place()
        with averaged, evaluating(self.net), attention(self.math_backend):
            for batch in batches:
                with self.autocast():
                    loss, correct = self.objective(unwrap(self.net), self._prepare_inputs(batch))
                count += len(correct)
                loss_sum += float(loss) * len(correct)
                right += int(correct.sum())
        if not math.isfinite(loss_sum):
            raise NotFiniteError(self._not_finite(f"the loss on the evaluation data is {loss_sum}"))
        return {"eval_loss": loss_sum / count, "eval_accuracy": right / count}

    # -------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if not all_finite(self.net, self.objective.head):
            raise NotFiniteError(self._not_finite("the weights are NaN or Inf"))
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            break_seal(folder)
            super()._save_checkpoint(*args, **kwargs)
            seal(folder)
        except (
            OSError,
            SafetensorError,
            RuntimeError,
        ) as error:  # torch.save raises RuntimeError on a full disk
            raise CordaError(
                f"could not write {folder}: {error}. Earlier checkpoints are untouched: free some space and "
                "run the same command again to resume from the last."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Not the Trainer's own, which pickles its arguments and renames a full model's weights.
        assert output_dir is not None
        save_weights(self.net, self.objective.head, output_dir)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_weights(self.net, self.objective.head, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _told(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _told(checkpoint):
            super()._load_rng_state(checkpoint)

    def _not_finite(self, what: str) -> str:
        seen = [float(loss) for loss in self.loss_seen if torch.isfinite(loss)]
        return (
            f"{what} at step {self.state.global_step + 1} of {self.state.max_steps} "
            f"(learning rate {self._get_learning_rate():.3g}"
            + (f"; the loss before was {seen[-1]:.4g}" if seen else "")
            + f"). Lower the peak learning rate ({self.options.learning_rate:g}), lengthen the warm-up, or clip "
            f"gradients harder (max_grad_norm {self.options.max_grad_norm:g})."
        )


@contextlib.contextmanager
def _told(checkpoint: str | None) -> Iterator[None]:
    """Say which folder it is whose state does not fit, where PyTorch says which key is missing."""
    try:
        yield
    except CordaError:
        raise
    except (
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OSError,
        EOFError,
    ) as error:
        raise ForeignFileError(
            f"{checkpoint} is damaged, or of another training ({shown(str(error))}); delete that folder, and the training goes "
            "on from what was before it"
        ) from error


class CordaTrainer(AnchorMixin, _BatchLoss):
    """`_BatchLoss` with further terms."""

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        with attention(self.math_backend), self.autocast():
            yield

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # the losses and penalties of the steps that no entry of the history tells yet
        progress = {
            "seconds": self.seconds,
            "loss": [float(loss) for loss in self.loss_seen],
            "penalties": self.penalties_seen(),
        }
        write_json(Path(str(output_dir)) / PROGRESS, progress)
        if self.average is not None:
            self.average.save(Path(str(output_dir)))

    def restore(self, checkpoint: Path | None) -> None:
        """Go on from the progress that a checkpoint holds; None, or a checkpoint without one, begins at zero.

        Raises:
            ForeignFileError: it is damaged.
        """
        if checkpoint is not None and self.average is not None:
            self.average.load(checkpoint)
        path = None if checkpoint is None else checkpoint / PROGRESS
        if path is None or not path.is_file():
            return
        saved = read_json(path, "training progress")
        try:
            self.seconds = float(saved["seconds"])
            self.loss_seen = [self._scalar(value) for value in saved["loss"]]
            self.see_penalties(
                {n: [self._scalar(v) for v in of] for n, of in saved["penalties"].items()}
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ForeignFileError(
                f"{path} is damaged; delete the folder {path.parent}, and the training goes on from what was before it"
            ) from error

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(float(value), dtype=torch.float32, device=self.args.device)


PROGRESS = "progress.json"


def make_trainer(
    model: nn.Module,
    *,
    objective: Objective,
    batches: StepBatches,
    options: TrainOptions,
    output_dir: Path,
    callbacks: list[TrainerCallback],
) -> CordaTrainer:
    """A trainer on the device where the model is."""
    from transformers import PrinterCallback

    check_trackers(options.report_to)
    device = next(model.parameters()).device
    steps = math.ceil(len(batches) / options.gradient_accumulation)
    args = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type=_SCHEDULES[options.schedule],
        warmup_steps=round(options.warmup_ratio * steps),
        max_grad_norm=options.max_grad_norm,
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,  # it would hide the NaN that we report
        save_strategy="no",  # our callback says when
        save_total_limit=KEPT,
        seed=options.seed,
        use_cpu=device.type == "cpu",
        report_to=list(options.report_to),
        run_name=f"{output_dir.resolve().parent.name}/{output_dir.resolve().name}",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    if args.world_size > 1:
        raise CordaError(
            f"started in {args.world_size} processes; training runs in one process, on one device. "
            "Start it without torchrun or accelerate launch."
        )
    if getattr(args, "trackio_space_id", None) == "trackio":
        args.trackio_space_id = None  # the default of transformers 4, which uploads
    # With several GPUs in sight the Trainer would replicate the model over them.
    args._n_gpu = min(args.n_gpu, 1)
    trainer = CordaTrainer(
        model,
        objective,
        batches,
        options,
        batches.builder.processor.image_size,
        args=args,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def takes_math(options: TrainOptions, net: nn.Module, image_size: tuple[int, int]) -> bool:
    """Should attention run on PyTorch's MATH back-end? See `TrainOptions.attention`.

    Under bfloat16 on a CPU with AMX, forward and backward of attention took, MATH against the default: 6 against 19 ms
    with 17 tokens an image, 41 against 79 with 50, 39 against 87 with 77 of text, but 76 against 62 with 197
    and 212 against 120 with 577. In float32 the default was never slower by much, and faster on long inputs.
    """
    if options.attention != "auto":
        return options.attention == "math"
    device = next(net.parameters()).device
    if device.type != "cpu" or options.bf16 is not True or not bf16_is_faster(device):
        return False
    patches = [
        math.prod(image_size) // math.prod(module.kernel_size)
        for module in net.modules()
        if isinstance(module, nn.Conv2d)
        and module.in_channels == 3
        and module.kernel_size == module.stride
    ]
    return max(patches, default=0) <= _SHORT


_SHORT = 128
"""Tokens up to which MATH is the faster one."""


@contextlib.contextmanager
def attention(math_backend: bool) -> Iterator[None]:
    """Attention on the MATH back-end, or on PyTorch's own choice."""
    if math_backend:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


def _only(items: list[Any]) -> Any:
    return items[0]
