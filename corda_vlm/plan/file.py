"""The plan as a file: readable JSON, and the factors beside it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corda_vlm.decompose import Decomposition
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.files import check_path, file_digest, read_json, shown, write_text
from corda_vlm.options import (
    fitted,
    read_options,
)
from corda_vlm.tensors import load_tensors, read_header, save_tensors

if TYPE_CHECKING:
    from corda_vlm.plan.plan import AdapterPlan, SitePlan

FORMAT, VERSION = "corda_vlm.plan", 2
_ENVELOPE = ("format", "version", "tensors", "factors")
_FACTORS, _AGAIN = "the factors of a plan", "make the plan again (corda-vlm init, plan_adapter)"


def write_plan(plan: AdapterPlan, path: str | Path) -> Path:
    """Write `path` (JSON) and the factors beside it (`.safetensors`), each atomically; return `path`."""
    path = check_path(path)
    tensors = _tensors_path(path)
    if tensors == path:
        raise CordaError(f"a plan is a JSON file; name it {path.with_suffix('.json')}, not {path}")
    if tensors.exists() and not _is_plan(tensors):
        raise CordaError(
            f"the factors would go to {tensors}, which holds something else, e.g. covariances; choose another name"
        )
    missing = [s.site.name for s in plan.sites if s.site.name not in plan.factors]
    if missing:
        raise CordaError(f"this plan has no factors for {missing[0]!r}; make it with plan_adapter")
    packed = {}
    for name, factor in plan.factors.items():
        packed |= {f"{name}.B": factor.B, f"{name}.A": factor.A}
        if factor.spectrum is not None:
            packed[f"{name}.spectrum"] = factor.spectrum
    save_tensors(tensors, {k: v.float() for k, v in packed.items()}, {"format": FORMAT})
    digest = file_digest(tensors)
    described = {
        "format": FORMAT,
        "version": VERSION,
        **{f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)[:-2]},
        "tensors": {"file": tensors.name, "sha256": digest},
        "sites": [dataclasses.asdict(s) for s in plan.sites],
    }
    write_text(path, _readable(described) + "\n")
    return path


def read_plan(kind: type[AdapterPlan], path: str | Path, *, factors: bool) -> AdapterPlan:
    """Read what `write_plan` wrote.

    Args:
        kind: `AdapterPlan`.
        factors: read them too, or the JSON alone.

    Raises:
        ForeignFileError: missing, corrupt, truncated, or factors that are not this plan's.
    """
    path = check_path(path)
    described = read_json(path, "plan")
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise ForeignFileError(
            f"{path} is JSON, but not a plan of corda_vlm. Make one with plan_adapter."
        )
    if described.get("version") != VERSION:
        raise ForeignFileError(
            f"{path} is a plan of version {described.get('version')!r}, and this corda_vlm reads {VERSION}. "
            "Make it again with plan_adapter (corda-vlm init)."
        )
    tensors = _tensors_path(path)
    own = {key: value for key, value in described.items() if key not in _ENVELOPE}
    try:
        plan = read_options(kind, own, "the plan")
        digest = fitted(described["tensors"]["sha256"], str, "tensors.sha256")
        _check_sites(plan.sites)
        if factors:
            read = _read_tensors(tensors, digest, path)
            factors_of = {s.site.name: _decomposition(s, read) for s in plan.sites}
            plan = dataclasses.replace(plan, factors=factors_of)
    except ForeignFileError:
        raise
    except (CordaError, KeyError, TypeError, AttributeError) as error:
        raise ForeignFileError(
            f"{path} is not a whole plan ({type(error).__name__}: {shown(str(error))}); it may be truncated or edited. "
            "Make it again with plan_adapter."
        ) from error
    return plan


def _readable(value: Any, margin: str = "") -> str:
    """JSON with an entry a line, but what is flat (a site, a spectrum) on one: for readers, and for diffs."""
    if not isinstance(value, (dict, list, tuple)) or not any(
        isinstance(inner, (dict, list, tuple))
        for inner in (value.values() if isinstance(value, dict) else value)
    ):
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    inside = margin + "  "
    if isinstance(value, dict):
        entries = [f"{json.dumps(k)}: {_readable(v, inside)}" for k, v in value.items()]
        brackets = "{}"
    else:
        entries, brackets = [_readable(v, inside) for v in value], "[]"
    lines = f",\n{inside}".join(entries)
    return f"{brackets[0]}\n{inside}{lines}\n{margin}{brackets[1]}"


def _tensors_path(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def _is_plan(tensors: Path) -> bool:
    try:
        return read_header(tensors, _FACTORS, _AGAIN)[1].get("format") == FORMAT
    except ForeignFileError:
        return False


def _read_tensors(tensors: Path, digest: str, path: Path) -> dict[str, Tensor]:
    if not tensors.is_file():
        raise ForeignFileError(
            f"the plan {path} has lost its factors: no file {tensors}. Make it again."
        )
    if file_digest(tensors) != digest:
        raise ForeignFileError(
            f"{tensors} does not hold the factors of the plan {path} (its hash differs): corrupt, truncated, or from "
            "another plan. Make the plan again."
        )
    return load_tensors(tensors, _FACTORS, _AGAIN)


def _check_sites(sites: Sequence[SitePlan]) -> None:
    """Raise `CordaError` where what is said of a site contradicts itself."""
    names = [s.site.name for s in sites]
    if twice := [name for name in names if names.count(name) > 1]:
        raise CordaError(f"the site {twice[0]!r} is there twice")
    for s in sites:
        if s.rank > max(s.shape) or len(s.spectrum) != s.rank:
            raise CordaError(
                f"the site {s.site.name!r} of shape {s.shape} has rank {s.rank} and {len(s.spectrum)} singular values"
            )


def _decomposition(site: SitePlan, tensors: Mapping[str, Tensor]) -> Decomposition:
    name, (out, inp) = site.site.name, site.shape
    B, A = tensors[f"{name}.B"], tensors[f"{name}.A"]
    floating = B.is_floating_point() and A.is_floating_point()
    if B.shape != (out, site.rank) or A.shape != (site.rank, inp) or not floating:
        raise ForeignFileError(
            f"the factors of site {name!r} have shapes {tuple(B.shape)} and {tuple(A.shape)}, and the plan says "
            f"{(out, site.rank)} and {(site.rank, inp)}: it was edited. Make it again with plan_adapter."
        )
    return Decomposition(
        B=B,
        A=A,
        singular_values=torch.tensor(site.spectrum),
        spectrum=tensors.get(f"{name}.spectrum"),
        total_energy=site.total_energy,
        chosen_energy=site.chosen_energy,
        floored=site.floored,
        side=site.side,
        route=site.route,
    )
