"""Questions with their answers, aliases and choices."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from corda_vlm.data.columns import asked_column, filled, is_empty, is_nan, is_nothing
from corda_vlm.data.sources.table import Table
from corda_vlm.data.spec import DataSpec
from corda_vlm.data.text.messages import asks, bare, checked, matching, says
from corda_vlm.data.text.rows import Columns, Fault, each, made_of, not_text, unpacked
from corda_vlm.errors import DataError, UnknownNameError, brief

logger = logging.getLogger(__name__)

_QUESTION = ("question", "query", "prompt", "instruction", "problem")
_TARGET = (
    "multiple_choice_answer", "answer", "answerKey", "response", "output", "completion", "solution", "class_name", "label",
)  # fmt: skip
_REFERENCES = ("answers", "answer_list", "references")
_CHOICES = ("choices", "options")


@dataclass(frozen=True)
class _Asked:
    """Where the parts of a question are: columns, or sentences over the columns; None for what there is none of.

    Attributes:
        question: what is asked.
        target: the answer to learn.
        references: the column of all right answers.
        aliases: the column of other spellings of the answer.
        choices: the column of all choices, or the columns of one each.
        classes: the names that the numbers of `target` stand for.
    """

    question: str
    target: str | None
    references: str | None
    aliases: str | None
    choices: str | list[str] | None
    classes: Sequence[str] | None

    @property
    def lettered(self) -> bool:
        """Does the question write the choices, so that its answer is a letter?"""
        return "{choices}" in self.question


def qa(table: Table, spec: DataSpec, count: Callable[[int], int]) -> Columns:
    """Questions with their answers, or with the choices of which one is right.

    Raises:
        UnknownNameError: a column that was asked for does not exist.
        DataError: there is no question column, or no choices where the question is to write them.
    """
    asked = _asked(table, spec)

    def make(row: int) -> dict[str, Any]:
        values = {name: column[row] for name, column in table.columns.items()}
        given = _given(asked, values)
        choice = _choice_of(asked, values, given)
        if choice and asked.lettered:
            values["choices"] = _written(choice["choices"])
            choice["choices"] = _letters(choice["choices"])
        if choice:
            answers = [choice["choices"][choice["choice"]]]
        else:
            answers = _answers(asked, values, given)
        if (asked.target or asked.references) and (not answers or not answers[0].strip()):
            raise Fault("has an empty answer")
        return choice | question_and_answers(_question(asked, values), answers, count(row), spec)

    names = ["messages", "question", "answers"] + (["choices", "choice"] if asked.choices else [])
    return each(table, make, names)


def _asked(table: Table, spec: DataSpec) -> _Asked:
    """Where the parts of a table's questions are."""
    names = list(table.columns)
    question = asked_column(spec.question, _QUESTION, names, spec, "question")
    if question is None:
        raise DataError(
            f"{spec}: has no question column; its columns are {', '.join(table.names)}: "
            "name it with question: (a column, or a sentence such as 'What is this?' or 'Of {subject}: {problem}')"
        )
    if spec.question == "auto":
        _must_ask_all(table, spec, question)
    usual = spec.answer == "auto"
    target = None
    if spec.answer is not None:
        target = asked_column(spec.answer, _TARGET, names, spec, "answer")
    asked = _Asked(
        question,
        target,
        references=next((name for name in _REFERENCES if usual and name in names), None),
        aliases="aliases" if usual and "aliases" in names else None,
        choices=None if spec.answer is None else _choice_columns(spec, names),
        classes=table.class_names.get(str(target)),
    )
    if asked.lettered and asked.choices is None:
        why = (
            "needs an answer to tell the right one by; leave answer: null out"
            if spec.answer is None
            else "needs their column; name it with choices:"
        )
        raise DataError(f"{spec}: its question is to write the choices, which {why}")
    return asked


def _given(asked: _Asked, values: Mapping[str, Any]) -> Any:
    """The answer of a row as it is stored, but for the name of its class in place of the class's number."""
    given = None if asked.target is None else filled(asked.target, values)
    if asked.classes is None or not isinstance(given, int):
        return given
    if not 0 <= given < len(asked.classes):
        raise Fault(f"its {asked.target} is {given}, and there are {len(asked.classes)} classes")
    return asked.classes[given]


