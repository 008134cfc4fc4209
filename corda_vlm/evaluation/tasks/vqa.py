"""VQA accuracy: an answer is as right as people agree with it (Antol et al. 2015, section 5)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from corda_vlm.data import ChatOptions
from corda_vlm.data.text.chat_options import PromptOptions
from corda_vlm.errors import DataError
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.models.generate import answered, question_of, references
from corda_vlm.evaluation.models.text_model import TextGenerator
from corda_vlm.evaluation.scores import Outcome
from corda_vlm.evaluation.tasks.base import Evaluator, known, registered
from corda_vlm.evaluation.tasks.options import VQA_METRICS as METRICS
from corda_vlm.evaluation.tasks.options import VqaOptions
from corda_vlm.evaluation.tasks.qa import judged
from corda_vlm.options import as_keywords

if TYPE_CHECKING:
    from corda_vlm.data import InstructionData

# The tables of the official evaluation, oddities included: only the same tables give the same numbers.
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = (
    ";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!",
)  # fmt: skip
_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")

# In most contractions all apostrophes are missing or none.
_SINGLE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
# The others as they should be spelled, and the spellings that lack something.
_DOUBLE = """
couldn't've couldn'tve couldnt've
hadn't've hadnt've hadn'tve
he'd've hed've he'dve
I'd've Id've I'dve
it'd've itd've it'dve
let's let's
mightn't've mightnt've mightn'tve
'ow's'at ow's'at 'ows'at 'ow'sat
she'd've shed've she'dve
she's she's
shouldn't've shouldnt've shouldn'tve
somebodyd somebody'd
somebody'd've somebodyd've somebody'dve
someone'd someoned
someone'd've someoned've someone'dve
something'd've somethingd've something'dve
there'd've thered've there'dve
they'd've theyd've they'dve
we'd've wed've we'dve
who'd've whod've who'dve
wouldn't've wouldnt've wouldn'tve
y'all'll yall'll y'allll
y'all'd've yall'd've y'alld've y'all'dve
you'd've youd've you'dve
"""
_CONTRACTIONS = {spelled.replace("'", ""): spelled for spelled in _SINGLE.split()} | {
    lacking: spelled
    for spelled, *variants in (line.split() for line in _DOUBLE.strip().splitlines())
    for lacking in variants
}


def normalize_answer(answer: str, articles: bool = False) -> str:
    """An answer as the official VQA evaluation compares it: punctuation, numbers, articles, contractions.

    Punctuation that touches a space is deleted, other punctuation becomes a space; where the answer holds a number
    with a thousands comma all punctuation is deleted. Number words up to ten become digits ("none" is 0), articles
    go unless `articles`, and contractions without their apostrophe get it.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    thousands = _THOUSANDS.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        touches = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if touches or thousands else " ")
    # The official expression also means to spare the period after a digit, but its look-behind is misspelled.
    plain = _PERIOD.sub("", plain)
    words = [_NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(
        _CONTRACTIONS.get(word, word) for word in words if articles or word not in _ARTICLES
    )


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The accuracy of one answer, from 0 to 1.

    With several references, each by one person: the mean, over the subsets that leave one person out, of
    min(1, number who gave this answer / 3). Of fewer than four people, where three others cannot agree, it is the share of
    the others. With one reference: 1 if the two agree, else 0. (Ways to write one answer are for `exact_match`.)

    Both sides are normalized. The official script leaves the people's answers as they are but for punctuation, and where
    all agree even that, as VQA's own are normalized already; those of other data sets are not. An answer of which
    normalization leaves nothing keeps its articles ("A" is right where "a." is), and silence is never right.

    Raises:
        DataError: no reference.
    """
    agree = sum(_agrees(answer, references))
    count = len(references)
    if count == 1:
        return float(agree)
    enough = min(3, count - 1)
    # Leaving out one of those who agree leaves agree - 1, leaving out another leaves all of them.
    left = agree * min(1.0, (agree - 1) / enough) + (count - agree) * min(1.0, agree / enough)
    return left / count


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer, normalized, is one of the references, else 0; of none left see `vqa_accuracy`.

    Raises:
        DataError: no reference.
    """
    return float(any(_agrees(answer, references)))


def _agrees(answer: str, references: Sequence[str]) -> list[bool]:
    """Whether each reference is the same answer."""
    if not references:
        raise DataError("an answer cannot be judged without a reference")
    given = normalize_answer(answer)
    if given:
        return [given == normalize_answer(reference) for reference in references]
    bare = normalize_answer(answer, articles=True)
    return [bool(bare) and bare == normalize_answer(one, articles=True) for one in references]


def answer_type(references: Sequence[str]) -> str:
    """One of `ANSWER_TYPES`, of the most frequent reference: "yes_no", "number" or "other"."""
    own = [normalize_answer(reference) for reference in references]
    usual = max(own, key=own.count)
    if usual in ("yes", "no"):
        return "yes_no"
    return "number" if re.fullmatch(r"\d+(\.\d+)?", usual) else "other"


@dataclass(frozen=True)
class Vqa(VqaOptions, Evaluator):
    """Questions about pictures, answered freely.

    vqa_accuracy: see `vqa_accuracy`. exact_match: the share whose normalized answer is one of the normalized
    references. accuracy_yes_no, accuracy_number, accuracy_other: vqa_accuracy over the questions of that type alone.
    """

    data: InstructionData
    metrics: Sequence[str] = ("vqa_accuracy",)

    def __post_init__(self) -> None:
        known(self.metrics, [*METRICS, *registered(self.metrics, "vqa")], "vqa")
        super().__post_init__()

    def outcomes(self, encoder: Encoder) -> Iterator[Outcome]:
        """Yield for each metric what happened on each question.

        Raises:
            DataError: no question is of use, one has no answer, or none is of the type that a metric is about.
        """
        chat = ChatOptions(**as_keywords(self, PromptOptions))
        right: list[tuple[float, float, str]] = []
        answers: list[tuple[str, list[str]]] = []
        own_metrics = registered(self.metrics, "vqa")
        for index, record, said in answered(
            TextGenerator.of(encoder), self.data, chat=chat, max_new_tokens=self.max_new_tokens, stop=self.stop
        ):  # fmt: skip
            known_answers = references(record, str(self.data.spec))
            accuracy, match = vqa_accuracy(said, known_answers), exact_match(said, known_answers)
            right.append((accuracy, match, answer_type(known_answers)))
            answers.append((said, known_answers))
            by = "exact_match" if self.metrics[0] == "exact_match" else "vqa_accuracy"
            correct, asked = match if by == "exact_match" else accuracy, question_of(record)
            self.note(encoder, index, said, known_answers, correct, by, asked)
        for metric in self.metrics:
            if metric in own_metrics:
                yield judged(metric, own_metrics[metric], answers)
                continue
            kind = metric.removeprefix("accuracy_")
            values = [
                match if metric == "exact_match" else accuracy
                for accuracy, match, own in right
                if kind == metric or own == kind
            ]
            if not values:
                raise DataError(f"{self.data.spec}: has no question of type {kind}, for {metric}")
            yield Outcome(metric, np.asarray(values), chance=self.chance)
