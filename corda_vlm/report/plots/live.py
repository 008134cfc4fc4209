"""The trade-off as an SVG for the page: every mark tells its values where the pointer or the keyboard is, also without script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from corda_vlm.names import listed
from corda_vlm.report import markup
from corda_vlm.report.analysis.curve import Point, Setting, mean_point
from corda_vlm.report.analysis.results import Results
from corda_vlm.report.plots.style import MARKERS, styles
from corda_vlm.report.plots.tradeoff import envelope, new_task
from corda_vlm.report.words import percent, setting_text

_WIDTH, _HEIGHT = 860.0, 500.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 78.0, 20.0, 16.0, 58.0
_NAMED = 6
"""Of so many methods each has its name beside its curve; of more the legend alone tells them."""

# Each of matplotlib's markers as a path around (0, 0); a star for the base model.
_SHAPES = {
    "o": "M-5.5,0a5.5,5.5 0 1,0 11,0a5.5,5.5 0 1,0 -11,0z", "s": "M-5,-5h10v10h-10z", "^": "M0,-6L6,5H-6z",
    "D": "M0,-6.5L6.5,0L0,6.5L-6.5,0z", "v": "M0,6L6,-5H-6z", "P": "M-2,-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    "X": "M-6,-3L-3,-6L0,-3L3,-6L6,-3L3,0L6,3L3,6L0,3L-3,6L-6,3L-3,0z", "p": "M0,-6L6,-1.5L3.7,5.5H-3.7L-6,-1.5z",
    "<": "M-6,0L5,-6V6z", ">": "M6,0L-5,-6V6z", "h": "M0,-6.5L5.6,-3.2V3.2L0,6.5L-5.6,3.2V-3.2z", "d": "M0,-7L4,0L0,7L-4,0z",
    "*": "M0,-10L2.6,-3.4L9.5,-3.1L4.1,1.3L5.9,8.1L0,4.2L-5.9,8.1L-4.1,1.3L-9.5,-3.1L-2.6,-3.4z",
}  # fmt: skip
assert set(MARKERS) < set(_SHAPES)


class _Scale:
    """From a share on one axis to a place in the picture."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        self.low, self.high, self.start, self.stop = low, high, start, stop

    def __call__(self, share: float) -> float:
        return self.start + (share - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round numbers within, some five of them."""
        rough = (self.high - self.low) / 5
        size = 10.0 ** np.floor(np.log10(rough))
        step = size * next(by for by in (1, 2, 5, 10) if by * size >= 0.7 * rough)
        first = int(np.ceil(self.low / step - 1e-9))
        last = int(np.floor(self.high / step + 1e-9))
        return [n * step for n in range(first, last + 1)]


def tradeoff_svg(results: Results) -> str:
    """Task accuracy against kept knowledge, with a legend, as HTML; empty where there is nothing to draw."""
    base = results.base_point
    points = {method: placed for method in results.trained if (placed := results.points(method))}
    if base is None or not points:
        return ""
    means = {
        method: {setting: mean_point(of.values()) for setting, of in settings.items()}
        for method, settings in points.items()
    }
    every = [p for settings in points.values() for of in settings.values() for p in of.values()]
    x, y = _scales([*every, base])
    look = styles(list(points))
    parts = [*_axes(x, y, results), _point("base model", base, "*", "var(--ink)", x, y)]
    for method, of in means.items():
        color, marker = look[method]
        inside = [*_curves(of, base, color, x, y), *_seeds(points[method], color, x, y)]
        for setting, mean in of.items():
            if setting.scale == 1.0:
                count = len(points[method][setting])
                told = f"{method}, {setting_text(setting)}"
                told += f", mean of {count} seeds" if count > 1 else ""
                inside.append(_point(told, mean, marker, color, x, y))
        if len(means) <= _NAMED:
            inside.append(_name(method, of, color, x, y))
        parts.append(f"<g {_owner(method, color)}>{''.join(inside)}</g>")
    label = f"Accuracy on the new task against knowledge kept, for {listed(list(points))}; arrow keys go from mark to mark."
    svg = f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{markup.page(label)}">{"".join(parts)}</svg>'
    return f'<div class="plot">{svg}</div>{_legend(look)}'


def _owner(method: str, color: str) -> str:
    return f'data-method="{markup.page(method)}" data-color="{color}"'


def _scales(points: Sequence[Point]) -> tuple[_Scale, _Scale]:
    """Both axes, with some room; chance, where nothing is kept, is in sight unless all are far above it."""
    task, kept = [p.task for p in points], [p.kept for p in points]
    low, high = min(*kept, 1.0), max(*kept, 1.0)
    floor = low - 0.12 * max(high - low, 0.05) if low > 0.3 else min(low, 0.0) - 0.04
    side = 0.06 * max(max(task) - min(task), 0.02)
    return (
        _Scale(min(task) - side, max(task) + side, _LEFT, _WIDTH - _RIGHT),
        _Scale(floor, high + 0.06 * (high - floor), _HEIGHT - _BOTTOM, _TOP),
    )


def _axes(x: _Scale, y: _Scale, results: Results) -> Iterator[str]:
    for share in x.ticks():
        yield f'<line class="grid" x1="{x(share):.1f}" x2="{x(share):.1f}" y1="{_TOP:g}" y2="{y.start:g}"/>'
        yield f'<text class="faint" text-anchor="middle" x="{x(share):.1f}" y="{y.start + 20:g}">{_short(share)}</text>'
    for share in y.ticks():
        yield f'<line class="grid" x1="{_LEFT:g}" x2="{x.stop:g}" y1="{y(share):.1f}" y2="{y(share):.1f}"/>'
        yield f'<text class="faint" text-anchor="end" x="{_LEFT - 8:g}" y="{y(share) + 5:.1f}">{_short(share)}</text>'
    middle = (_LEFT + x.stop) / 2
    yield f'<text text-anchor="middle" x="{middle:g}" y="{_HEIGHT - 10:g}">{markup.page(new_task(results))}</text>'
    up = (_TOP + y.start) / 2
    yield f'<text text-anchor="middle" transform="translate(18 {up:g}) rotate(-90)">knowledge kept</text>'


def _short(share: float) -> str:
    return f"{100 * share + 0.0:.5g}%".replace("-", "−")


def _point(told: str, at: Point, marker: str, color: str, x: _Scale, y: _Scale) -> str:
    """A mark with what it stands for, and an invisible disc around it to aim at."""
    words = f"{told}: new task {percent(at.task)}, kept {percent(at.kept)}"
    return (
        f'<g class="point" transform="translate({x(at.task):.1f} {y(at.kept):.1f})"><title>{markup.page(words)}</title>'
        f'<circle class="hit" r="13"/><path class="mark" d="{_SHAPES[marker]}" style="fill:{color}"/></g>'
    )


def _curves(
    means: Mapping[Setting, Point], base: Point, color: str, x: _Scale, y: _Scale
) -> Iterator[str]:
    """The line over learning rates, and dashed the most that is kept when scaled too."""
    unscaled = [point for setting, point in means.items() if setting.scale == 1.0]
    yield _line(unscaled, color, x, y, 'stroke-width="2.2"')
    if len(unscaled) < len(means):
        yield _line(envelope(means, base), color, x, y, 'stroke-width="1.4" stroke-dasharray="5 3"')


def _line(points: Sequence[Point], color: str, x: _Scale, y: _Scale, look: str) -> str:
    along = " ".join(f"{x(p.task):.1f},{y(p.kept):.1f}" for p in points)
    return f'<polyline points="{along}" fill="none" stroke="{color}" {look}/>'


def _seeds(
    settings: Mapping[Setting, Mapping[int | None, Point]], color: str, x: _Scale, y: _Scale
) -> Iterator[str]:
    for setting, by_seed in settings.items():
        if setting.scale == 1.0 and len(by_seed) > 1:
            for p in by_seed.values():
                yield f'<circle r="2.4" cx="{x(p.task):.1f}" cy="{y(p.kept):.1f}" fill="{color}" opacity=".4"/>'


def _name(method: str, means: Mapping[Setting, Point], color: str, x: _Scale, y: _Scale) -> str:
    """A method's name beside the middle of its curve."""
    along = sorted((p for s, p in means.items() if s.scale == 1.0), key=lambda p: p.task)
    if not along:
        return ""
    p = along[len(along) // 2]
    text = markup.page(markup.shortened(method, 28))
    return f'<text class="name" x="{x(p.task) + 11:.1f}" y="{y(p.kept) - 8:.1f}" style="fill:{color}">{text}</text>'


def _legend(look: Mapping[str, tuple[str, str]]) -> str:
    items = [
        f'<li><svg viewBox="-8 -8 16 16" aria-hidden="true"><path d="{_SHAPES[marker]}" fill="{color}"/></svg>'
        f"{markup.page(method)}</li>"
        for method, (color, marker) in look.items()
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'
