"""Whose a run's folder is, and what `--fresh` deletes: only what a run made, and only once nothing else can be wrong."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import yaml

from corda_vlm.errors import CordaError
from corda_vlm.experiment import run
from corda_vlm.experiment.folder import check_claim, claim, plain
from corda_vlm.experiment.load import load_experiment, load_study
from corda_vlm.files import asset
from corda_vlm.options import option_names
from corda_vlm.run_files import CONFIG, MADE_FROM, MARKER
from corda_vlm.train.terms.options import TermOptions


@pytest.fixture
def demo():
    return load_experiment(asset("configs/demo.yaml"), ["evaluation.bf16=auto"])


@pytest.fixture
def made(tmp_path, demo):
    """The folder of a run, with a note that somebody put there."""
    folder = tmp_path / "made"
    claim(folder, demo, fresh=False)
    (folder / MADE_FROM).write_text("{}")
    for name in (
        "scores.jsonl",
        "scores-base-examples.jsonl",
        "diverged.jsonl",
        "pictures.json",
        "plans.png",
    ):
        (folder / name).write_text("{}\n")
    (folder / "covariance.safetensors").write_text("")
    (folder / "covariance-task.safetensors.blocks").mkdir()
    (folder / "mine.png").write_text("")
    (folder / "lora" / "0.001-0").mkdir(parents=True)
    (folder / "lora" / "plan.json").write_text("{}")
    (folder / "notes.md").write_text("my notes")
    return folder


def test_fresh_leaves_what_no_run_made(made, demo, capsys):
    claim(made, replace(demo, rank=3), fresh=True)
    assert {path.name for path in made.iterdir()} == {MARKER, CONFIG, "notes.md", "mine.png"}
    assert yaml.safe_load((made / CONFIG).read_text())["rank"] == 3
    assert "notes.md" in capsys.readouterr().out


def test_the_marker_has_the_name_that_every_version_gave_it(made, demo):
    """A folder without a config, of which a kill left the marker alone, is still a run's."""
    assert (made / ".corda_vlm.run").is_file()
    for path in (made / CONFIG, made / MADE_FROM):
        path.unlink()
    check_claim(made, demo, fresh=True)


def test_fresh_takes_the_folder_of_a_run_from_before_markers(made, demo):
    (made / MARKER).unlink()
    claim(made, replace(demo, rank=3), fresh=True)
    assert not (made / "scores.jsonl").exists()


def test_auto_takes_the_precision_that_was_asked_for_formerly(made, demo):
    """A folder of before there was auto says false, and one of any version may say true."""
    full = demo.variants["full"]
    fixed = replace(
        demo,
        evaluation=replace(demo.evaluation, bf16=False),
        training={**demo.training, "bf16": True},
        variants={**demo.variants, "full": replace(full, training={"bf16": False})},
    )
    auto = replace(demo.variants["full"], training={"bf16": "auto"})
    claim(made, fixed, fresh=True)
    claim(made, replace(demo, variants={**demo.variants, "full": auto}), fresh=False)
    assert yaml.safe_load((made / CONFIG).read_text()) == plain(fixed)
    claim(made, demo, fresh=True)
    with pytest.raises(CordaError, match="differs in evaluation"):
        claim(made, replace(demo, evaluation=fixed.evaluation), fresh=False)


def test_a_kill_on_the_way_leaves_what_says_whose_the_folder_is(made, demo):
    (made / CONFIG).unlink()
    claim(made, demo, fresh=True)
    assert not (made / "lora").exists(), "its plan tells that it is a variant's"
    (made / CONFIG).unlink()
    (made / "notes.md").unlink()
    (made / "mine.png").unlink()
    claim(made, demo, fresh=False)
    assert (made / CONFIG).is_file()


@pytest.mark.parametrize(
    "config",
    ["name: x", "server: {port: 80}", "- 1", "{", ""],
    ids=["half of one", "somebody else's", "a list", "torn", "empty"],
)
def test_a_config_of_something_else_makes_no_run(tmp_path, demo, config):
    (tmp_path / CONFIG).write_text(config)
    (tmp_path / "thesis.tex").write_text("years of work")
    for fresh in (True, False):
        with pytest.raises(CordaError, match="holds no run"):
            claim(tmp_path, demo, fresh)
    assert (tmp_path / "thesis.tex").exists()
    assert (tmp_path / CONFIG).read_text() == config


def test_a_folder_with_a_config_of_ours_alone_is_not_deleted(tmp_path, demo):
    (tmp_path / CONFIG).write_text(yaml.safe_dump(plain(demo)))
    (tmp_path / "lora").mkdir()
    with pytest.raises(CordaError, match="nothing that a run made"):
        claim(tmp_path, demo, fresh=True)
    assert (tmp_path / "lora").exists()


