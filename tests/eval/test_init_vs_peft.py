"""The benchmark on tiny layers and a tiny CLIP, in this process: it measures, goes on, judges and reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from corda_vlm.files import asset

pytest.importorskip("attr", reason='PEFT\'s CorDA needs attrs: pip install "corda-vlm[bench]"')


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(asset("eval/benchmarks")))
    monkeypatch.delenv("CORDA_VLM_DATA", raising=False)
    import init_vs_peft

    return init_vs_peft


@pytest.fixture
def here(bench):
    """Measures in this process, and keeps the list of what it measured."""
    measured = []

    def work(task, out, threads):
        measured.append(task.key)
        out.write_text(json.dumps(bench.work(task)))

    measure: Any = work
    measure.done = measured
    return measure


def test_every_measurement_has_a_file_of_its_own_and_the_tools_take_turns(bench):
    tasks = list(bench.schedule("all", 3, False, 32))
    assert len({task.key for task in tasks}) == len(tasks)
    clip = [task for task in tasks if task.part == "clip"]
    assert [task.tool for task in clip[:4]] == ["peft", "ours", "ours", "ours"]
    for mode in ("kpm", "ipm"):
        assert sum(task.tool == "peft" and task.mode == mode for task in clip) == 3


@pytest.mark.filterwarnings("ignore:.*fewer tokens than their width")
def test_clip_is_measured_and_judged(bench, here, tmp_path: Path):
    tasks = [
        task
        for task in bench.schedule("clip", 1, True, 2)
        if task.part == "rates" or (task.mode == "kpm" and task.setting == "float32")
    ]
    bench.run_all(tasks, tmp_path, 1, here)
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["tool"]: row for row in results["rows"]}
    assert rows.keys() == {"peft", "ours"}
    for row in rows.values():
        seconds = row["seconds"]
        assert {"total", "forward", "collection", "covariance", "decomposition"} <= seconds.keys()
        assert seconds["total"] >= seconds["decomposition"] > 0
    assert rows["ours"]["times_faster"] > 0
    assert rows["ours"]["floor_seconds"] > 0
    judged = rows["peft"]["energy"]["kpm"]
    assert judged["dampings"][0] >= 0.01
    assert judged["ours"]["highest"] < 1.01, "within 1 % of the optimum, on PEFT's covariance"
    for group in ("kpm, δ = 0.01", "kpm, δ = 0.0001"):
        assert rows["ours"]["energy"][group]["ours"]["highest"] < 1.01, "and on our own"
    assert "corda_vlm, float32" in (tmp_path / "table.md").read_text()

    # a second run finds everything measured; one file lost is one measurement taken
    before = list(here.done)
    bench.run_all(tasks, tmp_path, 1, here)
    assert here.done == before
    next((tmp_path / "measurements").glob("clip_ours*")).unlink()
    bench.run_all(tasks, tmp_path, 1, here)
    assert len(here.done) == len(before) + 1


def test_layers_are_measured_and_judged(bench, here, tmp_path: Path):
    tasks = [t for t in bench.schedule("layers", 1, True, 2) if t.shape in ((96, 160), (160, 96))]
    bench.run_all(tasks, tmp_path, 1, here)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    for row in rows:
        assert row["seconds"]["total"] > 0
        if row["tool"] == "peft":
            for mode in ("kpm", "ipm"):
                ours = row["energy"][mode]["ours"]
                assert ours["median"] == pytest.approx(1, abs=0.01)
    assert "96x160" in (tmp_path / "table.md").read_text()


def test_peft_is_left_as_it_was(bench, here, tmp_path: Path):
    import torch
    from peft.tuners.lora import corda

    before = torch.linalg.inv, corda.collect_eigens, corda.calib_cov_distribution
    task = next(t for t in bench.schedule("layers", 1, True, 2) if t.tool == "peft")
    here(task, tmp_path / "one", 1)
    assert (torch.linalg.inv, corda.collect_eigens, corda.calib_cov_distribution) == before
