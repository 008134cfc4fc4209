"""A command's words become the arguments of a typed function, and its docstring becomes the help."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest

from corda_vlm.command_line import BY_PLACE, call
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.options import Count, NotNegative

ASKED: dict[str, Any] = {}
DEFAULTS = {"oven_heat": 180, "salt": None, "fan": False, "icing": "auto", "nuts": None}


def bake(
    cake: str,
    recipe: str | dict[str, Any],
    oven_heat: Count = 180,
    salt: NotNegative | None = None,
    fan: bool = False,
    icing: bool | Literal["auto"] = "auto",
    nuts: list[str] | None = None,
) -> None:
    """Bake a cake.

    Args:
        cake: its name.
        recipe: a file, or a mapping.
        oven_heat: degrees, 100% of the time.
        salt: grams; default: none.
        fan: let it blow.
        icing: on top.
        nuts: may be given many times.
    """
    ASKED.update(locals())


def asked(*words: str) -> dict[str, Any]:
    ASKED.clear()
    call({"bake": bake}, ["bake", *words], "About cakes.")
    return dict(ASKED)


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["--oven-heat", "200"], {"oven_heat": 200}),
        (["--oven_heat=200"], {"oven_heat": 200}),
        (["--salt=null"], {}),
        (["--salt", "2e-1"], {"salt": 0.2}),
        (["--fan"], {"fan": True}),
        (["--fan", "TRUE"], {"fan": True}),
        (["--fan=false"], {}),
        (["--icing"], {"icing": True}),
        (["--icing", "false", "--fan"], {"icing": False, "fan": True}),
        (["--icing=auto"], {}),
        (["--nuts", "[a, 1]", "--nuts=-2"], {"nuts": ["a", "1", "-2"]}),
        (["--nuts=--b_c"], {"nuts": ["--b_c"]}),
    ],
)
def test_options_stand_anywhere_among_the_places(words, read):
    places = ["pie", "{eggs: 2}"]
    expected = {**DEFAULTS, "cake": "pie", "recipe": {"eggs": 2}, **read}
    for before in range(3):
        assert asked(*places[:before], *words, *places[before:]) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "corda-vlm bake needs CAKE; usage: corda-vlm bake CAKE RECIPE [OPTIONS]"),
        (["a"], "needs RECIPE"),
        (["a", "b", "c"], "'c' is one word too many"),
        (["a", "b", "--oven-heat"], "--oven-heat needs a value: --oven-heat OVEN_HEAT"),
        (["a", "b", "--oven-heat", "--fan"], "--oven-heat needs a value"),
        (["a", "b", "--oven-heat", "-1"], "--oven-heat is -1"),
        (["a", "b", "--salt", "-1e-4"], "--salt is -0.0001"),
        (["a", "b", "--fan", "--fan"], "--fan is given twice"),
        (["a", "b", "--fan=maybe"], "--fan cannot be 'maybe'"),
        (["a", "{eggs: 2"], "recipe is not YAML"),
    ],
)
def test_a_wrong_word_is_told(words, message):
    with pytest.raises(CordaError) as told:
        asked(*words)
    assert message in str(told.value)


@pytest.mark.parametrize("word", ["--oven-haet", "--oven-haet=3", "--oven", "-oven-heat", "--cake"])
def test_an_option_is_neither_guessed_nor_abbreviated(word):
    with pytest.raises(UnknownNameError, match=r"choose one of: --fan, --icing, .*--oven-heat"):
        asked("a", "b", word)


def test_help_wins_over_whatever_else_is_wrong(capsys):
    call({"bake": bake}, ["bake", "--oven-haet=1", "--help"], "About cakes.")
    told = capsys.readouterr().out
    assert told.startswith("usage: corda-vlm bake CAKE RECIPE [OPTIONS]\n\nBake a cake.\n")
    assert "degrees, 100% of the time. (default: 180)" in told
    assert "--icing [true|false|auto]" in told
    assert "(default: None)" not in told
    call({"bake": bake}, [], "About cakes.")
    assert "About cakes.\n\nverbs:\n  bake  Bake a cake.\n" in capsys.readouterr().out


def test_an_argument_by_its_place_that_may_be_left_out():
    def roast(nuts: Annotated[str | None, BY_PLACE] = None, *, salt: int = 0) -> None:
        """Roast."""
        ASKED.update(nuts=nuts, salt=salt)

    def given(*words: str) -> dict[str, Any]:
        call({"roast": roast}, ["roast", *words], "About nuts.")
        return dict(ASKED)

    ASKED.clear()
    assert given() == {"nuts": None, "salt": 0}
    assert given("--salt", "2") == {"nuts": None, "salt": 2}
    assert given("cashews", "--salt", "2") == {"nuts": "cashews", "salt": 2}
    assert given("--salt", "2", "cashews") == {"nuts": "cashews", "salt": 2}
    with pytest.raises(
        CordaError, match=r"'walnuts' is one word too many.*usage: corda-vlm roast \[NUTS\]"
    ):
        given("cashews", "walnuts")
