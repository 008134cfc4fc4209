"""The plan as a value and as a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from corda_vlm.decompose import Decomposition
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.families import any_family
from corda_vlm.files import check_path, pieces, read_json, shown, write_text
from corda_vlm.locks import locks
from corda_vlm.options import (
    Count,
    Items,
    NotNegative,
    Positive,
    Text,
    Whole,
    fitted,
    read_options,
)
from corda_vlm.plan.bases import Components, Side
from corda_vlm.sites import Site, model_fingerprint
from corda_vlm.tensors import load_tensors, read_header, save_tensors
from corda_vlm.text_table import text_table

FORMAT, VERSION = "corda_vlm.plan", 2
_ENVELOPE = ("format", "version", "tensors", "factors")
_FACTORS, _AGAIN = "the factors of a plan", "make the plan again (corda-vlm init, plan_adapter)"


@dataclass(frozen=True)
class SitePlan:
    """How one weight matrix is adapted. Its numbers are kept to six digits, for readers and for diffs.

    Attributes:
        shape: (out, inp) of the weight.
        rank: of the adapter.
        round: which calibration round's covariance; None: all rounds pooled, or no data.
        components: "smallest" or "largest".
        side, power: of the basis, see `Basis`.
        spectrum: the `rank` singular values of `W C'^p` that were chosen, descending; on the input side the eigenvalues
            of `C'^p`, for "sc-lora" those of its difference, which may be negative.
        predicted_damage: the share of knowledge energy put at risk, `‖B A C'‖² / ‖W C'‖²` (Frobenius), 0 to 1;
            None without data.
        floored: how many of the chosen components lie at the precision's floor and were completed.
        chosen_energy, total_energy: `‖B A C'^p‖` and `‖W C'^p‖` (Frobenius).
        route: "exact" or "fast"; "fast" knows the chosen values only, not the rest of the spectrum.
        compactness: `π(C') = √(out · σ_max) / σ_min` of the damped covariance at mean diagonal 1. None without data,
            and for inputs wider than 1,024 unless a dynamic option or route="exact" was asked for: it takes all
            eigenvalues of C', which for wide inputs costs more than the fast route's whole decomposition.
        scores: of each calibration round, under `dynamic_covariance`; `round` is the one of the lowest.
    """

    site: Site
    shape: tuple[Count, Count]
    rank: Count
    round: Whole | None
    components: Components
    side: Side
    power: float
    spectrum: tuple[float, ...]
    predicted_damage: NotNegative | None
    floored: Whole
    chosen_energy: NotNegative
    total_energy: NotNegative
    route: Literal["exact", "fast"]
    compactness: Positive | None
    scores: Annotated[tuple[float, ...], Items(least=1)] | None

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            object.__setattr__(self, entry.name, _six_digits(getattr(self, entry.name)))


@dataclass(frozen=True)
class AdapterPlan:
    """Everything `attach_adapter` needs; `str(plan)` is a table.

    Attributes:
        method: key of `PLAN_METHODS`.
        mode: "kpm" or "ipm"; None for a method that has no modes.
        rank: as asked for; under `dynamic_rank` sites differ.
        budget: parameters that `dynamic_rank` was allowed; None without it. A `budget=` replaces `rank`.
        damping: δ of `C' = C + δ·mean(diag C)·I`.
        a_norm: norm of each row of A at the start; None: the paper's split `B = U Σ^½`.
        beta: of "sc-lora", see `plan_adapter`; None for the others.
        model_fingerprint, data_fingerprint: what it was made from; no data: None.
        task_fingerprint: of the data of the new task, for a method that takes both; else None.
        family: key of `FAMILIES`.
        sites: in the model's order.
        factors: site name -> decomposition, float32 on the CPU.
    """

    method: Text
    mode: str | None
    rank: Count
    budget: Count | None
    damping: NotNegative
    a_norm: Positive | None
    beta: float | None
    model_fingerprint: str
    data_fingerprint: str | None
    task_fingerprint: str | None
    family: str
    sites: Annotated[tuple[SitePlan, ...], Items(least=1)]
    factors: Mapping[str, Decomposition] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return self.table()

    @property
    def parameters(self) -> int:
        """Trainable parameters: `Σ (out + inp) · rank`."""
        return sum(sum(s.shape) * s.rank for s in self.sites)

    def table(self) -> str:
        """A readable table, one row a site; columns that would say nothing are left out."""
        # heading, whether it is aligned to the right, cell of a site
        columns: list[tuple[str, bool, Callable[[SitePlan], str]]] = [
            ("site", False, lambda s: s.site.name),
            ("shape", True, lambda s: f"{s.shape[0]}×{s.shape[1]}"),
            ("side", False, lambda s: s.side),
            ("round", True, lambda s: "" if s.round is None else str(s.round)),
            ("score", True, lambda s: _score(min(s.scores)) if s.scores else ""),
            ("others", False, _others),
            ("log₁₀ π", True, lambda s: f"{math.log10(s.compactness):.2f}" if s.compactness else ""),
            ("rank", True, lambda s: str(s.rank)),
            ("at risk", True, lambda s: _percent(s.predicted_damage)),
            ("floored", True, lambda s: str(s.floored or "")),
        ]  # fmt: skip
        told = [
            column
            for column in columns
            if any(column[2](s) for s in self.sites)
            and (column[0] != "side" or len({s.side for s in self.sites}) > 1)
        ]
        rows = [[cell(s) or "-" for _, _, cell in told] for s in self.sites]
        heads = [head for head, _, _ in told]
        named = f"{self.method}-{self.mode}" if self.mode else self.method
        scale = "the paper's split" if self.a_norm is None else f"rows of A at norm {self.a_norm:g}"
        lines = [
            f"{named}: {len(self.sites)} sites of {self.family}, damping {self.damping:g}, {scale}",
            text_table(rows, heads, [right for _, right, _ in told]),
            self.spent,
            *(f"{head}: {_LEGEND[head]}" for head in heads if head in _LEGEND),
        ]
        return "\n".join(lines)

    @property
    def spent(self) -> str:
        """The budget in words, e.g. `589,824 of 589,824 parameters, ranks 1 to 40`."""
        of = "" if self.budget is None else f" of {self.budget:,}"
        low, high = min(s.rank for s in self.sites), max(s.rank for s in self.sites)
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        return f"{self.parameters:,}{of} parameters, {ranks}"

    def check(
        self,
        model: nn.Module | None = None,
        *,
        mode: str | None = None,
        method: str | None = None,
        origin: str = "this plan",
    ) -> None:
        """Refuse to be used for another model, mode or method.

        Raises:
            ForeignFileError: it was made for another; the message names both.
        """
        if mode is not None and mode != self.mode:
            raise ForeignFileError(
                f"{origin} was made in mode {self.mode!r}, not {mode!r}: the modes adapt opposite components. "
                f"Make a plan with mode={mode!r}."
            )
        if method is not None and method != self.method:
            raise ForeignFileError(
                f"{origin} was made by method {self.method!r}, not {method!r}. Make a plan with method={method!r}."
            )
        if model is None:
            return
        family = any_family(model).name
        if family != self.family:
            raise ForeignFileError(
                f"{origin} was made for a model of family {self.family!r}, and this one is {family!r} "
                f"({type(model).__name__}). Make a plan for this model."
            )
        fingerprint = model_fingerprint(model)
        if fingerprint != self.model_fingerprint:
            raise ForeignFileError(
                f"{origin} was made for the {self.family!r} model {self.model_fingerprint}, and this one is "
                f"{fingerprint}: other layers or other weights. Load the model it was made for, or make a plan "
                "for this one."
            )

    @locks("path")
    def save(self, path: str | Path) -> Path:
        """Write `path` (JSON) and the factors beside it (`.safetensors`), each atomically; return `path`."""
        path = check_path(path)
        tensors = _tensors_path(path)
        if tensors == path:
            raise CordaError(
                f"a plan is a JSON file; name it {path.with_suffix('.json')}, not {path}"
            )
        if tensors.exists() and not _is_plan(tensors):
            raise CordaError(
                f"the factors would go to {tensors}, which holds something else, e.g. covariances; choose another name"
            )
        missing = [s.site.name for s in self.sites if s.site.name not in self.factors]
        if missing:
            raise CordaError(
                f"this plan has no factors for {missing[0]!r}; make it with plan_adapter"
            )
        packed = {}
        for name, factor in self.factors.items():
            packed |= {f"{name}.B": factor.B, f"{name}.A": factor.A}
            if factor.spectrum is not None:
                packed[f"{name}.spectrum"] = factor.spectrum
        save_tensors(tensors, {k: v.float() for k, v in packed.items()}, {"format": FORMAT})
        digest = _sha256(tensors)
        described = {
            "format": FORMAT,
            "version": VERSION,
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)[:-2]},
            "tensors": {"file": tensors.name, "sha256": digest},
            "sites": [dataclasses.asdict(s) for s in self.sites],
        }
        write_text(path, _readable(described) + "\n")
        return path

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: nn.Module | None = None,
        mode: str | None = None,
        method: str | None = None,
        factors: bool = True,
    ) -> AdapterPlan:
        """Read what `save` wrote; with `model`, `mode` or `method`, `check` against them too.

        `factors=False` reads the JSON alone: enough to look at, not to attach.

        Raises:
            ForeignFileError: missing, corrupt, truncated, factors that are not this plan's, or another model, mode
                or method.
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
            plan = read_options(cls, own, "the plan")
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
        plan.check(model, mode=mode, method=method, origin=f"the plan {path}")
        return plan


