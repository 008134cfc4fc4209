"""What the kinds of tasks can measure and what options they take, which is read before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from corda_vlm.data.text.chat_options import MaxTokens, PromptOptions, TemplateOptions
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
class AnswerOptions(PromptOptions):
    """Options of questions that are answered freely.

    Attributes:
        max_new_tokens: The most tokens of an answer.
        stop: Strings before which an answer ends.
        chance: What a blind guess gives, for what is kept; it cannot be told from the data.
    """

    max_new_tokens: Count = 16
    stop: Sequence[Text] = ("\n",)
    chance: Share = 0.0


@dataclass(frozen=True, kw_only=True)
class VqaOptions(AnswerOptions):
    """Options of questions about pictures, answered freely."""

    def __post_init__(self) -> None:
        check_options(self, VqaOptions)


@dataclass(frozen=True, kw_only=True)
class QaOptions(AnswerOptions):
    """Options of open questions, answered freely; as in the harness, an answer ends at a line's end, a period or a comma.

    Attributes:
        articles: Articles count, as in the harness's TriviaQA; without, they do not, as in its NQ-open.
    """

    max_new_tokens: Count = 32
    stop: Sequence[Text] = ("\n", ".", ",")
    articles: bool = False

    def __post_init__(self) -> None:
        check_options(self, QaOptions)


@dataclass(frozen=True, kw_only=True)
class LikelihoodOptions(PromptOptions):
    """Options of answers by their likelihood.

    Attributes:
        most_answers: Only the first so many of a question's right answers; None takes all.
    """

    most_answers: Count | None = None

    def __post_init__(self) -> None:
        check_options(self, LikelihoodOptions)


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions(PromptOptions):
    """Options of choices by their likelihood."""

    def __post_init__(self) -> None:
        check_options(self, ChoiceOptions)


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(TemplateOptions):
    """Options of perplexity; the template is for conversations.

    Attributes:
        window: Tokens of a window; None takes the model's context.
        stride: Tokens between the starts of two windows, below the window; None takes half of it.
    """

    window: MaxTokens | None = None
    stride: Count | None = None

    def __post_init__(self) -> None:
        check_options(self, PerplexityOptions)
