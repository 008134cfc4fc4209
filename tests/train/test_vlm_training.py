"""LLaVA as people train it: its projector at a rate of its own, in less memory, in bfloat16, on a device map."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from corda_vlm.adapter import attach_adapter
from corda_vlm.data import load_records
from corda_vlm.errors import CordaError
from corda_vlm.methods import prepare_method
from corda_vlm.plan import plan_adapter
from corda_vlm.train import TrainOptions, train
from corda_vlm.train.model import projector_parameters

OPTIONS = TrainOptions(
    loss="next_token", steps=3, batch_size=4, learning_rate=1e-2, warmup_ratio=0, schedule="constant", bf16=False
)  # fmt: skip
PROJECTOR = "model.multi_modal_projector"


@pytest.fixture
def shades(tmp_path):
    rows = []
    for shade in (10, 40, 210, 250):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (shade,) * 3).save(buffer, "PNG")
        rows.append(
            {
                "image": buffer.getvalue(),
                "question": "green?",
                "answer": "yes" if shade > 99 else "no",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shades.parquet")
    return load_records({"source": f"parquet:{tmp_path}/shades.parquet", "format": "qa"})


def trained(loaded, data, folder, model=None, **changes):
    model = model or loaded.model
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, data, loaded.processor, options=replace(OPTIONS, **changes), output_dir=folder,
          show_progress=False)  # fmt: skip
    now = dict(model.named_parameters())
    return {n: (now[n].detach() - p).abs().max().item() for n, p in before.items()}


def test_the_projector_has_its_own_rate_whole_or_adapted(tiny_llava, shades, tmp_path):
    plan = plan_adapter(tiny_llava.model, None, method="pissa", rank=2, towers="language", show_progress=False)  # fmt: skip
    whole = attach_adapter(copy.deepcopy(tiny_llava.model), plan, modules_to_save=[PROJECTOR])
    found = projector_parameters(whole)
    assert {p.shape for p in found} == {p.shape for p in tiny_llava.model.get_submodule(PROJECTOR).parameters()}  # fmt: skip
    moved = trained(tiny_llava, shades, tmp_path / "a", whole, projector_learning_rate=1e-5, log_every=1)  # fmt: skip
    logged = [json.loads(line) for line in (tmp_path / "a/history.jsonl").read_text().splitlines()]
    assert {entry["learning_rate"] for entry in logged if "loss" in entry} == {1e-2}
    of_it = [change for name, change in moved.items() if "multi_modal_projector" in name]
    rest = [change for name, change in moved.items() if "multi_modal_projector" not in name]
    assert len(of_it) == 4
    assert 0 < max(of_it) < 1e-4 < 1e-3 < max(rest)

    adapted = prepare_method(
        "lora", copy.deepcopy(tiny_llava.model), rank=2, towers="language,projector"
    )
    moved = trained(tiny_llava, shades, tmp_path / "b", adapted, projector_learning_rate=1e-5)
    assert max(c for n, c in moved.items() if "multi_modal_projector" in n) < 1e-4
    with pytest.raises(CordaError, match="nothing of a projector is trained"):
        language = prepare_method(
            "lora", copy.deepcopy(tiny_llava.model), rank=2, towers="language"
        )
        trained(tiny_llava, shades, tmp_path / "c", language, projector_learning_rate=1e-5)
    with pytest.raises(CordaError, match="projector_learning_rate is 0"):
        replace(OPTIONS, projector_learning_rate=0)


@pytest.mark.parametrize("method", ["lora", "pissa", "full"])
def test_gradient_checkpointing_changes_no_weight(tiny_llava, shades, tmp_path, method):
    ends = []
    for name, on in (("kept", False), ("again", True)):
        model: Any = prepare_method(method, copy.deepcopy(tiny_llava.model), rank=2, towers="language") if method != "full" \
            else copy.deepcopy(tiny_llava.model)  # fmt: skip
        counted = _blocks_run(model)
        trained(tiny_llava, shades, tmp_path / name, model, gradient_checkpointing=on)
        ends.append({n: p for n, p in model.named_parameters() if p.requires_grad})
        assert counted() == (6 if on else 3), "each block runs again for its gradients"
        bare: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        assert not bare.is_gradient_checkpointing, "and it is off again"
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=0, atol=0)


def _blocks_run(model):
    runs = []
    norm = next(m for n, m in model.named_modules() if n.endswith("layers.0.input_layernorm"))
    norm.register_forward_hook(lambda *_: runs.append(1))
    return lambda: len(runs)


def test_gradient_checkpointing_of_a_model_that_cannot(tiny_open_clip, digits, processor, tmp_path):
    options = TrainOptions(steps=1, gradient_checkpointing=True)
    with pytest.raises(CordaError, match="gradient_checkpointing is for models of transformers"):
        train(tiny_open_clip, digits, processor, options=options, output_dir=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_bfloat16_base_trains_adapters_in_float32(tiny_llava, shades, tmp_path):
    base = copy.deepcopy(tiny_llava.model).to(torch.bfloat16)
    for method in ("lora", "pissa"):
        model = prepare_method(method, copy.deepcopy(base), rank=2, towers="language")
        moved = trained(tiny_llava, shades, tmp_path / method, model, bf16=True)
        assert max(moved.values()) > 1e-3
        kinds = {p.dtype for p in model.parameters() if p.requires_grad}
        assert kinds == {torch.float32}, "small steps would be lost in bfloat16"
    history = (tmp_path / "lora" / "history.jsonl").read_text().splitlines()
    assert json.loads(history[-1])["loss"] > 0
