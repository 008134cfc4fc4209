"""lm-eval: a live model of ours, its adapter attached, in its `simple_evaluate`.

    from corda_vlm.integrations.lm_eval import evaluate

    evaluate(model, ["gsm8k", "corda_retention"], processor=loaded.processor, output="results/after")

writes the files that `lm_eval --log_samples` writes, which `corda-vlm report --before results/before --after results/after`
reads. `corda_retention` is a group of the knowledge that CorDA measures, TriviaQA, NQ-open and WebQuestions; it lies in
`tasks_folder()`, which lm-eval's own command takes as `--include_path`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from corda_vlm.errors import CordaError
from corda_vlm.files import asset, home_path
from corda_vlm.integrations.tasks import Task, as_tasks, save_results
from corda_vlm.integrations.theirs import module_of
from corda_vlm.names import check_name

RETENTION = "corda_retention"
"""The name of the group of retention tasks."""

_SET_HERE = ("model_args", "task_manager", "evaluation_tracker", "log_samples")


def tasks_folder() -> Path:
    """The folder of the task files that ship with the package, for `lm_eval --include_path`."""
    return asset("eval/lm_eval")


def as_lm(model: nn.Module, processor: Any, *, batch_size: int = 8, **options: Any) -> Any:
    """A live model as lm-eval's `HFLM`, weights and adapter as they are.

    Args:
        model: a language model, or a vision-language model that is asked without images; bare or a `PeftModel`.
        processor: the model's.
        options: further ones of `HFLM`, e.g. `max_length`.

    Raises:
        CordaError: lm-eval is not installed, or the model writes no text.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or not hasattr(model, "generate"):
        raise CordaError(
            f"lm-eval asks models that write text, and this {type(model).__name__} does not; evaluate it with "
            "corda_vlm.evaluate"
        )
    return _lm_eval("models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, **options
    )


def evaluate(
    model: nn.Module,
    tasks: str | Sequence[Task] = (RETENTION,),
    *,
    processor: Any,
    output: str | Path | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
    **keywords: Any,
) -> dict[str, Any] | None:
    """Measure a live model with lm-eval; its mode, train or eval, is as before afterwards.

    Args:
        tasks: names of lm-eval's tasks (a list, or "a,b") and of those in `tasks_folder()`, or mappings as its task files hold them.
        processor: the model's.
        output: a folder for results_DATE.json and samples_TASK_DATE.jsonl; the model is called by its name.
        include_path: a folder of further task files.
        keywords: further ones of `lm_eval.simple_evaluate`, e.g. `limit`, `num_fewshot` or `apply_chat_template`.

    Returns:
        what `simple_evaluate` returns: None in the processes of a distributed run but the first.

    Raises:
        CordaError: lm-eval is not installed, the model writes no text, no task is given, or a keyword is one that is set here.
    """
    if own := [name for name in _SET_HERE if name in keywords]:
        raise CordaError(
            f"{own[0]} is set by evaluate itself, which passes on other keywords of simple_evaluate; leave it out"
        )
    folders = [str(tasks_folder())] + ([str(include_path)] if include_path is not None else [])
    named = "" if output is None else check_name(Path(output).resolve().name, "the model's name")
    tracker = None if output is None else _tracker(home_path(output))
    modes = [(module, module.training) for module in model.modules()]  # which HFLM changes
    try:
        results = _lm_eval("evaluator").simple_evaluate(
            model=as_lm(model, processor, batch_size=batch_size),
            model_args={"pretrained": named},
            tasks=as_tasks(tasks),
            task_manager=_lm_eval("tasks").TaskManager(include_path=folders),
            evaluation_tracker=tracker,
            batch_size=batch_size,
            log_samples=True,
            **keywords,
        )
    finally:
        for module, training in modes:
            module.training = training
    if tracker is not None and results is not None:
        save_results(tracker, results)
    return results


def _tracker(folder: Path) -> Any:
    return _lm_eval("loggers").EvaluationTracker(output_path=str(folder))


def _lm_eval(module: str) -> Any:
    return module_of("lm_eval", module, "lm-eval", "lm_eval")
