"""`corda-vlm report` writes what the run itself wrote, also from the scores and the pictures alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from corda_vlm.__main__ import main
from corda_vlm.errors import ForeignFileError
from corda_vlm.plan import plan_adapter
from corda_vlm.report import write_report
from corda_vlm.report.document import Picture
from corda_vlm.report.overview import write_overview
from corda_vlm.run_files import STUDY


def with_sources(invented: Any, folder: Path, model: Any) -> Path:
    """A run with histories and a plan that chose ranks, so that its report has every picture."""
    run = invented.write_run(folder, invented.large_study(("lora", "corda-kpm")))
    for rate in (5e-4, 1e-3):
        file = run / "lora" / f"{rate:g}-0" / "history.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(
            "".join(json.dumps({"step": s, "loss": 1.0 / s}) + "\n" for s in range(1, 9))
        )
    plan = plan_adapter(model, None, method="milora", rank=3, towers=["vision"])
    sites = (
        dataclasses.replace(s, round=i % 2, scores=(1.0, 2.0)) for i, s in enumerate(plan.sites)
    )
    dataclasses.replace(plan, sites=tuple(sites)).save(run / "corda-kpm" / "plan.json")
    return run


def pages(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".md", ".html", ".png") or path.name == "pictures.json"
    }


@pytest.mark.parametrize("sources", [True, False])
def test_a_run(invented: Any, tmp_path: Path, tiny_open_clip: Any, sources: bool) -> None:
    run = with_sources(invented, tmp_path / "run", tiny_open_clip)
    Image.new("RGB", (20, 20)).save(run / "more.png")
    write_report(run, pictures=[Picture(run / "more.png", "More of it", "More |*")])
    before = pages(run)
    for name in ("tradeoff", "forecast", "training", "plans", "more"):
        assert f"]({name}.png)" in before["report.md"].decode(), name
    if not sources:
        shutil.rmtree(run / "lora")
        shutil.rmtree(run / "corda-kpm")
    main(["report", str(run)])
    assert pages(run) == before


def test_pictures_from_before_their_words_were_kept(
    invented: Any, tmp_path: Path, tiny_open_clip: Any
) -> None:
    run = with_sources(invented, tmp_path / "run", tiny_open_clip)
    write_report(run)
    shutil.rmtree(run / "lora")
    shutil.rmtree(run / "corda-kpm")
    (run / "pictures.json").unlink()
    write_report(run)
    text = (run / "report.md").read_text()
    assert "](training.png)" in text
    assert "Which layers were given how much." in text


def test_a_study(invented: Any, tmp_path: Path, tiny_open_clip: Any) -> None:
    for name in ("one", "two"):
        write_report(with_sources(invented, tmp_path / name, tiny_open_clip))
    titles = {"one": "One", "two": "Two", "three": "Not yet"}
    (tmp_path / STUDY).write_text(json.dumps({"title": "Study", "experiments": titles}))
    write_overview(tmp_path)
    before = pages(tmp_path)
    assert before["report.md"].decode().count(".png)") == 2
    for run in ("one", "two"):
        shutil.rmtree(tmp_path / run / "lora")
    main(["report", str(tmp_path)])
    assert pages(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [["a"], {"../x.png": {"alt": "", "caption": ""}}, {"a.png": 3}, {"a.png": {"alt": 1}}],
)
def test_a_list_that_is_not_ours_is_refused(invented: Any, tmp_path: Path, content: Any) -> None:
    run = invented.write_run(tmp_path / "run", invented.study(invented.DEMO))
    (run / "pictures.json").write_text(json.dumps(content))
    with pytest.raises(ForeignFileError, match=r"pictures\.json is no list of a report's pictures"):
        write_report(run)


def test_an_early_look_while_the_run_goes_on(invented: Any, tmp_path: Path, capsys: Any) -> None:
    run = invented.write_run(tmp_path / "run", invented.large_study(("lora", "corda-kpm")))
    code = (
        "import sys; from corda_vlm.locks import locked\n"
        "with locked(sys.argv[1], inside=True): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    try:
        main(["report", str(run)])
    finally:
        holder.stdin.close()
    assert holder.wait(60) == 0
    assert "wrote" in capsys.readouterr().out
    assert (run / "report.md").is_file()
