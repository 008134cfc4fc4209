"""lmms-eval: a live vision-language model of ours, its adapter attached, in its `simple_evaluate`.

    from corda_vlm.integrations.lmms_eval import evaluate

    evaluate(model, ["pope", "ok_vqa_val2014"], processor=loaded.processor, output="results/after")

writes the files that `lmms_eval --log_samples` writes, which `corda-vlm report --before results/before --after results/after`
reads. The model gets a task's messages in its own chat template and answers greedily, as in `corda_vlm.evaluate`, so that
one class stands for every family. Tasks that compare likelihoods, ask in several rounds or show videos are refused in words.
Made after lmms-eval 0.7.3, which needs filelock before 4 (`api/model.py`, `evaluator.py`, `loggers/evaluation_tracker.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from corda_vlm.data import Chat, ChatOptions, to_rgb
from corda_vlm.errors import CordaError, brief
from corda_vlm.evaluation.measure import encoder_of
from corda_vlm.evaluation.models.generate import generate
from corda_vlm.evaluation.models.text_model import TextGenerator
from corda_vlm.evaluation.options import EvalOptions
from corda_vlm.families.base import Processor
from corda_vlm.families.generative.language import Sample
from corda_vlm.files import home_path
from corda_vlm.integrations.tasks import Task, as_tasks, save_results
from corda_vlm.integrations.theirs import module_of
from corda_vlm.names import check_name

NAME = "corda_vlm"
"""How our models are called where a task file has words of its own for some models (`lmms_eval_specific_kwargs`)."""

MAX_NEW_TOKENS = 1024
"""Of answers to tasks that do not say how long they may be; what lmms-eval's own models take."""

_SET_HERE = (
    "model_args",
    "task_manager",
    "evaluation_tracker",
    "log_samples",
    "datetime_str",
    "force_simple",
)

Conversation = Callable[[], Sequence[Mapping[str, Any]]]
"""Gives messages; called when they are needed, as the pictures of a whole task would fill the memory."""


class Answers:
    """Answers conversations as lmms-eval's tasks write them.

    Args:
        model: bare or a `PeftModel`.
        processor: the model's.
        batch_size: conversations at a time.
        chat_template: as of `ChatOptions`.

    Raises:
        CordaError: the model writes no text, or has no chat template.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Processor,
        batch_size: int = 8,
        chat_template: str = ChatOptions.chat_template,
    ) -> None:
        options = EvalOptions(batch_size=batch_size, bf16=False)
        self.generator = TextGenerator.of(encoder_of(model, options, processor=processor))
        self.chat = Chat(self.generator.processor, chat_template)
        self.chat.check()

    def __call__(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """What the model says to each, greedily, in their order."""
        said: list[str] = []
        for window in self.generator.windows(len(conversations)):
            prompts = [self.prompt(conversations[index]()) for index in window]
            said += generate(self.generator, prompts, max_new_tokens=max_new_tokens, stop=stop)
        return said

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> Sample:
        """Messages of {"role", "content"}, the content a text or parts {"type": "text" | "image", …}, up to the answer."""
        pictures: list[Any] = []
        turns = [
            {"role": message["role"], "content": _content(message["content"], pictures)}
            for message in messages
        ]
        if pictures and not self.generator.processor.takes_images:
            raise CordaError(
                "this task shows pictures, and the model reads text alone; choose other tasks"
            )
        prompt = self.chat.prompt(turns)
        return self.generator.processor.encode(
            prompt.text,
            [to_rgb(picture, Path()) for picture in pictures],
            responses=[],
            special_tokens=prompt.special_tokens,
        )


def _content(content: Any, pictures: list[Any]) -> Any:
    """A message's content as templates take it; its pictures are added to `pictures`."""
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        if part["type"] == "text":
            parts.append({"type": "text", "text": part["text"]})
        elif part["type"] == "image":
            pictures.append(part["url"])
            parts.append({"type": "image"})
        else:
            raise CordaError(
                f"this task shows the model a part of type {part['type']!r}, and models are asked with texts and pictures here; "
                "choose other tasks"
            )
    return parts


