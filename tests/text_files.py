"""Ends text files in one newline, and lines without spaces, as editors do: `python -m tests.text_files FILE ...`.

It mends what it finds and then fails, so that a commit shows what was changed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def mended(text: str) -> str:
    """`text` as it should be. Two spaces at the end of a line mean a line break in Markdown, and are said otherwise."""
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).rstrip("\n") + "\n"


def main(paths: list[str]) -> int:
    """Mend the files; 1 if any needed it."""
    changed = 0
    for path in map(Path, paths):
        before = path.read_bytes().decode("utf-8")
        if before and mended(before) != before:
            path.write_bytes(mended(before).encode("utf-8"))
            print(f"mended {path}")
            changed = 1
    return changed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
