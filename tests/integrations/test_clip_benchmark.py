"""CLIP_benchmark itself, with emoji-clip as one of its models and on webdatasets as it lays them out."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from corda_vlm import asset
from corda_vlm.data import load_records
from corda_vlm.integrations import clip_benchmark
from corda_vlm.report import read_results

pytestmark = [pytest.mark.unchecked]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def data(tmp_path) -> Path:
    """200 of scikit-learn's digits as a webdataset in CLIP_benchmark's layout."""
    folder = tmp_path / "data" / "digits"
    (folder / "test").mkdir(parents=True)
    records = load_records({"source": "sklearn:digits", "split": "test"})
    with tarfile.open(folder / "test" / "0.tar", "w") as archive:
        for number in range(200):
            record, picture = records[number], io.BytesIO()
            record["image"].save(picture, "PNG")
            for ending, content in (
                ("png", picture.getvalue()),
                ("cls", str(record["label"]).encode()),
            ):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("\n".join(DIGITS) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("the digit {c}\nthe number {c}\n")
    return folder


@pytest.mark.parametrize(
    ("words", "added"),
    [
        (["eval"], ["--model_type", "corda_vlm"]),
        (["eval", "--model_type", "open_clip"], []),
        (["eval", "--model_type=open_clip"], []),
        (["build"], []),
    ],
)
def test_models_of_ours_are_the_usual_type(words, added, monkeypatch):
    seen = []
    models = SimpleNamespace(TYPE2FUNC={}, MODEL_TYPES=[])
    cli = SimpleNamespace(main=lambda: seen.extend(sys.argv[1:]))
    monkeypatch.setattr(clip_benchmark, "_theirs", {"models": models, "cli": cli}.get)
    clip_benchmark.main(words)
    assert seen == [*words, *added]


@pytest.mark.slow
def test_acc1_is_ours_and_the_report_reads_it(tool, data, tmp_path, measured):
    """acc1, acc5 and mean_per_class_recall of emoji-clip are ours on the same data (--no_amp)"""
    out = tmp_path / "results"
    out.mkdir()
    tool.run(
        "-m", "corda_vlm.integrations.clip_benchmark", "eval", "--model", "emoji-clip", "--pretrained", "", "--dataset", "wds/digits",
        "--dataset_root", data.parent / "{dataset}", "--no_amp", "--num_workers", "0", "--output", out / "{dataset}.json",
        cwd=tmp_path,
    )  # fmt: skip
    tool.run(
        Path(__file__).with_name("clip_live.py"),
        "emoji-clip",
        data,
        tmp_path / "ours.json",
        cwd=tmp_path,
    )
    ours = json.loads((tmp_path / "ours.json").read_text())
    (model,) = read_results(out)
    assert model.name == "emoji-clip"
    for theirs, own in (
        ("acc1", "top1"),
        ("acc5", "top5"),
        ("mean_per_class_recall", "mean_per_class"),
    ):
        measure = model.of("wds/digits", theirs)
        assert measure.value == pytest.approx(ours[own], abs=1e-6), theirs
    measured(f"acc1 {ours['top1']:.1%} both, acc5 {ours['top5']:.1%} both")


@pytest.mark.slow
def test_the_benchmark_of_speed_runs(tool, tmp_path, measured):
    """images a second beside its own loop, equal numbers (eval/benchmarks/evaluation_speed.py)"""
    script, out = asset("eval/benchmarks/evaluation_speed.py"), tmp_path / "images.json"
    tool.run(script, "images", "--limit", "64", "--repeats", "1", "--out", out, cwd=tmp_path)
    found = json.loads(out.read_text())
    assert found["count"] == 64
    measured(f"its own loop takes {found['ratio']:.2f} times as long for 64 images")
