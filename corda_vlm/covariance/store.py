"""Covariances by site name, in memory or in a file.

In the file, `ROUND/STREAM/triangle` is the upper triangle of T (row by row, d(d+1)/2 values), the second moment
about a shift s, and `ROUND/STREAM/means` holds s and the mean m about it; `C = T + m sᵀ + s mᵀ + s sᵀ` is the
second moment about zero. Sites, counts, fingerprints and progress are JSON in the header. `output/SITE/…` are the same of
the output side of a site, in files that have it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, reduce
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.covariance.entries import Entry, Pooled, pieces_of, stored
from corda_vlm.covariance.file import CovarianceFile, Pieces, write
from corda_vlm.covariance.moments import SecondMoment
from corda_vlm.covariance.output_side import OutputMoments
from corda_vlm.errors import CalibrationError, CordaError, ForeignFileError, UnknownNameError
from corda_vlm.names import quoted
from corda_vlm.same_model import is_made_from
from corda_vlm.sites import Site
from corda_vlm.sites import model_fingerprint as fingerprint_of
from corda_vlm.text_table import text_table


@dataclass(frozen=True)
class Covariance:
    """The second moment of one input stream.

    Attributes:
        matrix: `X Xᵀ / count` (d, d): mean, not centered, exactly symmetric, float64.
        count: tokens it was computed from; padding is not among them.
    """

    matrix: Float[Tensor, "d d"]
    count: int


@dataclass(frozen=True)
class Progress:
    """How far a calibration has come; kept in its file, so that it can go on from there.

    Attributes:
        data: fingerprint of the batches.
        base: fingerprints of the data of the store that was added to.
        batches: batches counted in full.
        ahead: stream -> calls of the batch after those that are counted already (an exception came half way).
        complete: every batch was counted.
    """

    data: str
    base: tuple[str, ...] = ()
    batches: int = 0
    ahead: Mapping[str, int] = field(default_factory=dict)
    complete: bool = False


class CovarianceStore:
    """Covariances of the input streams of a model's sites, one or more rounds each.

    `store[site]` is a `Covariance`, pooled over the rounds; `store.rounds(site)` lists one for each round; iterating
    gives site names. Matrices are made when they are asked for (read, from a file) and not kept.

    An expert of a mixture sees the tokens that its router sends it. One that saw, in any round, fewer than its inputs are
    wide has no covariance worth the name: that of all experts of its layer together stands in for it, each token
    counted once for each expert that it went to. `pooled` says for which. The file keeps what each saw.

    Attributes:
        sites: the sites, in the model's order.
        site_streams: site name -> stream; sites that read the same tensor share one.
        round_count: rounds of every stream.
        model_fingerprint: of the model the activations came from.
        model_signs: of the same, by which a quantised copy is known, see `same_model`; None in stores of former versions.
        data_fingerprints: of the calibration data, one for each collection that was merged in.
        precision: "float32", "float64" or "bf16"; joined by "+" when stores of several were merged.
        progress: of the calibration that made it, None for a merged store.
        outputs: the output side of the sites, where it was collected.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        entries: Mapping[str, Sequence[Entry]],
        *,
        model_fingerprint: str,
        data_fingerprints: Sequence[str],
        precision: str,
        progress: Progress | None = None,
        outputs: OutputMoments | None = None,
        model_signs: str | None = None,
    ) -> None:
        self.sites = tuple(sites)
        self.site_streams = {site.name: site.stream for site in self.sites}
        self.model_fingerprint, self.model_signs = model_fingerprint, model_signs
        self.data_fingerprints = tuple(data_fingerprints)
        self.precision = precision
        self.progress = progress
        self.outputs = outputs
        self._entries = {stream: list(rounds) for stream, rounds in entries.items()}
        lengths = {len(rounds) for rounds in self._entries.values()}
        if len(lengths) != 1 or set(self.site_streams.values()) != set(self._entries):
            raise ValueError("every stream of the sites needs entries, of one number of rounds")
        self.round_count = lengths.pop()
        self._pools: dict[str, list[str]] = {}
        for site in self.sites:
            if site.pool is not None and site.stream not in self._pools.setdefault(site.pool, []):
                self._pools[site.pool].append(site.stream)
        self._last_pool: tuple[str, list[Pooled]] | None = None  # what it has read is kept

    # ------------------------------------------------------------------ asking

    @property
    def data_fingerprint(self) -> str:
        """One fingerprint for all the data, whatever the order of merging."""
        if len(self.data_fingerprints) == 1:
            return self.data_fingerprints[0]
        return hashlib.sha256("\n".join(sorted(self.data_fingerprints)).encode()).hexdigest()[:32]

    @property
    def streams(self) -> Mapping[str, list[Covariance]]:
        """Stream -> its rounds, made on access."""
        return _Streams(self)

    def __getitem__(self, site: str) -> Covariance:
        entries = self.entries(self.stream_of(site))
        pooled = reduce(SecondMoment.merged, (entry.read() for entry in entries))  # one at a time
        return Covariance(pooled.matrix(), pooled.count)

    def rounds(self, site: str) -> list[Covariance]:
        """One covariance for each round, in order."""
        return self.streams[self.stream_of(site)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.site_streams)

    def __len__(self) -> int:
        return len(self.site_streams)

    def __contains__(self, site: object) -> bool:
        return site in self.site_streams

    def stream_of(self, site: str) -> str:
        """The input stream of a site; of an expert that saw too few tokens the pool that stands in for it."""
        if site not in self.site_streams:
            raise UnknownNameError("site", site, self.site_streams, "The store holds no others.")
        return self._stand_ins.get(site) or self.site_streams[site]

    @cached_property
    def _stand_ins(self) -> dict[str, str]:
        """Site -> its pool, of those that saw too few tokens."""
        return {
            site.name: site.pool
            for site in self.sites
            if site.pool is not None
            and min(e.count for e in self._entries[site.stream])
            < self._entries[site.stream][0].size
        }

    @property
    def pooled(self) -> dict[str, list[int]]:
        """Site -> tokens of each round, of the experts that saw too few, so that their layer's experts stand in."""
        return {site: self.counts(site) for site in self._stand_ins}

    def counts(self, site: str) -> list[int]:
        """Tokens of each round that reached the site itself; reads nothing."""
        self.stream_of(site)  # raises
        return [entry.count for entry in self._entries[self.site_streams[site]]]

    def moments(self, stream: str) -> list[SecondMoment]:
        """The packed accumulators of a stream, one for each round: half the memory of `rounds`. Not to be changed."""
        return [entry.read() for entry in self.entries(stream)]

    def entries(self, stream: str) -> list[Entry]:
        """The rounds of a stream or of a pool, in memory or in the file; nothing is read."""
        if stream not in self._pools:
            return list(self._entries[stream])
        if self._last_pool is None or self._last_pool[0] != stream:
            members = [self._entries[member] for member in self._pools[stream]]
            pools = [Pooled(rounds) for rounds in zip(*members, strict=True)]
            self._last_pool = stream, pools
        return list(self._last_pool[1])

    def output_side(self, site: str) -> Covariance:
        """`G = E[Σ_t g_t g_tᵀ]` (out, out) of a site, `g_t = ∂⟨v, f⟩/∂y_t`; its count is of outputs f that v was drawn for.

        Raises:
            CordaError: it was not collected.
        """
        self.stream_of(site)  # raises
        outputs = self.need_output_side()
        return Covariance(outputs.matrix(site), outputs.counts[site])

    def need_output_side(self) -> OutputMoments:
        """Raises `CordaError` where it was not collected."""
        if self.outputs is None:
            raise CordaError(
                "these covariances have no output side, which says what a change of a layer's outputs does to the model's: "
                "collect them with it, collect_covariance(..., output_side=True) or `corda-vlm calibrate --output-side` (in a "
                "config calibration: {output_side: true})"
            )
        return self.outputs

    def summary(self) -> str:
        """A small table, a line for each tower and width."""
        groups: dict[tuple[str, int], dict[str, Site | None]] = {}
        for site in self.sites:
            groups.setdefault((site.tower, self._entries[site.stream][0].size), {})[site.name] = (
                site
            )
        rows = []
        for (tower, width), names in groups.items():
            streams = {self.site_streams[name] for name in names}
            entries = [entry for stream in streams for entry in self._entries[stream]]
            tokens = sorted({min(e.count for e in entries), max(e.count for e in entries)})
            megabytes = sum(width * (width + 1) // 2 * e.dtype.itemsize for e in entries) / 1e6
            rows.append(
                (
                    tower,
                    width,
                    len(names),
                    len(streams),
                    "–".join(f"{n:,}" for n in tokens),
                    f"{megabytes:.1f}",
                )
            )
        headers = ("tower", "width", "sites", "streams", "tokens a round", "MB")
        table = text_table(rows, headers, right=(False, True, True, True, True, True))
        return (
            f"{table}\n\n{self.round_count} round{'s' * (self.round_count != 1)}, {self.precision}, "
            f"model {self.model_fingerprint}, data {self.data_fingerprint}"
            + self._experts()
            + ("" if self.outputs is None else f"\n{self.outputs.summary()}")
        )

    def _experts(self) -> str:
        """What to say of the experts, if there are any."""
        experts = [site for site in self.sites if site.pool is not None]
        if not experts:
            return ""
        if not self._stand_ins:
            return f"\n{len(experts)} sites are experts, each with the covariance of its own tokens"
        return f"\n{too_few(self)}"

    def __repr__(self) -> str:
        return f"<CovarianceStore: {len(self)} sites, {len(self._entries)} streams, {self.round_count} rounds>"

    # ------------------------------------------------------------------ merging

    def __add__(self, other: CovarianceStore) -> CovarianceStore:
        """The tokens of both, round by round, as if they had been collected together.

        Raises:
            CalibrationError: the stores are of different models, sites or numbers of rounds; says which.
        """
        if not isinstance(other, CovarianceStore):
            return NotImplemented
        check_same(self, other)
        merged = {
            stream: [
                a.merged(b)
                for a, b in zip(self.moments(stream), other.moments(stream), strict=True)
            ]
            for stream in self._entries
        }
        return CovarianceStore(
            self.sites,
            merged,
            model_fingerprint=self.model_fingerprint,
            data_fingerprints=self.data_fingerprints + other.data_fingerprints,
            precision="+".join(sorted({*self.precision.split("+"), *other.precision.split("+")})),
            outputs=self.outputs and other.outputs and self.outputs.merged(other.outputs),
            model_signs=self.model_signs or other.model_signs,
        )

    # ------------------------------------------------------------------ files

    def save(self, path: str | Path) -> Path:
        """Write the store to `path`: atomically, and in pieces, so that it takes little memory beside the store."""
        tensors: dict[str, Pieces] = {}
        for stream, entries in self._entries.items():
            for number, entry in enumerate(entries):
                tensors |= pieces_of(entry, f"{number}/{stream}")
        about: dict[str, Any] = {
            "package_version": _package_version(),
            "model_fingerprint": self.model_fingerprint,
            "model_signs": self.model_signs,
            "data_fingerprints": self.data_fingerprints,
            "precision": self.precision,
            "rounds": self.round_count,
            "sites": [asdict(site) for site in self.sites],
            "streams": {
                s: {"size": es[0].size, "counts": [e.count for e in es]}
                for s, es in self._entries.items()
            },
            "progress": None if self.progress is None else asdict(self.progress),
        }
        if self.outputs is not None:
            about["output_side"] = self.outputs.about()
            tensors |= self.outputs.pieces()
        write(path, about, tensors)
        return Path(path)

    @classmethod
    def load(
        cls, path: str | Path, *, model: nn.Module | None = None, unfinished: bool = False
    ) -> CovarianceStore:
        """Open a store; its matrices stay in the file until they are asked for.

        Args:
            path: a file of `save` or of `collect_covariance(path=...)`.
            model: if given, a store made from another model is refused.
            unfinished: also open the checkpoint of a calibration that has not come to its end.

        Raises:
            ForeignFileError: no such file, truncated, damaged, of another kind, of another model, or unfinished.
        """
        file = CovarianceFile(path)
        try:
            store = cls._from_file(file)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise file.damaged(f"its header does not fit its contents ({error})") from error
        progress = store.progress
        if progress is not None and not progress.complete and not unfinished:
            raise ForeignFileError(
                f"{path} is the checkpoint of a calibration that stopped after {progress.batches} batches; run the "
                "same command again (collect_covariance with the same path) to finish it"
            )
        if model is not None and not is_made_from(
            model, store.model_fingerprint, store.model_signs, f"the covariances {path}"
        ):
            raise ForeignFileError(
                f"{path} was made from another model: its fingerprint is {store.model_fingerprint}, that of this "
                f"{type(model).__name__} is {fingerprint_of(model)}. Load the model it was made from, or collect the covariances of "
                "this one into another file"
            )
        return store

    @classmethod
    def _from_file(cls, file: CovarianceFile) -> CovarianceStore:
        about = file.about
        entries: dict[str, list[Entry]] = {}
        for stream, meta in about["streams"].items():
            if len(meta["counts"]) != about["rounds"]:
                raise ValueError(f"{stream} lacks rounds")
            entries[stream] = [
                stored(file, f"{n}/{stream}", meta["size"], c) for n, c in enumerate(meta["counts"])
            ]
        saved, outputs = about["progress"], about.get("output_side")
        return cls(
            [Site(**site) for site in about["sites"]],
            entries,
            model_fingerprint=about["model_fingerprint"],
            data_fingerprints=about["data_fingerprints"],
            precision=about["precision"],
            progress=None if saved is None else Progress(**{**saved, "base": tuple(saved["base"])}),
            outputs=None if outputs is None else OutputMoments.read(file, outputs),
            model_signs=about.get("model_signs"),
        )


def too_few(store: CovarianceStore) -> str:
    """Which experts saw too few tokens, with numbers."""
    sites = {site.name: site for site in store.sites}
    experts = sum(site.pool is not None for site in store.sites)
    fewest = min(store.pooled, key=lambda name: min(store.counts(name)))
    width = store.entries(sites[fewest].stream)[0].size
    pool = sum(entry.count for entry in store.entries(store.stream_of(fewest)))
    unseen = sum(not any(counts) for counts in store.pooled.values())
    return (
        f"{len(store.pooled)} of {experts} sites are experts that saw fewer tokens than their inputs are wide ({unseen} saw none), "
        f"and take the covariance of their layer's experts together: e.g. {fewest}, {min(store.counts(fewest)):,} tokens for width "
        f"{width:,}, takes that of {pool:,}"
    )


class _Streams(Mapping[str, list[Covariance]]):
    def __init__(self, store: CovarianceStore) -> None:
        self._store = store

    def __getitem__(self, stream: str) -> list[Covariance]:
        return [Covariance(moment.matrix(), moment.count) for moment in self._store.moments(stream)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._store._entries)

    def __len__(self) -> int:
        return len(self._store._entries)


def check_same(a: CovarianceStore, b: CovarianceStore) -> None:
    """Raise `CalibrationError`, naming the difference, unless the two stores can be added."""

    def refuse(what: str) -> NoReturn:
        raise CalibrationError(f"these two covariance stores cannot be added: {what}")

    if a.model_fingerprint != b.model_fingerprint:
        refuse(
            f"they are of two models (fingerprints {a.model_fingerprint} and {b.model_fingerprint})"
        )
    if a.site_streams != b.site_streams:
        names = sorted({name for name, _ in a.site_streams.items() ^ b.site_streams.items()})
        refuse(f"they differ in the sites {quoted(names)}. Collect both with the same `sites`")
    if a.round_count != b.round_count:
        refuse(
            f"they have {a.round_count} and {b.round_count} rounds. Collect both with the same `rounds`"
        )
    if (a.outputs is None) != (b.outputs is None):
        refuse("one of them has no output side. Collect both with the same `output_side`")


def _package_version() -> str:
    try:
        return version("corda-vlm")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"
