"""The verbs, one after another, as a person types them; and what a wrong word is answered."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from corda_vlm.__main__ import VERBS, _show_warning, main
from corda_vlm.command_line import Command
from corda_vlm.errors import CordaError
from corda_vlm.experiment.load import is_study, load_experiment, load_study
from corda_vlm.files import asset
from corda_vlm.jsonl import append_jsonl
from corda_vlm.train.terms.options import DISTILL
from tests.report.invented import rows_of

DRAWINGS = "parquet:model_zoo/emoji-clip/data/noto.parquet"


def test_the_verbs_are_those_of_the_design():
    assert list(VERBS) == [
        "new",
        "run",
        "sites",
        "calibrate",
        "gradient",
        "plan",
        "train",
        "evaluate",
        "ask",
        "export",
        "import",
        "report",
        "init",
    ]
    assert VERBS["init"] is VERBS["plan"], "as it was called before"


@pytest.mark.usefixtures("one_text_side")
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
        "corda-vlm plan emoji-clip --covariance covariance.safetensors" in capsys.readouterr().out
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
    main([*anchored, "--anchor=30", "--covariance=covariance.safetensors", "--distill-every=1",
          "--knowledge", DRAWINGS, "--knowledge-samples=16"])  # fmt: skip
    history = [
        json.loads(line)
        for line in (tmp_path / "anchored" / "history.jsonl").read_text().splitlines()
    ]
    assert history[-1]["anchor"] > 0
    assert history[-1]["distill"] > 0
    plan = json.loads((tmp_path / "anchored" / "train.json").read_text())
    assert plan["terms"]["distill"]["weight"] == DISTILL, "what --knowledge means by itself"

    kept = ["train", "emoji-clip", digits, "--steps=3", "--batch-size=16", "--output=kept"]
    main([*kept, "--keep=0.5", "--keep-every=2", "--knowledge", DRAWINGS, "--knowledge-samples=16",
          "--probe-records=96"])  # fmt: skip
    told = json.loads((tmp_path / "kept" / "result.json").read_text())["budget"]
    assert told["kept"]["share"] >= 0.5
    assert (told["kept"]["records"], told["term"]) == (96, "distill")
    assert "where 50% was asked for" in capsys.readouterr().out

    main(["export", "emoji-clip", "plan.json", "start", "--format=lora"])
    told = json.loads((tmp_path / "start" / "adapter_config.json").read_text())
    assert (told["peft_type"], told["r"]) == ("LORA", 8), "[0, B0] [A0; 0] of a plan of rank 4"

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
        ours = loaded.family.need_contrastive(adapted).encode_image(adapted, pixels)
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
        (
            ["train", "emoji-clip", "sklearn:digits", "--distill=30"],
            "there are none: give --knowledge",
        ),
        (["train", "emoji-clip", "sklearn:digits", "--keep=0.9"], "or --probe, one of such"),
        (["train", "emoji-clip", "sklearn:digits", "--keep=1.9"], "keep is 1.9; it is the share"),
        (
            ["train", "emoji-clip", "sklearn:digits", "--keep=0.9", "--probe=x:y"],
            "unknown data source 'x:y'",
        ),
        (
            ["train", "emoji-clip", "sklearn:digits", "--start-decay=1", "--weight-decay=0.1"],
            "choose one of the two",
        ),
        (
            ["train", "emoji-clip", "sklearn:digits", "--task-covariance=c.safetensors"],
            "--task-covariance has no effect",
        ),
        (["run", "configs/none.yaml"], "no file 'configs/none.yaml'"),
        (["report", "nowhere"], "nowhere"),
        (["run", "configs/demo.yaml", "--set", "[seeds=[0]]"], "is not a list in YAML"),
        (["rnu", "configs/demo.yaml"], "unknown verb 'rnu'"),
        (["run", "configs/demo.yaml", "--frehs"], "Did you mean '--fresh'"),
        (["run", "configs/demo.yaml", "more"], "one word too many"),
        (["run"], "needs EXPERIMENT"),
        (["run", "configs/demo.yaml", "--device"], "--device needs a value"),
        (["run", "configs/demo.yaml", "--device=cpu", "--device=cpu"], "--device is given twice"),
        (["run", "configs/demo.yaml", "--only", "lora", "--only", "lora"], "'lora' is given twice"),
        (["run", "configs/demo.yaml", "--set", "seeds=["], "seeds' is not YAML"),
        (["run", "configs/demo.yaml", "--set", f"{'a.' * 5000}b=1"], "leads deeper"),
        (["calibrate", "emoji-clip", DRAWINGS, "--samples=0"], "--samples is 0"),
        (["calibrate", "emoji-clip", DRAWINGS, "--samples=1.5"], "--samples cannot be '1.5'"),
        (["calibrate", "emoji-clip", DRAWINGS, "--seed", "-1"], "--seed is -1"),
        (["calibrate", "emoji-clip", DRAWINGS, "--tokens", "some"], "unknown --tokens 'some'"),
        (["init", "emoji-clip", "--damping", "-1e-4"], "--damping is -0.0001"),
        (["init", "emoji-clip", "--damping", "nan"], "--damping cannot be nan"),
        (["train", "emoji-clip", "sklearn:digits", "--batch-size", "yes"], "a whole number"),
        (["train", "~nosuchuser/x", "sklearn:digits"], "nosuchuser"),
        (["train", "emoji-clip", "folder:~nosuchuser"], "nosuchuser"),
        (["train", "emoji-clip", "{source: [1}"], "data is not YAML"),
        (["train", "emoji-clip", "{source: 'folder:x', class_path: os.x}"], "data option"),
        (["sites", "x" * 5000], "' is no model's name"),
        (["sites", "emoji\0clip"], "is no model's name"),
    ],
)
def test_wrong_words_end_with_a_message_and_status_2(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("corda-vlm: ")
    assert len(error) < 2000
    assert message in error
    assert "Traceback" not in error


@pytest.fixture
def asked(monkeypatch) -> dict[str, Any]:
    """What the verb `run` hands on, in place of running it."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "corda_vlm.experiment.study.run",
        lambda config, **options: asked.update(options, config=config),
    )
    return asked


