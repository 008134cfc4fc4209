"""From conversations, questions and documents to batches of tokens, the same way for every use."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from corda_vlm.data.records import Records
from corda_vlm.data.text.chat import Chat, Rendered, is_learnt
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.data.text.instruction import InstructionData
from corda_vlm.data.text.registry import FORMATS
from corda_vlm.data.text.rows import MAY_CALL, Message
from corda_vlm.errors import DataError
from corda_vlm.families.base import Processor
from corda_vlm.families.generative.language import ALONG_TOKENS, IGNORED, LanguageProcessor, Sample
from corda_vlm.options import narrowed

logger = logging.getLogger(__name__)


@dataclass
class _Kept:
    """Samples of one data set under one template, as far as they fit."""

    tokens: dict[int, Sample] = field(default_factory=dict)
    images: dict[int, Sample] = field(default_factory=dict)
    truncated: set[int] = field(default_factory=set)
    size: int = 0

    def keep(self, into: dict[int, Sample], key: int, sample: Sample, most: float) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in sample.values())
        if key not in into and self.size + size <= most:
            into[key] = sample
            self.size += size


class ConversationBatches:
    """Builds the batch of any set of records, for a model that generates text.

    Batches hold `input_ids`, `attention_mask` and `labels` (B, L), padded on the right, labels -100 but on the
    answers (of documents: on every token), and what the model wants of the images. Tokens and preprocessed images are
    kept in `data.cache` as far as `cache_mb` allows, each image once however many questions are about it.

    Args:
        must_learn: refuse records of which nothing is to be learned; without, they are there with every label -100.
        workers: threads that prepare records.

    Raises:
        DataError: records that are no conversations, or images for a model that reads text alone.
        UnknownNameError: no such chat template.
        CordaError: "auto", and the model brings none.
    """

    towers = ("language",)

    def __init__(
        self,
        data: Records,
        processor: Processor,
        *,
        chat: ChatOptions | None = None,
        must_learn: bool = False,
        cache_mb: float = 512.0,
        workers: int = 0,
    ) -> None:
        if not isinstance(processor, LanguageProcessor):
            raise DataError(
                f"{data.spec}: holds conversations, and this model compares images with texts; it does not answer"
            )
        if not isinstance(data, InstructionData):
            raise DataError(
                f"{data.spec}: this model generates text; say which format: the records have ({', '.join(FORMATS)})"
                + (f". By its columns: {line}" if (line := data.written_as) else "")
            )
        if data.has_images and not processor.takes_images:
            raise DataError(
                f"{data.spec}: has images, and this model reads text alone; leave them out with image: null"
            )
        self.data, self.processor, self.workers = data, processor, workers
        # of a stage's options those of conversations alone, by which the cache of samples is shared
        self.options = narrowed(chat or ChatOptions(), ChatOptions)
        self.chat = Chat(processor, self.options.chat_template)
        if data.texts is None:  # documents need no template
            self.chat.check()
        self.must_learn = must_learn
        self._most = cache_mb * 2**20
        self._pool = ThreadPoolExecutor(workers) if workers > 0 else None
        key = ("samples", processor, self.options, must_learn)
        self._kept: _Kept = data.cache.setdefault(key, _Kept())

    @property
    def truncated(self) -> int:
        """How many records were cut, of those made so far."""
        return len(self._kept.truncated)

    @property
    def limit(self) -> int | None:
        """The most tokens of a sequence; None where there is no limit."""
        given = [n for n in (self.options.max_tokens, self.processor.context) if n is not None]
        return min(given, default=None)

    def warnings(self) -> list[str]:
        """How many records were cut, if any."""
        cut = self.truncated
        return [f"{cut:,} records were cut to {self.limit:,} tokens"] if cut else []

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """The batch of the records at `indices`; those of no use leave it smaller, or empty ({})."""
        mapped = map if self._pool is None else self._pool.map
        samples = [s for s in mapped(self.sample, [int(i) for i in indices]) if s is not None]
        return dict(self.processor.collate(samples)) if samples else {}

    def sample(self, index: int) -> Sample | None:
        """Record `index` with its answers labeled, or None if it is of no use.

        Raises:
            DataError: too long, where that is an error; or more records of no use than the data's spec allows.
        """
        tokens, key = self._kept.tokens.get(index), self.data.picture_key(index)
        if tokens is not None and (not self.data.has_images or key in self._kept.images):
            return tokens | self._kept.images.get(key, {})
        made = self._made(index, self._answers)
        if made is None:
            return None
        # The space after a label at position 0 is nowhere: what is learned is predicted from a token before it.
        if self.must_learn and not bool((made["labels"][1:] != IGNORED).any()):
            return self.data.reject(index, "holds no token to learn: all its labels are masked")
        tokens = {name: value for name, value in made.items() if name in ALONG_TOKENS}
        self._kept.keep(self._kept.tokens, index, tokens, self._most)
        if len(tokens) < len(made) or self.data.has_images:
            images = {name: value for name, value in made.items() if name not in ALONG_TOKENS}
            self._kept.keep(self._kept.images, key, images, self._most)
        return made

    def prompt(self, index: int, room: int = 0) -> Sample | None:
        """Record `index` up to where the last answer begins; `room` tokens must be left for the answer."""
        return self._made(index, lambda chat, messages: (chat.prompt(messages), None), room)

    def answered(self, index: int, answer: str) -> Sample | None:
        """Record `index` with `answer` in place of its last one, which alone is labeled (without the turn's end)."""

        def rendered(chat: Chat, messages: list[Message]) -> tuple[Rendered, list[tuple[int, int]]]:
            last = len(messages) - (messages[-1]["role"] == "assistant")
            whole = chat.full(
                [*messages[:last], {"role": "assistant", "content": answer.strip()}], "last"
            )
            turn = whole.turns[-1]
            return whole, [(turn.start, turn.content_end)]

        return self._made(index, rendered)

    def _answers(
        self, chat: Chat, messages: list[Message]
    ) -> tuple[Rendered, list[tuple[int, int]]]:
        if not any(map(is_learnt, messages)):
            return chat.prompt(messages), []
        whole = chat.full(messages, self.options.learn)
        return whole, [(turn.start, turn.end) for turn in whole.turns]

    def _made(self, index: int, render: Any, room: int = 0) -> Sample | None:
        record = self.data.get(index)
        if record is None:
            return None
        try:
            if record["messages"] is None:
                text = record["text"]
                rendered, spans = Rendered(text, (), True), [(0, len(text))]
            else:
                chat = self.chat.with_tools(record.get(MAY_CALL))
                rendered, spans = render(chat, record["messages"])
            sample = self.processor.encode(
                rendered.text,
                record["images"],
                responses=spans,
                special_tokens=rendered.special_tokens,
            )
        except DataError as error:
            return self.data.reject(index, str(error))
        return self._fitting(index, sample, room)

    def _fitting(self, index: int, sample: Sample, room: int) -> Sample | None:
        """The sample if it is short enough, cut if that is wanted, else None."""
        length, limit = len(sample["input_ids"]), self.limit
        if limit is None or length + room <= limit:
            return sample
        why = (
            f"{length} tokens"
            + (f" and room for {room} more" if room else "")
            + f" are more than the {limit} that fit"
        )
        if self.options.too_long == "error":
            raise DataError(
                f"{self.data.place(index)}: {why}; shorten it, raise max_tokens (up to the model's context of "
                f"{self.processor.context}), or skip or truncate what is too long"
            )
        if self.options.too_long == "skip" or room:
            return self.data.reject(index, why)
        cut = sample["input_ids"][limit:]
        if self.processor.takes_images and bool((cut == self.processor.image_token_id).any()):
            return self.data.reject(index, f"{why}, and cutting it would cut an image")
        if not self._kept.truncated:
            logger.warning("%s: %s; it and others like it are cut", self.data.place(index), why)
        self._kept.truncated.add(index)
        return {
            name: value[:limit] if name in ALONG_TOKENS else value for name, value in sample.items()
        }


def no_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as a model takes it that is not to compute a loss of its own."""
    return {name: value for name, value in batch.items() if name != "labels"}