def _choice_of(asked: _Asked, values: Mapping[str, Any], given: Any) -> dict[str, Any]:
    """The choices of a row and the index of the right one; {} where it has none."""
    stored = None if asked.choices is None else _stored_choices(asked.choices, values)
    if stored is not None:
        choices, right = _choice(stored, given)
        return {"choices": choices, "choice": right}
    if asked.lettered:
        raise Fault("has no choices")
    return {}


def _answers(asked: _Asked, values: Mapping[str, Any], given: Any) -> list[str]:
    """All right answers of a row; the one to learn is the first, and is one of the references, not one more."""
    answers = answers_of(given)
    known = [] if asked.references is None else answers_of(values[asked.references])
    if known:
        first = answers[:1]
        if first and first[0] in known:
            known.remove(first[0])
        answers = first + known
    more = [] if asked.aliases is None else answers_of(values[asked.aliases])
    return answers + [alias for alias in dict.fromkeys(more) if alias not in answers]


def _question(asked: _Asked, values: Mapping[str, Any]) -> str:
    """What a row asks; an empty text where nothing is stored."""
    question = filled(asked.question, values)
    if question is None or is_nan(question):
        return ""
    if not isinstance(question, str):
        raise not_text("question", question)
    return question


def question_and_answers(
    asked: str, answers: Sequence[str], pictures: int, spec: DataSpec
) -> dict[str, Any]:
    """The columns of one question; the first of its answers is the one to learn."""
    question = bare(asked, pictures, spec).strip()
    if not question:
        raise Fault("has an empty question")
    messages = [asks(asked.strip(), pictures, spec)]
    made: dict[str, Any] = {"question": question}
    if answers:
        messages.append(says(answers[0], pictures, spec))
        made["answers"] = [messages[1]["content"], *answers[1:]]
    return {**made, "messages": checked(matching(messages, pictures))}


def _must_ask_all(table: Table, spec: DataSpec, question: str) -> None:
    """Nothing that a question needs may be left out without a word.

    Raises:
        DataError: the columns are those of another format, in which the question is more than one column.
    """
    has = {name for name, values in table.columns.items() if not all(map(is_empty, values))}
    more = sorted(has & {"input", "context", "history"})
    if question == "instruction" and more:
        raise DataError(
            f"{spec}: has the columns of Alpaca's data, of which format: qa would ask the instruction without its "
            f"{' and '.join(more)}; write format: alpaca, or name what to ask, e.g. question: "
            f"'{{instruction}}' or '{{instruction}} {{{more[0]}}}'"
        )
    talks = any(isinstance(value, (list, tuple)) for value in table.columns[question])
    if question == "prompt" and talks:
        raise DataError(
            f"{spec}: its prompt is a list of messages, as TRL has them; write format: prompt_completion"
        )
    for column in sorted(has & {"context", "passage", "hint"}):
        logger.warning(
            "%s: its column %r is not asked; question: '{%s} {%s}' asks it too",
            *(spec, column, column, question),
        )


def _choice_columns(spec: DataSpec, names: Sequence[str]) -> str | list[str] | None:
    """The column of all choices, or those of one each."""
    if spec.choices == "auto":
        usual = next((name for name in _CHOICES if name in names), None)
        return usual if spec.answer == "auto" else None
    for name in [spec.choices] if isinstance(spec.choices, str) else spec.choices:
        if name not in names:
            raise UnknownNameError(f"column of choices of {spec}", name, names)
    return spec.choices if isinstance(spec.choices, str) else list(spec.choices)


def _stored_choices(columns: str | list[str], values: Mapping[str, Any]) -> Any:
    if isinstance(columns, str):
        return values[columns]
    # The columns' names are what answers go by, whichever of the columns are empty.
    filled_in = {column: values[column] for column in columns if not is_nothing(values[column])}
    return {"text": list(filled_in.values()), "label": list(filled_in)}


