"""Questions with their answers, aliases and choices."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
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


def qa(table: Table, spec: DataSpec, count: Callable[[int], int]) -> Columns:
    names = list(table.columns)
    question = asked_column(spec.question, _QUESTION, names, spec, "question")
    if question is None:
        raise DataError(
            f"{spec}: has no question column; its columns are {', '.join(table.names)}: "
            "name it with question: (a column, or a sentence such as 'What is this?' or 'Of {subject}: {problem}')"
        )
    if spec.question == "auto":
        _must_ask_all(table, spec, question)
    target = references = choices = None
    if spec.answer is not None:
        asked = "auto" if spec.answer == "auto" else spec.answer
        target = asked_column(asked, _TARGET, names, spec, "answer")
        if spec.answer == "auto":
            references = next((name for name in _REFERENCES if name in names), None)
        choices = _choice_columns(spec, names)
    lettered = "{choices}" in question
    if lettered and choices is None:
        why = (
            "needs an answer to tell the right one by; leave answer: null out"
            if spec.answer is None
            else "needs their column; name it with choices:"
        )
        raise DataError(f"{spec}: its question is to write the choices, which {why}")
    aliases = "aliases" if spec.answer == "auto" and "aliases" in names else None

    classes = table.class_names.get(str(target))

    def make(row: int) -> dict[str, Any]:
        values = {name: column[row] for name, column in table.columns.items()}
        made: dict[str, Any] = {}
        given = None if target is None else filled(target, values)
        if classes is not None and isinstance(given, int):
            if not 0 <= given < len(classes):
                raise Fault(f"its {target} is {given}, and there are {len(classes)} classes")
            given = classes[given]
        if choices is not None and (stored := _stored_choices(choices, values)) is not None:
            made["choices"], made["choice"] = _choice(stored, given)
            if lettered:
                letters = _letters(made["choices"])
                lines = zip(letters, made["choices"], strict=True)
                values["choices"] = "\n".join(f"{letter}. {choice}" for letter, choice in lines)
                made["choices"] = letters
            answers = [made["choices"][made["choice"]]]
        elif lettered:
            raise Fault("has no choices")
        else:
            answers = answers_of(given)
            known = [] if references is None else answers_of(values[references])
            if (
                known
            ):  # what is to be learned comes first; it is one of the references, not one more
                first = answers[:1]
                if first and first[0] in known:
                    known.remove(first[0])
                answers = first + known
            more = [] if aliases is None else answers_of(values[aliases])
            answers += [alias for alias in dict.fromkeys(more) if alias not in answers]
        if (target or references) and (not answers or not answers[0].strip()):
            raise Fault("has an empty answer")
        asked = filled(question, values)
        if is_nan(asked) or asked is None:
            asked = ""
        if not isinstance(asked, str):
            raise not_text("question", asked)
        return made | question_and_answers(asked, answers, count(row), spec)

    names = ["messages", "question", "answers"] + (["choices", "choice"] if choices else [])
    return each(table, make, names)


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
        found = next((name for name in _CHOICES if name in names), None)
        return found if spec.answer == "auto" else None
    for name in [spec.choices] if isinstance(spec.choices, str) else spec.choices:
        if name not in names:
            raise UnknownNameError(f"column of choices of {spec}", name, names)
    return spec.choices if isinstance(spec.choices, str) else list(spec.choices)


def _stored_choices(columns: str | list[str], values: Mapping[str, Any]) -> Any:
    if isinstance(columns, str):
        return values[columns]
    # The columns' names are what answers go by, whichever of the columns are empty.
    found = {column: values[column] for column in columns if not is_nothing(values[column])}
    return {"text": list(found.values()), "label": list(found)}


def _letters(choices: Sequence[str]) -> list[str]:
    if len(choices) > 26:
        raise Fault(f"has {len(choices)} choices, more than there are letters")
    return list(ascii_uppercase[: len(choices)])


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
    places: list[int] = []
    for row, stored in enumerate(table.columns[column]):
        found = unpacked(stored)
        good = isinstance(found, (list, tuple)) and all(isinstance(i, Mapping) for i in found)
        if not good or not found:
            faults[len(parents)] = f"its {column} holds no list of questions"
            found = [{}]
        for number, item in enumerate(found):
            parents.append(row)
            items.append(item)
            places.append(number)
    own = dict.fromkeys(name for item in items for name in item)
    rest = {name: values for name, values in table.columns.items() if name != column}
    columns = {name: [values[row] for row in parents] for name, values in rest.items()}
    columns |= {name: [item.get(name) for item in items] for name in own}
    return made_of(table, parents, columns, faults, lambda row: f"question {places[row]}")
