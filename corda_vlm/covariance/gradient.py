"""The gradient of a new task's loss with respect to each weight matrix, at the base model: summed over a few batches, and a file.

    gradient = collect_gradient(model, batches, loss, towers="vision", path="gradient.safetensors")
    plan = plan_adapter(model, store, method="corda-natural", gradient=gradient)

A method that starts from it (the natural-gradient start, LoRA-GA, KeepLoRA) needs no more of the task than this.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from corda_vlm.covariance.checkpoint import Source, no_batches, on_device
from corda_vlm.errors import CalibrationError, CordaError, ForeignFileError
from corda_vlm.families import Batch
from corda_vlm.families.base import evaluating
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.families.options import SiteKeywords, SiteOptions
from corda_vlm.files import check_path
from corda_vlm.interrupts import Interrupts
from corda_vlm.locks import locked
from corda_vlm.names import quoted
from corda_vlm.options import as_keywords, options_from
from corda_vlm.progress import Meter, showing
from corda_vlm.sites import Site, find_sites, get_linear, model_fingerprint
from corda_vlm.tensors import LazyTensors, save_tensors

logger = logging.getLogger(__name__)

FORMAT, VERSION = "corda_vlm.gradient", 1
_WHAT, _AGAIN = "gradient of a task", "collect it again (corda-vlm gradient, collect_gradient)"
_CHECKPOINT_SHARE = 0.1
"""The share of the time, at most, that goes into writing checkpoints."""

Loss = Callable[[nn.Module, Batch], Float[Tensor, ""]]
"""(model, batch) -> the loss of the batch, a mean over its records."""


class GradientStore(Mapping[str, Tensor]):
    """Site name -> mean gradient `∂L/∂W` (out, inp) of the batches, float32 on the CPU.

    Attributes:
        model_fingerprint: of the model it was taken at.
        data_fingerprint: of the batches and of the loss.
        batches: how many it is the mean of.
        complete: False of a checkpoint, which holds the sums.
    """

    def __init__(
        self,
        gradients: Mapping[str, Tensor],
        *,
        model_fingerprint: str,
        data_fingerprint: str,
        batches: int,
        complete: bool = True,
    ) -> None:
        self._gradients = gradients
        self.model_fingerprint, self.data_fingerprint = model_fingerprint, data_fingerprint
        self.batches, self.complete = batches, complete

    def __getitem__(self, site: str) -> Float[Tensor, "out inp"]:
        if site not in self._gradients:
            raise CordaError(
                f"the gradient has nothing of site {site!r} (it has {len(self._gradients)} sites: {quoted(list(self))}); "
                "collect it for that site too, or leave the site out with towers=, roles= or targets="
            )
        return self._gradients[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._gradients)

    def __len__(self) -> int:
        return len(self._gradients)

    def __contains__(self, site: object) -> bool:
        return site in self._gradients

    def __repr__(self) -> str:
        return f"<GradientStore: {len(self)} sites, mean of {self.batches} batches>"

    def summary(self) -> str:
        """What was collected, in a line."""
        size = sum(self[name].nbytes for name in self) / 1e6
        return f"the loss's gradient of {len(self)} weight matrices, mean of {self.batches} batches ({size:,.0f} MB)"

    def save(self, path: str | Path) -> None:
        """Write safetensors, atomically.

        Raises:
            CordaError: NaN or Inf, or nothing can be written there.
        """
        about = {
            "version": VERSION,
            "model": self.model_fingerprint,
            "data": self.data_fingerprint,
            "batches": self.batches,
            "complete": self.complete,
        }
        header = {"format": FORMAT, "about": json.dumps(about)}
        save_tensors(path, {name: self[name] for name in self}, header)

    @classmethod
    def load(
        cls, path: str | Path, *, model: nn.Module | None = None, unfinished: bool = False
    ) -> GradientStore:
        """Read what `save` wrote; the matrices are read when they are asked for.

        Args:
            model: refuse a gradient of another one.
            unfinished: take a checkpoint too.

        Raises:
            ForeignFileError: missing, damaged, unfinished, or of another model.
        """
        tensors = LazyTensors(path, _WHAT, _AGAIN)
        if tensors.metadata.get("format") != FORMAT:
            raise ForeignFileError(
                f"{path} is a safetensors file, but no gradient; give the file that collect_gradient or `corda-vlm "
                "gradient` wrote"
            )
        try:
            about = json.loads(tensors.metadata["about"])
            store = cls(
                tensors,
                model_fingerprint=str(about["model"]),
                data_fingerprint=str(about["data"]),
                batches=int(about["batches"]),
                complete=bool(about["complete"]),
            )
            version = about["version"]
        except (KeyError, TypeError, ValueError) as error:
            raise ForeignFileError(f"{path}: its header is damaged ({error}); {_AGAIN}") from error
        if version != VERSION:
            raise ForeignFileError(
                f"{path} has version {version} of the format, and this corda_vlm reads {VERSION}; {_AGAIN}"
            )
        if not store.complete and not unfinished:
            raise ForeignFileError(
                f"{path} is the checkpoint of a gradient that was stopped after {store.batches} batches; run the command that "
                "collects it again, and it goes on from there"
            )
        if model is not None and store.model_fingerprint != (own := model_fingerprint(model)):
            raise ForeignFileError(
                f"{path} is the gradient of the model {store.model_fingerprint}, and this one is {own}: other layers or other "
                f"weights; {_AGAIN}"
            )
        return store


def collect_gradient(
    model: nn.Module,
    batches: Iterable[Batch],
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

    Args:
        model: bare; packed attention is unpacked meanwhile.
        batches: mappings as the loss takes them, of the new task. Some 500 records are enough.
        loss: (model, batch) -> scalar. None takes the loss that the model itself returns for batches with `labels`.
        sites: of `find_sites`; None for those that `options` choose.
        about: what identifies the loss, e.g. its options; it becomes a part of the fingerprint.
        path: file for checkpoints and for the result: a second call goes on from there, or returns it.
        show_progress: a bar over the batches.
        options: of `SiteOptions`.

    Returns:
        The store; loaded lazily from `path` if there is one.

    Raises:
        CordaError: a model that returns no loss, and none is given.
        CalibrationError: no batches, a gradient with NaN or Inf (names site and batch), or sites that the loss does not reach.
        ForeignFileError: `path` holds something else, or the gradient of another model, of other data or another loss.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the batch in flight is counted and the file is written.
    """
    asked = options_from(SiteOptions, options, "collect_gradient")
    if sites is None:
        sites = find_sites(model, **as_keywords(asked, SiteOptions))
    path = None if path is None else Path(check_path(path))
    with (
        nullcontext() if path is None else locked(path),
        showing(show_progress),
        Interrupts("finishing the batch in flight, then saving", active=path is not None) as stop,
        evaluating(model),
        unpacked(model),
    ):
        job = _Job(model, Source(batches), loss or own_loss, sites, about, path)
        if not job.complete:
            job.run(stop)
        return job.result() if path is None else GradientStore.load(path)


