"""Text for people, written for each kind of page: names are shown as they are, and never obeyed."""

from __future__ import annotations

import html
import re

import pytest

from corda_vlm.report import markup
from tests.report.test_names import NASTY, unescaped


@pytest.mark.parametrize("name", NASTY)
def test_markdown_is_read_back_as_the_text(name: str) -> None:
    for text in (name, markup.bold(name)):
        written = markup.markdown(text)
        bare = written if text == name else written[2:-2]
        assert unescaped(bare) == markup.terminal(text)
        assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]<|~$#]", bare), "nothing is left to Markdown"
    assert "\n" not in written


@pytest.mark.parametrize("name", NASTY)
def test_html_is_read_back_as_the_text(name: str) -> None:
    assert html.unescape(markup.page(name)) == markup.terminal(name)
    assert markup.page(markup.bold(name)).startswith("<strong>")
    assert not re.search(r"[<>\"']", markup.page(name))


def test_code_keeps_what_is_typed() -> None:
    assert markup.markdown(markup.code("run $x_1$ <a>")) == "`run $x_1$ <a>`"
    assert markup.markdown(markup.code("a `b` | c")) == "``a `b` | c``"
    assert markup.markdown(markup.code("`b` | c"), cell=True) == "`` `b` \\| c ``"
    assert markup.page(markup.code("<a>")) == "<code>&lt;a&gt;</code>"


def test_our_marks_in_a_name_are_no_marks() -> None:
    stolen = markup.bold("x")
    assert markup.bold(stolen).count("x") == 1
    assert markup.markdown(markup.bold(stolen)) == "**�x�**"
    assert markup.page("\ufdd0 never ended") == "� never ended"


def test_what_starts_a_paragraph() -> None:
    assert markup.markdown("1. one") == "1\\. one"
    assert markup.markdown("- one") == "\\- one"
    assert markup.markdown("> one") == "\\> one"
    assert markup.markdown("76.0% (75.5 to 76.5)") == "76.0% (75.5 to 76.5)"
    assert markup.markdown("+1.0 (0.5 to 1.5)") == "+1.0 (0.5 to 1.5)"
