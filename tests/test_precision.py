"""bfloat16 where it is worth it: found out by a product, said once, and kept by a training that goes on elsewhere."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from corda_vlm import precision
from corda_vlm.anchor import full_weights
from corda_vlm.errors import UnknownNameError
from corda_vlm.experiment import Experiment
from corda_vlm.precision import Speeds, fast_dtype, speeds, takes_bf16

SLOW, FAST = Speeds("cpu", 1.0, 30.0), Speeds("cpu", 5.0, 1.0)


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one that multiplies bfloat16 at given speeds."""

    def become(measured: Speeds) -> None:
        precision._told.clear()
        monkeypatch.setattr(precision, "speeds", lambda kind, index=None: measured)

    yield become
    precision._told.clear()


def test_auto_asks_the_machine_and_says_so_once(machine, caplog):
    caplog.set_level(logging.INFO, "corda_vlm")
    machine(SLOW)
    assert not takes_bf16("auto", "cpu")
    assert not takes_bf16("auto", torch.device("cpu"))
    assert caplog.messages == ["computes in float32: bfloat16 is 30 times slower on this processor"]
    assert fast_dtype("cpu") == torch.float32
    machine(FAST)
    assert takes_bf16("auto", "cpu")
    assert caplog.messages[1:] == [
        "computes in bfloat16: bfloat16 is 5 times faster on this processor"
    ]
    assert fast_dtype("cpu") == torch.bfloat16


def test_what_is_asked_for_is_done_with_a_warning_where_it_is_slow(machine, recwarn):
    machine(FAST)
    assert takes_bf16(True, "cpu")
    assert not takes_bf16(False, "cpu")
    machine(SLOW)
    assert not takes_bf16(False, "cpu")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="30 times slower on this processor; leave it at auto"):
        assert takes_bf16(True, "cpu")
    with pytest.raises(UnknownNameError, match=r"value of bf16 'fast'.*auto, false, true"):
        takes_bf16("fast", "cpu")  # type: ignore[arg-type]


def test_what_goes_on_keeps_its_precision_and_says_so_once(machine, caplog, recwarn):
    caplog.set_level(logging.INFO, "corda_vlm")
    machine(SLOW)
    for _ in range(2):
        assert takes_bf16("auto", "cpu", former=True)
    assert takes_bf16(True, "cpu"), "a run hands on what it has decided"
    assert caplog.messages == [
        "goes on in bfloat16, as it began; bfloat16 is 30 times slower on this processor"
    ]
    assert not recwarn.list
    machine(FAST)
    assert not takes_bf16("auto", "cpu", former=False)
    assert caplog.messages[1:] == [
        "goes on in float32, as it began; bfloat16 is 5 times faster on this processor"
    ]


def test_weights_in_half_precision_are_not_called_float32(machine, caplog, recwarn):
    caplog.set_level(logging.INFO, "corda_vlm")
    machine(SLOW)
    for _ in range(2):
        assert not takes_bf16("auto", "cpu", weights=torch.bfloat16)
        assert not takes_bf16("auto", "cpu", weights=torch.float16)
    assert caplog.messages == ["no autocast: the weights are in float16"]
    (warned,) = recwarn.list
    assert "weights are in bfloat16, and bfloat16 is 30 times slower" in str(warned.message)
    assert "dtype=float32" in str(warned.message)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("not implemented")])
def test_only_a_failure_of_bfloat16_means_that_there_is_none(monkeypatch, error):
    timed = precision._seconds

    def seconds(x, w):
        if x.dtype == torch.bfloat16:
            raise error
        return timed(x, w)

    monkeypatch.setattr(precision, "_seconds", seconds)
    speeds.cache_clear()
    if isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            speeds("cpu")
    else:
        assert speeds("cpu").ratio == 0
    speeds.cache_clear()


