"""Second moments of the inputs of layers, while a callback of the user's runs the model as it likes.

`corda_vlm.covariance.observe` is told of each batch before it runs. Here nothing is told: what a batch is, and which of its
tokens are padding, is seen from the calls of the model itself, and of parts of it that take a mask.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from corda_vlm.covariance import CovarianceStore
from corda_vlm.covariance.moments import PRECISIONS, SecondMoment
from corda_vlm.covariance.sharing import Sharing
from corda_vlm.covariance.tokens import Masks, TokenSelector
from corda_vlm.errors import CalibrationError, CordaError
from corda_vlm.families import token_masks
from corda_vlm.families.base import evaluating
from corda_vlm.families.generic import TOWER
from corda_vlm.families.options import TOWERS
from corda_vlm.integrations.peft.layers import family_or_generic
from corda_vlm.names import quoted
from corda_vlm.sites import Site


class Watch:
    """Counts what layers read, from `watching` on.

    Attributes:
        calls: name of a site -> how often it was called.
    """

    def __init__(self, sites: Sequence[Site], precision: str) -> None:
        self.sites, self.precision = tuple(sites), precision
        self.calls: Counter[str] = Counter()
        self._selector = TokenSelector(TOWERS)  # a mask is that of the layers whose inputs it fits
        self._masks: list[Masks] = [{}]  # of the calls that are running, the innermost last
        self._moments: dict[str, SecondMoment] = {}
        streams: dict[str, list[str]] = {}
        for site in self.sites:
            streams.setdefault(site.stream, []).append(site.name)
        self._first = {members[0] for members in streams.values()}  # which counts for its stream
        self._sharing = {
            stream: Sharing(stream, members)
            for stream, members in streams.items()
            if len(members) > 1
        }

    def enter(self, masks: Masks) -> None:
        """A call begins, in which these are the tokens that count, if those within which it is made said nothing."""
        self._masks.append(self._masks[-1] or masks)
        self._selector.begin(self._masks[-1])

    def leave(self) -> None:
        """The call ends."""
        self._masks.pop()
        self._selector.begin(self._masks[-1])

    def hook(self, site: Site) -> Callable[..., None]:
        """What runs before the site's layer does."""

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor):
                with torch.inference_mode(False), torch.no_grad():
                    self._read(site, x.detach())

        return count

    def _read(self, site: Site, x: Float[Tensor, "*axes d"]) -> None:
        sharing = self._sharing.get(site.stream)
        if sharing is not None and not self.calls[site.name]:
            sharing.compare(site.name, x)
        self.calls[site.name] += 1
        if site.name not in self._first:
            return
        x = x[None] if x.dim() == 1 else x  # a single token
        rows = self._selector.select(x, tower=site.tower, stream=site.stream, site=site.name)
        if len(rows):
            self._check_finite(site, rows)
            self._moment(site, rows).add(rows, self.precision)

    def _moment(self, site: Site, rows: Float[Tensor, "n d"]) -> SecondMoment:
        if site.stream not in self._moments:
            # mps has no float64, which the means are kept in
            device = "cpu" if rows.device.type == "mps" else rows.device
            dtype = PRECISIONS[self.precision]
            self._moments[site.stream] = SecondMoment(rows.shape[1], dtype, device)
        return self._moments[site.stream]

    def _check_finite(self, site: Site, rows: Float[Tensor, "n d"]) -> None:
        largest = max(abs(float(value)) for value in torch.aminmax(rows))  # NaN goes through both
        if not largest < torch.finfo(PRECISIONS[self.precision]).max ** 0.5 / 1e3:
            raise CalibrationError(
                f"the input of {site.name!r} has NaN, Inf or values too large to square in call {self.calls[site.name]}; look "
                "at the inputs of that batch, and if they are fine, run the model in float32 or bfloat16"
            )

    def store(self, model_fingerprint: str) -> CovarianceStore:
        """What was counted.

        Raises:
            CalibrationError: no token reached a site, or sites that are said to read one input do not.
        """
        missed = [site.name for site in self.sites if site.stream not in self._moments]
        if missed:
            raise CalibrationError(
                f"no token reached {quoted(missed)}, {len(missed)} of {len(self.sites)} layers, while run_model ran; run "
                "the model (or hooked_model) in it, on data that reaches them, or leave them out of target_modules"
            )
        for sharing in self._sharing.values():
            sharing.conclude()
        self._check_calls()
        return CovarianceStore(
            self.sites,
            {stream: [moment] for stream, moment in self._moments.items()},
            model_fingerprint=model_fingerprint,
            data_fingerprints=[self._seen()],
            precision=self.precision,
        )

    def _check_calls(self) -> None:
        for sharing in self._sharing.values():
            numbers = {self.calls[name] for name in sharing.names}
            if len(numbers) > 1:
                raise CalibrationError(
                    f"{quoted(sharing.names)} are known to read one input, but were called {sorted(numbers)} times; run the "
                    "whole model in run_model"
                )

    def _seen(self) -> str:
        """What identifies the data, of which nothing is known but the sums."""
        digest = hashlib.blake2b(digest_size=16)
        for stream, moment in self._moments.items():
            digest.update(f"{stream}:{moment.count};".encode())
            digest.update((moment.shift.double() + moment.mean).cpu().numpy().tobytes())
        return digest.hexdigest()