def test_nothing_is_deleted_through_a_link(made, demo, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(made)
    with pytest.raises(CordaError, match="through no link"):
        claim(link, demo, fresh=True)
    (made / "lora" / "1e-05-0").symlink_to(tmp_path)
    (made / "report.md").symlink_to(asset("README.md"))
    claim(made, demo, fresh=True)
    assert asset("README.md").exists()
    assert tmp_path.exists()
    assert link.exists()
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CordaError, match="link to nothing"):
        claim(dangling, demo, fresh=False)


@pytest.mark.parametrize("where", ["cwd", "above", "home"])
def test_neither_home_nor_where_one_works_is_deleted(made, demo, monkeypatch, where):
    if where == "home":
        monkeypatch.setenv("HOME", str(made))
    else:
        monkeypatch.chdir(made if where == "cwd" else made / "lora")
    with pytest.raises(CordaError, match="deletes no such folder"):
        claim(made, demo, fresh=True)
    assert (made / "scores.jsonl").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "emoji-clap"},
        {"suite": "emojo"},
        {"task.data": "folder:none"},
        {"towers": ["visoin"]},
        {"rank": 100_000},
        {"variants.lora.modules_to_save": ["nothing.here"], "evaluation.scales": []},
        {"task.classes": ["zero"]},
    ],
    ids=str,
)
def test_fresh_deletes_nothing_where_anything_else_is_wrong(made, wrong):
    before = sorted(path.name for path in made.rglob("*"))
    overrides = [f"{key}={value}" for key, value in wrong.items()]
    with pytest.raises(CordaError):
        run("configs/demo.yaml", output=made, overrides=overrides, fresh=True)
    assert sorted(path.name for path in made.rglob("*")) == before


@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", ".hidden", "", "x" * 200, "a\tb"])
def test_names_do_not_lead_elsewhere(name, tmp_path):
    config = yaml.safe_load(asset("configs/demo.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({**config, "name": name}))
    with pytest.raises(CordaError, match="name"):
        load_experiment(path)
    path.write_text(yaml.safe_dump({**config, "variants": {name: {"learning_rates": [1], "method": "lora"}}}))  # fmt: skip
    with pytest.raises(CordaError, match="name"):
        load_experiment(path)
    for study in ({"name": name, "experiments": {"a": config}}, {"name": "a", "experiments": {name: config}}):  # fmt: skip
        path.write_text(yaml.safe_dump(study))
        with pytest.raises(CordaError, match="name"):
            load_study(path)


def test_a_study_takes_no_folder_of_something_else(tmp_path):
    config = yaml.safe_load(asset("configs/demo.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"name": "pair", "experiments": {"one": config}}))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(CordaError, match="holds no study"):
        run(path, output=folder, fresh=True)
    (folder / "study.json").write_text("{}")
    (folder / "one").mkdir()
    (folder / "one" / CONFIG).write_text("server: {port: 80}")
    with pytest.raises(CordaError, match="holds no run"):
        run(path, output=folder, fresh=True)
    assert sorted(path.name for path in folder.rglob("*")) == ["config.yaml", "one", "study.json", "thesis.tex"]  # fmt: skip


def test_a_claim_looks_before_it_writes(made, demo):
    other = replace(demo, rank=3)
    with pytest.raises(CordaError, match="another experiment"):
        check_claim(made, other, fresh=False)
    check_claim(made, other, fresh=True)
    assert (made / "scores.jsonl").exists(), "looking deletes nothing"
    shutil.rmtree(made)
    check_claim(made, other, fresh=False)
    assert not made.exists()


def test_the_folder_of_a_former_version_is_gone_on_with(made, demo):
    """Options had other names, and fewer could be said: the same experiment is still the same."""
    former = plain(demo)
    former["chat"] = former.pop("chat_template")
    for name in ("device", "trust_remote_code", "plugins"):
        del former[name]
    former["evaluation"] = {"scales": [], "batch_size": 256, "bf16": "auto"}
    former["calibration"] = {
        name: former["calibration"][name] for name in ("data", "samples", "batch_size")
    }
    former["training"]["template"] = "plain"
    del former["variants"]["natural-distill"]  # which it could not say
    for variant in former["variants"].values():
        for name in (
            "roles",
            "budget",
            "rho",
            "route",
            "base",
            "towers",
            "targets",
            "anchor_every",
            *option_names(TermOptions),
        ):
            variant.pop(name, None)
    (made / CONFIG).write_text(yaml.safe_dump(former))
    now = replace(demo, training={**demo.training, "chat_template": "plain"})
    check_claim(made, now, fresh=False)
    check_claim(made, replace(now, device="cpu"), fresh=False)
    with pytest.raises(CordaError, match=r"differs in training"):
        check_claim(made, replace(now, training={**demo.training, "chat_template": "bare"}), fresh=False)  # fmt: skip
