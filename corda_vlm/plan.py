"""What will be adapted and how: for each site its covariance, rank, components, spectrum and predicted damage.

A plan is a JSON file a person can read, and beside it, under the same name with `.safetensors`, the factors, so that
attaching does not decompose again. The JSON holds the hash of the factors and the fingerprints of the
model and the calibration data; a plan of another model or mode is refused, naming both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from torch import Tensor, nn
from tqdm.auto import tqdm

from corda_vlm import ranks
from corda_vlm.covariance import CovarianceStore
from corda_vlm.decompose import Decomposition, damp, decompose, knowledge_energy
from corda_vlm.errors import CordaError, ForeignFileError, UnknownNameError
from corda_vlm.families import detect_family
from corda_vlm.families.attention import unpacked
from corda_vlm.files import atomic_write, read_json, write_json
from corda_vlm.sites import Site, find_sites, get_linear, model_fingerprint

Components = Literal["smallest", "largest"]
Side = Literal["output", "input"]
Route = Literal["auto", "exact", "fast"]

FORMAT, VERSION = "corda_vlm.plan", 1

MODES: dict[str, Components] = {
    "kpm": "smallest",  # knowledge-preserved: adapt what the knowledge uses least
    "ipm": "largest",  # instruction-previewed: adapt what the new task uses most
}


@dataclass(frozen=True)
class Basis:
    """A row of method.md's table: `B A = Q Qᵀ W` with Q from the eigenvectors of `W C^2p Wᵀ`.

    Attributes:
        power: p, of the covariance in `W C^p`.
        components: "smallest" or "largest"; None: the mode decides.
        side: "output" or "input".
        source: the paper.
    """

    power: float
    components: Components | None
    side: Side
    source: str

    @property
    def needs_store(self) -> bool:
        return self.power != 0


PLAN_METHODS: dict[str, Basis] = {
    "corda": Basis(1.0, None, "output", "CorDA, arXiv 2406.05223"),
    "pissa": Basis(0.0, "largest", "output", "PiSSA, arXiv 2404.02948"),
    "milora": Basis(0.0, "smallest", "output", "MiLoRA, arXiv 2406.09044"),
    "olora": Basis(0.0, "largest", "output", "OLoRA, arXiv 2406.01775: the first columns of W = Q R"),
}


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


@dataclass(frozen=True)
class AdapterPlan:
    """Everything `attach_adapter` needs; `str(plan)` is a table.

    Attributes:
        method: key of `PLAN_METHODS`.
        mode: "kpm" or "ipm"; None for a method that has no modes.
        rank: as asked for; sites may differ under `dynamic_rank`.
        damping: δ of `C' = C + δ·mean(diag C)·I`.
        a_norm: norm of each row of A at the start; None: the paper's split `B = U Σ^½`.
        model_fingerprint, data_fingerprint: what it was made from; no data: None.
        family: key of `FAMILIES`.
        sites: in the model's order.
        factors: site name -> decomposition, float32 on the CPU.
    """

    method: str
    mode: str | None
    rank: int
    damping: float
    a_norm: float | None
    model_fingerprint: str
    data_fingerprint: str | None
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
            save_file({k: v.float().contiguous() for k, v in packed.items()}, partial)
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


def plan_adapter(
    model: nn.Module,
    store: CovarianceStore | None,
    *,
    mode: str = "kpm",
    rank: int = 16,
    method: str = "corda",
    dynamic_rank: bool = False,
    dynamic_covariance: bool = False,
    damping: float = 1e-4,
    a_norm: float | None = None,
    towers: Sequence[str] | str | None = None,
    roles: Sequence[str] | str | None = None,
    route: Route = "auto",
    seed: int = 0,
    show_progress: bool = True,
) -> AdapterPlan:
    """Decide, and decompose: which directions of which weight matrices are adapted. The model is not changed.

    Args:
        model: bare; packed attention is unpacked meanwhile.
        store: covariances of the knowledge to keep ("kpm") or of the new task ("ipm"). May be None for
            "pissa", "milora" and "olora"; if given, it predicts their damage.
        mode: "kpm" takes the smallest components, "ipm" the largest. Only "corda" has modes.
        rank: of every site, or with `dynamic_rank` their budget: as many parameters as that rank everywhere.
        method: key of `PLAN_METHODS`.
        dynamic_rank: CorDA++: ranks by compactness, see `ranks.allocate_ranks`. Takes the exact route.
        dynamic_covariance: CorDA++: each site takes one calibration round, see `ranks.select_covariance`.
        damping: δ, see `AdapterPlan`.
        a_norm: norm of each row of A at the start; B takes the inverse. It decides how far training strays from
            the planned directions (learning rates scale along). None: the paper's split.
        towers, roles: only these, names as in `find_sites`.
        route: "auto", "exact" or "fast", see `decompose`.
        seed: of the fast route's starting block.

    Raises:
        UnknownNameError: unknown method, mode, tower or role.
        NoSitesError: towers and roles leave no site.
        ForeignFileError: the store was made from another model.
        CordaError: a rank outside 1 to min(out, inp), a site the store did not calibrate, an option the method lacks.
    """
    if method not in PLAN_METHODS:
        raise UnknownNameError("plan method", method, PLAN_METHODS)
    basis = PLAN_METHODS[method]
    if basis.components is None and mode not in MODES:
        raise UnknownNameError("mode", mode, MODES)
    components = basis.components or MODES[mode]
    if store is None and basis.needs_store:
        raise CordaError(
            f"method {method!r} takes its directions from data: pass the store of collect_covariance. "
            f"Without data: {', '.join(sorted(m for m, b in PLAN_METHODS.items() if not b.needs_store))}."
        )
    if (dynamic_rank or dynamic_covariance) and not basis.needs_store:
        raise CordaError(
            f"dynamic_rank and dynamic_covariance weigh covariances, which method {method!r} does not use; "
            "take method='corda' or leave them off"
        )
    if a_norm is not None and not (math.isfinite(a_norm) and a_norm > 0):
        raise CordaError(
            f"a_norm is the norm of each row of A at the start, so positive; got {a_norm!r}"
        )
    fingerprint = model_fingerprint(model)
    if store is not None and store.model_fingerprint != fingerprint:
        raise ForeignFileError(
            f"the covariances were collected from the model {store.model_fingerprint}, and this one is "
            f"{fingerprint}: collect them from this model, or load that one"
        )
    with unpacked(model):
        sites = find_sites(model, towers=towers, roles=roles)
        weights = {s.name: get_linear(model, s.name).weight.detach() for s in sites}
        shapes = {name: (w.shape[0], w.shape[1]) for name, w in weights.items()}
        check_rank(shapes, rank)
        chosen = _covariances(sites, weights, store, damping, dynamic_covariance)
        ranks_of = dict.fromkeys(weights, rank)
        if dynamic_rank:
            ranks_of = _dynamic_ranks(weights, chosen, mode, rank, damping, show_progress)
            route = "exact"
        planned, factors = [], {}
        for site in tqdm(sites, "plan", unit="site", disable=not show_progress, leave=False):
            weight, (covariance, round_) = weights[site.name], chosen[site.name]
            if method == "olora":
                factor = _olora(weight, ranks_of[site.name], a_norm)
            else:
                factor = decompose(
                    weight,
                    covariance if basis.needs_store else None,
                    rank=ranks_of[site.name],
                    components=components,
                    power=basis.power,
                    side=basis.side,
                    damping=damping,
                    a_norm=a_norm,
                    route=route,
                    seed=seed,
                )
            factors[site.name] = _on_cpu(factor)
            planned.append(
                SitePlan(
                    site=site,
                    shape=shapes[site.name],
                    rank=ranks_of[site.name],
                    round=round_,
                    components=components,
                    side=basis.side,
                    power=basis.power,
                    spectrum=tuple(factor.singular_values.tolist()),
                    predicted_damage=_damage(weight, factor, covariance, damping, basis.power),
                    floored=factor.floored,
                    chosen_energy=factor.chosen_energy,
                    total_energy=factor.total_energy,
                    route=factor.route,
                )
            )
    return AdapterPlan(
        method=method,
        mode=mode if basis.components is None else None,
        rank=rank,
        damping=float(damping),
        a_norm=None if a_norm is None else float(a_norm),
        model_fingerprint=fingerprint,
        data_fingerprint=store.data_fingerprint if store is not None else None,
        family=detect_family(model).name,
        sites=tuple(planned),
        factors=factors,
    )


def check_rank(shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
    """Raise a `CordaError` that names the first site whose (out, inp) weight cannot have this rank."""
    for name, (out, inp) in shapes.items():
        if not 1 <= rank <= min(out, inp):
            raise CordaError(
                f"site {name!r}: rank {rank} is outside 1 to {min(out, inp)}, the full rank of its {out}×{inp} weight; "
                "choose a rank within, or leave the site out with towers= or roles="
            )


def _covariances(
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    store: CovarianceStore | None,
    damping: float,
    dynamic: bool,
) -> dict[str, tuple[Tensor | None, int | None]]:
    """Site name -> (covariance or None, its round or None)."""
    chosen: dict[str, tuple[Tensor | None, int | None]] = {}
    for site in sites:
        if store is None:
            chosen[site.name] = (None, None)
            continue
        if site.name not in store.site_streams:
            known = ", ".join(sorted(store.site_streams)[:4])
            raise CordaError(
                f"site {site.name!r} was not calibrated (the store has {len(store.site_streams)} sites: {known}, …); "
                "collect covariances for it too, or leave it out with towers= or roles="
            )
        if dynamic:
            rounds = store.rounds(site.name)
            index, _ = ranks.select_covariance(
                [c.matrix for c in rounds], weights[site.name], damping=damping
            )
            chosen[site.name] = (rounds[index].matrix, index)
        else:
            chosen[site.name] = (store[site.name].matrix, None)
    return chosen


def _dynamic_ranks(
    weights: Mapping[str, Tensor],
    chosen: Mapping[str, tuple[Tensor | None, int | None]],
    mode: str,
    rank: int,
    damping: float,
    show_progress: bool,
) -> dict[str, int]:
    spectra, compactness = {}, {}
    for name, weight in tqdm(weights.items(), "spectra", disable=not show_progress, leave=False):
        covariance = chosen[name][0]
        assert covariance is not None
        # a first pass for the values alone: holding every site's whole basis would take the model's size
        factor = decompose(
            weight, covariance, rank=1, components="largest", damping=damping, route="exact"
        )
        assert factor.spectrum is not None
        spectra[name] = factor.spectrum
        compactness[name] = ranks.compactness(covariance, weight.shape[0], damping=damping)
    shapes = {name: (w.shape[0], w.shape[1]) for name, w in weights.items()}
    return ranks.allocate_ranks(spectra, compactness, shapes, mode=mode, uniform_rank=rank)


def _damage(
    weight: Float[Tensor, "out inp"],
    factor: Decomposition,
    covariance: Float[Tensor, "inp inp"] | None,
    damping: float,
    power: float,
) -> float | None:
    """`‖B A C'‖² / ‖W C'‖²`."""
    if covariance is None:
        return None
    if power == 1:  # the decomposition has both
        return factor.energy_share
    damped = damp(covariance.to(weight.device), damping)
    whole = float((weight.to(damped.dtype) @ damped).norm()) ** 2
    part = knowledge_energy((factor.B, factor.A), damped) ** 2
    return part / whole if whole > 0 else 0.0


def _olora(weight: Float[Tensor, "out inp"], rank: int, a_norm: float | None) -> Decomposition:
    """OLoRA: `W = Q R`, `B = Q[:, :r]`, `A = R[:r]`. Its values are the norms of A's rows."""
    Q, R = torch.linalg.qr(weight.double())
    B, A = Q[:, :rank], R[:rank]
    norms = A.norm(dim=1)
    if a_norm is not None:
        scale = a_norm / norms.clamp_min(torch.finfo(torch.float32).tiny)
        B, A = B / scale, A * scale[:, None]
    return Decomposition(
        B=B,
        A=A,
        singular_values=norms,
        spectrum=None,
        total_energy=float(R.norm()),
        chosen_energy=float(norms.norm()),
        floored=0,
        side="output",
        route="exact",
    )


def _on_cpu(factor: Decomposition) -> Decomposition:
    moved = {
        f.name: getattr(factor, f.name).detach().to("cpu", torch.float32).contiguous()
        for f in dataclasses.fields(factor)
        if isinstance(getattr(factor, f.name), Tensor)
    }
    return dataclasses.replace(factor, **moved)


# ------------------------------------------------------------------ on disk


def _tensors_path(path: Path) -> Path:
    return path.with_suffix(".safetensors")


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
