"""What feeds a model that generates text: one record becomes a sample, samples become a batch.

sample = processor.encode("USER: <image>\\nWhat is this? ASSISTANT: A cat.", [picture], responses=[(40, 46)])
batch = processor.collate([sample, ...])
"""

from __future__ import annotations

import bisect
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.errors import CordaError, DataError
from corda_vlm.families.base import Processor, no_tower, unwrap
from corda_vlm.families.loading.hub import Missing, image_size

logger = logging.getLogger(__name__)

Sample = dict[str, Tensor]
"""One record: `input_ids` (L,), `attention_mask` (L,), perhaps `labels` (L,), and the images' tensors."""

IGNORED = -100
# What has one entry for each token, and how it is padded; `input_ids` by the tokenizer's own.
ALONG_TOKENS = {
    "input_ids": 0,
    "attention_mask": 0,
    "labels": IGNORED,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
}


@dataclass(frozen=True)
class LanguageProcessor(Processor):
    """The `Processor` of a model that generates text.

    `image` is for models that see whole images of one size; others cut an image into pieces, of which `encode`
    takes care. `text` pads on the right and adds the special tokens.

    Attributes:
        tokenizer: transformers'; its padding token is set.
        hf_processor: transformers' processor of a vision-language model, None for a model of text alone.
        context: most tokens of a sequence, None where the configuration sets no limit.
        image_token: what stands for one image in a text, e.g. "<image>"; None for a model of text alone.
        image_token_id: the id that every place of an image feature has.
    """

    tokenizer: Any = None
    hf_processor: Any = None
    context: int | None = None
    image_token: str | None = None
    image_token_id: int | None = None

    @property
    def takes_images(self) -> bool:
        return self.image_token_id is not None

    @property
    def templater(self) -> Any:
        """What has the chat template: `templater.apply_chat_template(messages, tokenize=False, ...)`."""
        if getattr(self.hf_processor, "chat_template", None):
            return self.hf_processor
        return self.tokenizer

    def need_tokenizer(self) -> None:
        """Raises `CordaError` if the model came without one."""
        if isinstance(self.tokenizer, Missing):
            self.tokenizer()

    def encode(
        self,
        text: str,
        images: Sequence[Any] = (),
        *,
        responses: Sequence[tuple[int, int]] | None = None,
        special_tokens: bool = True,
    ) -> Sample:
        """One record, neither padded nor truncated.

        Args:
            text: all of it, with one `image_token` for each image.
            images: PIL images in the order of their tokens.
            responses: the characters of `text`, as (start, end), that are to be learned; a token that shares a
                character with them is labeled. None for no `labels`.
            special_tokens: False for text from a chat template, which has its own.

        Returns:
            `input_ids`, `attention_mask` and `labels` (L,), int64, labels -100 outside of the responses; for images
            `pixel_values` and what else the model takes, with a leading axis of images or patches.

        Raises:
            DataError: images and their tokens do not match, or a response is not within the text.
            CordaError: the model came without a tokenizer or image processor; spans cannot be told.
        """
        self._check(text, images, responses)
        if images and "suffix" in inspect.signature(self.hf_processor.__call__).parameters:
            return self._prefix_and_suffix(text, images, responses)
        offsets = responses is not None
        if images and type(self.hf_processor).__name__ in _BEGINS_ITSELF:
            text, responses = _begun(text, responses, self.tokenizer)
            special_tokens = False
        if images:
            found = self.hf_processor(
                text=[text],
                images=[picture.convert("RGB") for picture in images],
                text_kwargs={
                    "add_special_tokens": special_tokens,
                    **({"return_offsets_mapping": True} if offsets else {}),
                },
                images_kwargs={"return_tensors": "pt"},
                **({"return_text_replacement_offsets": True} if offsets else {}),
            )
            moved = found.pop("text_replacement_offsets", None) if offsets else None
        else:
            found = self.tokenizer(
                [text],
                add_special_tokens=special_tokens,
                return_offsets_mapping=offsets,
                return_token_type_ids=False,  # which transformers 4 adds for models that know none
            )
            moved = [[]]
        sample = _tensors(found, "offset_mapping")
        if offsets:
            if moved is None:
                raise CordaError(
                    f"{type(self.hf_processor).__name__} does not say where it puts images into a text, which labels need; "
                    "take transformers 5 or later (Mllama's does not there either: make its batches yourself)"
                )
            spans = [tuple(_moved(at, moved[0]) for at in span) for span in responses or ()]
            sample["labels"] = _labels(sample["input_ids"], found["offset_mapping"][0], spans)
        return sample

    def collate(
        self, samples: Sequence[Sample], *, padding_side: str = "right"
    ) -> dict[str, Tensor]:
        """Samples as one batch: tokens padded, images one after another, padded to the largest.

        Args:
            padding_side: "right" to train; "left" to generate.
        """
        if padding_side not in ("left", "right"):
            raise CordaError(f"padding_side is {padding_side!r}; expected 'left' or 'right'")
        samples = _pooled_in_order(samples)
        length = max(len(sample["input_ids"]) for sample in samples)
        batch: dict[str, Tensor] = {}
        for key in dict.fromkeys(key for sample in samples for key in sample):
            if key not in ALONG_TOKENS:
                batch[key] = _stacked([sample[key] for sample in samples if key in sample])
                continue
            fill = self.tokenizer.pad_token_id if key == "input_ids" else ALONG_TOKENS[key]
            rows = []
            for sample in samples:
                row = sample.get(key)
                if row is None:  # a record without images, or without a response
                    row = torch.full_like(sample["input_ids"], ALONG_TOKENS[key])
                spare = length - len(row)
                sides = (spare, 0) if padding_side == "left" else (0, spare)
                rows.append(F.pad(row, sides, value=fill))
            batch[key] = torch.stack(rows)
        return batch

    def _check(
        self, text: str, images: Sequence[Any], responses: Sequence[tuple[int, int]] | None
    ) -> None:
        self.need_tokenizer()
        if images and not self.takes_images:
            raise DataError(f"{len(images)} images for a model that reads text alone")
        places = text.count(self.image_token) if self.image_token else 0
        if places != len(images):
            raise DataError(
                f"{len(images)} images, and {places} places for them ({self.image_token}) in the text "
                f"{text[:60]!r}; they have to be as many"
            )
        if images and isinstance(self.hf_processor, Missing):
            self.hf_processor()
        for start, end in responses or ():
            if not 0 <= start < end <= len(text):
                raise DataError(
                    f"the response is characters {start} to {end} of a text of {len(text)}: it is empty, or not within it"
                )
        if responses is not None and not getattr(self.tokenizer, "is_fast", False):
            raise CordaError(
                f"labels need a fast tokenizer (tokenizer.json), and {type(self.tokenizer).__name__} is none: it does "
                "not say which characters a token is made of"
            )

    def _prefix_and_suffix(
        self,
        text: str,
        images: Sequence[Any],
        responses: Sequence[tuple[int, int]] | None,
    ) -> Sample:
        """PaliGemma: question and answer are two arguments, as the question is attended to both ways."""
        answer: dict[str, str] = {}
        if responses is not None:
            if len(responses) != 1 or responses[0][1] < len(text.rstrip()):
                raise DataError(
                    f"{type(self.hf_processor).__name__} takes one answer at the end of the text; got {len(responses)} responses"
                )
            start = responses[0][0]
            end_of_text = self.tokenizer.eos_token or ""  # which the processor adds
            answer = {"suffix": text[start:].rstrip().removesuffix(end_of_text).strip()}
            text = text[:start].rstrip()
        found = self.hf_processor(
            text=[text], images=[[picture.convert("RGB") for picture in images]],
            images_kwargs={"return_tensors": "pt"}, **answer,
        )  # fmt: skip
        sample = _tensors(found)
        if responses is None:
            sample.pop("labels", None)
        return sample


