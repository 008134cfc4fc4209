"""A processor for the tiny models of tests/conftest.py, and a few real digits to train on."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image

from corda_vlm.data import ImageTextData, load_records
from corda_vlm.families import Processor
from tests.evaluation.conftest import colour_folder, tiny_processor  # noqa: F401


def _image(picture: Image.Image) -> torch.Tensor:
    pixels = torch.frombuffer(bytearray(picture.resize((32, 32)).tobytes()), dtype=torch.uint8)
    return (pixels.reshape(32, 32, 3).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def _text(texts) -> dict[str, torch.Tensor]:
    """Twelve tokens: 98, the last letters, 99, padding."""
    ids = torch.zeros(len(texts), 12, dtype=torch.long)
    for row, text in enumerate(texts):
        tokens = [98, *(1 + ord(letter) % 97 for letter in text[-10:]), 99]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return {"input_ids": ids, "attention_mask": ids > 0}


@pytest.fixture(scope="session")
def processor() -> Processor:
    return Processor(image=_image, text=_text, image_size=(32, 32))


@pytest.fixture(scope="session")
def digits() -> ImageTextData:
    """90 of scikit-learn's digits, with a caption of their class."""
    spec = {"source": "sklearn:digits", "split": "train", "text": "a photo of a {class_name}"}
    data = load_records({**spec, "per_class": 9})
    assert isinstance(data, ImageTextData)
    return data


@pytest.fixture(scope="session")
def held_out() -> ImageTextData:
    spec = {"source": "sklearn:digits", "split": "val", "text": "a photo of a {class_name}"}
    data = load_records({**spec, "limit": 40})
    assert isinstance(data, ImageTextData)
    return data


@pytest.fixture
def lora():
    """(model, dropout) -> plain LoRA on the MLPs of its vision tower, the same weights each time."""
    return _lora


def _lora(model: torch.nn.Module, dropout: float = 0.0) -> PeftModel:
    torch.manual_seed(1)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and "vis" in name
        and ("fc" in name or "c_proj" in name)
    ]
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=4, target_modules=names, lora_dropout=dropout)
    )
