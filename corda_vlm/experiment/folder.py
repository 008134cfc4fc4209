"""The folder of a run: whose it is, and what `--fresh` may delete of it."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from corda_vlm.errors import CordaError
from corda_vlm.experiment.load import load_former
from corda_vlm.experiment.spec import Experiment
from corda_vlm.files import check_path, clear, entries, read_json, write_json, write_text
from corda_vlm.options import renamed
from corda_vlm.progress import note
from corda_vlm.run_files import BEGUN, CONFIG, MADE_FROM, MARKER, PATTERNS, PLAN
from corda_vlm.train.options import RESUME_SAFE_OPTIONS, TrainOptions

_MARK = {"made by": "corda-vlm run"}


def check_claim(folder: Path, experiment: Experiment, fresh: bool) -> dict[str, Any]:
    """Refuse a folder that a run of `experiment` may not write to, or not empty; nothing is changed.

    Returns:
        the config that it would get.

    Raises:
        CordaError: the folder holds something else, or results of another experiment.
    """
    check_path(folder)
    if folder.is_symlink() and not folder.exists():
        raise CordaError(f"{folder} is a link to nothing; give another folder with --output")
    if folder.exists() and not folder.is_dir():
        raise CordaError(f"{folder} is no folder; give another with --output")
    there = [path for path in entries(folder) if path.name != MARKER]
    if there and not _is_run(folder):
        raise CordaError(
            f"{folder} is not empty and holds no run; give another folder with --output"
        )
    if there and fresh:
        _check_deletable(folder)
    return plain(experiment) if fresh else _merged(folder, experiment)


def claim(folder: Path, experiment: Experiment, fresh: bool) -> None:
    """Make `folder` that of a run of `experiment`: empty if `fresh`, marked, with the resolved config.

    Raises:
        CordaError: as of `check_claim`; or it cannot be written.
    """
    config = check_claim(folder, experiment, fresh)
    write_json(folder / MARKER, _MARK)
    if fresh:
        _clear(folder, experiment)
    write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def _is_run(folder: Path) -> bool:
    """Did a run of ours make this folder?"""
    try:
        if (folder / MARKER).is_file():
            return read_json(folder / MARKER, "marker of a run") == _MARK
        # before there were markers
        if not (folder / CONFIG).is_file():
            return False
        load_former((folder / CONFIG).resolve())
    except CordaError:
        return False
    return True


def _check_deletable(folder: Path) -> None:
    """Refuse to delete where a slip would cost more than a run."""
    if folder.is_symlink():
        raise CordaError(
            f"{folder} is a link to {folder.resolve()}, and --fresh deletes through no link; give that folder as --output"
        )
    if not (folder / MARKER).is_file() and not (folder / MADE_FROM).is_file():
        raise CordaError(
            f"{folder} holds a {CONFIG} and nothing that a run made; --fresh deletes only what a run made. Give another "
            "folder with --output, or delete it by hand"
        )
    real = folder.resolve()
    for place, what in ((Path.home(), "your home"), (Path.cwd(), "the folder you work in")):
        if real == place.resolve() or real in place.resolve().parents:
            raise CordaError(
                f"{folder} is or holds {what}, and --fresh deletes no such folder; give another with --output"
            )


def _clear(folder: Path, experiment: Experiment) -> None:
    """Delete what runs write into their folders; what else lies there stays."""
    ours = (*PATTERNS, *map(glob.escape, _variants(folder, experiment)))
    # What the results were made from stands while there are results; the config names the variants' folders.
    clear(folder, ours, last=(MADE_FROM, CONFIG))
    if kept := [path.name for path in entries(folder) if path.name != MARKER]:
        note(f"left in {folder}, as no run made it: {', '.join(kept[:10])}")


def _variants(folder: Path, experiment: Experiment) -> set[str]:
    """The variants that the folder may hold folders of."""
    variants = set(experiment.variants)
    try:
        return variants | set(load_former((folder / CONFIG).resolve()).variants)
    except CordaError:  # a kill while it was deleted, or by hand
        variants |= {path.parent.name for path in folder.glob(f"*/{PLAN}")}
        return variants | {path.parent.parent.name for path in folder.glob(f"*/*/{BEGUN}")}


def _merged(folder: Path, experiment: Experiment) -> dict[str, Any]:
    """The config to write: the experiment's, with the variants that the folder has besides.

    Raises:
        CordaError: the folder's differs in more than what adds to it.
    """
    now = plain(experiment)
    if not (folder / CONFIG).is_file():
        return now
    # read as an experiment: what the config could not yet say when it was written has its default
    former = plain(load_former((folder / CONFIG).resolve()))
    now = _in_its_precision(now, former)
    before, after = _decisive(former), _decisive(now)
    shared = before["variants"].keys() & after["variants"].keys()
    changed = [key for key in after if key != "variants" and before.get(key) != after[key]]
    for name in [name for name in after["variants"] if name in shared]:
        old, new = before["variants"][name], after["variants"][name]
        changed += [f"variants.{name}.{key}" for key in new if old.get(key) != new[key]]
    if changed:
        raise CordaError(
            f"{folder} holds results of another experiment (it differs in {', '.join(changed)}); "
            "give another folder with --output, or --fresh to delete them and begin anew"
        )
    # variants that were left out this time keep their results, so they may not come back changed
    return {**now, "variants": {**former["variants"], **now["variants"]}}


def _in_its_precision(now: dict[str, Any], former: Mapping[str, Any]) -> dict[str, Any]:
    """`now`, with the precision that was asked for formerly where it is left open now: auto goes on as it began."""

    def kept(options: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        fixed = options.get("bf16") == "auto" and isinstance(before.get("bf16"), bool)
        return {**options, "bf16": before["bf16"]} if fixed else dict(options)

    training = now["training"]
    if training.get("bf16", "auto") == "auto":  # left out or written down, it is the same
        own = {key: value for key, value in former["training"].items() if key == "bf16"}
        training = {**{k: v for k, v in training.items() if k != "bf16"}, **own}
    variants = {
        name: {
            **variant,
            "training": kept(variant["training"], former["variants"][name]["training"]),
        }
        if name in former["variants"]
        else variant
        for name, variant in now["variants"].items()
    }
    evaluation = kept(now["evaluation"], former["evaluation"])
    return {**now, "training": training, "evaluation": evaluation, "variants": variants}


def plain(experiment: Experiment) -> dict[str, Any]:
    """An experiment as YAML has it: mappings and lists, without what no config can say."""
    return _plain(experiment)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _decisive(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """What may not change between two runs into one folder.

    More variants, rates, seeds or scales add to what is there, and some options of training change no weight; anything
    else would mix two experiments.
    """

    def without(mapping: Mapping[str, Any] | None, *keys: str) -> dict[str, Any]:
        return {key: value for key, value in (mapping or {}).items() if key not in keys}

    def deciding(training: Mapping[str, Any]) -> dict[str, Any]:
        return without(renamed(TrainOptions, training), *RESUME_SAFE_OPTIONS)

    return {
        # of plugins their content counts; and another machine gives the same results
        **without(experiment, "title", "seeds", "plugins", "device", "device_map"),
        "calibration": without(experiment["calibration"], "checkpoint_share"),
        "evaluation": without(experiment["evaluation"], "scales", "batch_size", "workers"),
        "training": deciding(experiment["training"]),
        "variants": {
            name: {
                **without(variant, "learning_rates", "scales"),
                "training": deciding(variant["training"]),
            }
            for name, variant in experiment["variants"].items()
        },
    }
