"""A study: several experiments in one file, with defaults, run and resumed by one command."""

from __future__ import annotations

import pytest
import yaml

from corda_vlm.__main__ import main
from corda_vlm.errors import UnknownNameError
from corda_vlm.evaluation import read_rows
from corda_vlm.experiment import run

STUDY = {
    "name": "pair",
    "title": "Two small experiments",
    "defaults": {
        "model": "emoji-clip",
        "suite": "suite.yaml",
        "towers": ["vision"],
        "rank": 2,
        "task": {"data": {"source": "sklearn:digits", "limit": 32}, "templates": ["{}"]},
        "training": {"steps": 2, "batch_size": 8},
        "variants": {"lora": {"learning_rates": [1e-3]}},
    },
    "experiments": {
        "low": {"title": "The lower rank"},
        "high": {"rank": 4, "evaluation": {"scales": [0.5]}},
    },
}
SUITE = {
    "name": "small",
    "version": 1,
    "tasks": [
        {
            "name": name,
            "role": role,
            "kind": "zero_shot",
            "limit": 40,
            "data": data,
            "classes": {"from": "data"},
            "templates": ["{}"],
        }
        for name, role, data in (
            ("digits", "gain", "sklearn:digits"),
            (
                "emoji",
                "retention",
                {
                    "source": "parquet:model_zoo/emoji-clip/data/twemoji.parquet",
                    "label": "group",
                    "where": {"split": "heldout"},
                },
            ),
        )
    ],
}


@pytest.fixture
def config(tmp_path):
    """Writes a study, with changes, and returns its path."""

    def write(**changes):
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE))
        content = {**STUDY, **changes}
        if isinstance(content.get("defaults"), dict):
            content["defaults"] = {**content["defaults"], "suite": str(tmp_path / "suite.yaml")}
        path = tmp_path / "pair.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def test_runs_each_in_its_folder_and_goes_on(config, tmp_path, capsys):
    folder = run(config(), output=tmp_path / "out", only=["high"])
    rows = read_rows(folder / "high" / "scores.jsonl")
    assert {(row["method"], row["scale"]) for row in rows} == {
        ("base", 1.0),
        ("lora", 1.0),
        ("lora", 0.5),
    }
    overview = (folder / "report.md").read_text()
    assert "# Two small experiments" in overview
    assert "## The lower rank\n\nNot run yet." in overview
    assert "(high/report.md)" in overview

    before = (folder / "high" / "scores.jsonl").read_bytes()
    run(config(), output=folder)
    assert (folder / "high" / "scores.jsonl").read_bytes() == before, "nothing is measured again"
    assert read_rows(folder / "low" / "scores.jsonl")
    assert "Not run yet" not in (folder / "report.md").read_text()
    assert "1 of 1 trainings are finished already" in capsys.readouterr().out

    (folder / "report.md").unlink()
    main(["report", str(folder)])
    assert "(low/report.md)" in (folder / "report.md").read_text()


def test_an_unknown_experiment_is_refused(config):
    with pytest.raises(UnknownNameError, match="experiment 'middle'"):
        run(config(), only=["middle"])
