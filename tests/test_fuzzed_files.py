"""Plans, adapters and heads whose files say anything at all: an error of ours, or something that works."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from corda_vlm.adapter import attach_adapter, load_adapter, restore
from corda_vlm.errors import CordaError
from corda_vlm.families.layers.attention import is_packed
from corda_vlm.methods import prepare_method
from corda_vlm.plan import AdapterPlan, plan_adapter
from corda_vlm.sites import model_fingerprint
from corda_vlm.train import Head
from corda_vlm.train.trained import load_trained
from corda_vlm.train.weights import save_weights

pytestmark = [
    pytest.mark.unchecked,  # a file holds what the annotations forbid
    pytest.mark.filterwarnings("ignore:::peft"),  # of entries that we changed
]

FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
# A wrong value, of each type, and some that are nearly right.
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5), st.just(10**400), st.floats(), st.text(max_size=5),
    st.just("residual"), st.just("output"), st.just([]), st.just({}), st.just([[1]]), st.just({"a": {"b": 1}}),
    st.lists(st.integers(0, 3), max_size=3),
)  # fmt: skip


def paths(value: Any, at: tuple = ()) -> list[tuple]:
    """Where a change can be made: of lists the first items alone, as the others are alike."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()  # fmt: skip
    return [at, *(path for key, inner in items for path in paths(inner, (*at, key)))]


def changed(value: Any, path: tuple, new: Any, how: str) -> Any:
    """A copy of JSON with the entry at `path` replaced, removed or renamed."""
    if not path:
        return new
    value = copy.deepcopy(value)
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    if how == "replaced":
        inside[path[-1]] = new
    else:
        kept = inside.pop(path[-1])
        if how == "renamed" and isinstance(inside, dict):
            inside[f"{path[-1]}_"] = kept
    return value


HOW = st.sampled_from(("replaced", "replaced", "replaced", "removed", "renamed"))


def works(call) -> bool:
    """False where `call` ends in an error of ours that can be read; any other error is raised."""
    try:
        call()
    except CordaError as error:
        if len(str(error)) > 2000:
            raise AssertionError("too long a message") from error
        return False
    return True


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_plan(dynamic, tiny_clip_hf, tmp_path):
    plan = plan_adapter(tiny_clip_hf, None, method="pissa", rank=2, show_progress=False)
    path = plan.save(tmp_path / "plan.json")
    described = json.loads(path.read_text())
    if dynamic:  # what a plan of CorDA++ holds beyond that
        described["sites"][0] |= {"scores": [1.0, 2.0], "round": 1, "compactness": 3.0, "predicted_damage": 0.1}  # fmt: skip
    whole = json.dumps(described)
    path.write_text(whole)
    assert works(lambda: AdapterPlan.load(path))

    @FUZZ
    @given(st.sampled_from(paths(described)), VALUES, HOW)
    def fuzzed(at, new, how):
        path.write_text(json.dumps(changed(described, at, new, how)))

        def use():
            read = AdapterPlan.load(path, model=tiny_clip_hf)
            assert str(read)
            restore(attach_adapter(tiny_clip_hf, read))

        works(use)
        works(lambda: str(AdapterPlan.load(path, factors=False)))

    fuzzed()

    @FUZZ
    @given(st.integers(0, len(whole) - 1), st.integers(0, 255), st.integers(0, 40))
    def scrambled(at, byte, cut):
        data = bytearray(whole.encode())
        data[at : at + cut] = bytes([byte])
        path.write_bytes(data)
        works(lambda: str(AdapterPlan.load(path)))

    scrambled()


@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_an_adapter(method, tiny_open_clip, tmp_path):
    model = tiny_open_clip
    before = model_fingerprint(model)
    ready = (
        attach_adapter(
            model, plan_adapter(model, None, method="pissa", rank=2, show_progress=False)
        )
        if method == "pissa"
        else prepare_method("lora", model, rank=2)
    )
    save_weights(ready, None, tmp_path, base=before)
    restore(ready)
    path = tmp_path / "adapter_config.json"
    described, note = json.loads(path.read_text()), json.loads((tmp_path / "base.json").read_text())

    def loads() -> None:
        loaded = load_adapter(model, tmp_path)
        assert isinstance(loaded, PeftModel)
        restore(loaded)

    assert works(loads)

    @settings(FUZZ, max_examples=30)
    @given(st.sampled_from(paths(described)), VALUES, HOW)
    def fuzzed(at, new, how):
        path.write_text(json.dumps(changed(described, at, new, how)))
        works(loads)
        assert model_fingerprint(model) == before
        assert any(is_packed(module) for module in model.modules()), "the model is left as it was"

    fuzzed()
    path.write_text(json.dumps(described))

    @settings(FUZZ, max_examples=30)
    @given(st.sampled_from(paths(note)), VALUES, HOW)
    def noted(at, new, how):
        (tmp_path / "base.json").write_text(json.dumps(changed(note, at, new, how)))
        assert not works(loads)

    noted()


