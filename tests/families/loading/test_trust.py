"""No code of a model's folder runs, and nobody is asked, whichever file asks for it."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from corda_vlm.adapter import load_adapter
from corda_vlm.errors import CordaError
from corda_vlm.families import load_model
from corda_vlm.families.loading.hub import or_missing
from corda_vlm.families.loading.trust import RemoteCodeError

EVIL = """
from pathlib import Path

Path({sentinel!r}).write_text("ran")
from transformers import *


class C(CLIPConfig):
    model_type = "evil"


class M(CLIPModel):
    config_class = C


class T(PreTrainedTokenizerFast):
    pass


class P(CLIPImageProcessor):
    pass
"""


@pytest.fixture
def sentinel(tmp_path, monkeypatch):
    """The file that evil code writes; whoever asks on the terminal fails the test."""

    def asked(prompt: str = "") -> str:
        raise AssertionError(f"asks on the terminal: {prompt}")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "sentinel"
    yield path
    for name in [name for name in sys.modules if "evil" in name]:
        del sys.modules[name]


def poison(folder: Path, sentinel: Path) -> None:
    (folder / "evil.py").write_text(EVIL.format(sentinel=str(sentinel)))


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changes}))


def try_all(folder: Path | str) -> None:
    """Load a model and use all that came with it, as far as it goes."""
    try:
        loaded = load_model(folder)
        loaded.processor.text(["a word"])
        from PIL import Image

        loaded.processor.image(Image.new("RGB", (32, 32)))
    except CordaError:
        pass


@pytest.fixture
def open_clip_folder(tmp_path, make_open_clip, tiny_tokenizer):
    folder = tmp_path / "open"
    folder.mkdir()
    text = {"context_length": 12, "vocab_size": 400, "width": 32, "heads": 2, "layers": 2}
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = make_open_clip(vision=vision, text=text)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    tiny_tokenizer.save_pretrained(folder)
    return folder


def set_text(folder: Path, **changes) -> None:
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["model_cfg"]["text_cfg"].update(changes)
    path.write_text(json.dumps(content))


@pytest.fixture
def clip_folder(tmp_path, tiny_clip_hf, tiny_tokenizer):
    from transformers import CLIPImageProcessor

    folder = tmp_path / "clip"
    tiny_clip_hf.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


TOKENIZER = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}


def test_the_poison_would_work(open_clip_folder, sentinel):
    """Else the tests below would pass for no reason; here the user says that the code is trusted."""
    poison(open_clip_folder, sentinel)
    edit(open_clip_folder / "tokenizer_config.json", **TOKENIZER)
    set_text(open_clip_folder, hf_tokenizer_name="x", tokenizer_kwargs={"trust_remote_code": True})
    load_model(open_clip_folder, trust_remote_code=True)
    assert sentinel.read_text() == "ran"


@pytest.mark.parametrize("says_so", [{"trust_remote_code": True}, {}])
def test_the_tokenizer_of_an_open_clip_model(open_clip_folder, sentinel, says_so):
    poison(open_clip_folder, sentinel)
    edit(open_clip_folder / "tokenizer_config.json", **TOKENIZER)
    set_text(open_clip_folder, hf_tokenizer_name="x", tokenizer_kwargs=says_so)
    with pytest.raises(RemoteCodeError, match="pass trust_remote_code=True"):
        load_model(open_clip_folder)
    assert not sentinel.exists()


def test_the_text_tower_of_an_open_clip_model(open_clip_folder, sentinel, tmp_path):
    tower = tmp_path / "tower"
    tower.mkdir()
    poison(tower, sentinel)
    auto = {"AutoConfig": "evil.C", "AutoModel": "evil.M"}
    edit(tower / "config.json", model_type="evil", auto_map=auto)
    set_text(open_clip_folder, hf_model_name=str(tower), hf_tokenizer_name=str(tower))
    with pytest.raises(CordaError):
        load_model(open_clip_folder)
    assert not sentinel.exists()


def test_the_vision_tower_of_an_open_clip_model(open_clip_folder, sentinel, tmp_path):
    path = open_clip_folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    for name in ("local-dir:/x", "hf-hub:nobody/x", "hf_hub:nobody/x"):
        content["model_cfg"]["vision_cfg"] = {"timm_model_name": name, "image_size": 32}
        path.write_text(json.dumps(content))
        with pytest.raises(CordaError, match="vision tower elsewhere"):
            load_model(open_clip_folder)


AUTO = {
    "AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M",
    "AutoModelForImageTextToText": "evil.M", "AutoProcessor": "evil.P", "AutoImageProcessor": "evil.P",
    "AutoTokenizer": ["evil.T", "evil.T"],
}  # fmt: skip


@pytest.mark.parametrize("unknown", [True, False], ids=["unknown classes", "known classes"])
@pytest.mark.parametrize(
    "files",
    [
        ("config.json",),
        ("preprocessor_config.json",),
        ("processor_config.json",),
        ("tokenizer_config.json",),
        ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_clip_of_transformers(clip_folder, sentinel, files, unknown):
    poison(clip_folder, sentinel)
    for file in files:
        edit(clip_folder / file, auto_map=AUTO)
        if unknown and file != "config.json":
            edit(clip_folder / file, tokenizer_class="T", image_processor_type="P", processor_class="P")  # fmt: skip
    try_all(clip_folder)
    assert not sentinel.exists()


@pytest.mark.parametrize("kind", ["tiny_llm", "tiny_llava"])
def test_models_that_generate_text(kind, request, saved, sentinel):
    folder = saved(request.getfixturevalue(kind), kind)
    poison(folder, sentinel)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL.format(sentinel=str(sentinel)))
    for file in ("config", "preprocessor_config", "processor_config", "tokenizer_config", "generation_config"):  # fmt: skip
        edit(folder / f"{file}.json", auto_map=AUTO, custom_generate=str(folder))
        if file not in ("config", "generation_config"):
            edit(folder / f"{file}.json", tokenizer_class="T", image_processor_type="P", processor_class="P")  # fmt: skip
    try_all(folder)
    assert not sentinel.exists()


def test_what_needs_code_says_so_when_it_is_used():
    def load():
        raise ValueError("Please pass the argument `trust_remote_code=True` to allow custom code")

    stand_in = or_missing(load)
    with pytest.raises(CordaError, match="pass trust_remote_code=True to load_model"):
        stand_in()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_of_a_hub_is_code(clip_folder, key):
    edit(clip_folder / "config.json", **{key: "nobody/evil-kernel"})
    with pytest.raises(RemoteCodeError, match="nobody/evil-kernel"):
        load_model(clip_folder)


class Bomb:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return exec, (f"open({str(self.sentinel)!r}, 'w').write('ran')",)


def test_weights_that_are_pickles(
    open_clip_folder, clip_folder, tiny_llm, saved, sentinel, tmp_path
):
    bomb = pickle.dumps(Bomb(sentinel))
    llm = saved(tiny_llm, "llm")
    for folder, names in (
        (open_clip_folder, ("open_clip_pytorch_model.bin", "open_clip_model.pt", "model.pth")),
        (clip_folder, ("pytorch_model.bin",)),
        (llm, ("pytorch_model.bin",)),
    ):
        for path in folder.glob("*.safetensors"):
            path.unlink()
        for name in names:
            (folder / name).write_bytes(bomb)
        with pytest.raises(CordaError, match="pickles"):
            load_model(folder)
    for name in ("x.pt", "x.bin", "x.npz"):
        (tmp_path / name).write_bytes(bomb)
        with pytest.raises(CordaError, match="pickles"):
            load_model(f"ViT-B-32/{tmp_path / name}")
    (tmp_path / "x.safetensors").write_bytes(bomb)
    with pytest.raises(CordaError):
        load_model(f"ViT-B-32/{tmp_path / 'x.safetensors'}")
    assert not sentinel.exists()


def test_pickles_beside_safetensors_are_not_read(open_clip_folder, clip_folder, sentinel):
    bomb = pickle.dumps(Bomb(sentinel))
    (open_clip_folder / "open_clip_pytorch_model.bin").write_bytes(bomb)
    (clip_folder / "pytorch_model.bin").write_bytes(bomb)
    for folder in (open_clip_folder, clip_folder):
        load_model(folder)
    assert not sentinel.exists()


def test_a_gguf_file_beside_code(tmp_path, sentinel, tiny_llm, saved, monkeypatch):
    monkeypatch.setenv("CORDA_VLM_CACHE", str(tmp_path / "cache"))
    folder = saved(tiny_llm, "llm")
    poison(folder, sentinel)
    for file in ("config", "tokenizer_config"):
        edit(folder / f"{file}.json", auto_map=AUTO, tokenizer_class="T", model_type="evil")
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CordaError):
        load_model(folder / "model.gguf")
    assert not sentinel.exists()


def test_an_adapter_that_names_a_module(tmp_path, sentinel, monkeypatch):
    """PEFT's AutoPeftModel imports the `parent_library` of an adapter's configuration."""
    model = load_model("emoji-clip").model
    folder = tmp_path / "adapter"
    folder.mkdir()
    poison(folder, sentinel)
    monkeypatch.syspath_prepend(folder)
    mapping = {"base_model_class": "M", "parent_library": "evil"}
    edit(folder / "adapter_config.json", peft_type="LORA", auto_mapping=mapping, base_model_name_or_path="evil", r=2,
         target_modules=["c_fc"])  # fmt: skip
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(sentinel)))
    with pytest.raises(CordaError):
        load_adapter(model, folder)
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(CordaError):
        load_adapter(model, folder)
    assert not sentinel.exists()
