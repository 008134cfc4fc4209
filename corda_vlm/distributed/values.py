"""Results of several kinds from each process to all, to the bit: trees of dataclasses, lists, dicts, numbers, texts and tensors.

As JSON and the bytes of tensors, so that nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from corda_vlm.distributed.agree import AT_WORK, made_everywhere, told_everywhere
from corda_vlm.distributed.deal import Share, dealt
from corda_vlm.distributed.sums import send_from
from corda_vlm.progress import Meter

_Made = TypeVar("_Made")


def values_everywhere(
    what: str, make: Callable[[], _Made], types: tuple[type, ...] = ()
) -> list[_Made]:
    """What `make()` gives on each process, by rank, on all; tensors on the CPU.

    Args:
        what: names it, for messages.
        types: the dataclasses that it holds.

    Raises:
        CordaError: it failed on another process, or one has ended.
    """
    share = Share.here()
    own = made_everywhere(what, make, AT_WORK)
    if share.is_all:
        return [own]
    tensors: list[Tensor] = []
    packed = json.dumps(_packed(own, tensors)).encode()
    sizes = told_everywhere(f"the size of {what}", lambda: len(packed))
    every: list[Any] = []
    for sender, size in enumerate(sizes):
        text = torch.empty(size, dtype=torch.uint8)
        if sender == share.rank:
            text = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        send_from(sender, [text], torch.uint8)
        tree = json.loads(bytes(text.numpy()))
        there = tensors if sender == share.rank else _empty(tree)
        send_from(sender, (_as_bytes(tensor) for tensor in there), torch.uint8)
        every.append(own if sender == share.rank else _unpacked(tree, there, types))
    return every


def dealt_out(
    what: str,
    groups: Mapping[str, Sequence[str]],
    costs: Mapping[str, float],
    make: Callable[[str], Mapping[str, _Made]],
    types: tuple[type, ...] = (),
) -> dict[str, _Made]:
    """What `make` gives for each group of sites, by site; the processes do this between them, the largest group first.

    Args:
        what: the work, as progress and messages tell it.
        groups: name -> the sites that are done together.
        costs: of each group, in any unit.
        types: the dataclasses that the results hold.

    Returns:
        the results of all, the same to the bit on every process.

    Raises:
        CordaError: a group failed on any process, or one has ended.
    """

    def work() -> dict[str, _Made]:
        made: dict[str, _Made] = {}
        own = dealt(costs, Share.here())
        with Meter(what, sum(len(groups[group]) for group in own), unit="site") as meter:
            for group in own:
                made.update(make(group))
                meter.update(len(groups[group]))
        return made

    return {
        name: made for own in values_everywhere(what, work, types) for name, made in own.items()
    }


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    """`value` as JSON has it; its tensors go to the end of the list."""
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().contiguous())
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": len(tensors) - 1, "dtype": dtype, "shape": list(value.shape)}
    if is_dataclass(value):
        parts = {f.name: _packed(getattr(value, f.name), tensors) for f in fields(value)}
        return {"class": type(value).__name__, "parts": parts}
    if isinstance(value, tuple):
        return {"tuple": [_packed(item, tensors) for item in value]}
    if isinstance(value, list):
        return {"list": [_packed(item, tensors) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_packed(k, tensors), _packed(v, tensors)] for k, v in value.items()]}
    return value


def _unpacked(tree: Any, tensors: list[Tensor], types: tuple[type, ...]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "class" in tree:
        kind = next(kind for kind in types if kind.__name__ == tree["class"])
        return kind(**{n: _unpacked(v, tensors, types) for n, v in tree["parts"].items()})
    if "dict" in tree:
        pairs = [[_unpacked(item, tensors, types) for item in pair] for pair in tree["dict"]]
        return dict(pairs)
    is_tuple = "tuple" in tree
    items = [_unpacked(item, tensors, types) for item in tree["tuple" if is_tuple else "list"]]
    return tuple(items) if is_tuple else items


def _empty(tree: Any) -> list[Tensor]:
    """Tensors of the dtypes and shapes that a packed value tells, in order."""
    found: dict[int, Tensor] = {}

    def look(tree: Any) -> None:
        if isinstance(tree, list):
            for item in tree:
                look(item)
        elif isinstance(tree, dict):
            if "tensor" in tree:
                dtype = getattr(torch, tree["dtype"])
                found[tree["tensor"]] = torch.empty(tree["shape"], dtype=dtype)
            else:
                look(list(tree.values()))

    look(tree)
    return [found[number] for number in sorted(found)]


def _as_bytes(tensor: Tensor) -> Tensor:
    return (
        tensor.view(-1).view(torch.uint8)
        if tensor.numel()
        else tensor.new_empty(0, dtype=torch.uint8)
    )
