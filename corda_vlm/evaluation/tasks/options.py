"""What the kinds of tasks can measure and what options they take, which is read before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from corda_vlm.data.text.chat_options import MaxTokens
from corda_vlm.options import Count, Share, Text, check_options

ZERO_SHOT_METRICS = ("top1", "top5", "mean_per_class")
DIRECTIONS = ("image_to_text", "text_to_image")
RETRIEVAL_METRICS = tuple(f"{direction}_recall@{k}" for direction in DIRECTIONS for k in (1, 5, 10))
ANSWER_TYPES = ("yes_no", "number", "other")
VQA_METRICS = ("vqa_accuracy", "exact_match", *(f"accuracy_{kind}" for kind in ANSWER_TYPES))
QA_METRICS = ("exact_match",)
LIKELIHOOD_METRICS = ("token_probability", "log_likelihood", "log_likelihood_per_token")
CHOICE_METRICS = ("acc", "acc_norm")
PERPLEXITY_METRICS = ("token_probability", "perplexity")


@dataclass(frozen=True, kw_only=True)
class VqaOptions:
    """Options of questions about pictures, answered freely.

    Attributes:
        template, max_tokens: as of `ChatOptions`.
        max_new_tokens, stop: of an answer.
        chance: what a blind guess gives, for what is kept; it cannot be told from the data.
    """

    template: str = "auto"
    max_tokens: MaxTokens | None = None
    max_new_tokens: Count = 16
    stop: Sequence[Text] = ("\n",)
    chance: Share = 0.0

    def __post_init__(self) -> None:
        check_options(self, VqaOptions)


@dataclass(frozen=True, kw_only=True)
class QaOptions:
    """Options of open questions, answered freely.

    Attributes:
        template, max_tokens: as of `ChatOptions`.
        max_new_tokens, stop: of an answer; the harness stops at a line's end, a period and a comma.
        articles: articles count, as in the harness's TriviaQA; without, they do not, as in its NQ-open.
        chance: what a blind guess gives, for what is kept.
    """

    template: str = "auto"
    max_tokens: MaxTokens | None = None
    max_new_tokens: Count = 32
    stop: Sequence[Text] = ("\n", ".", ",")
    articles: bool = False
    chance: Share = 0.0

    def __post_init__(self) -> None:
        check_options(self, QaOptions)


@dataclass(frozen=True, kw_only=True)
class LikelihoodOptions:
    """Options of answers by their likelihood.

    Attributes:
        template, max_tokens: as of `ChatOptions`.
        most_answers: only the first so many of a question's right answers; None takes all.
    """

    template: str = "auto"
    max_tokens: MaxTokens | None = None
    most_answers: Count | None = None

    def __post_init__(self) -> None:
        check_options(self, LikelihoodOptions)


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions:
    """Options of choices by their likelihood.

    Attributes:
        template, max_tokens: as of `ChatOptions`.
    """

    template: str = "auto"
    max_tokens: MaxTokens | None = None

    def __post_init__(self) -> None:
        check_options(self, ChoiceOptions)


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions:
    """Options of perplexity.

    Attributes:
        window: tokens of a window; None takes the model's context.
        stride: tokens between the starts of two windows, below the window; None takes half of it.
        template: as of `ChatOptions`, for conversations.
    """

    window: MaxTokens | None = None
    stride: Count | None = None
    template: str = "auto"

    def __post_init__(self) -> None:
        check_options(self, PerplexityOptions)
