"""Chat templates: from messages to the text a model reads, and which of its characters are the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from corda_vlm.data.paths import read_text
from corda_vlm.data.text.rendering import render
from corda_vlm.data.text.rows import Message
from corda_vlm.errors import CordaError, DataError, UnknownNameError
from corda_vlm.families.generative.language import LanguageProcessor
from corda_vlm.files import resolve

TEMPLATES: Mapping[str, str] = {
    "plain": (
        "{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}Answer: {{ m['content'] }}\n"
        "{% elif m['role'] == 'user' %}Question: {{ m['content'] }}\n"
        "{% else %}{{ m['content'] }}\n\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
    ),
    # The break is a string, as Jinja swallows one that follows a tag.
    "bare": (
        "{% for m in messages %}{{ m['content'] }}{{ '\n' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    ),
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "vicuna": (
        "{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }}{{ eos_token }}"
        "{% elif m['role'] == 'user' %}USER: {{ m['content'] }} "
        "{% else %}{{ m['content'] }} {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
}
"""Templates by name, for models that bring none. "plain": Question and Answer on lines of their own, as a base model
is asked; "bare": the question as it is, a space, the answer; "vicuna": LLaVA-1.5's."""


# Stands for an answer to see what a template writes around one; digits, as templates change letters.
_PROBE = "0123456789"


