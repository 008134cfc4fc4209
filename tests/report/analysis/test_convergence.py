"""Steps to a loss, by hand."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from corda_vlm.report import Results, steps_to_loss
from corda_vlm.report.analysis.convergence import convergence, read_histories, running_mean


def history(*losses: float, every: int = 1) -> list[dict[str, Any]]:
    return [{"step": every * (i + 1), "loss": loss} for i, loss in enumerate(losses)]


def test_the_first_step_at_or_below() -> None:
    assert steps_to_loss(history(3.0, 2.0, 1.0, 2.0), 2.0) == 2
    assert steps_to_loss(history(3.0, 2.0, 1.0, every=10), 1.5) == 30
    assert steps_to_loss(history(3.0, 2.0), 1.0) is None


def test_the_loss_is_a_running_mean_over_an_eighth() -> None:
    # 40 entries, so the mean of 5: one lucky batch is not yet an arrival
    losses = [4.0] * 10 + [0.0] + [4.0] * 9 + [1.0] * 20
    assert running_mean(history(*losses))[10] == pytest.approx(3.2)
    assert steps_to_loss(history(*losses), 1.5) == 25
    assert steps_to_loss(history(*losses), 3.2) == 11


def write(folder: Path, method: str, rate: float, seed: int, losses: list[float]) -> None:
    file = folder / method / f"{rate:g}-{seed}" / "history.jsonl"
    file.parent.mkdir(parents=True)
    rows = [*history(*losses, every=10), {"step": 10 * len(losses), "eval_loss": 0.5}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_method_at_its_best_rate_and_seed_by_seed(invented: Any, tmp_path: Path) -> None:
    rows = invented.study(
        {"lora": [(1e-3, 0.5, 0.5), (2e-3, 0.8, 0.2)], "corda-ipm": [(1e-3, 0.8, 0.1)]}, seeds=2
    )
    for seed, end in enumerate((1.0, 0.8)):
        write(tmp_path, "lora", 2e-3, seed, [3.0, 2.0, 1.5, end])
        write(tmp_path, "lora", 1e-3, seed, [3.0, 3.0, 3.0, 0.1])  # not its best rate
    write(tmp_path, "corda-ipm", 1e-3, 0, [2.0, 1.0, 0.5, 0.4])
    write(tmp_path, "corda-ipm", 1e-3, 1, [2.0, 1.0, 0.9, 0.7])
    found = convergence(Results.of(rows), read_histories(tmp_path))
    assert [c.method for c in found] == ["corda-ipm", "lora"]
    assert list(found[0].steps) == [20, 40]
    assert found[0].median() == (30.0, pytest.approx(0.75))
    assert list(found[1].steps) == [40, 40]


def test_what_never_gets_there(invented: Any, tmp_path: Path) -> None:
    rows = invented.study({"lora": [(1e-3, 0.5, 0.5)], "slow": [(1e-3, 0.4, 0.5)]}, seeds=3)
    for seed in range(3):
        write(tmp_path, "lora", 1e-3, seed, [3.0, 1.0])
        write(tmp_path, "slow", 1e-3, seed, [3.0, 0.9 if seed == 0 else 2.0])
    slow = convergence(Results.of(rows), read_histories(tmp_path))[-1]
    assert list(slow.steps) == [20, None, None]
    assert slow.median() is None


def test_without_the_reference_or_histories(invented: Any, tmp_path: Path) -> None:
    results = Results.of(invented.study(invented.DEMO))
    assert convergence(results, read_histories(tmp_path)) == []
    write(tmp_path, "full", 1e-3, 0, [1.0])
    assert convergence(results, read_histories(tmp_path)) == []


def test_files_that_are_no_history(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "lora", 1e-3, 0, [1.0])
    for folder, text in (("0.001-1", "{torn"), ("notes-x", '{"step": 1, "loss": 2}\n'), ("0.1-0", "[]\n[]\n")):  # fmt: skip
        file = tmp_path / "lora" / folder / "history.jsonl"
        file.parent.mkdir()
        file.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert [h.seed for h in read_histories(tmp_path)["lora"]] == [0]
    assert caplog.text.count("left out of the training curves") == 3
