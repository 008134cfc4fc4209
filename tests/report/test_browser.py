"""A report's page in a real browser: no errors, tables that sort, methods that can be hidden, values at the marks."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from corda_vlm.report.write import write_report
from tests.report.invented import DEMO, large_study, study, write_run

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="no Chromium on the path to open the page in"),
]

# What a reader does, one after another; what is seen then is written where the test reads it.
ACTIONS = """
<script>
const rows = (table) => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
const seen = {};
const table = document.querySelector("table");
const heading = table.tHead.rows[0].cells[1];
seen.before = rows(table);
for (const press of ["first", "second", "third"]) {
  heading.querySelector("button").click();
  seen[press] = [heading.getAttribute("aria-sort"), ...rows(table)];
}
heading.querySelector("button").focus();
seen.reached = document.activeElement.closest("th") === heading;
const shown = () => [...document.querySelectorAll("[data-method]")].filter((e) => getComputedStyle(e).display !== "none").map((e) => e.dataset.method);
const box = document.querySelector(".filter input[value=full]");
box.click();
seen.hidden = !shown().includes("full") && shown().includes("lora");
box.click();
seen.back = shown().includes("full");
const svg = document.querySelector(".plot svg");
svg.focus();
svg.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
seen.value = document.querySelector(".plot .value").textContent;
document.querySelector(".point .hit").dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
seen.pointed = !document.querySelector(".plot .value").hidden;
seen.wide = document.documentElement.scrollWidth <= innerWidth;
document.title = JSON.stringify(seen);
</script>
"""


def opened(page: Path, *more: str) -> tuple[str, str]:
    """The page as the browser has it in the end, and what went to the console."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=500,900",
         f"--user-data-dir={page.parent / 'profile'}", *more, page.as_uri()],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    return done.stdout, "\n".join(re.findall(r".*CONSOLE.*", done.stderr))


def test_a_reader_sorts_filters_and_points(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path, study(DEMO)))
    acted = tmp_path / "acted.html"
    acted.write_text(page.read_text().replace("</body>", ACTIONS + "</body>"))
    text, console = opened(acted, "--dump-dom")
    assert console == ""
    title = re.search(r"<title>(.*?)</title>", text)
    assert title is not None
    seen = json.loads(html.unescape(title[1]))
    assert seen["before"] == ["corda-kpm", "full", "lora"]
    assert seen["first"] == ["descending", "corda-kpm", "full", "lora"]
    assert seen["second"] == ["ascending", "lora", "full", "corda-kpm"]
    assert seen["third"] == [None, *seen["before"]]
    assert seen["hidden"]
    assert seen["back"]
    assert seen["value"] == "base model: new task 10.0%, kept 100.0%"
    assert seen["pointed"]
    assert seen["reached"], "a heading takes the keyboard's focus"
    assert seen["wide"], "a phone scrolls tables, not the page"


@pytest.mark.parametrize("look", ["light", "dark"])
def test_many_methods_and_a_gallery_fit_a_phone(tmp_path: Path, look: str) -> None:
    """The picture is kept beside the page, to be looked at."""
    rows = large_study(seeds=1, scales=(0.5,))
    page = write_report(write_run(tmp_path, rows))
    dark = (
        ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if look == "dark" else []
    )
    file = tmp_path / f"{look}.png"
    _, console = opened(page, f"--screenshot={file}", "--hide-scrollbars", *dark)
    assert console == ""
    paper = Image.open(file).convert("RGB").getpixel((2, 400))
    assert paper == ((22, 24, 27) if look == "dark" else (255, 255, 255))