@dataclass(frozen=True)
class Turn:
    """Where an answer lies in a text, in characters.

    Attributes:
        start: after what the template writes before an answer; the space that follows it belongs to the answer.
        content_end: the end of the answer itself.
        end: the end of the turn, with the token that ends it.
    """

    start: int
    content_end: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text.

    Attributes:
        turns: of the assistant, in order.
        special_tokens: must the tokenizer still add its own, as the text does not begin with one?
    """

    text: str
    turns: tuple[Turn, ...]
    special_tokens: bool


@dataclass(frozen=True)
class Chat:
    """The template of one model.

    Attributes:
        template: "auto" for the model's own, a name of `TEMPLATES`, a file that ends in .jinja, or Jinja itself.
        tools: descriptions of the tools that the conversation may call, as templates take them.
    """

    processor: LanguageProcessor
    template: str = "auto"
    tools: Sequence[Mapping[str, Any]] = ()

    def with_tools(self, tools: Sequence[Mapping[str, Any]] | None) -> Chat:
        """The same for a conversation that may call these."""
        return replace(self, tools=tuple(tools)) if tools else self

    def check(self) -> None:
        """Raise as `_source` does, and as `render` does for a template that is of no use, before a record is looked at."""
        _ = self._source
        with suppress(DataError):  # it may want other messages than these
            self._render([{"role": "user", "content": "x"}], False)

    @cached_property
    def _source(self) -> str:
        """The template in Jinja.

        Raises:
            CordaError: the model has no tokenizer, or no template of its own, or the file cannot be read.
            UnknownNameError: no such template.
        """
        self.processor.need_tokenizer()  # without one it has no template either
        if self.template == "auto":
            return self._of_the_model()
        if self.template in TEMPLATES:
            return TEMPLATES[self.template]
        if "{%" in self.template or "{{" in self.template:
            return self.template
        if self.template.endswith(".jinja"):
            return read_text(resolve(self.template))
        raise UnknownNameError(
            "chat template",
            self.template,
            ["auto", *TEMPLATES],
            "Or give the path of a .jinja file.",
        )

    def _of_the_model(self) -> str:
        template = getattr(self.processor.templater, "chat_template", None)
        if isinstance(template, Mapping):  # several by name, e.g. one for tools
            usual = template.get("default")
            template = template.get("tool_use", usual) if self.tools else usual
        if not isinstance(template, str) or not template:
            raise CordaError(
                "unknown chat template: this model's tokenizer brings none; name one as the chat template: "
                f"{', '.join(TEMPLATES)}, or a .jinja file"
            )
        return template

    @cached_property
    def _opens_answers(self) -> bool:
        """Does the template write something before an answer when it is asked to?"""
        probe: list[Message] = [{"role": "user", "content": "x"}]
        return self._render(probe, True) != self._render(probe, False)

    @cached_property
    def _endings(self) -> tuple[str, ...]:
        """Tokens that may end a turn."""
        tokenizer = self.processor.tokenizer
        return tuple({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens})

    def prompt(self, messages: Sequence[Message]) -> Rendered:
        """The conversation up to where the last answer begins, for the model to go on."""
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        until = answers[-1] if answers and answers[-1] == len(messages) - 1 else len(messages)
        self._check_tools(messages)
        text = self._opening(messages[:until])
        return Rendered(text, (), self._wants_special_tokens(text))

    def full(self, messages: Sequence[Message], learn: str = "all") -> Rendered:
        """The whole conversation, with its answers that are to be learned.

        Args:
            learn: the answers to find, "all" or the "last". Templates that write earlier answers in other words, e.g.
                without their reasoning, can only tell the last.

        The text ends with a token that ends a turn: the template's own, else the end of text, so that a model that
        learns from it learns to stop.

        Raises:
            DataError: the template does not take these messages, or writes an answer so that it cannot be told
                where it is (e.g. it rewrites earlier turns).
        """
        self._check_tools(messages)
        text = self._render(messages, False)
        answers = [i for i, message in enumerate(messages) if is_learnt(message)]
        turns = []
        for index in answers if learn == "all" else answers[-1:]:
            turn = self._turn(text, messages[: index + 1])
            if turn is None:
                earlier = index != answers[-1]
                last = self._turn(text, messages[: answers[-1] + 1]) if earlier else None
                raise DataError(_rewritten(index, last is not None))
            if index == len(messages) - 1 and not text[: turn.end].endswith(self._endings):
                text = text[: turn.end] + (self.processor.tokenizer.eos_token or "")
                turn = replace(turn, end=len(text))
            turns.append(turn)
        return Rendered(text, tuple(turns), self._wants_special_tokens(text))

    def _check_tools(self, messages: Sequence[Message]) -> None:
        """Raise `DataError` where the template would pass over tools or their calls."""
        calls = any("tool_calls" in message for message in messages)
        for used, word in ((bool(self.tools), "tools"), (calls, "tool_calls")):
            if used and word not in self._source:
                raise DataError(
                    f"has {word.replace('_', ' ')}, which the chat template does not write; take a model whose template does, "
                    "or give one as a .jinja file"
                )

    def _turn(self, text: str, messages: Sequence[Message]) -> Turn | None:
        """Where the last of these messages, an answer, lies in the text of the whole conversation; None if it is not
        told.

        What stands around an answer is seen from one that is a probe. There may be more before the answer that ends a
        conversation (Qwen3 writes empty thoughts there and nowhere else), which the text may lack or the answer itself
        may bring.
        """
        content = str(messages[-1]["content"]).strip()
        opening = self._opening(messages[:-1])
        probed = self._render([*messages[:-1], {"role": "assistant", "content": _PROBE}], False)
        before, probe, after = probed.rpartition(_PROBE)
        if not probe or not before.startswith(opening) or not text.startswith(opening):
            return None
        starts = [len(one) for one in (before, opening) if text.startswith(one)]
        starts = [start + len(text[start:]) - len(text[start:].lstrip()) for start in starts]
        at = next((start for start in starts if text.startswith(content, start)), None)
        if at is None:
            return None
        end = content_end = at + len(content)
        if closing := after.strip():
            end = text.find(closing, content_end)
            if end < 0 or text[content_end:end].strip():
                return None
            end += len(closing)
        return Turn(len(opening) if self._opens_answers else at, content_end, end)

    def _opening(self, messages: Sequence[Message]) -> str:
        # A space at the end would be a token of its own, and the answer's first word another than in training.
        return self._render(messages, True).rstrip(" ")

    def _wants_special_tokens(self, text: str) -> bool:
        first = self.processor.tokenizer.bos_token
        return not (first and text.startswith(first))

    def _render(self, messages: Sequence[Message], opens: bool) -> str:
        processor = self.processor
        own_parts = self.template == "auto" and processor.templater is processor.hf_processor
        place = processor.image_token
        written = [_in_parts(m) if own_parts else _in_text(m, place) for m in messages]
        return render(
            self._source,
            written,
            add_generation_prompt=opens,
            tools=list(self.tools) or None,
            **processor.tokenizer.special_tokens_map,
        )


def is_learnt(message: Message) -> bool:
    """Is this an answer, and one to be learned?"""
    return message["role"] == "assistant" and message.get("learn", True)


def _in_parts(message: Message) -> Message:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {**_told(message), "content": parts}


def _told(message: Message) -> Message:
    """What a template is told of a message; whether it is learned is not for it."""
    return {key: value for key, value in message.items() if key != "learn"}


def _in_text(message: Message, place: str | None) -> Message:
    content = message["content"]
    if not isinstance(content, str):
        if place is None:
            raise DataError("has an image, and this model reads text alone")
        parts = [f"{place}\n" if part["type"] == "image" else part["text"] for part in content]
        content = "".join(parts)
    return {**_told(message), "content": content}


def _rewritten(index: int, last_is_told: bool) -> str:
    return (
        f"the chat template writes message {index} in other words, so that its answer cannot be told from the rest; "
        "choose another template"
        + (", or learn: last, for the last answer alone" if last_is_told else "")
    )