@contextmanager
def watching(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    sites: Sequence[Site],
    precision: str,
    *,
    called: nn.Module | None = None,
) -> Iterator[Watch]:
    """Hooks on the layers for the length of the block, exceptions included; the model is in eval mode meanwhile.

    Args:
        called: what is called in the block, if it is a wrapper of PEFT's, which passes by the hooks of the model itself.
    """
    watch = Watch(sites, precision)
    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            handles.append(
                layers[site.name].register_forward_pre_hook(watch.hook(site), with_kwargs=True)
            )
        for module, masks in _maskers(model, called or model, sites):
            handles += _mask_hooks(watch, module, masks)
        with evaluating(model), torch.no_grad():
            yield watch
    finally:
        for handle in handles:
            handle.remove()


Masker = Callable[[dict[str, Any]], Masks]
"""The arguments of a call -> tower -> its mask."""


def _maskers(
    model: nn.Module, called: nn.Module, sites: Sequence[Site]
) -> Iterator[tuple[nn.Module, Masker]]:
    """The model, with its family's own idea of padding, and those parts of it that a script may call alone with a mask."""
    family = family_or_generic(model)
    of_family = token_masks(family, model)
    yield called, lambda batch: {**_for_all({TOWER}, batch), **of_family(batch)}
    for name, module in model.named_modules():
        inside = {site.tower for site in sites if name and site.name.startswith(f"{name}.")}
        arguments = _arguments(module)
        if inside and "attention_mask" in arguments and not _FED.isdisjoint(arguments):
            yield module, partial(_for_all, inside)


_FED = {"input_ids", "inputs_embeds"}


def _for_all(towers: Iterable[str], batch: Mapping[str, Any]) -> Masks:
    mask: Tensor | None = batch.get("attention_mask")
    return {} if mask is None else dict.fromkeys(towers, mask)


def _mask_hooks(watch: Watch, module: nn.Module, masks: Masker) -> list[RemovableHandle]:
    """A call of `module` says which tokens count in it, unless it is made by one that has said so."""
    names = _arguments(module)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = batch.get("attention_mask")
        if not (isinstance(mask, Tensor) and mask.dim() == 2):  # one of queries and keys, or none
            batch.pop("attention_mask", None)
        try:
            watch.enter(masks(batch))
        except (CordaError, KeyError, AttributeError, TypeError):  # no call that its family knows
            watch.enter({})

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(lambda *_: watch.leave(), always_call=True),
    ]


def _arguments(module: nn.Module) -> list[str]:
    return [*inspect.signature(module.forward).parameters]
