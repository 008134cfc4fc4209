"""How pictures look: colours and markers that stay with a method, frames, and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import PercentFormatter

from corda_vlm.files import atomic_write

# Okabe and Ito's palette, then Tol's muted one: told apart with any colour vision. Marker and label repeat
# what colour says.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
    "#332288", "#882255", "#117733", "#999933", "#666666", "#AA4499",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h", "d")
# The three of the demo look the same in every report.
FIRST = ("corda-kpm", "lora", "full")
INK, FAINT = "#222222", "#767676"


def styles(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Method -> (colour, marker): those of the demo always their own, the others what is left.

    From the thirteenth method on colours come again, with other markers.
    """
    free = iter(range(len(FIRST), len(COLOURS) + len(methods)))
    found = {}
    for method in methods:
        index = FIRST.index(method) if method in FIRST else next(free)
        again = index // len(COLOURS)
        found[method] = (
            COLOURS[index % len(COLOURS)],
            MARKERS[(index + 3 * again) % len(MARKERS)],
        )
    return found


def frame(axes: Any) -> None:
    """Faint axes without a box."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelcolor=INK)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def percent() -> Any:
    """Shares as whole percents."""
    return PercentFormatter(xmax=1.0, decimals=0, symbol="%")


def save(figure: Any, path: Path) -> None:
    """As PNG, atomically, the same bytes for the same picture."""
    with atomic_write(path) as partial:
        figure.savefig(
            partial, dpi=160, format="png", facecolor="white", metadata={"Software": None}
        )
