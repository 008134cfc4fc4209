"""Asking a model about one picture: what a person does before and after a training, beside all measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from corda_vlm.data import Chat, to_rgb
from corda_vlm.errors import CordaError
from corda_vlm.evaluation.class_names import DEFAULT_TEMPLATES
from corda_vlm.evaluation.measure import encoder_of
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.models.generate import generate
from corda_vlm.evaluation.models.text_model import TextGenerator
from corda_vlm.evaluation.options import AskOptions
from corda_vlm.families.base import Loaded, Processor


def ask(
    model: nn.Module | Loaded,
    question: str,
    image: Any = None,
    *,
    processor: Processor | None = None,
    chat_template: str = AskOptions.chat_template,
    max_new_tokens: int = AskOptions.max_new_tokens,
) -> str:
    """What a model that generates text answers to one question, greedily.

    Args:
        model: bare or with an adapter, or what `load_model` returned.
        question: what the user says.
        image: a path, a PIL image, encoded bytes or an array (H, W, 3) in uint8; None for a question without a picture.
        processor: what `load_model` returned beside the model; needed unless `model` is its whole answer.
        chat_template: as of `ChatOptions`.
        max_new_tokens: the most tokens of the answer.

    Returns:
        the answer without special tokens, and without white space around.

    Raises:
        CordaError: the model generates no text, reads no pictures, or has no chat template; or the question is empty.
        Undecodable: the picture cannot be read.
        NotFiniteError: the model's output is NaN or Inf.
    """
    if not question.strip():
        raise CordaError("the question is empty; ask something")
    generator = TextGenerator.of(encoder_of(model, processor=processor))
    if image is not None and not generator.processor.takes_images:
        raise CordaError("this model reads text alone; leave the picture out")
    content: Any = question
    if image is not None:
        content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = Chat(generator.processor, chat_template)
    chat.check()
    prompt = chat.prompt([{"role": "user", "content": content}])
    sample = generator.processor.encode(
        prompt.text,
        [] if image is None else [to_rgb(image, Path())],
        responses=[],
        special_tokens=prompt.special_tokens,
    )
    return generate(generator, [sample], max_new_tokens=max_new_tokens)[0]


def classify(
    model: nn.Module | Loaded,
    image: Any,
    classes: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    processor: Processor | None = None,
) -> list[tuple[str, float]]:
    """Which of some classes a model that compares images with texts sees in a picture.

    Args:
        model, image, processor: as of `ask`.
        classes: their names.
        templates: prompts with one `{}` each for the name.

    Returns:
        the classes with their probabilities, the likeliest first; they add up to 1.

    Raises:
        CordaError: the model compares no images with texts, a class is named twice, or there are none.
        Undecodable: the picture cannot be read.
        NotFiniteError: the model's output is NaN or Inf.
    """
    if not classes or len(set(classes)) < len(classes):
        raise CordaError("classify takes class names, each once, e.g. cat,dog")
    encoder: Encoder = encoder_of(model, processor=processor)
    contrastive = encoder.family.need_contrastive(encoder.model)
    pixels = encoder.processor.image(to_rgb(image, Path()))[None]  # (1, 3, h, w)
    vector = encoder.images([pixels])  # (1, d)
    with torch.no_grad():
        scale = float(contrastive.logit_scale(encoder.model))
    logits = scale * vector @ encoder.classifier(classes, templates)  # (1, classes)
    chances = logits.softmax(-1)[0].tolist()
    return sorted(zip(classes, chances, strict=True), key=lambda pair: -pair[1])
