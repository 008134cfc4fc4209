"""How conversations become tokens: the options, which are read before PyTorch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from corda_vlm.options import Range, Text, check_options

Learn = Literal["all", "last"]
TooLong = Literal["skip", "truncate", "error"]
MaxTokens = Annotated[int, Range(at_least=2)]


@dataclass(frozen=True, kw_only=True)
class TemplateOptions:
    """In which format a model reads conversations.

    Attributes:
        chat_template: "auto" for the model's own chat template, or plain, bare, chatml, vicuna, or a .jinja file.
    """

    FORMER: ClassVar[Mapping[str, str]] = {"template": "chat_template"}

    chat_template: Text = "auto"


@dataclass(frozen=True, kw_only=True)
class PromptOptions(TemplateOptions):
    """In which format a model reads conversations, and how much of them.

    Attributes:
        max_tokens: The most tokens of a sequence; the default is the model's context.
    """

    max_tokens: MaxTokens | None = None


@dataclass(frozen=True, kw_only=True)
class ChatOptions(PromptOptions):
    """How conversations become tokens.

    Attributes:
        learn: Which answers of a conversation are learned: "all", or the "last".
        too_long: What to do with a longer one: "skip" and count it, "truncate" its end (never within an image; counted),
            or "error".
    """

    FORMER: ClassVar[Mapping[str, str]] = {**PromptOptions.FORMER, "chat": "chat_template"}

    learn: Learn = "all"
    too_long: TooLong = "skip"

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def identity(self) -> str:
        """What these options are among the things that identify batches, written as files of covariances have it."""
        return (
            f"ChatOptions(template={self.chat_template!r}, learn={self.learn!r}, max_tokens={self.max_tokens!r}, "
            f"too_long={self.too_long!r})"
        )