def language_processor(
    model: nn.Module, tokenizer: Any, hf_processor: Any = None
) -> LanguageProcessor:
    """A `LanguageProcessor` from transformers' tokenizer, and its processor for a vision-language model.

    A tokenizer without a padding token gets the end of text as one, which a log line says: padding is masked, so
    that nothing is learned or read from it.

    Raises:
        CordaError: the tokenizer has neither.
    """
    bare = unwrap(model)
    config = bare.config
    sees = getattr(config, "vision_config", None)
    token_id = image_token_id(config)
    if not isinstance(tokenizer, Missing):
        _pad(tokenizer)

    def image(picture: Any) -> Float[Tensor, "3 h w"]:
        if sees is None:
            raise no_tower(bare, "vision")
        if isinstance(hf_processor, Missing):
            hf_processor()
        images: Any = hf_processor
        pixels = images.image_processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        if pixels.dim() != 4 or len(pixels) != 1:
            raise CordaError(
                f"{type(bare).__name__} cuts images into pieces (pixel_values {tuple(pixels.shape)}); give text and "
                "images together, processor.encode(text, images)"
            )
        return pixels[0]

    def text(texts: Sequence[str]) -> dict[str, Tensor]:
        if isinstance(tokenizer, Missing):
            tokenizer()
        found = tokenizer(
            list(texts),
            padding=True,
            padding_side="right",
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"].bool()}

    return LanguageProcessor(
        image=image,
        text=text,
        image_size=image_size(sees) if sees is not None else (0, 0),
        tokenizer=tokenizer,
        hf_processor=hf_processor,
        context=_context(config),
        image_token=_image_token(tokenizer, hf_processor, token_id),
        image_token_id=token_id,
    )


def image_token_id(config: Any) -> int | None:
    """The id of the places of image features, None for a model of text alone."""
    if getattr(config, "vision_config", None) is None:
        return None
    found = getattr(config, "image_token_id", None)
    return getattr(config, "image_token_index", None) if found is None else found


def _image_token(tokenizer: Any, hf_processor: Any, token_id: int | None) -> str | None:
    if token_id is None or isinstance(tokenizer, Missing):
        return None
    named = getattr(hf_processor, "image_token", None)
    return named if isinstance(named, str) else tokenizer.convert_ids_to_tokens(token_id)


def _context(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _pad(tokenizer: Any) -> None:
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token_id is None:
        raise CordaError(
            "the tokenizer has neither a padding token nor an end of text, so that texts make no batch; add "
            '"pad_token" to tokenizer_config.json'
        )
    tokenizer.pad_token = tokenizer.eos_token
    logger.warning(
        "the tokenizer has no padding token; %r, the end of text, is taken for it (masked wherever it pads)",
        tokenizer.eos_token,
    )


# ------------------------------------------------------------------ tensors


def _tensors(found: Mapping[str, Any], *but: str) -> Sample:
    """The one sample of a processor's answer: without the axis of texts."""
    sample = {key: _tensor(value) for key, value in found.items() if key not in but}
    ids = sample["input_ids"]
    return {key: value[0] if key in ALONG_TOKENS else value for key, value in sample.items()} | (
        {} if "attention_mask" in sample else {"attention_mask": torch.ones_like(ids[0])}
    )


# What puts the beginning of the text there before it looks for images, so that labels would be some characters off.
_BEGINS_ITSELF = ("Molmo2Processor",)


def _begun(
    text: str, responses: Sequence[tuple[int, int]] | None, tokenizer: Any
) -> tuple[str, Sequence[tuple[int, int]] | None]:
    """A text that begins as its model wants it to, and where the responses are then."""
    begin = tokenizer.bos_token or tokenizer.eos_token or ""
    if text.startswith(begin):
        return text, responses
    by = len(begin)
    moved = None if responses is None else [(start + by, end + by) for start, end in responses]
    return begin + text, moved


def _pooled_in_order(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Molmo 2: which patches an image token is pooled of, counted from the first patch of the batch instead of the record."""
    before, found = 0, []
    for sample in samples:
        if (pooled := sample.get("image_token_pooling")) is not None:
            sample = {
                **sample,
                "image_token_pooling": torch.where(pooled < 0, pooled, pooled + before),
            }
            before += sample["pixel_values"].shape[:2].numel()
        found.append(sample)
    return found


def _tensor(value: Any) -> Tensor:
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return torch.stack([_tensor(one) for one in value])
    return torch.as_tensor(value)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Parts one after another along the first axis, the others padded with zeros to the largest."""
    if parts[0].dim() < 2:
        return torch.cat(list(parts))
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = []
    for part in parts:
        spare = [most - size for most, size in zip(largest, part.shape[1:], strict=True)]
        sides = [amount for size in reversed(spare) for amount in (0, size)]
        padded.append(F.pad(part, sides) if any(spare) else part)
    return torch.cat(padded)


def _moved(at: int, replaced: Sequence[Mapping[str, Any]]) -> int:
    """Where a character of the text is once image tokens were expanded."""
    ends = [one["span"][1] for one in replaced]
    before = bisect.bisect_right(ends, at)
    return at + (replaced[before - 1]["new_span"][1] - ends[before - 1] if before else 0)


def _labels(ids: Tensor, offsets: Any, spans: Sequence[tuple[int, ...]]) -> Tensor:
    """The ids of the tokens that share a character with a span, -100 elsewhere."""
    places = torch.as_tensor(offsets)  # (L, 2)
    learnt = torch.zeros_like(ids, dtype=torch.bool)
    for start, end in spans:
        learnt |= (places[:, 0] < end) & (places[:, 1] > start) & (places[:, 1] > places[:, 0])
    return torch.where(learnt, ids, IGNORED)
