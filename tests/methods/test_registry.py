"""A method of one's own, with a term of the loss: known to configs, prepared as the others, and trained with its term."""

from __future__ import annotations

import pytest
import yaml
from torch import Tensor, nn

from corda_vlm import METHODS, CordaError, prepare_method, register_method
from corda_vlm.errors import UnknownNameError
from corda_vlm.experiment.load import parse_experiment
from corda_vlm.methods import Method, MethodRequest

pytestmark = pytest.mark.usefixtures("own_registrations")


def only_biases(model: nn.Module, request: MethodRequest) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias")
    return model


def near_the_start(model: nn.Module, request: MethodRequest):
    starts = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def penalty() -> Tensor:
        moved = [(p - starts[n]).square().sum() for n, p in model.named_parameters() if n in starts]
        return 10 * sum(moved[1:], moved[0])

    return penalty


BITFIT = Method(
    "bitfit",
    "biases alone are trained, and held to where they were",
    "BitFit, arXiv 2106.10199",
    (),
    attach=only_biases,
    detach=lambda model: model,
    penalty=near_the_start,
)

EXPERIMENT = {
    "name": "small",
    "model": "emoji-clip",
    "suite": "emoji-digits",
    "task": {"data": "sklearn:digits"},
    "variants": {"bitfit": {"learning_rates": [1e-3]}},
}


def test_it_is_prepared_as_the_others_and_brings_its_term(tiny_open_clip, caplog):
    with pytest.raises(UnknownNameError, match="unknown method 'bitfit'"):
        prepare_method("bitfit", tiny_open_clip)
    assert register_method(BITFIT) is BITFIT
    assert prepare_method("bitfit", tiny_open_clip) is tiny_open_clip
    assert "a term of the loss of its own" in caplog.text  # which the model alone does not carry
    prepared = METHODS["bitfit"].prepare(tiny_open_clip, MethodRequest())
    assert 0 < prepared.trainable < prepared.total
    assert prepared.penalty is not None
    assert float(prepared.penalty().detach()) == 0
    bias = next(p for p in tiny_open_clip.parameters() if p.requires_grad)
    bias.data += 1
    assert float(prepared.penalty().detach()) == pytest.approx(10 * bias.numel())
    with pytest.raises(CordaError, match="method 'bitfit' has no a_norm"):
        prepare_method("bitfit", tiny_open_clip, a_norm=3.0)


def test_the_methods_that_come_with_the_package_have_no_term(tiny_clip_hf):
    assert METHODS["lora"].prepare(tiny_clip_hf, MethodRequest(rank=2)).penalty is None


def test_its_name_may_not_be_taken():
    with pytest.raises(CordaError, match="a method named 'lora' is registered already"):
        register_method(Method("lora", "mine", "me", (), only_biases, lambda model: model))


def test_a_config_may_name_it_once_it_is_registered():
    with pytest.raises(UnknownNameError, match="method of variant 'bitfit'"):
        parse_experiment(EXPERIMENT, "small")
    register_method(BITFIT)
    assert parse_experiment(EXPERIMENT, "small").method_of("bitfit") == "bitfit"


def test_a_run_trains_it_with_its_term(tmp_path):
    register_method(BITFIT)
    from corda_vlm.experiment.study import run
    from corda_vlm.train.history import read_history

    suite = {
        "name": "small",
        "version": 1,
        "tasks": [
            {"name": "digits", "role": "gain", "kind": "zero_shot", "limit": 20, "classes": {"from": "data"},
             "templates": ["{}"], "data": {"source": "sklearn:digits", "split": "test"}}
        ],
    }  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    experiment = {
        **EXPERIMENT,
        "suite": str(tmp_path / "suite.yaml"),
        "task": {"data": {"source": "sklearn:digits", "split": "train", "limit": 32}},
        "training": {"steps": 2, "batch_size": 16, "log_every": 1},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(experiment))
    folder = run(tmp_path / "small.yaml", output=tmp_path / "out")
    entries = [
        e for e in read_history(folder / "bitfit" / "0.001-0" / "history.jsonl") if "loss" in e
    ]
    assert entries[0]["extra_loss"] == 0
    assert entries[-1]["extra_loss"] > 0