def _letters(choices: Sequence[str]) -> list[str]:
    if len(choices) > 26:
        raise Fault(f"has {len(choices)} choices, more than there are letters")
    return list(ascii_uppercase[: len(choices)])


def _written(choices: Sequence[str]) -> str:
    """Choices as a question writes them, "A. …" on lines of their own."""
    lines = zip(_letters(choices), choices, strict=True)
    return "\n".join(f"{letter}. {choice}" for letter, choice in lines)


def answers_of(stored: Any) -> list[str]:
    """Answers from a string, a number, a list of those or of VQA's {"answer": ...}, or TriviaQA's {"value", "aliases"}."""
    # The word "nan" stays, unlike in columns of choices, of which some are empty on purpose: every question is to have an
    # answer, and "nan" may be one (the bread).
    if stored is None or is_nan(stored):
        return []
    if isinstance(stored, Mapping):
        if not {"answer", "value", "aliases"} & set(stored):
            raise not_text("answer", stored)
        if "answer" in stored:
            return answers_of(stored["answer"])
        return list(
            dict.fromkeys([*answers_of(stored.get("value")), *answers_of(stored.get("aliases"))])
        )
    if isinstance(stored, (list, tuple)):
        return [answer for item in stored for answer in answers_of(item)]
    if isinstance(stored, bool):
        return ["yes" if stored else "no"]
    return [str(stored)]


def _choice(stored: Any, given: Any) -> tuple[list[str], int]:
    """The choices and the index of the right one, given as a number, a letter, a label or its text."""
    labels: list[str] = []
    if isinstance(stored, Mapping):  # ARC's {"text": [...], "label": [...]}
        named, stored = stored.get("label"), stored.get("text")
        labels = [str(label) for label in named] if isinstance(named, (list, tuple)) else []
    if not isinstance(stored, (list, tuple)) or len(stored) < 2:
        raise Fault("has fewer than two choices")
    choices = [str(choice) for choice in stored]
    if any(not choice.strip() for choice in choices):
        raise Fault("has an empty choice")
    if isinstance(given, int) and not isinstance(given, bool):
        right = given
    else:
        text = str(given).strip()
        known = (labels, choices, list(ascii_uppercase[: len(choices)]))
        right = next((names.index(text) for names in known if text in names), -1)
        if right < 0 and re.fullmatch(r"[0-9]{1,9}", text):
            right = int(text)
    if not 0 <= right < len(choices):
        raise Fault(f"has the answer {brief(given)}, which is none of its {len(choices)} choices")
    return choices, right


def expanded(table: Table, spec: DataSpec) -> Table:
    """One row for each of the questions that a row holds."""
    column = spec.expand
    if column == "auto":
        column = "qa_json" if "qa_json" in table.columns else None
    if column is None:
        return table
    if column not in table.columns:
        raise UnknownNameError(f"column of {spec} to expand", column, table.columns)
    parents: list[int] = []
    items: list[Mapping[str, Any]] = []
    faults: dict[int, str] = {}
    numbers: list[int] = []
    for row, stored in enumerate(table.columns[column]):
        questions = _question_list(stored)
        if not questions:
            faults[len(parents)] = f"its {column} holds no list of questions"
        for number, item in enumerate(questions or [{}]):
            parents.append(row)
            items.append(item)
            numbers.append(number)
    own = dict.fromkeys(name for item in items for name in item)
    rest = {name: values for name, values in table.columns.items() if name != column}
    columns = {name: [values[row] for row in parents] for name, values in rest.items()}
    columns |= {name: [item.get(name) for item in items] for name in own}
    return made_of(table, parents, columns, faults, lambda row: f"question {numbers[row]}")


def _question_list(stored: Any) -> Sequence[Mapping[str, Any]]:
    """The questions of one row, perhaps written as JSON; none where it is no list of mappings."""
    listed = unpacked(stored)
    good = isinstance(listed, (list, tuple)) and all(isinstance(i, Mapping) for i in listed)
    return listed if good else ()
