"""Is bfloat16 worth it here? The one place that answers, for training, evaluation, calibration and the anchor."""

from __future__ import annotations

import logging
import math
import time
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from corda_vlm.errors import UnknownNameError

if TYPE_CHECKING:
    import torch

Bf16 = bool | Literal["auto"]
"""Run under bfloat16 autocast: yes, no, or "auto", where the device multiplies bfloat16 faster than float32."""

_log = logging.getLogger(__name__)

_SIZE = 256, 512, 512
"""Rows, inputs and outputs of the timed product: some half a millisecond of float32 on one core."""

_ON_ACCELERATOR = 8
"""An accelerator's product is so many times as long, wide and tall, or its start-up would be all that is timed."""

_TURNS, _AT_MOST = 25, 0.05
"""Products in each precision, and seconds after which fewer will do."""

_WORTH = 1.2
"""How much faster bfloat16 must multiply: autocast also converts every weight and activation."""


@dataclass(frozen=True)
class Speeds:
    """What a product took.

    Attributes:
        device: "cpu", "cuda", ….
        float32: seconds in float32.
        bfloat16: seconds in bfloat16; infinite where the device has no bfloat16 at all.
    """

    device: str
    float32: float
    bfloat16: float

    @property
    def ratio(self) -> float:
        """How many times faster than float32 bfloat16 is; below 1 it is slower."""
        return self.float32 / self.bfloat16

    @property
    def worth_it(self) -> bool:
        return self.ratio >= _WORTH

    def __str__(self) -> str:
        place = "on this processor" if self.device == "cpu" else f"on {self.device}"
        if self.ratio == 0:
            return f"bfloat16 does not exist {place}"
        if self.ratio < 1:
            return f"bfloat16 is {1 / self.ratio:.2g} times slower {place}"
        return f"bfloat16 is {self.ratio:.2g} times faster {place}"


@cache
def speeds(kind: str, index: int | None = None) -> Speeds:
    """Time a product in both precisions, once a process and device: some 30 milliseconds on a CPU.

    The two take turns on one thread, and the fastest of each counts, so that other work on the machine does not decide.

    Args:
        kind: a device's type, e.g. "cpu".
        index: which of several.

    Raises:
        RuntimeError: the device is not there, or its memory is full.
    """
    import torch

    device = torch.device(kind) if index is None else torch.device(kind, index)
    scale = 1 if kind == "cpu" else _ON_ACCELERATOR
    rows, inner, out = (n * scale for n in _SIZE)
    # constants: random numbers would move the caller's generator
    x, w = torch.full((rows, inner), 0.5), torch.full((out, inner), 0.5)
    full = x.to(device), w.to(device)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # several would wait for one another wherever a core is busy
        _seconds(*full)  # the first product of each kind sets things up
        try:
            half = x.to(device, torch.bfloat16), w.to(device, torch.bfloat16)
            _seconds(*half)
        except torch.cuda.OutOfMemoryError:  # says nothing about bfloat16
            raise
        except (RuntimeError, TypeError):  # a device without bfloat16, as float32 went well
            return Speeds(kind, 0.0, math.inf)
        slow, fast = math.inf, math.inf
        began = time.perf_counter()
        for turn in range(_TURNS):
            slow, fast = min(slow, _seconds(*full)), min(fast, _seconds(*half))
            if turn > 1 and time.perf_counter() - began > _AT_MOST:
                break
        return Speeds(kind, slow, fast)
    finally:
        torch.set_num_threads(threads)


def _seconds(x: torch.Tensor, w: torch.Tensor) -> float:
    """What the product `x wᵀ` takes."""
    import torch

    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        began = time.perf_counter()
        product = torch.nn.functional.linear(x, w)
        if x.device.type != "cpu":
            product[0, 0].item()  # waits until the device has finished
        return time.perf_counter() - began


def bf16_is_faster(device: torch.device | str) -> bool:
    """Does this device multiply bfloat16 clearly faster than float32?"""
    import torch

    device = torch.device(device)
    return speeds(device.type, device.index).worth_it


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the device multiplies it faster, else float32."""
    import torch

    return torch.bfloat16 if bf16_is_faster(device) else torch.float32


def check_bf16(value: object, name: str = "bf16") -> None:
    """Raise unless `value` is true, false or "auto".

    Raises:
        UnknownNameError: it is something else.
    """
    if not (isinstance(value, bool) or value == "auto"):
        raise UnknownNameError(f"value of {name}", value, ("true", "false", "auto"))


def takes_bf16(
    wanted: Bf16,
    device: torch.device | str,
    *,
    former: bool | None = None,
    weights: torch.dtype | None = None,
) -> bool:
    """Whether `bf16=wanted` means bfloat16 autocast on this device; with "auto" it is said once, on this package's logger.

    Args:
        former: what the work that is gone on with began with; "auto" keeps to it, on whatever machine.
        weights: of the model; None if what is computed does not depend on them. In half precision they are multiplied
            in it without autocast too.

    Warns:
        UserWarning: bfloat16 is asked for, or the weights are in it, where it is slower than float32.
    """
    import torch

    check_bf16(wanted)
    if wanted is False:
        return False
    device = torch.device(device)
    measured = speeds(device.type, device.index)
    if wanted is True:
        # a run that goes on has said so, and hands on what it has decided
        if measured.ratio < 1 and _goes_on("bfloat16", measured) not in _told:
            warnings.warn(
                f"bf16 is on, and {measured}; leave it at auto, or turn it off", stacklevel=3
            )
        return True
    taken = measured.worth_it if former is None else former
    without = "float32" if weights is None else str(weights).removeprefix("torch.")
    chosen = "bfloat16" if taken else without
    if taken != measured.worth_it:
        _say(_goes_on(chosen, measured))
    elif taken or without == "float32":
        _say(f"computes in {chosen}: {measured}")
    elif without == "bfloat16" and measured.ratio < 1:
        _warn_of_weights(measured)
    else:
        _say(f"no autocast: the weights are in {without}")
    return taken


_told: set[str] = set()
"""What was said in this process."""


def _goes_on(chosen: str, measured: Speeds) -> str:
    return f"goes on in {chosen}, as it began; {measured}"


def _say(message: str) -> None:
    if message not in _told:
        _told.add(message)
        _log.info("%s", message)


def _warn_of_weights(measured: Speeds) -> None:
    message = (
        f"the model's weights are in bfloat16, and {measured}; load it with dtype=float32 if memory "
        "allows"
    )
    if message not in _told:
        _told.add(message)
        warnings.warn(message, stacklevel=4)
