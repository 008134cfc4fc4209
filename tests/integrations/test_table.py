"""The table of `make integrations`, and what the recipes say of themselves."""

from __future__ import annotations

import re

import pytest

from corda_vlm import asset
from tests.integrations.__main__ import HERE, Row, main, table
from tests.integrations.tools import TOOLS

RECIPES = sorted(
    path
    for path in asset("configs/integrations").iterdir()
    if path.suffix in (".py", ".yaml", ".sh")
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_says_how_it_is_run_with_which_versions_and_what_to_expect(path):
    text = path.read_text(encoding="utf-8")
    head = text.split('"""')[1] if path.suffix == ".py" else text.split("\n\n")[0]
    assert re.search(r"^(# )? +\S", head, flags=re.MULTILINE), "no command"
    assert "Versions:" in head
    assert "Expect:" in head


def test_every_tool_has_its_checks():
    for name in TOOLS:
        assert (HERE / f"test_{name}.py").is_file(), name


def test_a_row_says_why_and_the_status_is_not_zero(tmp_path, capsys, monkeypatch):
    from tests.integrations import __main__ as runner
    from tests.integrations.tools import Tool

    class Broken(Tool):
        def prepare(self) -> None:
            raise OSError("no matching distribution")

    monkeypatch.setattr(runner, "TOOLS", {"broken": Broken("broken", ("nothing",), ())})
    assert main(["broken", f"--out={tmp_path}"]) == 1
    row = Row("broken", "", "is installed by pip", "not installed: no matching distribution")
    assert table([row]) in capsys.readouterr().out
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table([row])


def test_a_tool_that_is_not_known_is_told():
    with pytest.raises(SystemExit):
        main(["nosuchtool"])
