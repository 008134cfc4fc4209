"""Names of files, and lists of names in sentences."""

from __future__ import annotations

import pytest

from corda_vlm.names import listed, quoted


@pytest.mark.parametrize(
    ("names", "most", "text"),
    [
        ([], None, "none"),
        (["a"], None, "a"),
        (["a", "b"], None, "a and b"),
        (["a", "b", "c"], None, "a, b and c"),
        (["a", "b", "c"], 2, "a, b and c"),  # not: and 1 others
        (["a", "b", "c", "d"], 2, "a, b and 2 others"),
    ],
)
def test_lists(names: list[str], most: int | None, text: str) -> None:
    assert listed(names, most) == text


def test_names_in_quotes() -> None:
    assert quoted(["a", "it's"]) == "'a' and \"it's\""
    assert quoted("abcdefg") == "'a', 'b', 'c', 'd' and 3 others"
