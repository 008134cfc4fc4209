"""How conversations become tokens: the options, which are read before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from corda_vlm.options import Range, check_options

Learn = Literal["all", "last"]
TooLong = Literal["skip", "truncate", "error"]
MaxTokens = Annotated[int, Range(at_least=2)]


@dataclass(frozen=True)
class ChatOptions:
    """How conversations become tokens.

    Attributes:
        template: "auto" for the model's own chat template, or one of `corda_vlm.data.text.chat.TEMPLATES`, or a file.
        learn: which answers are labelled, "all" or the "last" of each conversation.
        max_tokens: the most tokens of a sequence; None takes the model's context.
        too_long: what to do with a longer one: "skip" and count it, "truncate" its end (never within an image;
            counted), or "error".
    """

    template: str = "auto"
    learn: Learn = "all"
    max_tokens: MaxTokens | None = None
    too_long: TooLong = "skip"

    def __post_init__(self) -> None:
        check_options(self)
