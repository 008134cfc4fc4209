"""Rounds, merging, and files of covariances."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from corda_vlm.covariance import CovarianceStore, SecondMoment
from corda_vlm.errors import (
    CalibrationError,
    ForeignFileError,
    UnknownNameError,
)
from corda_vlm.sites import Site, model_fingerprint
from tests.covariance.covariance_toy import (
    TOY_SITES,
    Toy,
    clip_batches,
    collect,
    same,
    toy,
    toy_batches,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*have no full rank")


def test_rounds_are_disjoint_and_dealt_in_turn() -> None:
    model, batches = toy(), toy_batches(5)
    store = collect(model, batches, rounds=2)
    even, odd = (collect(model, batches[start::2]) for start in (0, 1))
    assert store
    for name in store:
        first, second = store.rounds(name)
        assert torch.equal(first.matrix, even[name].matrix)
        assert torch.equal(second.matrix, odd[name].matrix)
        assert (first.count, second.count) == tuple(store.counts(name))
        pooled = (first.matrix * first.count + second.matrix * second.count) / store[name].count
        torch.testing.assert_close(store[name].matrix, pooled, rtol=1e-5, atol=1e-6)
        assert store[name].count == first.count + second.count

    def alternate(model: Any, batch: dict) -> None:
        (model.a if batch is batches[0] else model.c)(
            torch.randn(9, 6 if batch is batches[0] else 12)
        )

    with pytest.raises(CalibrationError, match="no token reached a in round 1 of 2"):
        collect(model, batches[:2], [TOY_SITES[0], TOY_SITES[2]], rounds=2, forward=alternate)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for its memory")
def test_rounds_at_rest_are_on_the_disk_and_not_in_memory(tmp_path: Path) -> None:
    def resident() -> float:
        """MB, files that are mapped included."""
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1e3

    torch.manual_seed(0)
    model, path, seen = Toy(width=768).eval(), tmp_path / "c.safetensors", []

    def forward(model: nn.Module, batch: dict) -> None:
        model(batch["input_ids"])
        seen.append(resident())

    batches = toy_batches(9)
    options: dict = {"rounds": 8, "forward": forward}
    store = collect(model, batches, path=path, **options)
    assert path.stat().st_size > 50e6
    assert max(seen) - seen[0] < 20  # a round has 7 MB
    before, total = resident(), 0.0
    for stream in sorted(set(store.site_streams.values())):
        for entry in store.entries(stream):
            total += float(entry.read().matrix().trace())
            assert resident() - before < 40  # 5 in the triangle, 19 in the matrix
    in_memory = collect(model, batches, rounds=8)
    assert same(store, in_memory)


def test_more_rounds_than_batches_are_refused_before_the_model_runs(tmp_path: Path) -> None:
    def forward(model: nn.Module, batch: dict) -> None:
        raise AssertionError("the model ran")

    with pytest.raises(
        CalibrationError, match=r"4 rounds need at least 4 batches, and there are 3; take fewer"
    ):
        collect(toy(), toy_batches(3), rounds=4, forward=forward, path=tmp_path / "c.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_adding_stores_and_adding_to_a_store(tmp_path: Path) -> None:
    model, batches = toy(), toy_batches(6)
    whole = collect(model, batches)
    first, second = collect(model, batches[:2]), collect(model, batches[2:])
    before = first["a"].matrix.clone()
    extended = collect(model, batches[2:], store=first)
    assert torch.equal(first["a"].matrix, before)
    for added in (first + second, second + first, extended):
        assert added.data_fingerprint == (first + second).data_fingerprint
        for name in whole:
            assert added.counts(name) == whole.counts(name)
            torch.testing.assert_close(added[name].matrix, whole[name].matrix, rtol=1e-5, atol=1e-6)
    # the sum of a file and a store, written and read again
    path = first.save(tmp_path / "first.safetensors")
    total = CovarianceStore.load(path, model=model) + second
    assert same(total, first + second)
    assert same(CovarianceStore.load(total.save(tmp_path / "total.safetensors")), total)
    mixed = first + collect(model, batches, precision="float64")
    assert mixed.precision == "float32+float64"


def test_stores_that_do_not_go_together() -> None:
    model, batches = toy(), toy_batches(4)
    store = collect(model, batches)
    with pytest.raises(CalibrationError, match="of two models"):
        store + collect(toy(seed=5), batches)
    with pytest.raises(CalibrationError, match="differ in the sites 'c' and 'head'"):
        store + collect(model, batches, TOY_SITES[:2])
    with pytest.raises(CalibrationError, match="have 1 and 2 rounds"):
        store + collect(model, batches, rounds=2)
    with pytest.raises(TypeError):
        store + 1  # type: ignore[operator]
    with pytest.raises(ForeignFileError, match="of another model"):
        collect(toy(seed=5), batches, store=store)
    with pytest.raises(CalibrationError, match="differs in the sites 'c' and 'head'"):
        collect(model, batches, TOY_SITES[:2], store=store)
    with pytest.raises(CalibrationError, match="give rounds=1"):
        collect(model, batches, rounds=2, store=store)


def test_rounds_collected_on_disk_are_the_same(tmp_path: Path) -> None:
    model, batches = toy(), toy_batches(6)
    store = collect(model, batches, rounds=3, path=tmp_path / "c.safetensors")
    assert same(store, collect(model, batches, rounds=3))
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_store_reads_like_a_mapping() -> None:
    store = collect(toy(), toy_batches(3), rounds=3)
    assert list(store) == ["a", "b", "c", "head"]
    assert len(store) == 4
    assert "a" in store
    assert "z" not in store
    with pytest.raises(UnknownNameError, match=r"unknown site 'hed'.*Did you mean 'head'"):
        store["hed"]
    summary = store.summary()
    assert "tokens a round" in summary
    assert "3 rounds, float32" in summary
    assert len(summary.splitlines()) < 10


# ------------------------------------------------------------------ files


def test_saved_and_loaded_to_the_bit(tmp_path: Path, tiny_clip_hf: nn.Module) -> None:
    for precision in ("float32", "float64"):
        store = collect(tiny_clip_hf, clip_batches([5, 5]), precision=precision, rounds=2)
        path = store.save(tmp_path / "deep" / f"{precision}.safetensors")
        loaded = CovarianceStore.load(path, model=tiny_clip_hf)
        assert same(store, loaded)
        assert loaded.sites == store.sites
        assert loaded.precision == precision
        assert loaded.data_fingerprint == store.data_fingerprint
        assert loaded.summary() == store.summary()
        assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_the_file_is_plain_safetensors_of_half_the_size(tmp_path: Path) -> None:
    model = toy()
    model.wide = nn.Linear(500, 2)
    site = [Site("wide", "text", None, "up", "wide.in")]
    x = torch.randn(700, 500) + 3
    store = collect(model, toy_batches(1), site, forward=lambda m, _: m.wide(x))
    path = store.save(tmp_path / "c.safetensors")
    assert path.stat().st_size < 0.51 * 500 * 500 * 4 + 20_000
    with safe_open(str(path), "np") as file:  # a reader that knows nothing of us
        triangle = file.get_tensor("0/wide.in/triangle")
        shift, mean = file.get_tensor("0/wide.in/means")
        about = json.loads(file.metadata()["about"])
    matrix = np.zeros((500, 500))
    matrix[np.triu_indices(500)] = triangle
    matrix += np.triu(matrix, 1).T
    matrix += np.outer(mean, shift) + np.outer(shift, mean) + np.outer(shift, shift)
    np.testing.assert_allclose(matrix, store["wide"].matrix.numpy(), rtol=1e-9, atol=1e-12)
    assert about["model_fingerprint"] == model_fingerprint(model)
    assert about["streams"] == {"wide.in": {"size": 500, "counts": [700]}}
    assert about["sites"][0]["name"] == "wide"
    assert about["package_version"]


def test_loading_reads_nothing_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = collect(toy(), toy_batches(3)).save(tmp_path / "c.safetensors")
    reads = []
    fill = SecondMoment.fill_triangle
    monkeypatch.setattr(
        SecondMoment,
        "fill_triangle",
        lambda self, pieces: (reads.append(self.size), fill(self, pieces)),
    )
    store = CovarianceStore.load(path)
    store.summary()
    assert store.counts("a") == [60]
    assert reads == []
    assert store["c"].matrix.shape == (12, 12)
    assert reads == [12]
    # the file may go while the store is in use
    path.unlink()
    assert store["a"].matrix.shape == (6, 6)


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    one, other = toy(), toy(seed=9)
    path = collect(one, toy_batches(3)).save(tmp_path / "c.safetensors")
    assert CovarianceStore.load(path, model=one.to(torch.bfloat16))
    with pytest.raises(ForeignFileError) as error:
        CovarianceStore.load(path, model=other)
    assert model_fingerprint(one) in str(error.value)
    assert model_fingerprint(other) in str(error.value)


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def _edit_header(path: Path, change: object) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["about"])
    change(about)  # type: ignore[operator]
    header["__metadata__"]["about"] = json.dumps(about)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


DAMAGE = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-10]),
    "header only": lambda p: p.write_bytes(p.read_bytes()[:200]),
    "empty": lambda p: p.write_bytes(b""),
    "garbage": lambda p: p.write_bytes(os.urandom(4000)),
    "text": lambda p: p.write_text("not a covariance"),
    "pickle": lambda p: torch.save({"a": torch.ones(3)}, p),
    "other safetensors": lambda p: save_file({"a": torch.ones(3)}, p),
    "header damaged": lambda p: _flip(p, 40),
    "no streams": lambda p: _edit_header(p, lambda a: a.pop("streams")),
    "no checksums": lambda p: _edit_header(p, lambda a: a.pop("crc32")),
    "wrong width": lambda p: _edit_header(p, lambda a: a["streams"]["in"].update(size=7)),
    "a stream more": lambda p: _edit_header(
        p, lambda a: a["streams"].update(x={"size": 6, "counts": [5]})
    ),
    "fewer rounds": lambda p: _edit_header(p, lambda a: a.update(rounds=2)),
    "sites of another kind": lambda p: _edit_header(p, lambda a: a.update(sites=["a"])),
    "newer format": lambda p: _edit_header(p, lambda a: a.update(format_version=99)),
    "absent": lambda p: p.unlink(),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_files_that_are_no_covariances(how: str, tmp_path: Path) -> None:
    path = collect(toy(), toy_batches(3)).save(tmp_path / "c.safetensors")
    DAMAGE[how](path)
    with pytest.raises(ForeignFileError, match=r"c\.safetensors"):
        CovarianceStore.load(path)
    if how not in ("absent", "a folder"):
        content = path.read_bytes()
        with pytest.raises(ForeignFileError):
            collect(toy(), toy_batches(3), path=path)
        assert path.read_bytes() == content  # nothing of the user's is overwritten


def test_damaged_values_are_found_when_read(tmp_path: Path) -> None:
    path = collect(toy(), toy_batches(3)).save(tmp_path / "c.safetensors")
    _flip(path, path.stat().st_size - 3)
    store = CovarianceStore.load(path)
    with pytest.raises(ForeignFileError, match=r"c\.safetensors.*not those that were written"):
        for name in store:
            _ = store[name]


def test_a_folder_in_place_of_a_covariance_file(tmp_path):
    with pytest.raises(ForeignFileError, match="is a folder, and covariances are one file"):
        CovarianceStore.load(tmp_path)
