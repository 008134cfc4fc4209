"""The plan as a value and as a file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from torch import Tensor, nn

from corda_vlm.decompose import Decomposition
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.families import detect_family
from corda_vlm.files import atomic_write, read_json, write_json
from corda_vlm.plan.bases import Components, Side
from corda_vlm.sites import Site, model_fingerprint

FORMAT, VERSION = "corda_vlm.plan", 2


@dataclass(frozen=True)
class SitePlan:
    """How one weight matrix is adapted.

    Attributes:
        shape: (out, inp) of the weight.
        rank: of the adapter.
        round: which calibration round's covariance; None: all rounds pooled, or no data.
        components: "smallest" or "largest".
        side, power: of the basis, see `Basis`.
        spectrum: the `rank` singular values of `W C'^p` that were chosen, descending.
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
    shape: tuple[int, int]
    rank: int
    round: int | None
    components: Components
    side: Side
    power: float
    spectrum: tuple[float, ...]
    predicted_damage: float | None
    floored: int
    chosen_energy: float
    total_energy: float
    route: Literal["exact", "fast"]
    compactness: float | None
    scores: tuple[float, ...] | None


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

    method: str
    mode: str | None
    rank: int
    budget: int | None
    damping: float
    a_norm: float | None
    beta: float | None
    model_fingerprint: str
    data_fingerprint: str | None
    task_fingerprint: str | None
    family: str
    sites: tuple[SitePlan, ...]
    factors: Mapping[str, Decomposition] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return self.table()

    @property
    def parameters(self) -> int:
        """Trainable parameters: `Σ (out + inp) · rank`."""
        return sum(sum(s.shape) * s.rank for s in self.sites)

    def table(self) -> str:
        """A readable table, one row a site."""
        rows = [
            [
                s.site.name,
                s.site.tower,
                s.site.role,
                f"{s.shape[0]}×{s.shape[1]}",
                s.rank,
                "-" if s.round is None else s.round,
                f"{s.spectrum[0]:.3g} … {s.spectrum[-1]:.3g}" if s.spectrum else "-",
                "-" if s.predicted_damage is None else f"{s.predicted_damage:.2%}",
                s.floored or "",
            ]
            for s in self.sites
        ]
        head = ["site", "tower", "role", "shape", "rank", "round", "chosen σ", "at risk", "floored"]
        named = f"{self.method}-{self.mode}" if self.mode else self.method
        scale = "the paper's split" if self.a_norm is None else f"rows of A at norm {self.a_norm:g}"
        return (
            f"{named}: {len(self.sites)} sites of {self.family}, {self.parameters:,} trainable parameters, "
            f"damping {self.damping:g}, {scale}\n"
            + tabulate(rows, head, disable_numparse=True)
            + "\nat risk: ‖B A C'‖² / ‖W C'‖², the share of the knowledge's energy in the adapted directions"
        )

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
        family = detect_family(model).name
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

    def save(self, path: str | Path) -> Path:
        """Write `path` (JSON) and the factors beside it (`.safetensors`), each atomically; return `path`."""
        path = Path(path)
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
        with atomic_write(tensors) as partial:
            factors = {k: v.float().contiguous() for k, v in packed.items()}
            save_file(factors, partial, metadata={"format": FORMAT})
            digest = _sha256(partial)
        described = {
            "format": FORMAT,
            "version": VERSION,
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)[:-2]},
            "tensors": {"file": tensors.name, "sha256": digest},
            "sites": [dataclasses.asdict(s) for s in self.sites],
        }
        write_json(path, described)
        return path

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: nn.Module | None = None,
        mode: str | None = None,
        method: str | None = None,
    ) -> AdapterPlan:
        """Read what `save` wrote; with `model`, `mode` or `method`, `check` against them too.

        Raises:
            ForeignFileError: missing, corrupt, truncated, factors that are not this plan's, or another model, mode
                or method.
        """
        path = Path(path)
        described = read_json(path, "plan")
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            raise ForeignFileError(
                f"{path} is JSON, but not a plan of corda_vlm. Make one with plan_adapter."
            )
        if described.get("version") != VERSION:
            raise ForeignFileError(
                f"{path} is a plan of version {described.get('version')!r}, and this corda_vlm reads {VERSION}. "
                "Make it again."
            )
        tensors = _tensors_path(path)
        try:
            sites = tuple(_site_plan(entry) for entry in described["sites"])
            found = _read_tensors(tensors, described["tensors"]["sha256"], path)
            factors = {s.site.name: _decomposition(s, found) for s in sites}
            plan = cls(
                **{f.name: described[f.name] for f in dataclasses.fields(cls)[:-2]},
                sites=sites,
                factors=factors,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ForeignFileError(
                f"{path} is not a whole plan ({type(error).__name__}: {error}); it may be truncated or edited. "
                "Make it again with plan_adapter."
            ) from error
        plan.check(model, mode=mode, method=method, origin=f"the plan {path}")
        return plan


# ------------------------------------------------------------------ on disk


def _tensors_path(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def _is_plan(tensors: Path) -> bool:
    try:
        with safe_open(str(tensors), "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
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
    try:
        return load_file(tensors)
    except SafetensorError as error:
        raise ForeignFileError(
            f"{tensors} is not a safetensors file ({error}). Make the plan again."
        ) from error


def _site_plan(entry: dict[str, Any]) -> SitePlan:
    return SitePlan(
        **{
            **entry,
            "site": Site(**entry["site"]),
            "shape": tuple(entry["shape"]),
            "spectrum": tuple(entry["spectrum"]),
            "scores": None if entry["scores"] is None else tuple(entry["scores"]),
        }
    )


def _decomposition(site: SitePlan, tensors: Mapping[str, Tensor]) -> Decomposition:
    name, (out, inp) = site.site.name, site.shape
    B, A = tensors[f"{name}.B"], tensors[f"{name}.A"]
    if B.shape != (out, site.rank) or A.shape != (site.rank, inp):
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
