"""The verbs, one after another, as a person types them; and what a wrong word is answered."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
import torch
from PIL import Image

from corda_vlm.__main__ import VERBS, _show_warning, main
from corda_vlm.experiment import load_experiment
from corda_vlm.files import asset
from corda_vlm.study import is_study, load_study

DRAWINGS = "parquet:model_zoo/emoji-clip/data/noto.parquet"


def test_the_verbs_are_those_of_the_design():
    assert list(VERBS) == [
        "run",
        "sites",
        "calibrate",
        "init",
        "train",
        "evaluate",
        "export",
        "report",
    ]


def test_from_sites_to_a_plain_open_clip_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["sites", "emoji-clip", "--towers", "vision"])
    assert "visual.transformer.resblocks.*.attn.in" in capsys.readouterr().out

    main(
        [
            "calibrate",
            "emoji-clip",
            DRAWINGS,
            "--samples=48",
            "--batch-size",
            "16",
            "--towers=vision",
        ]
    )
    assert (
        "corda-vlm init emoji-clip --covariance covariance.safetensors" in capsys.readouterr().out
    )

    plan = [
        "init",
        "emoji-clip",
        "--covariance",
        "covariance.safetensors",
        "--rank=4",
        "--towers=vision",
    ]
    main([*plan, "--dry-run"])
    assert "at risk" in capsys.readouterr().out
    assert not (tmp_path / "plan.json").exists(), "--dry-run writes nothing"
    main([*plan, "--a-norm", "10"])
    assert json.loads((tmp_path / "plan.json").read_text())["a_norm"] == 10

    digits = '{"source": "sklearn:digits", "split": "train", "limit": 64}'
    main(["train", "emoji-clip", digits, "--steps=3", "--batch-size=16", "--output=adapter"])
    assert (tmp_path / "adapter" / "weights" / "adapter_model.safetensors").is_file()

    scores = ["evaluate", "emoji-clip", "emoji-digits", "--tasks=[digits]", "--limit=40"]
    main([*scores, "--adapter=adapter/weights", "--output=scores.jsonl"])
    row = json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[0])
    assert (row["method"], row["task"], row["n"]) == ("adapter", "digits", 40)

    main([*scores, "--adapter=adapter", "--scales=0,0.5,1", "--output=sweep.jsonl"])
    main([*scores, "--output=base.jsonl"])
    sweep, base = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("sweep.jsonl", "base.jsonl")
    )
    value = {r["scale"]: r["value"] for r in sweep if r["metric"] == "top1"}
    assert list(value) == [1.0, 0.5, 0.0]
    assert value[1.0] == row["value"], "at full strength it is the trained model"
    assert value[0.0] == base[0]["value"], "at none the one before training"

    anchored = ["train", "emoji-clip", digits, "--steps=3", "--batch-size=16", "--output=anchored"]
    main([*anchored, "--anchor=30", "--covariance=covariance.safetensors"])
    history = [
        json.loads(line)
        for line in (tmp_path / "anchored" / "history.jsonl").read_text().splitlines()
    ]
    assert history[-1]["anchor"] > 0

    main(["export", "emoji-clip", "adapter/weights", "merged"])
    plain = (
        "import open_clip, torch, sys\n"
        "model, _, transform = open_clip.create_model_and_transforms('local-dir:merged')\n"
        "from PIL import Image\n"
        "image = transform(Image.new('RGB', (64, 64), (200, 30, 90)))[None]\n"
        "with torch.no_grad(): torch.save(model.eval().encode_image(image), 'plain.pt')\n"
        "assert 'corda_vlm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", plain], check=True, cwd=tmp_path)
    from corda_vlm.adapter import load_adapter
    from corda_vlm.families import load_model

    loaded = load_model("emoji-clip")
    adapted = load_adapter(loaded.model, tmp_path / "adapter" / "weights")
    pixels = loaded.processor.image(Image.new("RGB", (64, 64), (200, 30, 90)))[None]
    with torch.no_grad():
        ours = loaded.family.encode_image(adapted, pixels)
    assert torch.allclose(ours, torch.load(tmp_path / "plain.pt", weights_only=True), atol=1e-4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sites", "emoji-clap"], "Did you mean 'emoji-clip'"),
        (["sites", "emoji-clip", "--towers=visoin"], "unknown tower 'visoin'; choose one of"),
        (["init", "emoji-clip", "--covariance=none.safetensors"], "none.safetensors"),
        (["init", "emoji-clip", "--method=lora"], "unknown plan method 'lora'"),
        (["evaluate", "emoji-clip", "imagenet"], "unknown suite 'imagenet'"),
        (["evaluate", "emoji-clip", "emoji", "--scales=0.5"], "the model before training as MODEL"),
        (["evaluate", "emoji-clip", "emoji", "--scales=half"], "numbers separated by commas"),
        (["train", "emoji-clip", "sklearn:digits", "--anchor=30"], "give --covariance"),
        (["run", "configs/none.yaml"], "no file 'configs/none.yaml'"),
        (["report", "nowhere"], "nowhere"),
        (["run", "configs/demo.yaml", "--set", "[seeds=[0]]"], "is not a list in YAML"),
    ],
)
def test_wrong_words_end_with_a_message_and_status_2(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("corda-vlm: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("path", sorted(asset("configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_command_at_the_head_of_a_config(path, monkeypatch):
    asked = {}
    for name in ("run.run", "study.run_study"):
        monkeypatch.setattr(
            f"corda_vlm.{name}", lambda config, **options: asked.update(options, config=config)
        )
    first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").partition("  ")[0]
    main(shlex.split(first)[1:])
    assert asked["config"] == f"configs/{path.name}"
    (load_study if is_study(path) else load_experiment)(path, asked["overrides"])


@pytest.mark.parametrize(
    "words",
    [
        ["--set", "seeds=[0, 1]", "--set=rank=4", "--only", "lora"],
        ["--set", '["seeds=[0, 1]", rank=4]', "--only=[lora]"],
        ["--only", "lora", "--set", '["seeds=[0, 1]"]', "--set", "rank=4"],
    ],
)
def test_an_option_that_may_be_given_many_times(words, monkeypatch):
    asked = {}
    monkeypatch.setattr("corda_vlm.run.run", lambda config, **options: asked.update(options))
    main(["run", *words, "configs/demo.yaml"])
    assert (asked["overrides"], asked["only"]) == (["seeds=[0, 1]", "rank=4"], ["lora"])


@pytest.mark.parametrize("words", [["--set", "title=a 😀"], ["--set", "[title=a 😀]"]])
def test_what_stands_in_a_list_stays_as_it_was_written(words, monkeypatch):
    asked = {}
    monkeypatch.setattr("corda_vlm.run.run", lambda config, **options: asked.update(options))
    main(["run", "configs/demo.yaml", *words, "--only", "[2024-01-01, no]"])
    assert (asked["overrides"], asked["only"]) == (["title=a 😀"], ["2024-01-01", "no"])
    with pytest.raises(SystemExit):  # the next option is no value
        main(["run", "configs/demo.yaml", "--only", "--fresh"])


def test_help_answers_quickly_and_names_every_verb():
    printed = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "corda_vlm", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(verb in printed.stdout for verb in VERBS)
    assert "import time" in printed.stderr
    assert "| torch\n" not in printed.stderr, "help must not wait for torch"


def test_a_warning_shows_no_source_code(capsys):
    _show_warning(UserWarning("too few tokens"), UserWarning, "collect.py", 111)
    assert capsys.readouterr().err == "corda-vlm: warning: too few tokens\n"
