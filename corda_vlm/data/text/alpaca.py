"""Data for fine-tuning as Alpaca and TRL write them: an instruction with its input, a prompt with its completion, and a
prompt with the answer that people chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from corda_vlm.data.columns import asked_column, filled, is_empty
from corda_vlm.data.sources.table import Table
from corda_vlm.data.spec import DataSpec
from corda_vlm.data.text.messages import checked, matching, messages_of, needed, speaker
from corda_vlm.data.text.questions import answers_of, question_and_answers
from corda_vlm.data.text.rows import Columns, Fault, Message, each, not_text, unpacked
from corda_vlm.errors import DataError

_INPUT = ("input", "context")


def alpaca(table: Table, spec: DataSpec, count: Callable[[int], int]) -> Columns:
    """`instruction`, `input` and `output`, and perhaps `history`, a list of [question, answer] from before.

    What is asked is the instruction, and on the next line the input where there is one.

    Raises:
        DataError: there are an `input` and a `context`, of which one would not be asked.
    """
    names = list(table.columns)
    instruction = asked_column(spec.question, ("instruction",), names, spec, "instruction")
    if instruction is None:
        needed(table, spec, "instruction")
        raise AssertionError("unreachable: the column was not there")
    asked = _instructed(table, spec, instruction)
    history = table.columns.get("history")
    target = None
    if spec.answer is not None:
        target = asked_column(spec.answer, ("output", "response"), names, spec, "output")
        if target is None:
            raise DataError(
                f"{spec}: has no column 'output' with Alpaca's answers; its columns are "
                f"{', '.join(table.names)}: name it with answer:, or write answer: null for questions alone"
            )

    def make(row: int) -> dict[str, Any]:
        answers = [] if target is None else answers_of(filled(target, _values(table, row)))
        if target is not None and (not answers or not answers[0].strip()):
            raise Fault("has an empty answer")
        made = question_and_answers(asked(row), answers, count(row), spec)
        before = [] if history is None else _before(history[row])
        return {**made, "messages": [*before, *made["messages"]]}

    return each(table, make, ["messages", "question", "answers"])


def _instructed(table: Table, spec: DataSpec, instruction: str) -> Callable[[int], str]:
    """What a row asks: its instruction, and on the next line its input where there is one; or what the spec names.

    Raises:
        DataError: as `alpaca`.
    """
    inputs = [
        name for name in _INPUT if name in table.columns and not all(map(is_empty, table.columns[name]))
    ]  # fmt: skip
    if len(inputs) > 1 and spec.question == "auto":
        raise DataError(
            f"{spec}: has two inputs, {' and '.join(inputs)}, of which format: {spec.format} asks one; name what to ask, e.g. "
            "question: '{instruction} {input} {context}'"
        )
    more = table.columns[inputs[0]] if inputs and spec.question == "auto" else None

    def asked(row: int) -> str:
        parts = [_text("instruction", filled(instruction, _values(table, row)))]
        if more is not None:
            parts.append(_text("input", more[row]))
        return "\n".join(part for part in parts if part.strip())

    return asked


def _values(table: Table, row: int) -> dict[str, Any]:
    return {name: column[row] for name, column in table.columns.items()}


def _text(what: str, stored: Any) -> str:
    if not isinstance(stored, str) and not is_empty(stored):
        raise not_text(what, stored)
    return stored if isinstance(stored, str) else ""


def _before(stored: Any) -> list[Message]:
    """The messages of a history."""
    if is_empty(stored):
        return []
    history = unpacked(stored)
    said: list[Message] = []
    for pair in history if isinstance(history, (list, tuple)) else [()]:
        asked, answer = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else ("", "")
        if not all(isinstance(text, str) and text.strip() for text in (asked, answer)):
            raise Fault("its history is no list of [question, answer]")
        said += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return said


def prompt_completion(table: Table, spec: DataSpec, count: Callable[[int], int]) -> Columns:
    """TRL's `prompt` and `completion`: texts, or lists of messages. What the prompt says is not learned."""
    prompts, completions = (needed(table, spec, name) for name in ("prompt", "completion"))

    def make(row: int) -> dict[str, Any]:
        asked, said = _turns(prompts[row]), _turns(completions[row])
        return _completed(asked, said, "completion", count(row), spec)

    return each(table, make, ["messages", "question", "answers"])


