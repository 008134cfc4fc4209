"""What a training's folder holds: what is trained, for who goes on with it, and what came of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from corda_vlm.adapter.base import base_fingerprint
from corda_vlm.adapter.folder import WEIGHTS
from corda_vlm.data import Records
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.files import read_json, shown, write_json
from corda_vlm.options import renamed
from corda_vlm.precision import takes_bf16
from corda_vlm.run_files import BEGUN, DONE, HISTORY
from corda_vlm.train.budget.budget import Budget
from corda_vlm.train.budget.spent import Spent
from corda_vlm.train.checkpoints import STATE
from corda_vlm.train.heads import Template
from corda_vlm.train.history import read_history
from corda_vlm.train.objectives import Objective
from corda_vlm.train.options import RESUME_SAFE_OPTIONS, TrainOptions, TrainResult
from corda_vlm.train.terms.term import Term
from corda_vlm.train.watch import Watch
from corda_vlm.train.weights import check_signature, load_weights, save_weights, signature


def training_plan(
    model: nn.Module,
    data: Records,
    options: TrainOptions,
    classes: Sequence[str] | None,
    templates: Sequence[Template] | None,
    budget: Budget | None,
) -> dict[str, Any]:
    """What a training is, as JSON, but for the terms of its loss: `with_terms` adds these, and then two trainings with equal
    plans end in equal weights."""
    plan = {
        "options": _kept(options),
        "data": data.fingerprint,
        "classes": None if classes is None else list(classes),
        "templates": None
        if templates is None
        else [t if isinstance(t, str) else t("{}") for t in templates],
        "model": signature(model),
        "terms": {},
        "base": base_fingerprint(model),
        "budget": None if budget is None else budget.identity,
    }
    return _as_json(plan)


def with_terms(plan: dict[str, Any], terms: Sequence[Term]) -> dict[str, Any]:
    """The plan of a training with these terms; one that is only logged decides about no weight."""
    return {**plan, "terms": _as_json({term.name: term.plan for term in terms if term.weight > 0})}


def _kept(options: TrainOptions) -> dict[str, Any]:
    """The options that decide about the weights, as JSON gives them back."""
    kept = {
        name: value for name, value in asdict(options).items() if name not in RESUME_SAFE_OPTIONS
    }
    return _as_json(kept)


def _as_json(content: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(content))


def runs_in_bf16(options: TrainOptions, output: Path, model: nn.Module) -> bool:
    """Whether this training runs under bfloat16; where it is left open, what the folder's training began with."""
    former = None
    if options.bf16 == "auto" and (output / BEGUN).is_file():
        saved = read_json(output / BEGUN, "training plan")
        before = saved.get("options") if isinstance(saved, dict) else None
        if isinstance(before, dict) and isinstance(bf16 := before.get("bf16"), bool):
            former = bf16
    weight = next(model.parameters())
    return takes_bf16(options.bf16, weight.device, former=former, weights=weight.dtype)


def check_begun(output: Path, plan: dict[str, Any], model: nn.Module) -> None:
    """Raise `CordaError` if another training was begun in `output`, as far as that shows before the terms of the loss are made."""
    if (output / BEGUN).is_file():
        with _undamaged(output):
            terms = _noted(output / BEGUN, plan).get("terms")
        _check(output, {**plan, "terms": terms}, model)


def begin(output: Path, plan: dict[str, Any], model: nn.Module) -> None:
    """Write the plan, or check that the one that is there is the same."""
    path = output / BEGUN
    if not path.is_file():
        if any(output.glob(f"checkpoint-*/{STATE}")) or (output / DONE).is_file():
            raise CordaError(
                f"{output} holds a training without its {BEGUN}; choose another folder"
            )
        write_json(path, plan)
        return
    _check(output, plan, model)


