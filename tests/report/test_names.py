"""Names that other languages would take for their own: in every picture and on every page they are shown as they are."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from corda_vlm.evaluation.diverged import note_diverged
from corda_vlm.plan import AdapterPlan, plan_adapter
from corda_vlm.report import markup, summary_table, write_report
from corda_vlm.report.overview import write_overview
from corda_vlm.report.plots import plan as heatmap
from corda_vlm.report.plots.plan import plan_heatmap
from corda_vlm.run_files import REPORT, STUDY, TRADEOFF

NASTY = (
    "$x_1$", "$", "$\\frac{", "a_b_c^2", "\\alpha", "100%", "{x}", "_hidden", "a|b", "**bold**", "`code`", "[link](http:)",
    "<script>alert(1)</script>", "&lt;i&gt;", "# heading", "- list", "line\nbreak", "tab\tbed", "\x1b[31mred", "\u202eevil",
    "~~gone~~", ":smile:", "\\", "日本語 🙂", "long" * 60, "\ud800half",
)  # fmt: skip


def nasty_rows(invented: Any, one_task: str, methods: tuple[str, ...]) -> list[dict[str, Any]]:
    """Five learning rates a method of a large study, whose tasks have nasty names too."""
    named = {"new": f"new {one_task}", "old": f"old {one_task}", "older": "older", "new-val": "val"}
    rows = invented.large_study(list(invented.MANY)[: len(methods) + 1], seeds=2)
    own = dict(zip(list(dict.fromkeys(r["method"] for r in rows))[2:], methods, strict=False))
    return [
        {**row, "method": own.get(row["method"], row["method"]), "task": named[row["task"]]}
        for row in rows
    ]


class Page(HTMLParser):
    """The text and the tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags = "", set()
        self.alts: list[str] = []
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.alts += [value or "" for name, value in attrs if name == "alt"]


def unescaped(text: str) -> str:
    """GitHub's Markdown read back where all of its own signs are escaped."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every figure that is written, and it is written all the same."""
    from corda_vlm.report.plots import forecast, tradeoff
    from corda_vlm.report.plots import style as drawing
    from corda_vlm.report.plots import training as pictures

    found: list[Any] = []
    save = drawing.save

    def keep(figure: Any, path: Path) -> None:
        found.append(figure)
        save(figure, path)

    for module in (forecast, pictures, tradeoff, heatmap):
        monkeypatch.setattr(module, "save", keep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield found


def texts_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


@pytest.mark.parametrize(
    "few", [True, pytest.param(False, marks=[pytest.mark.unchecked, pytest.mark.slow])]
)
def test_every_picture_and_page_of_a_run(
    invented: Any, tmp_path: Path, figures: list[Any], few: bool
) -> None:
    names = NASTY if not few else NASTY[:3]
    for start in range(0, len(names), 16):
        methods = names[start : start + 16]
        task = methods[0]
        run = invented.write_run(tmp_path / f"run-{start}", nasty_rows(invented, task, methods))
        facts = {
            "title": f"Title {task}",
            "command": f"corda-vlm run {task}`|",
            "note": list(methods),
            "a|b_c": 1,
        }
        (run / "run.json").write_text(json.dumps(facts))
        for method in ("lora", *methods):
            if any(c in method for c in "/\ud800") or len(method) > 200:
                continue  # no name of a folder
            file = run / method / "0.001-0" / "history.jsonl"
            file.parent.mkdir(parents=True)
            entries = [{"step": s, "loss": 2.0 / s, "anchor": 10.0 ** (s - 9)} for s in range(1, 9)]
            file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        note_diverged(
            run, method=methods[-1] + "?", learning_rate=1.0, seed=0, reason="the loss is nan"
        )
        figures.clear()
        write_report(run)
        assert len(figures) == 3, "the trade-off, the training, the forecast"
        drawn = [text for figure in figures for text in texts_of(figure)]
        for method in methods:
            assert {markup.shortened(method, most) for most in range(12, 29)} & {*drawn}
            assert markup.shortened(method) in drawn, "in the legend, also with an underscore first"
        check_pages(run, methods, task)


def check_pages(run: Path, methods: tuple[str, ...], task: str) -> None:
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert page.tags <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "section", "figure", "img", "figcaption",
        "div", "table", "thead", "tbody", "tr", "th", "td", "code", "strong", "details", "summary",
        "nav", "span", "ol", "ul", "li", "a", "script", "svg", "g", "path", "circle", "line", "polyline", "text",
    }  # fmt: skip
    source = (run / "report.md").read_text(encoding="utf-8")
    rows = [line for line in source.splitlines() if line.startswith("| ")]
    columns = {len(re.split(r"(?<!\\)\|", line.replace("\\\\", ""))) for line in rows}
    assert columns, "no name ends a cell"
    plain = unescaped(source)
    for method in (*methods, f"new {task}"):
        shown = " ".join(markup.terminal(method).split())
        assert shown in " ".join(page.text.split())
        assert shown in " ".join(plain.split())
    assert "<script" not in re.sub(r"\\<", "", source)
    table = summary_table(run)
    table.encode()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", table)


def test_plans(tiny_open_clip: Any, tmp_path: Path, figures: list[Any]) -> None:
    plan = plan_adapter(tiny_open_clip, None, method="milora", rank=2, towers=["vision"])
    for start in range(0, len(NASTY), 4):
        names = NASTY[start : start + 4]
        plans: dict[str, AdapterPlan] = dict.fromkeys(names, plan)
        assert plan_heatmap(plans, tmp_path / "plans.png")
        drawn = [t.get_suptitle() for t in figures[-1].subfigs]
        for name, text in zip(names, drawn, strict=True):
            assert text.rpartition(": ")[0] in {markup.shortened(name, n) for n in range(12, 41)}


@pytest.mark.unchecked
def test_the_overview_of_a_study(invented: Any, tmp_path: Path) -> None:
    names = [name for name in NASTY if not set(name) & set("/\n\t\x1b\ud800\\") and len(name) < 200]
    for name in names:
        run = invented.write_run(tmp_path / name, nasty_rows(invented, name, (name,)))
        if name == names[0]:
            write_report(run)
        else:  # the pages themselves are tested above
            (run / REPORT).touch()
            (run / TRADEOFF).touch()
    titles = {name: f"Title {name}" for name in names}
    (tmp_path / STUDY).write_text(json.dumps({"title": "All $x$ <b>", "experiments": titles}))
    source = write_overview(tmp_path).read_text(encoding="utf-8")
    assert source.startswith("# All \\$x\\$ \\<b>\n")
    targets = re.findall(r"(?<!\\)\]\(([^)]*)\)", source)
    assert len(targets) == 2 * len(names)
    for target in targets:
        from urllib.parse import unquote

        assert (tmp_path / unquote(target)).is_file()
        assert not set(target) & set(' <>[]()|*`"')
    for name in names:
        assert f"\n## {unescaped(markup.markdown(titles[name]))}\n" in unescaped(source)
