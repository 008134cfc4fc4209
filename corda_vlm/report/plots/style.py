"""How pictures look: colors and markers that stay with a method, frames, and files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.ticker import FuncFormatter, LogFormatter

from corda_vlm.files import atomic_write

# Okabe and Ito's palette, then Tol's muted one: told apart with any color vision. Marker and label repeat
# what color says.
COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
    "#332288", "#882255", "#117733", "#999933", "#666666", "#AA4499",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h", "d")
# The three of the demo look the same in every report.
FIRST = ("corda-kpm", "lora", "full")
INK, FAINT = "#222222", "#767676"


@contextmanager
def literal_text() -> Iterator[None]:
    """Within it, text in pictures is what it says: names come from users, and `$x_1$` is a name, no formula.

    Every function that draws is decorated with it; so numbers on logarithmic axes are `plain_powers`, as matplotlib's own
    are formulas. A sign that the font does not have becomes a box, without a warning for each.
    """
    with rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        yield


def plain_powers(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers."""
    axis.set_major_formatter(_PlainPowers())
    axis.set_minor_formatter(_PlainPowers(minor_thresholds=(1, 0.4)))


class _PlainPowers(LogFormatter):
    """0.01 for 1e-02, wherever matplotlib would write a number at all."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}".replace("-", "−") if super().__call__(x, pos) else ""


def styles(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Method -> (color, marker): those of the demo always their own, the others what is left.

    From the thirteenth method on colors come again, with other markers.
    """
    free = iter(range(len(FIRST), len(COLORS) + len(methods)))
    styles = {}
    for method in methods:
        index = FIRST.index(method) if method in FIRST else next(free)
        again = index // len(COLORS)
        styles[method] = (
            COLORS[index % len(COLORS)],
            MARKERS[(index + 3 * again) % len(MARKERS)],
        )
    return styles


def frame(axes: Any) -> None:
    """Faint axes without a box."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelcolor=INK)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def percent_axis() -> Any:
    """Shares in percent, with decimals where the axis is so short that it has marks between whole percents."""
    return FuncFormatter(lambda share, _: f"{100 * share + 0.0:.5g}%")


def save(figure: Any, path: Path) -> None:
    """As PNG, atomically, the same bytes for the same picture."""
    with atomic_write(path) as partial:
        figure.savefig(
            partial, dpi=160, format="png", facecolor="white", metadata={"Software": None}
        )