def own_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """The loss that a model of transformers returns for a batch with labels.

    Raises:
        CordaError: it returns none.
    """
    value = getattr(model(**batch), "loss", None)
    if not isinstance(value, Tensor):
        raise CordaError(
            f"{type(model).__name__} returned no loss for a batch of {', '.join(batch)}; pass loss=, a function (model, batch) "
            "-> scalar, e.g. the cross-entropy of your classes"
        )
    return value


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
        self.weights = {site.name: get_linear(model, site.name).weight for site in sites}
        self.fingerprints = {
            "model_fingerprint": model_fingerprint(model),
            "data_fingerprint": f"{source.fingerprint}-{about}" if about else source.fingerprint,
        }
        self.done, self.complete = 0, False
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
        if missing := [name for name in self.weights if name not in saved]:
            raise ForeignFileError(
                f"{self.path} lacks the sites {quoted(missing)}; give another path, or delete the file to start anew"
            )
        self.done, self.complete = saved.batches, saved.complete
        if not saved.complete:
            self.sums = {name: saved[name].clone() for name in self.weights}

    def run(self, stop: Interrupts) -> None:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        took, ended = 0.0, time.monotonic()
        with Meter("gradient", self.source.total, unit="batch") as meter, self._watched():
            meter.update(self.done)
            for batch in self.source.after(self.done):
                self._add(on_device(device, batch))
                meter.update()
                if self.path is None:
                    continue
                if stop.asked is not None:
                    self.result(complete=False).save(self.path)
                    raise KeyboardInterrupt(
                        f"stopped after {self.done} batches; they are saved in {self.path}. Run the same command again to go "
                        "on from there"
                    )
                if took <= _CHECKPOINT_SHARE * (time.monotonic() - ended):
                    began = time.monotonic()
                    self.result(complete=False).save(self.path)
                    ended = time.monotonic()
                    took = ended - began
        if self.done == 0:
            raise no_batches()
        self._check_reached()
        if self.path is not None:
            self.result().save(self.path)

    def result(self, *, complete: bool = True) -> GradientStore:
        """The means; of a checkpoint the sums, so that it goes on to the bit."""
        by = self.done if complete else 1
        means = {name: self.sums[name] / by for name in self.weights if name in self.sums}
        return GradientStore(means, batches=self.done, complete=complete, **self.fingerprints)

    def _add(self, batch: Batch) -> None:
        with torch.enable_grad():
            value = self.loss(self.model, batch)
            if not value.requires_grad:
                raise CalibrationError(
                    "the loss does not depend on any of the chosen weights; choose the towers that it runs through"
                )
            value.backward()
        self.done += 1

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Only these weights take gradients, which go to the sums one by one; all is put back afterwards."""
        before = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        grads = {parameter: parameter.grad for parameter in self.model.parameters()}
        handles = []
        try:
            for parameter in before:
                parameter.requires_grad_(False)
                parameter.grad = None
            for name, weight in self.weights.items():
                weight.requires_grad_(True)
                handles.append(weight.register_post_accumulate_grad_hook(self._taker(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, needed in before.items():
                parameter.requires_grad_(needed)
                parameter.grad = grads[parameter]

    def _taker(self, name: str) -> Callable[[Tensor], None]:
        def take(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient, weight.grad = weight.grad.detach().to("cpu", torch.float32), None
            if not bool(torch.isfinite(gradient).all()):
                raise CalibrationError(
                    f"the gradient of {name} has NaN or Inf in batch {self.done} (from 0). Look at that batch's inputs; if they "
                    "are fine, load the model in float32 or bfloat16"
                )
            # the first may be a view of what the backward pass goes on with
            self.sums[name] = (
                self.sums[name].add_(gradient) if name in self.sums else gradient.clone()
            )

        return take

    def _check_reached(self) -> None:
        missed = [n for n in self.weights if n not in self.sums or not bool(self.sums[n].any())]
        if missed:
            raise CalibrationError(
                f"the loss does not depend on {len(missed)} of {len(self.weights)} weights, {quoted(missed)}: it does not run "
                "through them, or they have no say in it. Leave them out with towers=, roles= or targets="
            )
