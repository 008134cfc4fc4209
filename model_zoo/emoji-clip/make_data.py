"""Render the emoji of nine public icon sets into parquet files, one file a style.

The icon sets and the emoji list are npm packages; nothing else is fetched. Run from a checkout::

    python model_zoo/emoji-clip/make_data.py                  # installs the packages with npm, in a temp folder
    python model_zoo/emoji-clip/make_data.py --npm-dir DIR    # DIR/node_modules has them already

An emoji is looked up in a style by its code points where the package maps them (``chars.json``), else
by name. Names differ between packages and between versions of CLDR, so the candidates are tried in
the order of how sure they are, over all emoji at once, and an icon is given to one emoji only.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import tempfile
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
TRAINED_STYLES = (
    "noto",
    "noto-v1",
    "fluent-emoji",
    "fluent-emoji-flat",
    "fluent-emoji-high-contrast",
    "twemoji",
    "emojione",
    "emojione-monotone",
)
UNSEEN_STYLE = "openmoji"
EMOJI_PACKAGE = "emojibase-data"
# The versions the shipped files were made from: another version may draw or name an emoji differently.
PACKAGES = {
    EMOJI_PACKAGE: "17.0.0",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/emojione-monotone": "1.2.1",
    "@iconify-json/openmoji": "1.2.29",
}
SKIPPED_GROUPS = {"component", "flags"}
# For the picture: a few of every group, people and arrows among them.
PICTURE = (
    "1F600",
    "1F469-200D-1F680",
    "1F436",
    "1F984",
    "1F33B",
    "1F355",
    "1F697",
    "26BD",
    "1F511",
)
PICTURE += ("1F4A1", "2764", "27A1", "0033-FE0F-20E3")
IMAGE_SIZE = 64
SUPERSAMPLE = 4
SPLIT_SEED = 0
HELDOUT_SHARE = 0.20
VAL_SHARE = 0.03
SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("style", pa.string()),
        ("hexcode", pa.string()),
        ("emoji", pa.string()),
        ("label", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("group", pa.string()),
        ("subgroup", pa.string()),
        ("split", pa.string()),
    ]
)


@dataclass(frozen=True)
class Emoji:
    """One emoji of the list, with the names it goes by, surest first."""

    hexcode: str
    emoji: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


@dataclass(frozen=True)
class IconSet:
    """One style: its drawings (name -> iconify icon), its code point map and where it comes from."""

    style: str
    icons: dict[str, dict[str, Any]]
    chars: dict[str, str]
    package: str
    version: str
    author: str
    author_url: str
    licence: str
    licence_url: str


def slug(text: str) -> str:
    """``"Piñata: A & B"`` -> ``"pinata-a-b"``, the way icon names are written."""
    plain = unicodedata.normalize("NFKD", text.replace("&", " ")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower().replace("’", "").replace("'", "")).strip("-")


def bare_hexcode(hexcode: str) -> str:
    """Code points without the variation selector, which packages write or leave out at will."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def read_json(path: Path) -> Any:
    """One JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def install_packages(folder: Path) -> Path:
    """npm-install the pinned packages into `folder` (no scripts are run) and return node_modules."""
    specs = [f"{name}@{version}" for name, version in PACKAGES.items()]
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--legacy-peer-deps"]
    subprocess.run(["npm", "install", *options, "--prefix", str(folder), *specs], check=True)
    return folder / "node_modules"


def read_emoji(modules: Path) -> list[Emoji]:
    """The emoji to draw: all of emojibase's but flags, components and skin tones."""
    package = modules / EMOJI_PACKAGE
    meta = read_json(package / "meta" / "groups.json")
    found = []
    for entry in read_json(package / "en" / "data.json"):
        group = meta["groups"].get(str(entry.get("group")), "component")
        if group in SKIPPED_GROUPS:
            continue
        found.append(
            Emoji(
                hexcode=entry["hexcode"],
                emoji=entry["emoji"],
                label=entry["label"],
                tags=tuple(entry.get("tags", ())),
                group=group,
                subgroup=meta["subgroups"][str(entry["subgroup"])],
            )
        )
    return found


