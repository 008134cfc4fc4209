"""The arithmetic of streaming second moments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corda_vlm.covariance import SecondMoment
from corda_vlm.covariance.moments import _products, triangle_sizes
from tests.covariance.covariance_toy import (
    collect,
    toy,
    toy_batches,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*have no full rank")


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    width=st.integers(1, 20),
    offset=st.floats(-100, 100),
    precision=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 10**6),
)
def test_running_mean_is_the_mean(
    parts: list[int], width: int, offset: float, precision: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(parts), width, generator=generator) + offset
    dtype = torch.float64 if precision == "float64" else torch.float32
    moment = SecondMoment(width, dtype)
    for part in x.split(parts):
        moment.add(part, precision)
    matrix = moment.matrix()
    expected = x.double().T @ x.double() / len(x)
    assert moment.count == len(x)
    torch.testing.assert_close(matrix, expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix)[0] >= -1e-5 * (1 + offset**2)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 60), m=st.integers(1, 60), seed=st.integers(0, 10**6))
def test_merging_is_adding_the_rows(n: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n + m, 7, generator=generator) + 5
    first, second = SecondMoment(7), SecondMoment(7)
    first.add(x[:n])
    second.add(x[n:])
    merged = first.merged(second)
    assert merged.count == n + m
    torch.testing.assert_close(
        merged.matrix(), x.double().T @ x.double() / (n + m), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(merged.matrix(), second.merged(first).matrix(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 255, 256, 257, 600])
def test_triangle_is_the_upper_triangle_row_by_row(width: int) -> None:
    moment = SecondMoment(width)
    moment.add(torch.randn(90, width))
    pieces = list(moment.triangle())
    assert [len(piece) for piece in pieces] == triangle_sizes(width)
    assert sum(triangle_sizes(width)) == width * (width + 1) // 2
    centred = moment.matrix() - moment.shifted(torch.zeros(width)).matrix()
    assert centred.abs().max() < 1e-5
    back = SecondMoment(width)
    back.count = moment.count
    back.shift.copy_(moment.shift)
    back.mean.copy_(moment.mean)
    back.fill_triangle(iter(pieces))
    assert torch.equal(back.matrix(), moment.matrix())
    # as numpy lists it, so that others can read the file
    zero = SecondMoment(width)
    zero.add(torch.randn(2, width))
    zero.shift.zero_()
    zero.mean.zero_()
    rows, columns = np.triu_indices(width)
    assert np.allclose(
        torch.cat(list(zero.triangle())).numpy(), zero.matrix().numpy()[rows, columns]
    )


def test_only_half_of_the_matrix_is_kept() -> None:
    assert SecondMoment(2048).packed.numel() < 0.57 * 2048**2


def test_constant_channels_do_not_hide_the_smallest_directions() -> None:
    """CLIP has channels with a large constant value; what KPM reads are the smallest eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -3, 64, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    x = torch.randn(4000, 64, generator=generator, dtype=torch.float64) * scales @ basis.T
    x[:, :3] += 30
    x = x.float()
    exact = x.double().T @ x.double() / len(x)
    small = torch.linalg.eigh(exact)[1][:, :8]
    errors = {}
    for precision in ("float32", "bf16"):
        moment = SecondMoment(64)
        for part in x.split(500):
            moment.add(part, precision)
        errors[precision] = (small.T @ (moment.matrix() - exact) @ small).abs().max().item()
    plain = (x.T @ x / len(x)).double()
    errors["plain"] = (small.T @ (plain - exact) @ small).abs().max().item()
    smallest = torch.linalg.eigvalsh(exact)[0].item()
    assert errors["float32"] < 0.02 * smallest
    assert errors["float32"] < 0.05 * errors["plain"]
    assert errors["bf16"] < 0.5 * smallest


def test_product_settings_are_put_back() -> None:
    backend = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(backend, "fp32_precision"):
        pytest.skip("this torch has no setting of its own for float32 products on a CPU")
    before = backend.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="inside"), _products("bf16"):
        assert backend.fp32_precision == "bf16"
        raise RuntimeError("inside")
    assert (backend.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == before
    # reduced precision that the caller has set does not reach a float32 covariance
    torch.set_float32_matmul_precision("medium")
    try:
        x = torch.randn(512, 512)
        moment = SecondMoment(512)
        moment.add(x)
        assert torch.get_float32_matmul_precision() == "medium"
        exact = x.double().T @ x.double() / 512
        assert (moment.matrix() - exact).abs().max() < 1e-6 * exact.abs().max() * 5
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "float64", "bf16"])
def test_on_a_gpu(precision: str) -> None:
    model, batches = toy(), toy_batches(4)
    expected = collect(model, batches, precision="float64")
    for device in (None, "cpu"):
        found = collect(model.cuda(), batches, precision=precision, device=device)
        assert found["a"].matrix.device.type == (device or "cuda")
        for name in expected:
            torch.testing.assert_close(
                found[name].matrix.cpu(), expected[name].matrix, rtol=1e-2, atol=1e-3
            )


def test_sums_on_disk_are_the_same_and_take_no_memory(tmp_path: Path) -> None:
    def anonymous() -> int:
        """kB of memory that the system cannot page out to a file."""
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0])

    x = torch.randn(20, 4600)
    memory, disk = SecondMoment(10), SecondMoment(10, scratch=tmp_path)
    for moment in (memory, disk):
        moment.add(x[:, :10])
    assert torch.equal(disk.matrix(), memory.matrix())
    if Path("/proc/self/status").exists():
        before = anonymous()
        SecondMoment(4600, scratch=tmp_path).add(x)  # 45 MB
        assert anonymous() - before < 15_000
    assert list(tmp_path.iterdir()) == []  # without a name: nothing to clean up, ever
