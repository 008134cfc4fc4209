"""Tables of plain text."""

from __future__ import annotations

from corda_vlm.text_table import text_table


def test_columns() -> None:
    table = text_table(
        [["lora", "81.2%"], ["corda-kpm", 7]], ["method", "kept"], right=[False, True]
    )
    assert table == ("method       kept\n---------  ------\nlora        81.2%\ncorda-kpm       7")


def test_characters_of_two_columns_stand_in_line() -> None:
    lines = text_table([["数字", "1"], ["abcd", "2"]], ["", "n"], [False, False]).split("\n")
    assert lines[2] == "数字  1"
    assert lines[3] == "abcd  2"