def test_barely_faster_is_not_worth_the_conversions():
    assert not Speeds("cpu", 1.1, 1.0).worth_it
    assert Speeds("cpu", 1.3, 1.0).worth_it


def test_a_device_without_bfloat16():
    absent = Speeds("mps", 0.0, float("inf"))
    assert not absent.worth_it
    assert str(absent) == "bfloat16 does not exist on mps"


def test_the_product_is_timed_once_and_leaves_no_trace():
    torch.manual_seed(3)
    threads, generator = torch.get_num_threads(), torch.random.get_rng_state()
    speeds.cache_clear()
    first = speeds("cpu")
    assert 0 < first.float32 < 1
    assert first.bfloat16 > 0
    assert speeds("cpu") is first
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_a_processor_of_avx2_takes_float32():
    """oneDNN and ATen held to AVX2 are such a processor, whichever this one is."""
    held = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}  # fmt: skip
    code = "from corda_vlm.precision import speeds; print(speeds('cpu').ratio)"
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **held}, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert float(ran.stdout) < 1


def test_the_anchor_of_whole_matrices_asks_the_same(machine):
    assert full_weights.fast_dtype is fast_dtype


def test_attention_asks_the_same(machine, tiny_open_clip):
    from corda_vlm.train import TrainOptions
    from corda_vlm.train.trainer import takes_math

    options = TrainOptions(steps=1, bf16=True)
    machine(FAST)
    assert takes_math(options, tiny_open_clip, (32, 32))
    assert not takes_math(replace(options, bf16=False), tiny_open_clip, (32, 32))
    machine(SLOW)
    assert not takes_math(options, tiny_open_clip, (32, 32))


def test_a_training_that_goes_on_elsewhere_keeps_its_precision(
    machine, tiny_open_clip, tmp_path, monkeypatch
):
    """Begun where bfloat16 is fast and gone on with where it is slow, the weights are those of one machine."""
    from corda_vlm.files import read_json, write_json
    from corda_vlm.run_files import BEGUN
    from corda_vlm.train import TrainOptions
    from corda_vlm.train.folder import runs_in_bf16

    options = TrainOptions(steps=1)
    machine(FAST)
    assert runs_in_bf16(options, tmp_path, tiny_open_clip)
    write_json(tmp_path / BEGUN, {"options": {"bf16": True}})
    machine(SLOW)
    assert runs_in_bf16(options, tmp_path, tiny_open_clip)
    assert not runs_in_bf16(options, tmp_path / "another", tiny_open_clip)
    assert not runs_in_bf16(replace(options, bf16=False), tmp_path, tiny_open_clip)
    assert read_json(tmp_path / BEGUN) == {"options": {"bf16": True}}


@pytest.mark.filterwarnings("ignore:.*have no full rank")
def test_calibration_leaves_float32_where_bfloat16_is_fast(machine, tiny_clip_hf):
    from corda_vlm.covariance import collect_covariance

    batches = [{"pixel_values": torch.randn(8, 3, 32, 32), "input_ids": torch.ones(8, 12, dtype=torch.long)}] * 3  # fmt: skip

    def precision_of(wanted: str) -> str:
        return collect_covariance(
            tiny_clip_hf, batches, precision=wanted, show_progress=False
        ).precision

    machine(FAST)
    assert precision_of("auto") == "bf16"
    machine(SLOW)
    assert precision_of("auto") == "float32"


@pytest.fixture
def begun(tiny_open_clip, tmp_path):
    """Claims a folder for a run of the demo, with changes; gives the experiment, the folder and its settled precisions."""
    from corda_vlm.experiment.folder import claim
    from corda_vlm.experiment.load import load_experiment
    from corda_vlm.experiment.origin import settle_precisions
    from corda_vlm.files import asset

    def begin(*overrides: str) -> tuple[Experiment, Path, dict[str, bool]]:
        # the demo itself measures in float32
        experiment = load_experiment(
            asset("configs/demo.yaml"), ("evaluation.bf16=auto", *overrides)
        )
        folder = tmp_path / "run"
        claim(folder, experiment, fresh=False)
        return experiment, folder, settle_precisions(experiment, folder, tiny_open_clip)

    return begin