def _noted(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The plan that a folder holds, as plans are today."""
    return _of_today(read_json(path, "training plan"), plan, path)


def _check(output: Path, plan: dict[str, Any], model: nn.Module) -> None:
    with _undamaged(output):
        _compare(_noted(output / BEGUN, plan), plan, model, output)


@contextmanager
def _undamaged(output: Path) -> Iterator[None]:
    """Say which folder's plan it is that is no plan, where Python says what it cannot do with a value of it."""
    try:
        yield
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        if isinstance(error, CordaError):
            raise
        raise ForeignFileError(
            f"{output / BEGUN} is damaged ({type(error).__name__}: {shown(str(error))}); delete {output} to begin anew, or give another "
            "output folder"
        ) from error


def _of_today(saved: Any, plan: dict[str, Any], path: Path) -> dict[str, Any]:
    """What was noted of a training, with what trainings begun earlier did not note."""
    if isinstance(saved, dict):
        saved = {"base": plan["base"], "terms": _former_terms(saved), "budget": None, **saved}
        saved = {key: value for key, value in saved.items() if key not in _FORMER}
    if not isinstance(saved, dict) or set(saved) != set(plan):
        raise CordaError(
            f"{path} is not a training plan of this version; delete {path.parent} or choose another"
        )
    return saved


_FORMER = ("anchor", "extra_weight")


def _former_terms(saved: dict[str, Any]) -> dict[str, Any]:
    """The terms of a training that was begun when its plan named two of them only."""
    terms = {}
    if anchor := saved.get("anchor"):
        terms["anchor"] = {"every": 1, **anchor}
    if weight := saved.get("extra_weight"):
        terms["extra_loss"] = {"weight": weight, "every": 1}
    return terms


def _compare(saved: dict[str, Any], plan: dict[str, Any], model: nn.Module, output: Path) -> None:
    """Raise `CordaError` unless the training that was begun in `output` is this one."""
    # an option that there was not yet when the training began had what is its default now
    former = renamed(TrainOptions, saved["options"])
    options = {**_kept(TrainOptions(steps=1)), **former}
    changed = [
        f"{name}: {options[name]} there, {value} now"
        for name, value in plan["options"].items()
        if options[name] != value
    ]
    changed += [name for name in ("data", "classes", "templates") if saved[name] != plan[name]]
    for term in sorted({*saved["terms"], *plan["terms"]}):
        before, now = (p["terms"].get(term, {}) for p in (saved, plan))
        changed += [
            f"the {term}'s {name}: {before.get(name)} there, {now.get(name)} now"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
    before, now = (p["budget"] or {} for p in (saved, plan))
    changed += [
        f"the budget's {name}: {before.get(name)} there, {now.get(name)} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise CordaError(
            f"{output} holds another training ({'; '.join(changed)}); delete it to begin anew, "
            "or give another output folder"
        )
    check_signature(saved["model"], model, output)
    if saved["base"] != plan["base"]:  # what a full fine-tune begins with shows in nothing else
        raise CordaError(
            f"{output} holds the training of a model that began with other weights. Load the original model again if this "
            "one has been trained in the meantime, or give another output folder"
        )


def finish(
    output: Path,
    model: nn.Module,
    objective: Objective,
    watch: Watch,
    steps: int,
    resumed: int | None,
    base: str,
    spent: Spent | None = None,
) -> TrainResult:
    result = {
        "steps": steps,
        "seconds": round(watch.seconds, 3),
        "samples_per_second": round(watch.samples_per_second, 2),
    }
    try:
        save_weights(model, objective.head, output / WEIGHTS, base=base)
    except (OSError, SafetensorError) as error:
        raise CordaError(
            f"could not write {output / WEIGHTS}: {error}; free some space and run again"
        ) from error
    told = result if spent is None else {**result, "budget": spent.as_json()}
    write_json(output / DONE, told)  # last: from here on the training is finished
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)
    return TrainResult(
        history=watch.history,
        weights=output / WEIGHTS,
        head=objective.head,
        resumed_from=resumed,
        budget=spent,
        **result,
    )


def finished(output: Path, model: nn.Module, objective: Objective) -> TrainResult:
    load_weights(model, objective.head, output / WEIGHTS)
    path = output / DONE
    result = read_json(path, "training result")
    try:
        speed = {name: float(result[name]) for name in ("seconds", "samples_per_second")}
        return TrainResult(
            history=read_history(output / HISTORY),
            weights=output / WEIGHTS,
            head=objective.head,
            steps=int(result["steps"]),
            resumed_from=int(result["steps"]),
            budget=None if (spent := result.get("budget")) is None else Spent.from_json(spent),
            **speed,
        )
    except (TypeError, KeyError, ValueError, OverflowError, AttributeError) as error:
        if isinstance(error, CordaError):
            raise
        raise ForeignFileError(
            f"{path} is damaged ({type(error).__name__}: {shown(str(error))}); delete it to train again from the start"
        ) from error
