"""What looks on while the Trainer runs: progress, history, evaluation, checkpoints, Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from corda_vlm.interrupts import Interrupts
from corda_vlm.jsonl import append_jsonl, is_number, write_jsonl
from corda_vlm.progress import Meter, showing
from corda_vlm.train.budget.options import KEEP, WEIGHT
from corda_vlm.train.history import read_history
from corda_vlm.train.options import TrainOptions

SAVE_SECONDS = 120.0
"""Time between checkpoints when `save_every` is not given: what a kill may cost."""


class Watch(TrainerCallback):
    """Keeps the history and decides when to evaluate, to save and to stop.

    Attributes:
        history: entries so far, those of resumed runs included; also lines of `path`.
        interrupts: whether a signal asked to stop.
    """

    trainer: Any

    def __init__(
        self,
        options: TrainOptions,
        path: Path,
        measure: Callable[[], dict[str, float]] | None,
        show_progress: bool,
    ) -> None:
        self.options, self.path, self.measure = options, path, measure
        self.show_progress = show_progress
        self.history: list[dict[str, Any]] = []
        self.interrupts = Interrupts("finishing this step, then saving")
        self._meter: Meter | None = None

    @property
    def seconds(self) -> float:
        """In training so far, earlier runs included."""
        return self._before + time.perf_counter() - self._began

    @property
    def samples_per_second(self) -> float:
        """Of this run, evaluation and checkpoints not counted."""
        return self._samples / self._busy if self._busy > 0 else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._before, self._began = self.trainer.seconds, time.perf_counter()
        self._saved = self._began
        self._busy, self._samples = 0.0, 0
        self.history = [
            entry for entry in read_history(self.path) if entry["step"] <= state.global_step
        ]
        write_jsonl(self.path, self.history, "history entry")
        with showing(self.show_progress):
            self._meter = Meter("training", state.max_steps, initial=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now, step, options = time.perf_counter(), state.global_step, self.options
        self._busy += now - self._step_began
        micro = range(
            (step - 1) * options.gradient_accumulation, step * options.gradient_accumulation
        )
        batches = self.trainer.batches
        self._samples += sum(len(batches.indices(n)) for n in micro if n < len(batches))
        if self._meter is not None:
            self._meter.update()
            if (
                "loss" not in self._meter.facts
            ):  # until the first entry, which on a slow machine takes minutes
                self._meter.update(0, loss=f"{float(self.trainer.loss_seen[-1]):.3f}")
        stopped = control.should_training_stop and self.interrupts.asked is None  # for a budget
        last = step >= state.max_steps or stopped
        control.should_log |= last  # a training shorter than `log_every` has a history too
        if self.measure and (last or (options.eval_every and step % options.eval_every == 0)):
            found = {name: round(value, 6) for name, value in self.measure().items()}
            self._note(
                {
                    "step": step,
                    "epoch": self._epoch(step),
                    "seconds": round(self.seconds, 3),
                    **found,
                }
            )
            if options.report_to:
                due_to_log = control.should_log
                self.trainer.log(dict(found))
                control.should_log = due_to_log  # which an entry of its own clears
        due = (
            now - self._saved > SAVE_SECONDS
            if options.save_every is None
            else step % options.save_every == 0
        )
        if self.interrupts.asked is not None:
            control.should_training_stop = True
            due = True
        if due and not last:  # the last step's weights are written as the result
            control.should_save = True
            self.trainer.seconds = self.seconds
            self._saved = now

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any
    ) -> None:
        if logs and KEEP in logs:
            step = state.global_step
            when = {"step": step, "epoch": self._epoch(step), "seconds": round(self.seconds, 3)}
            self._note({**when, **{name: logs[name] for name in (KEEP, WEIGHT) if name in logs}})
        if not logs or "loss" not in logs:
            return
        trainer = self.trainer
        entry = {
            "step": state.global_step,
            "epoch": self._epoch(state.global_step),
            "seconds": round(self.seconds, 3),
            "loss": float(torch.stack(trainer.loss_seen).mean()),
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm") if is_number(logs.get("grad_norm")) else None,
            "samples_per_second": round(self.samples_per_second, 2),
            **{term.name: logs[term.name] for term in trainer.terms if term.name in logs},
        }
        trainer.loss_seen.clear()
        self._note(entry)
        if self._meter is not None:
            facts = {
                "loss": f"{entry['loss']:.3f}",
                "lr": f"{entry['learning_rate']:.1e}",
                "samples": f"{entry['samples_per_second']:.0f}/s",
            }
            if "anchor" in entry:
                facts["anchor"] = f"{entry['anchor']:.2g}"
            self._meter.update(0, **facts)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._meter is not None:
            self._meter.close()
            self._meter = None

    def _epoch(self, step: int) -> float:
        batches = self.trainer.batches
        return round(step * self.options.gradient_accumulation / batches.per_epoch, 3)

    def _note(self, entry: dict[str, Any]) -> None:
        self.history.append(entry)
        append_jsonl(self.path, [entry], "history entry")
