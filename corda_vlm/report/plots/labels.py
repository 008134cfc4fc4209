"""Where words go in a picture: beside what they name, over no line and no other word."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

_Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels

# Right and left of the point, a little above or below its height, then above and below it.
_SIDES = (
    (1, 0.4), (1, -0.4), (-1, 0.4), (-1, -0.4), (0, 1), (0, -1), (1, 1.6), (-1, 1.6), (1, -1.6), (-1, -1.6),
)  # fmt: skip


class Words:
    """Places words on axes whose limits are final.

    Args:
        axes: matplotlib's.
        ink: lines to keep clear of, each (points, 2) in data coordinates, under the name of what they belong to.
    """

    def __init__(
        self, axes: Any, ink: Mapping[str, Sequence[Float[np.ndarray, "_points 2"]]]
    ) -> None:
        self.axes = axes
        axes.figure.draw_without_rendering()  # settles the layout, and with it the axes' pixels
        self._scale = axes.figure.dpi / 72
        self._taken: list[_Box] = []
        self._ink = {
            name: np.concatenate([_dots(axes.transData.transform(line)) for line in lines])
            for name, lines in ink.items()
        }

    def add(
        self, text: str, points: Sequence[tuple[float, float]], size: float, of: str, **look: Any
    ) -> None:
        """Write `text`, which names `of`, beside one of `points`; earlier points are preferred."""
        width, height = 0.62 * size * self._scale * len(text), 1.15 * size * self._scale
        gap = 7 * self._scale
        best, chosen = np.inf, None
        for order, (x, y) in enumerate(self.axes.transData.transform(points)):
            for dx, dy in _SIDES:
                left = x + dx * gap - width * (0.5 - 0.5 * dx)
                bottom = y + dy * (gap + 0.3 * height) - height * 0.5
                box = (left, bottom, left + width, bottom + height)
                cost = self._cost(box, of, margin=0.6 * height) + 0.5 * order + 0.2 * abs(dy)
                if cost < best:
                    best, chosen = cost, box
        assert chosen is not None
        self._taken.append(chosen)
        middle = ((chosen[0] + chosen[2]) / 2, (chosen[1] + chosen[3]) / 2)
        self.axes.text(
            *self.axes.transAxes.inverted().transform(middle), text, transform=self.axes.transAxes,
            ha="center", va="center", fontsize=size, zorder=5, **look,
        )  # fmt: skip

    def _cost(self, box: _Box, of: str, margin: float) -> float:
        """Ink under the box; other curves' ink near it, as they might be taken for what it names; other words."""
        cost = 0.0
        wide = (box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin)
        for name, dots in self._ink.items():
            cost += _inside(dots, box)
            cost += 0.5 * _inside(dots, wide) if name != of else 0.0
        for left, bottom, right, top in self._taken:
            apart = box[2] <= left or right <= box[0] or box[3] <= bottom or top <= box[1]
            cost += 0.0 if apart else 40.0
        frame = self.axes.get_window_extent()
        outside = box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1
        return cost + (80.0 if outside else 0.0)


def _dots(line: np.ndarray) -> np.ndarray:
    """A line as dots some five pixels apart."""
    pieces = [line]
    for start, end in itertools.pairwise(line):
        count = max(2, int(np.hypot(*(end - start)) / 5))
        pieces.append(start + np.linspace(0, 1, count)[:, None] * (end - start))
    return np.concatenate(pieces)


def _inside(dots: np.ndarray, box: _Box) -> int:
    x, y = dots[:, 0], dots[:, 1]
    return int(((x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])).sum())
