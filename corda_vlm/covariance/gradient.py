"""The gradient of a new task's loss with respect to each weight matrix, at the base model: summed over a few batches, and a file.

    gradient = collect_gradient(model, batches, loss, towers="vision", path="gradient.safetensors")
    plan = plan_adapter(model, store, method="corda-natural", gradient=gradient)

A method that starts from it (the natural-gradient start, LoRA-GA, KeepLoRA) needs no more of the task than this.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from corda_vlm.covariance.checkpoint import Source, no_batches
from corda_vlm.covariance.gradient_store import GradientStore
from corda_vlm.covariance.options import CollectOptions
from corda_vlm.covariance.together import check_processes
from corda_vlm.distributed.agree import (
    AT_WORK,
    made_by_first,
    made_everywhere,
    told_by_first,
    told_everywhere,
)
from corda_vlm.distributed.deal import Share
from corda_vlm.distributed.first import locked_by_first
from corda_vlm.distributed.sums import add_up, send_from
from corda_vlm.errors import CalibrationError, CordaError, ForeignFileError
from corda_vlm.families import Batch, any_family
from corda_vlm.families.base import device_of, evaluating, requiring
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.families.layers.matrix import shape_of
from corda_vlm.families.layers.quantized import storage_of
from corda_vlm.families.options import SiteKeywords, SiteOptions
from corda_vlm.files import check_path
from corda_vlm.interrupts import Interrupts
from corda_vlm.names import quoted
from corda_vlm.options import as_keywords, options_from
from corda_vlm.progress import Meter, showing
from corda_vlm.same_model import model_signs
from corda_vlm.sites import Site, find_sites, get_layer, model_fingerprint

logger = logging.getLogger(__name__)

Loss = Callable[[nn.Module, Batch], Float[Tensor, ""]]
"""(model, batch) -> the loss of the batch, a mean over its records."""


def collect_gradient(
    model: nn.Module,
    batches: Iterable[Batch | Tensor | Sequence[Any]],
    loss: Loss | None = None,
    sites: Sequence[Site] | None = None,
    *,
    about: str = "",
    path: str | Path | None = None,
    show_progress: bool = True,
    **options: Unpack[SiteKeywords],
) -> GradientStore:
    """The mean gradient of a loss with respect to the weights of `sites`, over `batches`; the model is not changed.

    One backward pass a batch, in eval mode, with gradients of these weights alone; each is added to a float32 sum on the CPU
    as soon as it is there, so that the model's own device holds one of them beside the activations. The sums take four
    bytes a weight.

    In a distributed run the batches are dealt out as those of `collect_covariance` are, and all processes get the mean of all.

    Args:
        model: bare; packed attention is unpacked meanwhile.
        batches: mappings as the loss takes them, of the new task; of a model that no family knows also a tensor, its first
            argument, or a tuple of those that it needs. Some 500 records are enough.
        loss: (model, batch) -> scalar. None takes the loss that the model itself returns for batches with `labels`.
        sites: of `find_sites`; None for those that `options` choose.
        about: what identifies the loss, e.g. its options; it becomes a part of the fingerprint. Without it a loss is known by
            the name of its function alone.
        path: file for checkpoints and for the result: a second call goes on from there, or returns it.
        show_progress: a bar over the batches.
        options: of `SiteOptions`.

    Returns:
        The store; loaded lazily from `path` if there is one. Sites that the loss does not depend on (the last blocks of a
        LLaVA's vision tower, an expert that saw no token) are left out, which is said.

    Raises:
        CordaError: a model that returns no loss, and none is given.
        CalibrationError: no batches, a gradient with NaN or Inf (names site and batch), or a loss that is no scalar, or that
            depends on none of the weights.
        ForeignFileError: `path` holds something else, or the gradient of another model, of other data or another loss.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the batch in flight is counted and the file is written.
    """
    asked = options_from(SiteOptions, options, "collect_gradient")
    if sites is None:
        sites = find_sites(model, **as_keywords(asked, SiteOptions))
    source = Source(batches)
    source.as_mapping = partial(any_family(model).as_mapping, model)
    path = None if path is None else Path(check_path(path))
    about = about or _name_of(loss or own_loss)
    chosen = {"loss": about, "sites": sorted(site.name for site in sites)}
    check_processes(source, model, chosen, path)
    share = Share.here()
    with (
        locked_by_first(path),
        showing(show_progress and share.is_first),
        Interrupts("finishing the batch in flight, then saving", active=path is not None) as stop,
        evaluating(model),
        unpacked(model),
    ):
        job = made_everywhere(
            "the gradient's file",
            lambda: _Job(model, source, loss or own_loss, sites, about, path),
        )
        if not job.complete:
            job.run(stop) if share.is_all else job.run_together(stop, share)
        if path is None:
            return job.result()
        return made_everywhere("the finished gradient", lambda: GradientStore.load(path))


def own_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """The loss that a model of transformers returns for a batch with labels.

    Raises:
        CordaError: it returns none.
    """
    why = "returned no loss"
    value = None
    try:
        value = getattr(model(**batch), "loss", None)
    except TypeError as error:  # its forward takes no labels
        why = f"takes no such batch ({error})"
    if not isinstance(value, Tensor):
        raise CordaError(
            f"{type(model).__name__} {why}, with {', '.join(batch)}; pass loss=, a function (model, batch) -> scalar, e.g. the "
            "cross-entropy of your classes"
        )
    return value


def _name_of(loss: Loss) -> str:
    return str(getattr(loss, "__qualname__", type(loss).__qualname__))


class _Job:
    """Sums of gradients, from where a checkpoint left them."""

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        loss: Loss,
        sites: Sequence[Site],
        about: str,
        path: Path | None,
    ) -> None:
        self.model, self.source, self.loss, self.path = model, source, loss, path
        self.layers = {site.name: get_layer(model, site.name) for site in sites}
        self.weights = {name: _differentiable(layer) for name, layer in self.layers.items()}
        self.fingerprints = {
            "model_fingerprint": model_fingerprint(model),
            "data_fingerprint": f"{source.fingerprint}-{about}",
        }
        self.signs = model_signs(model)
        self.done, self.complete = 0, False
        self.number = 0  # of the batch in flight
        self.sums: dict[str, Tensor] = {}
        if path is not None and path.exists():
            self._go_on(GradientStore.load(path, unfinished=True))

    def _go_on(self, saved: GradientStore) -> None:
        for name, value in self.fingerprints.items():
            if getattr(saved, name) != value:
                raise ForeignFileError(
                    f"{self.path} is the gradient of another {name.partition('_')[0]} ({getattr(saved, name)}, now {value}); "
                    "give another path, or delete the file to start anew"
                )
        if missing := [name for name in self.weights if name not in saved.asked]:
            raise ForeignFileError(
                f"{self.path} lacks the sites {quoted(missing)}; give another path, or delete the file to start anew"
            )
        self.done, self.complete = saved.batches, saved.complete
        if not saved.complete:
            self.sums = {name: saved[name].clone() for name in saved}

    def run(self, stop: Interrupts) -> None:
        """Add up the batches that are left; a stop, or data that fails because of it, saves what is counted."""
        took, ended = 0.0, time.monotonic()
        remaining = self.source.batches(self.done, device_of(self.model), by_number=False)
        meter = Meter("gradient", self.source.total, unit="batch", initial=self.done)
        with meter, self._watched():
            while (item := self._next(remaining, stop)) is not None:
                self._add(*item)
                self.done += 1
                meter.update()
                if stop.asked is not None:
                    self._stop()
                if took <= CollectOptions.checkpoint_share * (time.monotonic() - ended):
                    began = time.monotonic()
                    self._save()
                    ended = time.monotonic()
                    took = ended - began
        self._finish()
        self._save()

    def run_together(self, stop: Interrupts, share: Share) -> None:
        """Add up this process's share of the batches that are left, and then the sums of all processes; the first writes.

        There is no checkpoint on the way: a stop, or an error of one process, leaves the file as it was.
        """
        if not share.is_first:
            self.sums = {}  # what a checkpoint had is the first's
        remaining = self.source.batches(self.done, device_of(self.model), share)
        meter = Meter("gradient", self.source.total, unit="batch", initial=self.done)

        def work() -> list[int]:
            useful = 0
            for number, batch in remaining:
                if stop.asked is not None:
                    return [useful, 1]
                if batch is not None:
                    self._add(number, batch)
                    useful += 1
                meter.update(share.size)
            return [useful, 0]

        with meter, self._watched():
            every = told_everywhere("the batches", work, AT_WORK)
        if any(stopped for _, stopped in every):
            raise KeyboardInterrupt(
                "stopped; of a gradient that several processes take nothing is saved before the end"
            )
        self.done += sum(useful for useful, _ in every)
        for name, weight in self.weights.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros(weight.shape).flatten(1)
        add_up((self.sums[name].contiguous() for name in self.weights), torch.float32)
        made_by_first("the gradient", self._finish)
        reached = told_by_first("the weights that were reached", lambda: list(self.sums))
        self.sums = {name: self.sums[name] for name in reached}
        self.complete = True
        if self.path is None:
            send_from(0, self.sums.values(), torch.float32)
        made_by_first("the gradient's file", self._save)

    def _finish(self) -> None:
        """From sums to means."""
        if self.done == 0:
            raise no_batches()
        self._tell_unreached()
        for total in self.sums.values():
            total.div_(self.done)
        self.complete = True

    def _next(
        self, remaining: Iterator[tuple[int, Batch | None]], stop: Interrupts
    ) -> tuple[int, Batch | None] | None:
        try:
            return next(remaining, None)
        except Exception:
            if (
                stop.asked is not None
            ):  # Ctrl-C reaches the workers of a DataLoader too, which then fail
                self._stop()
            raise

    def _stop(self) -> NoReturn:
        self._save()
        raise KeyboardInterrupt(
            f"stopped after {self.done} batches; they are saved in {self.path}. Run the same command again to go on from there"
        )

    def _save(self) -> None:
        if self.path is not None and self.done:
            self.result().save(self.path)

    def result(self) -> GradientStore:
        """The means; of a checkpoint the sums, so that it goes on to the bit."""
        return GradientStore(
            {name: self.sums[name] for name in self.weights if name in self.sums},
            asked=tuple(self.weights),
            batches=self.done,
            complete=self.complete,
            model_signs=self.signs,
            **self.fingerprints,
        )

    def _add(self, number: int, batch: Batch | None) -> None:
        assert batch is not None
        self.number = number
        with torch.enable_grad():
            value = self.loss(self.model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise CalibrationError(
                    f"the loss is {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}; it has to give one "
                    "number, the mean over the records of a batch"
                )
            if not value.requires_grad:
                raise CalibrationError(
                    "the loss does not depend on any of the chosen weights; choose the towers that it runs through"
                )
            value.backward()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Only these weights take gradients, which go to the sums one by one; all is put back afterwards."""
        grads = {parameter: parameter.grad for parameter in self.model.parameters()}
        handles = []
        with requiring(self.model, self.weights.values()):
            try:
                for parameter in grads:
                    parameter.grad = None
                for name, weight in self.weights.items():
                    handles.append(weight.register_post_accumulate_grad_hook(self._taker(name)))
                    if storage_of(self.layers[name]) is not None:
                        handles.append(self.layers[name].register_forward_hook(_adding(weight)))
                yield
            finally:
                for handle in handles:
                    handle.remove()
                for parameter, gradient in grads.items():
                    parameter.grad = gradient

    def _taker(self, name: str) -> Callable[[Tensor], None]:
        def take(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient, weight.grad = weight.grad.detach().to("cpu", torch.float32), None
            gradient = gradient.flatten(1)  # that of a convolution as its weight is
            if not bool(torch.isfinite(gradient).all()):
                raise CalibrationError(
                    f"the gradient of {name} has NaN or Inf in batch {self.number} (from 0). Look at that batch's inputs; if they "
                    "are fine, load the model in float32 or bfloat16"
                )
            # the first may be a view of what the backward pass goes on with
            self.sums[name] = (
                self.sums[name].add_(gradient) if name in self.sums else gradient.clone()
            )

        return take

    def _tell_unreached(self) -> None:
        """Leave out the weights that the loss does not depend on, and say so."""
        missed = [n for n in self.weights if n not in self.sums or not bool(self.sums[n].any())]
        for name in missed:
            self.sums.pop(name, None)
        if missed:
            logger.warning(
                "the loss does not depend on %d of %d weights, which are left out: %s",
                len(missed),
                len(self.weights),
                quoted(missed),
            )


def _differentiable(layer: Any) -> Tensor:
    """The weight of a layer; of one that keeps codes zeros in its place, which `_adding` adds, and which take no memory."""
    if storage_of(layer) is None:
        return layer.weight
    return torch.zeros((), device=layer.weight.device).expand(shape_of(layer))


def _adding(weight: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook after which a layer's outputs depend on `weight` as if it were added to the layer's own: so its gradient is that."""

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = inputs
        return output + F.linear(x.to(weight.dtype), weight).to(output.dtype)

    return add