def _greedy(asked: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """The most tokens of an answer, and the strings that end it, of a task's `generation_kwargs`.

    Raises:
        CordaError: the task wants answers that are drawn at random, or found by beams.
    """
    if (
        asked.get("do_sample")
        or (asked.get("temperature") or 0) > 0
        or (asked.get("num_beams") or 1) > 1
    ):
        raise CordaError(
            f"answers are greedy here, and a task asks for {brief(dict(asked))}; pass gen_kwargs='temperature=0,do_sample=False,"
            "num_beams=1'"
        )
    until = asked.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    return int(asked.get("max_new_tokens") or MAX_NEW_TOKENS), stop


def as_lmms(
    model: nn.Module,
    processor: Processor,
    *,
    batch_size: int = 8,
    chat_template: str = ChatOptions.chat_template,
) -> Any:
    """A live model as one of lmms-eval's, weights and adapter as they are.

    Args:
        model: a vision-language model, or a language model for tasks without pictures; bare or a `PeftModel`.
        processor: the model's.
        batch_size: conversations at a time.
        chat_template: as of `ChatOptions`.

    Raises:
        CordaError: lmms-eval is not installed, the model writes no text or has no chat template, or several processes run.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise CordaError("a live model is measured by lmms-eval in one process; start one")
    answers = Answers(model, processor, batch_size, chat_template)

    class Model(_lmms_eval("api.model").lmms):
        is_simple = False  # it is given messages, not a text and pictures apart

        def generate_until(self, requests: list[Any]) -> list[str]:
            return _answered(answers, requests, self.task_dict)

        def loglikelihood(self, requests: list[Any]) -> NoReturn:
            _refuse("compares likelihoods")

        def generate_until_multi_round(self, requests: list[Any]) -> NoReturn:
            _refuse("asks in several rounds")

    return Model()


def _refuse(what: str) -> NoReturn:
    raise CordaError(
        f"a task {what}, which a live model does not do in lmms-eval; choose other tasks"
    )


def _answered(answers: Answers, requests: Sequence[Any], documents: Mapping[str, Any]) -> list[str]:
    """What the model says to lmms-eval's requests, in their order: those that ask alike at a time."""
    alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    conversations: list[Conversation] = []
    for number, request in enumerate(requests):
        _, to_messages, asked, document, task, split = request.args
        conversations.append(partial(_messages, to_messages, documents, task, split, document))
        alike.setdefault(_greedy(asked), []).append(number)
    said: dict[int, str] = {}
    for (most, stop), numbers in alike.items():
        own = [conversations[number] for number in numbers]
        said.update(zip(numbers, answers(own, max_new_tokens=most, stop=stop), strict=True))
    return [said[number] for number in range(len(requests))]


def _messages(
    to_messages: Any, documents: Mapping[str, Any], task: str, split: str, document: int
) -> Any:
    return to_messages(documents[task][split][document])


def evaluate(
    model: nn.Module,
    tasks: str | Sequence[Task],
    *,
    processor: Processor,
    output: str | Path | None = None,
    batch_size: int = 8,
    chat_template: str = ChatOptions.chat_template,
    include_path: str | Path | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """Measure a live model with lmms-eval; its mode, train or eval, is as before afterwards.

    Args:
        tasks: names of lmms-eval's tasks (a list, or "a,b") and of those in `include_path`, or mappings as its task files hold them.
        processor: the model's.
        output: a folder for DATE_results.json and DATE_samples_TASK.jsonl; the model is called by its name.
        include_path: a folder of further task files.
        keywords: further ones of `lmms_eval.evaluator.simple_evaluate`, e.g. `limit`, `num_fewshot` or `gen_kwargs`.

    Returns:
        what `simple_evaluate` returns.

    Raises:
        CordaError: lmms-eval is not installed, the model writes no text, a keyword is one that is set here, no task is given, or a task is none
            that a live model does.
    """
    if own := [name for name in _SET_HERE if name in keywords]:
        raise CordaError(
            f"{own[0]} is set by evaluate itself, which passes on other keywords of simple_evaluate; leave it out"
        )
    named = "" if output is None else check_name(Path(output).resolve().name, "the model's name")
    lmms = as_lmms(model, processor, batch_size=batch_size, chat_template=chat_template)
    tracker = None
    if output is not None:
        loggers = _lmms_eval("loggers.evaluation_tracker")
        tracker = loggers.EvaluationTracker(output_path=str(home_path(output)))
    date = _lmms_eval("utils").get_datetime_str()  # its own default is when it was imported
    results = _lmms_eval("evaluator").simple_evaluate(
        model=lmms,
        model_args=f"pretrained={named}",
        tasks=as_tasks(tasks),
        task_manager=_lmms_eval("tasks").TaskManager(
            include_path=None if include_path is None else str(include_path), model_name=NAME
        ),
        evaluation_tracker=tracker,
        batch_size=batch_size,
        log_samples=True,
        datetime_str=date,
        **keywords,
    )
    if tracker is not None:
        save_results(tracker, results, datetime_str=date)
    return results


def _lmms_eval(module: str) -> Any:
    return module_of("lmms_eval", module, "lmms-eval", "lmms_eval")