def preference(table: Table, spec: DataSpec, count: Callable[[int], int]) -> Columns:
    """Pairs of answers, of which people chose one: the chosen one is the answer, the other is not looked at.

    TRL's `prompt`, `chosen` and `rejected`, texts or lists of messages, also where both lists begin with the prompt, which is then
    asked once; and LLaMA-Factory's, whose `chosen` is one message after a `conversations`, or the answer to an `instruction`.
    """
    chosen = needed(table, spec, "chosen")
    prompt = asked_column(spec.question or "auto", _PROMPT, list(table.columns), spec, "prompt")
    instructed = _instructed(table, spec, prompt) if prompt == "instruction" else None

    def asked(row: int) -> Any:
        if instructed is not None:
            return instructed(row)
        return None if prompt is None else _turns(filled(prompt, _values(table, row)))

    def make(row: int) -> dict[str, Any]:
        before, said = asked(row), _turns(chosen[row])
        if _is_whole(said):
            _check_holds(said, before)
            before, said = said[:-1], said[-1:]
        if is_empty(before):
            raise Fault("has no prompt, and its chosen is no list of messages that begins with one")
        return _completed(before, said, "chosen", count(row), spec)

    return each(table, make, ["messages", "question", "answers"])


_PROMPT = ("prompt", "conversations", "messages", "question", "instruction")


def _is_whole(stored: Any) -> bool:
    """Is it a conversation with its prompt, and no answer alone?"""
    listed = isinstance(stored, (list, tuple)) and all(isinstance(one, Mapping) for one in stored)
    return listed and len(stored) > 1 and speaker(stored[0]) != "assistant"


def _check_holds(whole: Sequence[Any], prompt: Any) -> None:
    """Raise a `Fault` where a conversation leaves out what a prompt beside it says."""
    if is_empty(prompt):
        return
    said = [_words(turn) for turn in whole]
    turns = prompt if isinstance(prompt, (list, tuple)) else [{"content": prompt}]
    if any(_words(turn) not in said for turn in turns):
        raise Fault(
            "its chosen begins with a prompt that leaves out what the prompt beside it says"
        )


def _words(turn: Any) -> Any:
    words = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else turn
    return words.strip() if isinstance(words, str) else words


def _completed(asked: Any, said: Any, what: str, pictures: int, spec: DataSpec) -> dict[str, Any]:
    """What a prompt and what follows it make: both texts, or lists of messages.

    Args:
        what: the column of what follows.
    """
    if isinstance(asked, str) and isinstance(said, str):
        if not said.strip():
            raise Fault("has an empty answer")
        return question_and_answers(asked, [_unparted(said)], pictures, spec)
    before = _as_messages("prompt", asked, "user", pictures, spec)
    after = _as_messages(what, said, "assistant", pictures, spec)
    if after[-1]["role"] != "assistant":
        raise Fault(f"its {what} does not end in an answer")
    before = [{**m, "learn": False} if m["role"] == "assistant" else m for m in before]
    messages = checked(matching([*before, *after], pictures))
    made: dict[str, Any] = {"messages": messages, "answers": [after[-1]["content"]]}
    questions = [m["content"] for m in before if m["role"] == "user"]
    if questions:
        made["question"] = _said(questions[-1])
    return made


def _unparted(completion: str) -> str:
    """Without the one space that parts a completion from its prompt, as the template writes one; indentation stays."""
    text = completion.rstrip()
    return text[1:] if text[:1] == " " and not text[1:2].isspace() else text


def _turns(stored: Any) -> Any:
    """A list of messages, also one that is written as JSON or one message alone, or what else is stored."""
    turns = unpacked(stored)
    turns = [turns] if isinstance(turns, Mapping) else turns
    listed = isinstance(turns, (list, tuple)) and all(isinstance(turn, Mapping) for turn in turns)
    if isinstance(stored, str):  # which may be an answer in JSON, and no message
        listed = listed and all(speaker(turn) is not None for turn in turns)
    return turns if listed and turns else stored


def _as_messages(
    what: str, stored: Any, role: str, pictures: int, spec: DataSpec
) -> Sequence[Message]:
    if is_empty(stored):
        raise Fault(f"has an empty {what}")
    if isinstance(stored, str):
        stored = [{"role": role, "content": stored}]
    if not isinstance(stored, (list, tuple)):
        raise Fault(f"its {what} is neither text nor a list of messages")
    return messages_of(stored, spec, split=pictures > 0)


def _said(content: str | list[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
