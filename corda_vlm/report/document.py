"""A report's content as Markdown and as one HTML page that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from corda_vlm.evaluation.scores import BASE
from corda_vlm.report import markup


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; the first column names the row, the others are right-aligned."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG file; `alt` says in words what it shows.

    Attributes:
        live: HTML that a page shows in its place, with values to point at; empty for none.
    """

    path: Path
    alt: str
    caption: str
    live: str = ""


@dataclass(frozen=True)
class Tile:
    """One example of a gallery.

    Attributes:
        image: PNG or JPEG; None for one without a picture.
        title: what was asked; empty where nothing was.
        lines: (who, what they said, whether it is right); None for a line that is not judged.
        place: where a person finds the example.
    """

    image: bytes | None
    title: str
    lines: Sequence[tuple[str, str, bool | None]]
    place: str = ""


@dataclass(frozen=True)
class Gallery:
    """Examples side by side; `picture` shows them where a page has no tiles, None where none of them has an image."""

    caption: str
    tiles: Sequence[Tile]
    picture: Picture | None = None


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it: paragraphs, pictures, galleries and tables, in this order.

    Attributes:
        folded: closed at first in the HTML, for what only some readers want.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    galleries: Sequence[Gallery] = field(default=(), kw_only=True)
    folded: bool = False

    @property
    def has_content(self) -> bool:
        tables = [table for table in self.tables if table.rows]
        return bool(self.paragraphs or self.pictures or self.galleries or tables)


@dataclass(frozen=True)
class Report:
    """A title, first paragraphs, and sections. All text is as of `markup`: plain, but for what `bold` and `code` wrap."""

    title: str
    lead: Sequence[str]
    sections: Sequence[Section] = field(default_factory=tuple)


def markdown(report: Report, folder: Path) -> str:
    """The report as GitHub's Markdown; pictures are linked relative to `folder`."""
    lines = [f"# {markup.markdown(report.title)}", ""]
    for paragraph in report.lead:
        lines += [markup.markdown(paragraph), ""]
    for section in _filled(report):
        lines += [f"## {markup.markdown(section.heading)}", ""]
        for paragraph in section.paragraphs:
            lines += [markup.markdown(paragraph), ""]
        shown = [gallery.picture for gallery in section.galleries if gallery.picture is not None]
        for picture in [*section.pictures, *shown]:
            target = markup.link(picture.path.relative_to(folder).as_posix())
            lines += [f"![{markup.markdown(markup.terminal(picture.alt))}]({target})", ""]
            lines += [markup.markdown(picture.caption), ""]
        as_tables = [_as_table(gallery) for gallery in section.galleries if gallery.picture is None]
        for table in [*as_tables, *section.tables]:
            if not table.rows:
                continue
            lines += [markup.markdown(table.caption), ""] if table.caption else []
            lines.append(_md_row(table.headings))
            lines.append("|" + "|".join(["---"] + ["---:"] * (len(table.headings) - 1)) + "|")
            lines += [_md_row(row) for row in table.rows]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _filled(report: Report) -> list[Section]:
    """The sections that say or show something."""
    return [section for section in report.sections if section.has_content]


def _md_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(markup.markdown(cell, cell=True) for cell in cells) + " |"


def _as_table(gallery: Gallery) -> Table:
    """Questions without pictures, a row each."""
    headings = ["question", *(who for who, _, _ in gallery.tiles[0].lines)]
    rows = [
        [tile.title or tile.place, *(said for _, said, _ in tile.lines)] for tile in gallery.tiles
    ]
    return Table(gallery.caption, headings, rows)