# ------------------------------------------------------------------ for a reader

_LEGEND = {
    "score": "of the calibration round taken, the lowest; others: of the rounds that were not",
    "log₁₀ π": "compactness of the covariance; the lower, the less a small component can change the outputs",
    "at risk": "‖B A C'‖² / ‖W C'‖², the share of the knowledge's energy in the adapted directions",
}


def _score(score: float) -> str:
    return f"{score:.2f}" if score < 1000 else f"{score:.0f}"


def _others(site: SitePlan) -> str:
    """The scores of the rounds that the site did not take."""
    if site.scores is None or site.round is None:
        return ""
    others = [score for index, score in enumerate(site.scores) if index != site.round]
    if not others:
        return ""
    low, high = _score(min(others)), _score(max(others))
    return low if low == high else f"{low}–{high}"


def _percent(share: float | None) -> str:
    return (
        "" if share is None else f"{100 * share:.2f}%" if share >= 1e-3 else f"{100 * share:.1e}%"
    )


def _six_digits(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_six_digits, value))
    return float(f"{value:.6g}") if isinstance(value, float) else value


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


# ------------------------------------------------------------------ on disk


def _tensors_path(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def _is_plan(tensors: Path) -> bool:
    try:
        return read_header(tensors, _FACTORS, _AGAIN)[1].get("format") == FORMAT
    except ForeignFileError:
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for piece in pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def _read_tensors(tensors: Path, digest: str, path: Path) -> dict[str, Tensor]:
    if not tensors.is_file():
        raise ForeignFileError(
            f"the plan {path} has lost its factors: no file {tensors}. Make it again."
        )
    if _sha256(tensors) != digest:
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