def resolve_aliases(icon_set: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All icons by name, aliases included, each with its box and its mirroring spelled out."""
    box = {"width": icon_set.get("width", 16), "height": icon_set.get("height", 16)}
    box |= {"left": 0, "top": 0, "hFlip": False, "vFlip": False, "rotate": 0}
    icons = {name: box | icon for name, icon in icon_set["icons"].items()}
    pending = dict(icon_set.get("aliases", {}))
    while pending:
        ready = {name: alias for name, alias in pending.items() if alias["parent"] in icons}
        if not ready:
            break  # a parent that does not exist: the package is inconsistent, the alias is useless
        for name, alias in ready.items():
            parent = icons[alias["parent"]]
            changed = {key: alias[key] for key in box if key in alias}
            for key in ("hFlip", "vFlip"):
                changed[key] = bool(parent[key]) ^ bool(alias.get(key, False))
            changed["rotate"] = (parent["rotate"] + alias.get("rotate", 0)) % 4
            icons[name] = parent | changed | {"alias_of": parent.get("alias_of", alias["parent"])}
            del pending[name]
    return icons


def read_icon_set(modules: Path, style: str) -> IconSet:
    """One ``@iconify-json`` package."""
    package = modules / "@iconify-json" / style
    about, info = read_json(package / "package.json"), read_json(package / "info.json")
    return IconSet(
        style=style,
        icons=resolve_aliases(read_json(package / "icons.json")),
        chars={bare_hexcode(k): v for k, v in read_json(package / "chars.json").items()},
        package=about["name"],
        version=about["version"],
        author=info["author"]["name"],
        author_url=info["author"]["url"],
        licence=info["license"]["spdx"],
        licence_url=info["license"]["url"],
    )


def match(emoji: list[Emoji], target: IconSet, all_sets: list[IconSet], modules: Path) -> list[str]:
    """The icon name of each emoji in `target` ('' where the style does not draw it).

    Four rounds: the package's own code point map; the label; the names other packages give these
    code points, with their aliases; the Unicode name and the JoyPixels short codes (EmojiOne's own).
    """
    names_of_icon: dict[str, dict[str, set[str]]] = {}
    for other in all_sets:
        same: dict[str, set[str]] = {}
        for name, icon in other.icons.items():
            if not (icon["hFlip"] or icon["vFlip"] or icon["rotate"]):
                same.setdefault(icon.get("alias_of", name), set()).add(name)
        names_of_icon[other.style] = same
    unicode_names = read_json(modules / EMOJI_PACKAGE / "meta" / "unicode-names.json")
    short_codes = read_json(modules / EMOJI_PACKAGE / "en" / "shortcodes" / "joypixels.json")

    def own(e: Emoji) -> list[str]:
        return [target.chars[key]] if (key := bare_hexcode(e.hexcode)) in target.chars else []

    def label(e: Emoji) -> list[str]:
        return [slug(e.label)]

    def elsewhere(e: Emoji) -> list[str]:
        names: list[str] = []
        for other in all_sets:
            name = other.chars.get(bare_hexcode(e.hexcode))
            if name in other.icons:
                root = other.icons[name].get("alias_of", name)
                names += [name, *sorted(names_of_icon[other.style].get(root, ()))]
        return names

    def other_names(e: Emoji) -> list[str]:
        codes = short_codes.get(e.hexcode, [])
        codes = [codes] if isinstance(codes, str) else codes
        return [slug(unicode_names.get(e.hexcode, "")), *(slug(code) for code in codes)]

    chosen = [""] * len(emoji)
    taken: set[str] = set()
    for candidates in (own, label, elsewhere, other_names):
        for i, e in enumerate(emoji):
            if chosen[i]:
                continue
            for name in candidates(e):
                icon = target.icons.get(name)
                if icon is None:
                    continue
                flips = icon["hFlip"], icon["vFlip"], icon["rotate"]
                drawing = f"{icon.get('alias_of', name)}/{flips}"
                if drawing not in taken:
                    chosen[i] = name
                    taken.add(drawing)
                    break
    return chosen


def svg_of(icon: dict[str, Any]) -> str:
    """A whole SVG document of an iconify icon; monochrome icons are black."""
    left, top, width, height = (icon[key] for key in ("left", "top", "width", "height"))
    body = icon["body"].replace("currentColor", "#000000")
    if icon["hFlip"] or icon["vFlip"]:
        sx, sy = (-1 if icon["hFlip"] else 1), (-1 if icon["vFlip"] else 1)
        dx = 2 * left + width if icon["hFlip"] else 0
        dy = 2 * top + height if icon["vFlip"] else 0
        body = f'<g transform="translate({dx} {dy}) scale({sx} {sy})">{body}</g>'
    if icon["rotate"]:
        centre = f"{left + width / 2} {top + height / 2}"
        body = f'<g transform="rotate({90 * icon["rotate"]} {centre})">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>'
    )


def render(icon: dict[str, Any]) -> Image.Image:
    """The icon on white at `IMAGE_SIZE`; drawn larger and averaged down, which keeps thin outlines."""
    # only needed here: reading the finished files must not ask for it
    import resvg_py  # pyright: ignore[reportMissingImports]

    side = IMAGE_SIZE * SUPERSAMPLE
    png = resvg_py.svg_to_bytes(
        svg_string=svg_of(icon), width=side, height=side, background="white", skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if image.size != (side, side):  # a box that is not square: centre it instead of stretching it
        canvas = Image.new("RGB", (side, side), "white")
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def encode(image: Image.Image) -> bytes:
    """Lossless WebP: two thirds the size of an optimised PNG on these drawings."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=100, method=4)
    return buffer.getvalue()


def split_of(hexcode: str, style: str) -> str:
    """'train', 'val' or 'heldout', from a seeded hash of the pair: adding a style moves no pair."""
    if style == UNSEEN_STYLE:
        return UNSEEN_STYLE
    digest = hashlib.sha256(f"{SPLIT_SEED}:{hexcode}:{style}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < HELDOUT_SHARE:
        return "heldout"
    return "val" if position < HELDOUT_SHARE + VAL_SHARE else "train"


def write_style(icon_set: IconSet, emoji: list[Emoji], names: list[str], out: Path) -> list[str]:
    """Render one style and write its parquet file; returns the split of each row."""
    rows = []
    for e, name in zip(emoji, names, strict=True):
        if not name:
            continue
        rows.append(
            {
                "image": encode(render(icon_set.icons[name])),
                "style": icon_set.style,
                "hexcode": e.hexcode,
                "emoji": e.emoji,
                "label": e.label,
                "tags": list(e.tags),
                "group": e.group,
                "subgroup": e.subgroup,
                "split": split_of(e.hexcode, icon_set.style),
            }
        )
    metadata = {
        "source_package": icon_set.package,
        "source_version": icon_set.version,
        "author": icon_set.author,
        "author_url": icon_set.author_url,
        "licence": icon_set.licence,
        "licence_url": icon_set.licence_url,
        "text_package": f"{EMOJI_PACKAGE}@{PACKAGES[EMOJI_PACKAGE]} (MIT)",
        "changes": f"rasterised to {IMAGE_SIZE}x{IMAGE_SIZE} pixels on white, lossless WebP",
    }
    table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata))
    pq.write_table(table, out, compression="zstd")
    return [row["split"] for row in rows]


def draw_picture(data_dir: Path, out: Path) -> None:
    """A few emoji in all styles, one column a style, from the finished files."""
    styles = (*TRAINED_STYLES, UNSEEN_STYLE)
    step, top, left = IMAGE_SIZE + 8, 62, 130
    size = (left + step * len(styles), top + step * len(PICTURE))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for column, style in enumerate(styles):
        pen.text((left + step * column, 4), style.replace("-", "\n"), fill="black", font_size=10)
        for row in pq.read_table(data_dir / f"{style}.parquet").to_pylist():
            if row["hexcode"] in PICTURE:
                y = top + step * PICTURE.index(row["hexcode"])
                canvas.paste(
                    Image.open(io.BytesIO(row["image"])).convert("RGB"), (left + step * column, y)
                )
                pen.text((4, y + 26), row["label"][:22], fill="black", font_size=10)
    canvas.quantize(192, dither=Image.Dither.NONE).save(out, optimize=True)


def main() -> None:
    """Render every style and print the coverage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--npm-dir", type=Path, help="folder whose node_modules has the packages")
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--picture-only", action="store_true", help="samples.png from the files")
    parser.add_argument("--styles", nargs="*", default=[*TRAINED_STYLES, UNSEEN_STYLE])
    arguments = parser.parse_args()
    if arguments.picture_only:
        draw_picture(arguments.out, HERE / "samples.png")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.npm_dir:
            modules = arguments.npm_dir / "node_modules"
        else:
            modules = install_packages(Path(temporary))
        emoji = read_emoji(modules)
        sets = {s: read_icon_set(modules, s) for s in (*TRAINED_STYLES, UNSEEN_STYLE)}
        for name, version in PACKAGES.items():
            found = read_json(modules / name / "package.json")["version"]
            if found != version:
                print(f"warning: {name} is {found}, the shipped files were made from {version}")
        print(f"{len(emoji)} emoji")
        for style in arguments.styles:
            names = match(emoji, sets[style], list(sets.values()), modules)
            out = arguments.out / f"{style}.parquet"
            splits = write_style(sets[style], emoji, names, out)
            missing = [e.label for e, name in zip(emoji, names, strict=True) if not name]
            print(
                f"{style:28} {len(splits):5} of {len(emoji)} ({len(splits) / len(emoji):.1%}) "
                f"{out.stat().st_size / 1e6:5.2f} MB  {dict(Counter(splits))}  missing e.g. {missing[:6]}",
                flush=True,
            )
    draw_picture(arguments.out, HERE / "samples.png")


if __name__ == "__main__":
    main()
