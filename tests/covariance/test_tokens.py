"""Padding is told from tokens, or refused."""

from __future__ import annotations

import pytest
import torch

from corda_vlm.covariance.tokens import TokenSelector, layout_of
from corda_vlm.errors import (
    CalibrationError,
)


def test_layouts() -> None:
    assert layout_of((4, 7), 4, 7) == "tokens"
    assert layout_of((4, 7, 2), 4, 7) == "tokens"
    assert layout_of((7, 4), 4, 7) == "sequence"
    assert layout_of((28,), 4, 7) == "flat"
    assert layout_of((4, 2, 3), 4, 6) == "flat"
    assert layout_of((4,), 4, 7) == layout_of((4, 1), 4, 7) == "pooled"
    assert layout_of((4, 8), 4, 7) is None
    assert layout_of((5,), 4, 7) is None


def test_selecting_tokens() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    x = torch.arange(24.0).reshape(4, 3, 2)
    expected = torch.stack([x[0, 0], x[0, 1], x[1, 0], x[3, 0], x[3, 1], x[3, 2]])
    selector = TokenSelector()
    selector.begin({"text": mask})

    def select(value: torch.Tensor, tower: str = "text") -> torch.Tensor:
        return selector.select(value, tower=tower, stream="s", site="site")

    assert torch.equal(select(x), expected)
    assert torch.equal(select(x.transpose(0, 1)), expected[[0, 2, 3, 1, 4, 5]])  # sequence first
    assert torch.equal(select(x.reshape(12, 2)), expected)
    assert torch.equal(select(x[:, 0]), x[[0, 1, 3], 0])  # pooled; the third sample is all padding
    assert torch.equal(select(x[:, :1]), x[[0, 1, 3], 0])
    assert torch.equal(select(x[..., None, :].expand(4, 3, 2, 2))[::2], expected)  # (B, L, h, d)
    assert select(x, tower="vision").data_ptr() == x.data_ptr()  # no mask: no copy
    for wrong in (torch.ones(4, 4, 2), torch.ones(5, 2), torch.ones(1, 1, 1, 1, 1)):
        with pytest.raises(
            CalibrationError, match=r"input of site has shape.*padding cannot be told"
        ):
            select(wrong)
    with pytest.raises(CalibrationError, match=r"expected \(tokens, d\)"):
        select(torch.ones(3))
    selector.begin({"text": torch.ones(4, 3, dtype=torch.long)})
    assert select(torch.ones(5, 2)).shape == (5, 2)  # nothing is padding, so nothing has to be told
    with pytest.raises(CalibrationError, match="mask of the text tower has shape"):
        selector.begin({"text": torch.ones(4)})


def test_tiles_of_images_are_told_and_a_stream_may_have_a_mask_of_its_own() -> None:
    tiles = torch.arange(24.0).reshape(2, 1, 2, 3, 2)  # (B, images, tiles, patches, d)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    selector = TokenSelector()
    selector.begin({"vision": mask, "states": mask[:, :3]})

    def select(x: torch.Tensor, stream: str) -> torch.Tensor:
        return selector.select(x, tower="vision", stream=stream, site="site")

    assert torch.equal(select(tiles, "s"), tiles.reshape(-1, 2)[mask.reshape(-1)])
    assert torch.equal(select(tiles[:, 0, 0], "states"), tiles[:, 0, 0].reshape(-1, 2))
    with pytest.raises(CalibrationError, match="padding cannot be told"):
        select(tiles[:, 0, 0], "s")


def test_as_many_rows_as_tokens_is_settled_or_refused() -> None:
    square = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    wide = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    x = torch.arange(18.0).reshape(3, 3, 2)

    def select(selector: TokenSelector, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        selector.begin({"text": mask})
        return selector.select(value, tower="text", stream="s", site="site")

    known = TokenSelector()
    select(known, torch.ones(3, 2, 2), wide)  # (L, B, d), unmistakable
    assert torch.equal(select(known, x, square), x[square.T])
    taken = TokenSelector()
    assert torch.equal(select(taken, x, square), x[square])  # batch first is the rule
    with pytest.raises(CalibrationError, match="batch size other than the number of tokens, 3"):
        select(taken, torch.ones(3, 2, 2), wide)
