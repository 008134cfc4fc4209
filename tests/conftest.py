"""Fixtures: tiny models of the real classes with random weights, for shapes and round trips.

Claims about learning and forgetting are tested on the trained models of `model_zoo/`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import jaxtyping
import pytest
import torch

from tests.budget import pytest_sessionstart, pytest_terminal_summary  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell without job control starts background processes with Ctrl-C ignored, and tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data named by `CORDA_VLM_DATA`; tests that want it are skipped, visibly, without it."""
    folder = os.environ.get("CORDA_VLM_DATA")
    if not folder:
        pytest.skip(
            "CORDA_VLM_DATA is not set: this test wants the real data sets beside the repository"
        )
    path = Path(folder)
    assert path.is_dir(), f"CORDA_VLM_DATA={folder} is not a folder"
    return path


@pytest.fixture(scope="session")
def _text_sides() -> dict[Any, Any]:
    return {}


@pytest.fixture
def one_text_side(_text_sides, monkeypatch) -> None:
    """All evaluations share the text side of a model, as those of one run do: it is encoded again where it has changed."""
    from corda_vlm.evaluation import Cache

    def share(self: Any) -> None:
        vars(self).update(data={}, classifiers=_text_sides)

    monkeypatch.setattr(Cache, "__init__", share)


@contextmanager
def unchecked() -> Iterator[None]:
    """The package as users run it: its annotations are not checked, so wrong arguments reach its own checks."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(autouse=True)
def _own_errors_come_first(request, monkeypatch) -> Iterator[None]:
    """`with pytest.raises(CordaError)` runs its block unchecked, and so does a test marked `unchecked` as a whole.

    Arguments and shapes are checked against the annotations in all tests (`--jaxtyping-packages` in pyproject.toml).
    A test that expects one of our own errors hands in what the annotations forbid, to see what a user would see.
    """
    from corda_vlm.errors import CordaError

    raises: Any = pytest.raises

    @contextmanager
    def raises_as_for_users(expected: Any = Exception, *args: Any, **kwargs: Any):
        kinds = expected if isinstance(expected, tuple) else (expected,)
        ours = any(isinstance(kind, type) and issubclass(kind, CordaError) for kind in kinds)
        with raises(expected, *args, **kwargs) as caught, unchecked() if ours else nullcontext():
            yield caught

    monkeypatch.setattr(pytest, "raises", raises_as_for_users)
    with unchecked() if request.node.get_closest_marker("unchecked") else nullcontext():
        yield


@pytest.fixture
def own_registrations() -> Iterator[None]:
    """What a test registers is known in that test alone."""
    from corda_vlm.data import SOURCES
    from corda_vlm.evaluation import TASK_KINDS
    from corda_vlm.families import FAMILIES
    from corda_vlm.methods import METHODS

    registries = [FAMILIES, METHODS, SOURCES, TASK_KINDS]
    registries += [kind.registered for kind in TASK_KINDS.values()]
    before = [dict(registry) for registry in registries]
    yield
    for registry, former in zip(registries, before, strict=True):
        registry.clear()
        registry.update(former)


@pytest.fixture
def tiny_clip_hf():
    """A transformers `CLIPModel`: 2 layers a tower, width 32, 32-pixel images, patch 8."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": 99,
                     "bos_token_id": 98, "pad_token_id": 0},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )  # fmt: skip
    return CLIPModel(config).eval()


@pytest.fixture
def tiny_siglip():
    """A transformers `SiglipModel`: 2 layers a tower, width 32, with the attention-pooling head."""
    from transformers import SiglipConfig, SiglipModel

    config = SiglipConfig(
        text_config={"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "max_position_embeddings": 12},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
    )  # fmt: skip
    return SiglipModel(config).eval()


@pytest.fixture
def tiny_open_clip():
    """An open_clip `CLIP`: 2 layers a tower, packed `in_proj_weight` attention."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    return CLIP(
        embed_dim=24,
        vision_cfg=CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32),
        text_cfg=CLIPTextCfg(context_length=12, vocab_size=100, width=32, heads=2, layers=2),
    ).eval()


@pytest.fixture
def tiny_resnet():
    """A convolutional `CLIP` of open_clip: a ResNet of four stages and its attention pool; 32-pixel images.

    Its normalizations are not as they are made: the last of each block starts at zero, which hides all before it.
    """
    import open_clip.model as models

    model = models.CLIP(
        24,
        models.CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, head_width=8, image_size=32),
        models.CLIPTextCfg(context_length=12, vocab_size=100, width=32, heads=2, layers=1),
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.0)
                module.bias.normal_(std=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer whose tokens take the space before a word with them; no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    words = "Question: is there a red circle in the image?\nAnswer: yes no blue green\n"
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [words] * 9,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def _text_config(tokenizer) -> dict:
    return {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip


@pytest.fixture
def tiny_llm(tiny_tokenizer):
    """A `Loaded` tiny Llama with `tiny_tokenizer`: width 32, 2 layers, a context of 128 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from corda_vlm.families import Loaded, detect_family
    from corda_vlm.families.generative.language import language_processor

    model = LlamaForCausalLM(LlamaConfig(**_text_config(tiny_tokenizer))).eval()
    return Loaded(model, language_processor(model, tiny_tokenizer), detect_family(model), "tiny")


LLAVA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}ASSISTANT: {{ m['content'][0]['text'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture
def tiny_llava(tiny_tokenizer):
    """A `Loaded` tiny LLaVA: 32-pixel images in 16 patches, the text model of `tiny_llm`, LLaVA-1.5's template."""
    import transformers

    if transformers.__version__.startswith("4."):
        pytest.skip("vision-language models take transformers 5")
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    from corda_vlm.families import Loaded, detect_family
    from corda_vlm.families.generative.language import language_processor

    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, patch_size=8)  # fmt: skip
    kind: Any = LlavaConfig  # the tokens are not named in its signature
    config = kind(
        vision_config=vision, text_config=LlamaConfig(**_text_config(tiny_tokenizer)), image_token_id=3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    whole = LlavaProcessor(
        pictures, tiny_tokenizer, patch_size=8, vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE, image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    processor = language_processor(model, tiny_tokenizer, whole)
    return Loaded(model, processor, detect_family(model), "tiny")


@pytest.fixture
def saved(tmp_path):
    """Saves a `Loaded` tiny model that generates text as transformers would; returns its folder."""

    def save(loaded, name: str) -> Path:
        folder = tmp_path / name
        loaded.model.save_pretrained(folder)
        (loaded.processor.hf_processor or loaded.processor.tokenizer).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def shades(tmp_path) -> Path:
    """Twelve pictures, dark or bright, with two questions about each."""
    import io
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rows = []
    for shade in (5, 10, 20, 30, 40, 50, 200, 210, 220, 230, 240, 250):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (shade,) * 3).save(buffer, "PNG")
        qa = [{"question": "is there a red circle?", "answer": "yes" if shade > 99 else "no"},
              {"question": "colour?", "answer": "green" if shade > 99 else "blue"}]  # fmt: skip
        rows.append({"image": buffer.getvalue(), "qa_json": json.dumps(qa)})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shades.parquet")
    return tmp_path / "shades.parquet"


@pytest.fixture(scope="session")
def invented() -> ModuleType:
    """Invented scores, for the tests of what reads them."""
    from tests.report import invented

    return invented
