"""Tiny real models, a little data, and what each verb makes of them: what the campaign kills, damages and misleads."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
FAST = ["--steps=2", "--batch-size=4", "--bf16=false"]
SHADES: dict[str, Any] = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 210)}


def warm() -> None:
    """Import whatever the children would, and start no thread."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    os.environ.setdefault("MPLBACKEND", "agg")
    import matplotlib.pyplot
    import open_clip
    import pyarrow.parquet  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch
    import transformers

    import corda_vlm.experiment.runner
    import corda_vlm.experiment.study  # noqa: F401

    torch.set_num_threads(1)
    for name in ("CLIPModel", "LlamaForCausalLM", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor",
                 "CLIPImageProcessor", "PreTrainedTokenizerFast", "LlavaForConditionalGeneration"):  # fmt: skip
        getattr(transformers, name)
    open_clip.get_tokenizer("ViT-B-32")
    matplotlib.pyplot.subplots()
    matplotlib.pyplot.close("all")


def main(*args: str | Path) -> Callable[[], None]:
    """A call of the command line."""

    def call() -> None:
        from corda_vlm.__main__ import main as verb

        verb([str(arg) for arg in args])

    return call


@dataclass(frozen=True)
class Verb:
    """One command, run in a folder of its own.

    Attributes:
        name: says which.
        args: the words of the command line.
        before: what lies in the folder at the start: name there -> name in the world.
    """

    name: str
    args: tuple[str, ...]
    before: dict[str, str]

    def prepare(self, world: Path, folder: Path) -> None:
        """Make the folder as it is before the command."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, source in self.before.items():
            copy = shutil.copytree if (world / source).is_dir() else shutil.copy
            copy(world / source, folder / name)


def verbs(world: Path) -> list[Verb]:
    """Every verb that writes, in each of its forms. The later ones read in the world what the former wrote into it."""
    clip, llm = str(world / "clip"), str(world / "llm")
    images, qa = f"folder:{world}/images", f'{{source: "jsonl:{world}/qa.jsonl", format: qa}}'
    cov, plan = f"{world}/covariance.safetensors", f"{world}/plan.json"
    calibrate = ("--samples=12", "--batch-size=4")
    made = [
        Verb("calibrate", ("calibrate", clip, images, *calibrate, "--towers=vision"), {}),
        Verb("calibrate --rounds", ("calibrate", clip, images, *calibrate, "--towers=vision", "--rounds=2"), {}),
        Verb("calibrate --blockwise", ("calibrate", llm, qa, *calibrate, "--blockwise", "--chat=plain"), {}),
        Verb("init", ("init", clip, "--covariance", cov, "--rank=2", "--a-norm=10", "--towers=vision"), {}),
        Verb("init over another", ("init", clip, "--covariance", cov, "--rank=2", "--a-norm=10", "--towers=vision"),
             {"plan.json": "plan.json", "plan.safetensors": "plan.safetensors"}),
        Verb("train", ("train", clip, images, "--plan", plan, *FAST), {}),
        Verb("evaluate", ("evaluate", clip, f"{world}/suite.yaml", "--adapter", f"{world}/adapter", "--output=scores.jsonl",
                          "--scales=0.5,1"), {}),
        *(Verb(f"export {form}", ("export", clip, f"{world}/adapter/weights", "out", "--format", form), {})
          for form in ("lora", "residual", "merged")),
        Verb("run", ("run", f"{world}/experiment.yaml", "--output=out"), {}),
        Verb("study", ("run", f"{world}/study.yaml", "--output=out"), {}),
    ]  # fmt: skip
    over = Verb("export over another", ("export", clip, f"{world}/adapter/weights", "out", "--format=merged"),
                {"out": "out"})  # fmt: skip
    report = Verb("report", ("report", "out"), {"out": "run"})
    return [*made, over, report]


KEPT: dict[str, Any] = {
    "calibrate": {"covariance.safetensors": "covariance.safetensors"},
    "init": {"plan.json": "plan.json", "plan.safetensors": "plan.safetensors"},
    "train": {"adapter": "adapter"},
    "evaluate": {"scores.jsonl": "scores.jsonl"},
    "export lora": {"out": "out"},
    "run": {"out": "run"},
    "study": {"out": "study"},
}
"""What of the verbs' work becomes part of the world: name in the verb's folder -> name in the world."""


def build(world: Path) -> None:
    """Models, data and configurations, in a folder that is new; to be called in a child, as it starts threads."""
    import torch

    torch.manual_seed(0)
    world.mkdir(parents=True)
    _pictures(world)
    _texts(world)
    _models(world)
    _configs(world)


def _pictures(world: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rows = []
    for number in range(24):
        name, shade = list(SHADES.items())[number % 3]
        path = world / "images" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (32, 32), shade)
        picture.putpixel((number, number), (number * 10, 0, 0))
        picture.save(path)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG")
        rows.append({"image": buffer.getvalue(), "label": name, "text": f"a {name} square"})
    pq.write_table(pa.Table.from_pylist(rows), world / "pictures.parquet")
    with (world / "pictures.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filepath", "title"])
        table.writerows([f"images/red/{n}.png", "a red square"] for n in range(0, 24, 3))


def _texts(world: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": f"is {i} even?", "answer": "no" if i % 2 else "yes"} for i in range(24)
    ]
    (world / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [{"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
             for r in rows]  # fmt: skip
    (world / "chats.json").write_text(json.dumps(chats))
    (world / "names.yaml").write_text(yaml.safe_dump({name: f"{name} square" for name in SHADES}))
    (world / "names.json").write_text(json.dumps(sorted(SHADES)))
    (world / "templates.txt").write_text("a photo of a {}.\na {}\n")
    (world / "template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )


def _models(world: Path) -> None:
    import transformers
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    clip = CLIP(embed_dim=24, vision_cfg=CLIPVisionCfg(**vision), text_cfg=CLIPTextCfg(**text))
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    (world / "clip").mkdir()
    about = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (world / "clip" / "open_clip_config.json").write_text(json.dumps(about))
    tensors = {name: value.contiguous() for name, value in clip.state_dict().items()}
    save_file(tensors, world / "clip" / "open_clip_model.safetensors")

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    words.train_from_iterator(["is it even? yes no\n"] * 9, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    llama = transformers.LlamaConfig(**TEXT, vocab_size=len(tokenizer))
    transformers.LlamaForCausalLM(llama).eval().save_pretrained(world / "llm")
    tokenizer.save_pretrained(world / "llm")


def _configs(world: Path) -> None:
    images = {"source": f"folder:{world}/images"}
    tasks = [{"name": name, "role": role, "kind": "zero_shot", "data": {**images, "limit": 12}, "classes": {"from": "data"},
              "templates": ["{}"]} for name, role in (("new", "gain"), ("old", "retention"))]  # fmt: skip
    suite = {"name": "small", "version": 1, "tasks": tasks}
    (world / "suite.yaml").write_text(yaml.safe_dump(suite))
    variants = {
        "corda-kpm": {"a_norm": 10, "learning_rates": [1e-3]},
        "full": {"learning_rates": [1e-4], "scales": [0.5]},
        "linear-probe": {"learning_rates": [1e-1]},
    }
    experiment = {
        "name": "small", "model": str(world / "clip"), "suite": str(world / "suite.yaml"), "towers": ["vision"], "rank": 2,
        "calibration": {"data": images, "samples": 12, "batch_size": 4}, "task": {"data": images, "templates": ["{}"]},
        "training": {"steps": 3, "batch_size": 4, "save_every": 1, "bf16": False, "log_every": 1}, "variants": variants,
    }  # fmt: skip
    (world / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    common = {key: value for key, value in experiment.items() if key not in ("name", "variants")}
    study = {"name": "pair", "defaults": {**common, "variants": {"lora": {"learning_rates": [1e-3]}}},
             "experiments": {"low": {}, "high": {"rank": 4}}}  # fmt: skip
    (world / "study.yaml").write_text(yaml.safe_dump(study))
