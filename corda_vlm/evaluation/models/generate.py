"""Batched greedy generation: padded on the left, in an order that does not change, ended by strings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from corda_vlm.data import ChatOptions, ConversationBatches, no_labels
from corda_vlm.errors import DataError
from corda_vlm.evaluation.models.finite import FiniteCheck
from corda_vlm.evaluation.models.text_model import TextGenerator, check_any_measured
from corda_vlm.families.base import unwrap
from corda_vlm.families.generative.language import Sample


@torch.no_grad()
def generate(
    generator: TextGenerator,
    prompts: Sequence[Sample],
    *,
    max_new_tokens: int = 32,
    stop: Sequence[str] = (),
) -> list[str]:
    """What the model says after each prompt, greedily, in the order of the prompts.

    Args:
        max_new_tokens: the most tokens of an answer.
        stop: strings before which an answer ends.

    Returns:
        answers without special tokens, and without white space around.

    Raises:
        NotFiniteError: the model's output is NaN or Inf.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    model, tokenizer = unwrap(generator.model), generator.processor.tokenizer
    own = getattr(model, "generation_config", None)
    ends = [getattr(own, "eos_token_id", None), tokenizer.eos_token_id]
    ids = {
        one for end in ends if end is not None for one in ([end] if isinstance(end, int) else end)
    }
    # Named one by one: what is left out is filled in from the model's own, which may sample or penalize.
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, min_new_tokens=0, temperature=1.0,
        top_k=50, top_p=1.0, repetition_penalty=1.0, no_repeat_ngram_size=0, use_cache=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(ids) or None,
    )  # fmt: skip
    check = FiniteCheck("prompts")

    def answer_share() -> dict[int, str]:
        by_index: dict[int, str] = {}
        for chosen, batch in generator.batches(prompts, "left"):
            given = batch["input_ids"].shape[1]
            said = StoppingCriteriaList([Said(tokenizer, given, tuple(stop))] if stop else [])
            sound = FiniteLogits()
            with generator.running():
                ids_out = model.generate(
                    **no_labels(batch), generation_config=settings, stopping_criteria=said,
                    logits_processor=LogitsProcessorList([sound]),
                )  # fmt: skip
            if sound.sums is not None:
                check(sound.sums)
            for index, tokens in zip(chosen, ids_out[:, given:].cpu().tolist(), strict=True):
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                by_index[index] = before_any(text, stop).strip()
        return by_index

    answers = generator.together("answers", answer_share)
    return [answers[index] for index in range(len(prompts))]


def answered(
    generator: TextGenerator,
    data: Any,
    *,
    chat: ChatOptions,
    max_new_tokens: int,
    stop: Sequence[str],
) -> Iterator[tuple[int, Mapping[str, Any], str]]:
    """Yield each record of use, after its number, with what the model answers, in the order of the records.

    Raises:
        DataError: no record is of use, or one has no answer to compare with.
    """
    builder = ConversationBatches(
        data, generator.processor, chat=chat, cache_mb=0, workers=generator.workers
    )
    count = 0
    for window in generator.windows(len(data)):
        prompts = {i: s for i in window if (s := builder.prompt(i, max_new_tokens)) is not None}
        said = generate(generator, list(prompts.values()), max_new_tokens=max_new_tokens, stop=stop)
        for index, text in zip(prompts, said, strict=True):
            count += 1
            yield index, data[index], text
    check_any_measured(range(count), data.spec)


def references(record: Mapping[str, Any], place: str) -> list[str]:
    """The answers that a record's own is compared with.

    Raises:
        DataError: it has none.
    """
    if answers := record.get("answers"):
        return list(answers)
    messages = record.get("messages") or []
    if messages and messages[-1]["role"] == "assistant":
        return [str(messages[-1]["content"])]
    raise DataError(f"{place}: has no answer to compare with")


def question_of(record: Mapping[str, Any]) -> str:
    """What a record asks: its question, or the last that a user says in its conversation; places of pictures left out."""
    messages = record.get("messages") or []
    asked = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    if not isinstance(asked, str):
        asked = " ".join(part["text"] for part in asked if part.get("type") == "text")
    return asked.replace("<image>", " ").strip()


class Said:
    """Ends a row once it has said a stop string."""

    def __init__(self, tokenizer: Any, given: int, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.given, self.stop = tokenizer, given, stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.given :], skip_special_tokens=True)
        over = [any(string in text for string in self.stop) for text in texts]
        return torch.tensor(over, dtype=torch.bool, device=input_ids.device)


class FiniteLogits:
    """Changes no logits, and keeps for each row a number that is finite if all its logits were."""

    sums: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Some models rule a word out by a logit of −Inf; NaN, +Inf, and all words ruled out show in this.
        now = scores.float().logsumexp(-1)  # (b,)
        self.sums = now if self.sums is None else torch.where(self.sums.isfinite(), now, self.sums)
        return scores


def before_any(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    ends = [at for string in stop if (at := text.find(string)) >= 0]
    return text[: min(ends)] if ends else text