def test_a_variant_that_leaves_it_open_is_asked_by_itself(machine, begun):
    from corda_vlm.experiment.origin import options_of

    machine(SLOW)
    with pytest.warns(UserWarning, match="bf16 is on"):
        experiment, folder, settled = begun(
            "training.bf16=true", "variants.full.training.bf16=auto"
        )
    of = {
        t.variant: options_of(t, experiment, folder, settled).bf16 for t in experiment.trainings()
    }
    assert of.pop("full") is False
    assert set(of.values()) == {True}


def test_a_run_that_goes_on_elsewhere_keeps_its_precision(machine, begun, recwarn):
    from corda_vlm.experiment.origin import AUTOCAST, options_of
    from corda_vlm.files import write_json
    from corda_vlm.run_files import BEGUN, DESCRIPTION

    machine(SLOW)
    _, folder, settled = begun()
    assert not any(settled.values())
    write_json(folder / DESCRIPTION, dict.fromkeys(settled, AUTOCAST))
    experiment, _, settled = begun()
    assert all(settled.values())
    first, second, *_ = experiment.trainings()
    assert options_of(first, experiment, folder, settled).bf16 is True
    assert takes_bf16(True, "cpu"), "as the training then asks"
    assert not recwarn.list, "nobody who left it at auto is told to leave it at auto"
    write_json(folder / first.folder / BEGUN, {"options": {"bf16": False}})
    own = options_of(first, experiment, folder, settled)
    assert own.bf16 == "auto", "its own folder says what it began with"
    assert options_of(second, experiment, folder, settled).bf16 is True


def test_a_run_begun_before_there_was_auto_goes_on_in_float32(machine, begun):
    from corda_vlm.files import write_json
    from corda_vlm.run_files import DESCRIPTION

    machine(FAST)
    _, folder, settled = begun("evaluation.bf16=false")
    write_json(folder / DESCRIPTION, {"title": "older"})
    assert settled == {"trained in": True, "measured in": False}
    assert begun()[-1] == {"trained in": False, "measured in": False}


@pytest.mark.filterwarnings("ignore:.*have no full rank")
@pytest.mark.parametrize("blockwise", [False, True], ids=["in one go", "blockwise"])
def test_a_calibration_goes_on_in_its_precision(machine, tiny_llm, tmp_path, blockwise):
    """Begun where bfloat16 is fast, it is gone on with, and read, where it is slow."""
    from corda_vlm.covariance import collect_covariance

    tokens = torch.arange(24).view(2, 12)
    batches = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}] * 3

    def collect() -> str:
        return collect_covariance(
            tiny_llm.model,
            batches,
            precision="auto",
            path=tmp_path / "c",
            blockwise=blockwise,
            show_progress=False,
        ).precision

    def interrupt(*_: object) -> None:
        handle.remove()
        os.kill(os.getpid(), signal.SIGINT)

    machine(FAST)
    handle = tiny_llm.model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt, match="saved in"):
        collect()
    machine(SLOW)
    assert collect() == "bf16"
    assert collect() == "bf16", "a finished one"


def test_evaluation_asks_the_same(machine, tiny_open_clip):
    from corda_vlm.evaluation.measure import encoder_of
    from corda_vlm.evaluation.options import EvalOptions
    from corda_vlm.families.base import Processor

    processor = Processor(lambda picture: torch.zeros(3, 32, 32), lambda texts: {}, (32, 32))

    def encoder(bf16) -> bool:
        made = encoder_of(tiny_open_clip, EvalOptions(bf16=bf16), processor=processor)
        return made.bf16

    machine(SLOW)
    assert not encoder("auto")
    machine(FAST)
    assert encoder("auto")
    assert not encoder(False)