@pytest.mark.parametrize("path", sorted(asset("configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_command_at_the_head_of_a_config(path, asked):
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
def test_an_option_that_may_be_given_many_times(words, asked):
    main(["run", *words, "configs/demo.yaml"])
    assert (asked["overrides"], asked["only"]) == (["seeds=[0, 1]", "rank=4"], ["lora"])


@pytest.mark.parametrize("words", [["--set", "title=a 😀"], ["--set", "[title=a 😀]"]])
def test_what_stands_in_a_list_stays_as_it_was_written(words, asked):
    main(["run", "configs/demo.yaml", *words, "--only", "[2024-01-01, no]"])
    assert (asked["overrides"], asked["only"]) == (["title=a 😀"], ["2024-01-01", "no"])
    with pytest.raises(SystemExit):  # the next option is no value
        main(["run", "configs/demo.yaml", "--only", "--fresh"])


# What takes seconds to import; looking for them stands for a clock, which a busy machine slows down.
HEAVY = """
import sys
from corda_vlm.__main__ import main

try:
    main(sys.argv[1:])
finally:
    for name in "torch transformers open_clip peft sklearn matplotlib pandas datasets timm".split():
        if name in sys.modules:
            raise SystemExit(f"imports {name}")
"""


def run_light(*words: str, cwd=None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEAVY, *words],
        capture_output=True, text=True, cwd=cwd, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run nosuch.yaml", "no file 'nosuch.yaml'"),
        ("run {demo} --set suite=emojo", "unknown suite 'emojo'"),
        ("run {demo} --set model=emoji-clap", "unknown model 'emoji-clap'"),
        ("run {demo} --set model=runs/none/merged", "no folder"),
        ("run {demo} --set family=lava", "unknown family 'lava'"),
        ("run {demo} --set task.data=folder:none", "no file 'none'"),
        ("run {demo} --set calibration.data=parquet:none/*.parquet", "no data matches"),
        ("run {demo} --set task.data=sklearn:digit", "scikit-learn data set 'digit'"),
        ("run {demo} --set variants.lora.method=lroa", "unknown method of variant"),
        ("run {demo} --set task.classes=digts", "unknown class names 'digts'"),
        ("run {demo} --set task.templates=none.txt", "unknown template list 'none.txt'"),
        ("run {demo} --set training.steps=0", "steps is 0"),
        ("run {demo} --only lroa", "unknown variant 'lroa'"),
        ("run {demo} --output pipe/x", "cannot be written"),
        ("run {demo} --output file", "is no folder"),
        ("run {study} --only digit", "unknown experiment 'digit'"),
        ("run {demo} --output foreign --fresh", "not empty and holds no run"),
        ("sites emoji-clap", "unknown model"),
        ("sites ./none", "no folder"),
        ("calibrate emoji-clip parquet:none.parquet", "no file 'none.parquet'"),
        ("calibrate emoji-clip sklearn:digits --output file/x", "is no folder"),
        ("calibrate emoji-clip sklearn:digits --output pipe", "pipe is no file"),
        ("init emoji-clip --output pipe", "pipe is no file"),
        ("export emoji-clip foreign pipe", "pipe is no folder"),
        ("init emoji-clip --covariance none.safetensors", "make it by corda-vlm calibrate"),
        ("init emoji-clip --method lora", "unknown plan method 'lora'"),
        ("train emoji-clip sklearn:digits --plan none.json", "make it by corda-vlm plan"),
        ("train emoji-clip sklearn:digits --learning-rate 0", "--learning-rate is 0"),
        ("train emoji-clip sklearn:digits --classes digts", "unknown class names 'digts'"),
        (
            "train emoji-clip sklearn:digits --templates none.txt",
            "unknown template list 'none.txt'",
        ),
        ("evaluate emoji-clip imagenet", "unknown suite 'imagenet'"),
        ("evaluate emoji-clip emoji --adapter none", "no training's folder"),
        ("evaluate emoji-clip emoji --tasks none", "unknown task of suite emoji 'none'"),
        ("export emoji-clip none merged", "no training's folder"),
        ("report none", "no run's folder"),
        ("report foreign", "no scores file"),
        ("rnu", "unknown verb 'rnu'"),
        ("run --fersh", "Did you mean '--fresh'"),
    ],
)
def test_a_typo_is_told_before_anything_heavy_is_imported(words, message, tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")  # as a device: no file, and nothing to be replaced by one
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    places = {name: asset(f"configs/{name}.yaml") for name in ("demo", "study")}
    told = run_light(*words.format(**places).split(), cwd=tmp_path)
    assert told.returncode == 2, told.stderr
    assert message in told.stderr
    assert "Traceback" not in told.stderr


def test_export_asks_which_scores_are_meant_before_it_reads_the_model(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    rows = [row for rate in (0.1, 0.2) for row in rows_of("lora", {"old": 0.3}, rate=rate, seed=0)]
    append_jsonl(tmp_path / "scores.jsonl", rows, "score")
    export = ["export", "emoji-clip", "adapter", "new"]
    for words, message in (
        (["--scores=scores.jsonl"], "scores of several: method='lora', learning_rate=0.1, seed=0"),
        (["--scores=scores.jsonl", "--learning-rate=0.3"], "there are no scores of it"),
        (["--scores=scores.jsonl", "--learning-rate=0.1", "--seed=1"], "there are no scores of it"),
        (
            ["--scores=scores.jsonl", "--learning-rate=0.1", "--scale=2"],
            "there are no scores of it",
        ),
        (["--seed=0"], "seed says which of the scores are meant; give --scores too"),
    ):
        with pytest.raises(SystemExit):
            main([*export, *words])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_imports_nothing_heavy(verb):
    told = run_light(*verb.split(), "--help")
    assert told.returncode == 0, told.stderr
    for name in (
        [one.shown for one in Command(verb, VERBS[verb]).arguments] if verb else {*VERBS} - {"init"}
    ):
        assert name in told.stdout


def test_no_word_of_a_command_or_config_names_code(tmp_path, monkeypatch):
    """The class that a `class_path` names is not imported, though it lies in the working directory."""
    (tmp_path / "evil.py").write_text("open('pwned', 'w').close()\nclass X: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(asset("configs/demo.yaml").read_text(encoding="utf-8"))
    spec = {"class_path": "evil.X", "init_args": {}}
    for key in ("task", "calibration", "evaluation", "training", "seeds", "variants"):
        (tmp_path / "x.yaml").write_text(yaml.safe_dump({**config, key: spec}))
        with pytest.raises(CordaError):
            load_experiment(tmp_path / "x.yaml")
    for variants in ({"lora": spec}, {"lora": {"learning_rates": [1], "training": {"loss": spec}}}):
        (tmp_path / "x.yaml").write_text(yaml.safe_dump({**config, "variants": variants}))
        with pytest.raises(CordaError):
            load_experiment(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(spec))
    for words in (
        ["--config", "x.yaml", "run", "configs/demo.yaml"],
        ["run", "configs/demo.yaml", "--config=x.yaml"],
        ["run", "configs/demo.yaml", "--print_config"],
        ["sites", str(spec)],
        ["train", "emoji-clip", str(spec)],
        ["train", "emoji-clip", "sklearn:digits", "--classes", str(spec), "--plan=none"],
        ["evaluate", "emoji-clip", str(spec)],
        ["run", "x.yaml"],
    ):
        with pytest.raises(SystemExit):
            main(words)
    assert not (tmp_path / "pwned").exists()
    assert "evil" not in sys.modules


def test_a_warning_shows_no_source_code(capsys):
    _show_warning(UserWarning("too few tokens"), UserWarning, "collect.py", 111)
    assert capsys.readouterr().err == "corda-vlm: warning: too few tokens\n"