TENSORS = st.one_of(
    st.just(torch.zeros(3, 24)), st.just(torch.zeros(24, 3)), st.just(torch.zeros(())), st.just(torch.zeros(0)),
    st.just(torch.zeros(3)), st.just(torch.zeros(3, 24, dtype=torch.int64)), st.just(torch.zeros(2, 2, 2)),
    st.just(torch.full((3, 24), float("nan"))), st.just(torch.zeros(4, 24)), st.just(None),
)  # fmt: skip


def test_a_head(tmp_path):
    Head("prompt", torch.eye(3, 24), 10.0).save(tmp_path / "head.safetensors")
    whole = load_file(tmp_path / "head.safetensors")

    @FUZZ
    @given(
        st.sampled_from([*whole, "strange"]),
        TENSORS,
        st.sampled_from(["prompt", "linear", "x", ""]),
    )
    def fuzzed(name, tensor, kind):
        tensors = {**whole, name: tensor}
        header = {"format": "corda_vlm.head", "kind": kind}
        tensors = {n: t for n, t in tensors.items() if t is not None}
        save_file(tensors, tmp_path / "head.safetensors", header)

        def use():
            head = Head.load(tmp_path / "head.safetensors")
            assert head(torch.ones(2, 24)).shape == (2, len(head.weight))

        works(use)

    fuzzed()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_of_other_shapes(method, tiny_clip_hf, tmp_path):
    original = copy.deepcopy(tiny_clip_hf)
    options = {"rank": 2} if method == "lora" else {}
    ready = prepare_method(method, tiny_clip_hf, towers="vision", **options)
    save_weights(ready, None, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    whole = load_file(path)

    @settings(FUZZ, max_examples=25)
    @given(st.sampled_from([*whole][:4]), TENSORS)
    def fuzzed(name, tensor):
        if tensor is None and method == "full":
            return  # a training of fewer weights
        tensors = {**whole, name: tensor}
        save_file({n: t for n, t in tensors.items() if t is not None}, path)
        assert not works(lambda: load_trained(copy.deepcopy(original), tmp_path))

    fuzzed()


def test_a_head_of_another_width_or_number_of_classes_is_named():
    head = Head("linear", torch.zeros(3, 24))
    with pytest.raises(CordaError, match="24 wide, and the model's are 16"):
        head(torch.zeros(2, 16))


def test_an_adapter_that_would_import_a_module_is_refused(tiny_open_clip, tmp_path, monkeypatch):
    ready = prepare_method("lora", tiny_open_clip, rank=2)
    save_weights(ready, None, tmp_path)
    restore(ready)
    (tmp_path / "evil_megatron.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "adapter_config.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "megatron_config": {"a": 1}, "megatron_core": "evil_megatron"}))  # fmt: skip
    with pytest.raises(CordaError, match="megatron_config"):
        load_adapter(tiny_open_clip, tmp_path)


def test_a_configuration_that_changes_the_strength_is_refused(tiny_open_clip, tmp_path):
    """No checksum is on the configuration, which people edit; what it decides is looked at."""
    plan = plan_adapter(tiny_open_clip, None, method="pissa", rank=2, show_progress=False)
    ready = attach_adapter(tiny_open_clip, plan)
    with torch.no_grad():
        for parameter in ready.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    ready.save_pretrained(str(tmp_path))
    bare: nn.Module = restore(ready)
    path = tmp_path / "adapter_config.json"
    described = json.loads(path.read_text())
    for change, told in (({"lora_alpha": 16}, "scales"), ({"use_rslora": True}, "scales"), ({"freeze_a": True}, "A was frozen")):  # fmt: skip
        path.write_text(json.dumps({**described, **change}))
        with pytest.raises(CordaError, match=told):
            load_adapter(bare, tmp_path)
    shutil.rmtree(Path(tmp_path))