def page(report: Report) -> str:
    """The report as one HTML file with its pictures and style inside."""
    body = [f"<h1>{markup.page(report.title)}</h1>"]
    body += [f'<p class="lead">{markup.page(paragraph)}</p>' for paragraph in report.lead]
    sections, numbers = _filled(report), itertools.count(1)
    body += [*_contents(sections), '<div id="filter"></div>']
    for place, section in enumerate(sections, start=1):
        inside = [f"<p>{markup.page(paragraph)}</p>" for paragraph in section.paragraphs]
        inside += [_figure(picture) for picture in section.pictures]
        inside += [_gallery(gallery) for gallery in section.galleries]
        inside += [_table(table, next(numbers)) for table in section.tables if table.rows]
        heading = f'<h2 id="section-{place}">{markup.page(section.heading)}</h2>'
        if section.folded:
            body += ["<details>", f"<summary>{heading}</summary>", *inside, "</details>"]
        else:
            body += ["<section>", heading, *inside, "</section>"]
    title = markup.page(markup.terminal(report.title))
    style, script = (
        (_LOOK / name).read_text(encoding="utf-8") for name in ("style.css", "script.js")
    )
    return _PAGE.format(title=title, style=style, script=script, body="\n".join(body))


def _contents(sections: Sequence[Section]) -> list[str]:
    """Links to the sections, where there are so many that a reader wants them."""
    if len(sections) < 3:
        return []
    links = [
        f'<li><a href="#section-{place}">{markup.page(section.heading)}</a></li>'
        for place, section in enumerate(sections, start=1)
    ]
    return ['<nav aria-label="contents"><span>On this page</span><ol>', *links, "</ol></nav>"]


def _figure(picture: Picture) -> str:
    about = f"<figcaption>{markup.page(picture.caption)}</figcaption>"
    if picture.live:
        return f"<figure>{picture.live}{about}</figure>"
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{markup.page(markup.terminal(picture.alt))}">'
        f"{about}</figure>"
    )


def _gallery(gallery: Gallery) -> str:
    tiles = "\n".join(_tile(tile) for tile in gallery.tiles)
    about = f'<p class="about">{markup.page(gallery.caption)}</p>'
    return f'{about}\n<ul class="gallery">\n{tiles}\n</ul>'


def _tile(tile: Tile) -> str:
    inside = ""
    if tile.image is not None:
        kind = "png" if tile.image.startswith(b"\x89PNG") else "jpeg"
        data = base64.b64encode(tile.image).decode("ascii")
        what = markup.page(markup.terminal(tile.place))
        inside += f'<img src="data:image/{kind};base64,{data}" alt="{what}" loading="lazy">'
    if tile.title:
        inside += f"<p>{markup.page(tile.title)}</p>"
    marks = {True: ("right", "✓"), False: ("wrong", "✗"), None: ("known", "")}
    for who, said, right in tile.lines:
        look, mark = marks[right]
        inside += (
            f'<div class="{look}"><span>{markup.page(who)}</span> {markup.page(said)}'
            + (f'<b aria-label="{look}">{mark}</b>' if mark else "")
            + "</div>"
        )
    return f'<li title="{markup.page(markup.terminal(tile.place))}">{inside}</li>'


def _table(table: Table, number: int) -> str:
    head = "".join(f'<th scope="col">{markup.page(cell)}</th>' for cell in table.headings)
    of_methods = table.headings[0] == "method"
    rows = "\n".join(
        (_method_row(row[0]) if of_methods else "<tr>")
        + f'<th scope="row">{markup.page(row[0])}</th>'
        + "".join(f"<td>{markup.page(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(table.headings) else ""
    # The words about a table stand outside it: it scrolls by itself, also with the keyboard, on a narrow screen.
    about = (
        f'<p class="about" id="table-{number}">{markup.page(table.caption)}</p>\n'
        if table.caption
        else ""
    )
    prose = ' class="prose"' if not any(table.headings) else ""
    named = f'aria-labelledby="table-{number}"' if table.caption else 'aria-label="table"'
    return (
        f'{about}<div class="wide" tabindex="0" role="region" {named}>'
        f"<table {named}{prose}>{head}<tbody>\n{rows}\n</tbody></table></div>"
    )


def _method_row(cell: str) -> str:
    """A row that a reader may hide with the others of its method; of the model before training one that stays."""
    method = markup.terminal(cell).removesuffix(", scaled")
    return "<tr>" if method == BASE else f'<tr data-method="{markup.page(method)}">'


_LOOK = Path(__file__).with_name("look")

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""
