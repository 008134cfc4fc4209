"""Questions with their answers, aliases and choices."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

import numpy as np

from corda_vlm.data.rows import Columns, Fault, each, made_of, not_text, unpacked
from corda_vlm.data.spec import DataSpec
from corda_vlm.data.table import Table
from corda_vlm.errors import DataError, UnknownNameError

_QUESTION = ("question", "query", "prompt", "instruction", "problem")
_TARGET = (
    "multiple_choice_answer", "answer", "answerKey", "response", "output", "solution", "class_name", "label",
)  # fmt: skip
_REFERENCES = ("answers", "answer_list", "references")
_CHOICES = ("choices", "options")


def qa(table: Table, spec: DataSpec, count: Callable[[int], int]) -> Columns:
    names = list(table.columns)
    question = _asked(spec.question, _QUESTION, names, spec, "question")
    if question is None:
        raise DataError(
            f"{spec}: has no question column; its columns are {', '.join(table.names)}: "
            "name it with question: (a column, or a sentence such as 'What is this?' or 'Of {subject}: {problem}')"
        )
    target = references = choices = None
    if spec.answer is not None:
        asked = "auto" if spec.answer == "auto" else spec.answer
        target = _asked(asked, _TARGET, names, spec, "answer")
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
        given = None if target is None else _filled(target, values)
        if classes is not None and isinstance(given, int):
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
            answers = _answers(given)
            known = [] if references is None else _answers(values[references])
            if known:  # what is to be learnt comes first; it is one of the references, not one more
                first = answers[:1]
                if first and first[0] in known:
                    known.remove(first[0])
                answers = first + known
            more = [] if aliases is None else _answers(values[aliases])
            answers += [alias for alias in dict.fromkeys(more) if alias not in answers]
        if (target or references) and (not answers or not answers[0].strip()):
            raise Fault("has an empty answer")
        asked = _filled(question, values)
        if _is_nan(asked) or asked is None:
            asked = ""
        if not isinstance(asked, str):
            raise not_text("question", asked)
        asked = asked.strip()
        if not asked:
            raise Fault("has an empty question")
        made["question"] = asked
        pictures = count(row)
        content: Any = asked
        if pictures:
            places = [{"type": "image"} for _ in range(pictures)]
            content = [*places, {"type": "text", "text": asked}]
        made["messages"] = [{"role": "user", "content": content}]
        if answers:
            made["answers"] = answers
            made["messages"].append({"role": "assistant", "content": answers[0]})
        return made

    names = ["messages", "question", "answers"] + (["choices", "choice"] if choices else [])
    return each(table, make, names)


def _asked(
    asked: str, usual: Sequence[str], names: Sequence[str], spec: DataSpec, what: str
) -> str | None:
    """A column, or a sentence, which may be a format string over the columns."""
    if asked == "auto":
        return next((name for name in usual if name in names), None)
    if "{" not in asked and " " not in asked.strip() and asked not in names:
        raise UnknownNameError(f"{what} column of {spec}", asked, names)
    return asked


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
    found = {column: values[column] for column in columns if not _is_nothing(values[column])}
    return {"text": list(found.values()), "label": list(found)}


def _is_nothing(value: Any) -> bool:
    """Tables that went through pandas say "nan" where a cell is empty."""
    return value is None or _is_nan(value) or (isinstance(value, str) and value in ("", "nan"))


def _is_nan(value: Any) -> bool:
    return isinstance(value, (float, np.floating)) and bool(np.isnan(value))


def _letters(choices: Sequence[str]) -> list[str]:
    if len(choices) > 26:
        raise Fault(f"has {len(choices)} choices, more than there are letters")
    return list(ascii_uppercase[: len(choices)])


def _filled(asked: str, values: Mapping[str, Any]) -> Any:
    if "{" not in asked:
        return values.get(asked, asked)
    try:
        return asked.format(**{k: "" if _is_nothing(v) else v for k, v in values.items()})
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise DataError(
            f"{asked!r}: cannot be filled in ({error}); the columns are {', '.join(sorted(values))}"
        ) from error


def _answers(stored: Any) -> list[str]:
    """Answers from a string, a number, a list of those or of VQA's {"answer": ...}, or TriviaQA's {"value", "aliases"}."""
    # The word "nan" stays, unlike in columns of choices, of which some are empty on purpose: every question is to have an
    # answer, and "nan" may be one (the bread).
    if stored is None or _is_nan(stored):
        return []
    if isinstance(stored, Mapping):
        if not {"answer", "value", "aliases"} & set(stored):
            raise not_text("answer", stored)
        if "answer" in stored:
            return _answers(stored["answer"])
        return list(
            dict.fromkeys([*_answers(stored.get("value")), *_answers(stored.get("aliases"))])
        )
    if isinstance(stored, (list, tuple)):
        return [answer for item in stored for answer in _answers(item)]
    if isinstance(stored, bool):
        return ["yes" if stored else "no"]
    return [str(stored)]


def _choice(stored: Any, given: Any) -> tuple[list[str], int]:
    """The choices and the index of the right one, given as a number, a letter, a label or its text."""
    labels: list[str] = []
    if isinstance(stored, Mapping):  # ARC's {"text": [...], "label": [...]}
        labels, stored = [str(label) for label in stored.get("label", ())], stored.get("text")
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
        if right < 0 and re.fullmatch(r"\d+", text):
            right = int(text)
    if not 0 <= right < len(choices):
        raise Fault(f"has the answer {given!r}, which is none of its {len(choices)} choices")
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
