"""A sheet of pictures with what two models said of each, for pages that show no tiles."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from corda_vlm.report.document import Tile
from corda_vlm.report.markup import shortened
from corda_vlm.report.plots.style import FAINT, INK, literal_text, save

_COLUMNS = 4
_LETTERS = 26
"""On a line below a picture."""

_LOOK = {True: ("✓", "#00714f"), False: ("✗", "#b04a00"), None: (" ", FAINT)}


@literal_text()
def contact_sheet(tiles: Sequence[Tile], path: Path) -> None:
    """Draw the tiles in lines of four, each with its question and what was said below it."""
    columns = min(_COLUMNS, len(tiles))
    lines = -(-len(tiles) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.75 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, tile in zip(axes.flat, tiles, strict=False):
        if tile.image is not None:
            axis.imshow(np.asarray(Image.open(io.BytesIO(tile.image)).convert("RGB")))
        title = "\n".join(wrap(tile.title, _LETTERS)[:3])
        axis.set_title(title, fontsize=8, color=INK, loc="left")
        for row, (who, said, right) in enumerate(tile.lines):
            mark, color = _LOOK[right]
            text = (
                f"{mark} {shortened(who, 11)}: {shortened(said, _LETTERS - 4 - min(len(who), 11))}"
            )
            axis.annotate(
                text, (0, 0), xycoords="axes fraction", xytext=(0, -10 - 11 * row),
                textcoords="offset points", fontsize=8, color=color, va="center",
            )  # fmt: skip
    save(figure, path)
