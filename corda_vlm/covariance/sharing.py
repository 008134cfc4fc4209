"""Proof that the sites of a stream read one tensor, so that one covariance is theirs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from corda_vlm.errors import CalibrationError


@dataclass
class Sharing:
    """Proof, in the first batch that reaches a stream, that its sites read one tensor."""

    stream: str
    names: list[str]
    handles: list[RemovableHandle] = field(default_factory=list)
    proven: bool = False
    calls: Counter[str] = field(default_factory=Counter)
    # call number -> (first site that made it, its input, how many sites are still to come)
    open: dict[int, tuple[str, Tensor, int]] = field(default_factory=dict)

    def compare(self, name: str, x: Tensor) -> None:
        number = self.calls[name]
        self.calls[name] += 1
        if number not in self.open:
            # Held until the last site has read it, so that no other tensor can get its address.
            self.open[number] = (name, x, len(self.names) - 1)
            return
        first, seen, left = self.open[number]
        if not _same(x, seen):
            raise CalibrationError(
                f"{first} and {name} are declared to read one input (stream {self.stream!r}), but they read different "
                f"ones of shapes {tuple(seen.shape)} and {tuple(x.shape)}; give them streams of their own"
            )
        if left > 1:
            self.open[number] = (first, seen, left - 1)
        else:
            del self.open[number]

    def conclude(self) -> None:
        if not self.proven:
            if len({self.calls[name] for name in self.names}) > 1:
                calls = ", ".join(f"{name} {self.calls[name]} times" for name in self.names)
                raise CalibrationError(
                    f"the sites of stream {self.stream!r} are declared to read one input, but in one batch the model "
                    f"called {calls}; give them streams of their own"
                )
            self.proven = True
            for handle in self.handles:
                handle.remove()

    def forget(self) -> None:
        self.open.clear()
        self.calls.clear()


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
