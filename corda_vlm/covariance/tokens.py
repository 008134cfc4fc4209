"""Which rows of a layer's input are tokens, and which are padding."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from corda_vlm.errors import CalibrationError
from corda_vlm.families.layers.conv2d import patches

Masks = Mapping[str, Tensor]
"""Tower, or stream whose inputs are not those of its tower, -> (B, L), True (or 1) on tokens that count; without an entry
there is no padding."""


class TokenSelector:
    """Selects the rows of inputs that count.

    Inputs are (B, L, d), (B, L, h, d), (B, H, W, d) with H·W = L or more such axes, flattened (B·L, d), or pooled: (B, d)
    or (B, 1, d), where a row counts unless the whole sample is padding. (L, B, d) is taken as such where the mask
    tells it from (B, L, d), and remembered for the batches in which it does not (as many rows as tokens).

    Args:
        loose: towers whose mask is that of some layers alone; of other inputs every row counts.
    """

    def __init__(self, loose: Collection[str] = ()) -> None:
        self._loose = loose
        self._masks: dict[str, Tensor | None] = {}
        self._sequence_first: set[str] = set()
        self._taken_as_batch_first: set[str] = set()

    def begin(self, masks: Masks | None) -> None:
        """A new batch."""
        self._masks = {tower: _or_none(tower, mask) for tower, mask in (masks or {}).items()}

    def has_padding(self, tower: str, stream: str) -> bool:
        """Whether the batch in hand has tokens that do not count in this tower, or for this stream."""
        return self._masks.get(stream, self._masks.get(tower)) is not None

    def blocks(
        self,
        layer: nn.Linear | nn.Conv2d,
        x: Float[Tensor, "*shape"],
        *,
        tower: str,
        stream: str,
        site: str,
        places: Int[Tensor, " m"] | None = None,
    ) -> Iterator[Float[Tensor, "n d"]]:
        """The rows that a layer multiplies, of its input `x`: of an `nn.Linear` all at once, of a convolution its patches.

        Args:
            places: as of `select`.

        Raises:
            CalibrationError: an input of another shape, or a convolution in a tower with padding; names the site.
        """
        if not isinstance(layer, nn.Conv2d):
            yield self.select(x, tower=tower, stream=stream, site=site, places=places)
            return
        mask = self._masks.get(stream, self._masks.get(tower))
        if mask is not None and tower not in self._loose:
            raise CalibrationError(
                f"{site} is a convolution, and the {tower} tower has a mask: which of its patches are padding cannot be told. "
                "Leave that site out, or use batches without padding"
            )
        yield from patches(layer, x)

    def select(
        self,
        x: Float[Tensor, "*axes d"],
        *,
        tower: str,
        stream: str,
        site: str,
        places: Int[Tensor, " m"] | None = None,
    ) -> Float[Tensor, "n d"]:
        """The rows of `x` that are tokens; a view of `x` where all are.

        Args:
            places: of rows that were sent to an expert, where each was among all of the batch, (B, L) flattened.

        Raises:
            CalibrationError: an input of another shape; names the site.
        """
        if x.dim() < 2:
            raise CalibrationError(
                f"the input of {site} has shape {tuple(x.shape)}; expected (tokens, d), (B, L, d) or (B, H, W, d)"
            )
        mask = self._masks.get(stream, self._masks.get(tower))
        if mask is None:
            return x.reshape(-1, x.shape[-1])
        if places is not None:
            return x[mask.to(x.device).flatten()[places]]
        layout = layout_of(x.shape[:-1], *mask.shape)
        if layout == "sequence":
            if stream in self._taken_as_batch_first:
                raise CalibrationError(
                    f"{site} reads (tokens, batch, d), which could not be told in an earlier batch of as many rows as "
                    f"tokens. Use a batch size other than the number of tokens, {mask.shape[1]}"
                )
            self._sequence_first.add(stream)
        elif layout == "tokens" and mask.shape[0] == mask.shape[1] > 1:
            if stream in self._sequence_first:
                layout = "sequence"
            else:
                self._taken_as_batch_first.add(stream)
        if layout is None and tower in self._loose:
            return x.reshape(-1, x.shape[-1])
        if layout is None:
            raise CalibrationError(
                f"the input of {site} has shape {tuple(x.shape)}, and the mask of the {tower} tower has "
                f"{tuple(mask.shape)}: which rows are padding cannot be told. Give `masks` that fit, leave that site "
                "out, or use batches without padding"
            )
        mask, width = mask.to(x.device), x.shape[-1]
        if layout == "tokens":
            return x[mask].reshape(-1, width)
        if layout == "sequence":
            return x[mask.T].reshape(-1, width)
        return x.reshape(-1, width)[mask.any(dim=1) if layout == "pooled" else mask.reshape(-1)]


def layout_of(lead: Sequence[int], batch: int, length: int) -> str | None:
    """How the leading axes of an input go with a mask (batch, length); None if they do not."""
    lead = tuple(lead)
    if lead[:2] == (batch, length):
        return "tokens"
    if lead[:2] == (length, batch):
        return "sequence"
    if lead == (batch * length,) or (
        len(lead) >= 3 and (lead[0], math.prod(lead[1:])) == (batch, length)
    ):
        return "flat"
    if lead in ((batch,), (batch, 1)):
        return "pooled"
    return None


def _or_none(tower: str, mask: Tensor) -> Tensor | None:
    """The mask as booleans, or None if it keeps everything."""
    if mask.dim() != 2:
        raise CalibrationError(
            f"the mask of the {tower} tower has shape {tuple(mask.shape)}; expected (batch, tokens)"
        )
    mask = mask.bool()
    return None if bool(mask.all()) else mask
