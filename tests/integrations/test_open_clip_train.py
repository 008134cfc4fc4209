"""open_clip's own training with our adapter and terms, on emoji-clip, with the tool in an environment of its own."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from corda_vlm import asset, attach_adapter, load_adapter, load_model, plan_adapter
from corda_vlm.__main__ import main as verb
from corda_vlm.data import load_records, make_batches
from corda_vlm.errors import CordaError
from corda_vlm.families.clip_open import CLIP_OPEN
from corda_vlm.integrations.open_clip_train import OpenClipOptions, Training, main, split
from corda_vlm.tensors import read_header
from tests.integrations.plain import departure

pytestmark = [pytest.mark.unchecked]
MODEL = asset("model_zoo/emoji-clip")
KNOWN = f"parquet:{MODEL}/data/noto.parquet"


@pytest.mark.slow
def test_training(tool, tmp_path, monkeypatch, measured):
    """starts at the base, the terms stand in its log, --resume goes on, open_clip and load_adapter load the result"""
    monkeypatch.chdir(tmp_path)
    verb(["calibrate", str(MODEL), KNOWN, "--samples=64", "--towers=vision"])
    verb(["plan", str(MODEL), "--covariance=covariance.safetensors", "--rank=8", "--mode=kpm", "--a-norm=10",
          "--towers=vision"])  # fmt: skip
    digits = load_records({"source": "sklearn:digits", "split": "train", "limit": 64})
    rows = ["filepath\ttitle"]
    for number in range(len(digits)):
        record = digits.get(number)
        path = tmp_path / f"{number}.png"
        record["image"].convert("RGB").save(path)
        rows.append(f"{path}\tthe digit {record['label']}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))

    script = ["-m", "corda_vlm.integrations.open_clip_train", "--model", f"local-dir:{MODEL}",
              "--train-data", "pairs.csv", "--dataset-type", "csv", "--batch-size", "16", "--lr", "1e-3", "--warmup", "0",
              "--wd", "0", "--lr-scheduler", "const", "--workers", "0", "--device", "cpu", "--precision", "fp32", "--seed", "1",
              "--name", "digits", "--logs", "logs", "--log-every-n-steps", "1",
              "--corda-plan", "plan.json", "--corda-anchor", "100", "--corda-covariance", "covariance.safetensors",
              "--corda-distill", "30", "--corda-knowledge", KNOWN, "--corda-samples", "32", "--corda-distill-every", "1"]  # fmt: skip
    tool.run(*script, "--epochs", "1", cwd=tmp_path)
    said = (tmp_path / "logs" / "digits" / "out.log").read_text()
    assert re.findall(r"Anchor: (\S+)", said)[0] == "0.0000"
    assert abs(float(re.findall(r"Distill: (\S+)", said)[0])) < 1e-5
    assert float(re.findall(r"Anchor: (\S+)", said)[-1]) > 0
    again = tool.run(*script, "--epochs", "2", "--resume", "latest", cwd=tmp_path)
    assert "Start epoch 1" in again
    assert "Start epoch 0" not in again

    import open_clip

    folder = tmp_path / "logs" / "digits"
    plain = open_clip.create_model(f"local-dir:{folder / 'merged'}").eval()
    encode = CLIP_OPEN.need_contrastive(plain).encode_image
    loaded = load_model("emoji-clip")
    pixels = next(iter(make_batches(digits, loaded.processor, batch_size=8)))["pixel_values"]
    with torch.no_grad():
        before = encode(loaded.model, pixels)
        after = encode(load_adapter(loaded.model, folder / "adapter").eval(), pixels)
        error = departure(encode(plain, pixels), after)
    assert error < 1e-4
    assert departure(after, before) > 100 * error
    losses = [float(loss) for loss in re.findall(r" Loss: (\S+)", said)]
    measured(
        f"loss {losses[0]:.2f} to {losses[-1]:.2f} in an epoch of 4 steps; open_clip's outputs within {error:.0e}"
    )


def test_an_adapter_is_written_as_a_whole_and_again(tmp_path, monkeypatch):
    """a later end of the training that fails leaves the former adapter; the model that it is of is noted"""
    model = load_model("emoji-clip").model
    plan = plan_adapter(model, None, method="pissa", rank=2, towers="vision", roles="q")
    adapted = attach_adapter(model, plan)
    args = SimpleNamespace(save_logs=True, logs=str(tmp_path), name="own", model=f"local-dir:{MODEL}")  # fmt: skip
    training = Training(OpenClipOptions(), model=adapted, args=args)
    for _ in range(2):  # a training that was resumed ends again
        assert training.finish() == tmp_path / "own"
    weights = tmp_path / "own" / "adapter" / "adapter_model.safetensors"
    _, header = read_header(weights, "adapter", "")
    assert header["corda_vlm.base"] == plan.model_fingerprint
    load_adapter(load_model("emoji-clip").model, weights.parent)

    def full(folder: str, **_: object) -> None:
        (Path(folder) / weights.name).write_bytes(b"half")
        raise OSError("no space left")

    before = weights.read_bytes()
    monkeypatch.setattr(adapted, "save_pretrained", full)
    with pytest.raises(CordaError, match="no space left"):
        training.finish()
    assert weights.read_bytes() == before


def test_the_flags_are_told_apart():
    words = ["--model", "ViT-B-32", "--corda-plan", "p.json", "--lr=1e-3", "--corda-anchor=3", "--debug"]  # fmt: skip
    ours, theirs = split(words)
    assert ours == ["--corda-plan", "p.json", "--corda-anchor=3"]
    assert theirs == ["--model", "ViT-B-32", "--lr=1e-3", "--debug"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"corda_anchor": 1.0}, "--corda-covariance"),
        ({"corda_distill": 1.0}, "--corda-knowledge"),
        ({"corda_anchor": -1.0}, "corda_anchor"),
    ],
)
def test_what_cannot_be_is_told_before_a_model_is_made(options, said):
    with pytest.raises(CordaError, match=said):
        OpenClipOptions(**options)


def test_a_flag_of_ours_that_is_not_known(monkeypatch):
    with pytest.raises(CordaError, match="--corda-plan"):
        main(["--corda-plann", "plan.json"])


def test_without_the_tool_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip_train.main", None)
    with pytest.raises(CordaError, match=r"open_clip_torch\[training\]"):
        main(["--model", "ViT-B-32"])
