"""What messages show of values."""

from __future__ import annotations

import pytest

from corda_vlm.errors import brief, first_line


@pytest.mark.parametrize("value", [10**5000, "a" * 5000, None], ids=["digits", "text", "none"])
def test_any_value_is_shown_on_one_short_line(value):
    assert len(brief(value)) <= 100
    assert "\n" not in brief(value)


def test_of_a_librarys_error_the_first_line_is_said():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 5000))) == 200
