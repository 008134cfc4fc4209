"""A suite: a short YAML file that says what is measured, and whether it measures gain or retention."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from corda_vlm.errors import CordaError, UnknownNameError, brief
from corda_vlm.evaluation.one_task import data_of, suite_of
from corda_vlm.evaluation.scores import TASK_ROLES
from corda_vlm.evaluation.shipped import find_shipped
from corda_vlm.evaluation.tasks.registry import TASK_KINDS
from corda_vlm.files import shown, text_digest
from corda_vlm.options import Count, Text, fitted, hints_of, read_options
from corda_vlm.yaml_file import read_yaml


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        name: how tables call it.
        role: one of `TASK_ROLES`: "gain", "retention", "selection".
        kind: one of `tasks.registry.TASK_KINDS`.
        data: what `corda_vlm.data.load_records` takes; `{data_root}` in its strings is filled in.
        classes: zero-shot only: a list in the order of the labels; the name of a file in eval/class_names or
            its path; "openai_imagenet"; or a mapping with `names` (any of those) or `from` ("data", or another
            data spec whose classes are meant), and optionally `count`, which is then checked.
        templates: zero-shot only: a list, "openai_imagenet", or the name of a file in eval/templates.
        metrics: what is measured; tasks are compared by the first.
        limit: at most so many examples.
        options: those of its kind, e.g. `{chat_template: plain, max_new_tokens: 8}`.
        source: the suite's file that says so; paths may be relative to it.
    """

    name: Text
    role: Text
    kind: Text
    data: str | Mapping[str, Any]
    classes: Sequence[str | int] | str | Mapping[str, Any] | None = None
    templates: Sequence[str] | str | None = None
    metrics: tuple[str, ...] = ()
    limit: Count | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    source: Path | None = None

    @property
    def digest(self) -> str:
        """Of what it measures, wherever it is written."""
        content = {**asdict(self), "source": None}
        if (
            not self.options
        ):  # tasks had none when folders that may still be gone on with were begun
            del content["options"]
        elif (
            kind := TASK_KINDS[self.kind].options
        ) is not None:  # those folders have the former names
            former = {name: was for was, name in getattr(kind, "FORMER", {}).items()}
            content["options"] = {former.get(name, name): v for name, v in self.options.items()}
        return text_digest(json.dumps(content, sort_keys=True, default=str))


@dataclass(frozen=True)
class Suite:
    """Tasks that belong together. Scores compare only within one `version`.

    Attributes:
        data_root: the folder that `{data_root}` in the tasks' data stands for.
        source: the file it was read from.
    """

    name: Text
    version: int | float | str
    tasks: tuple[Task, ...]
    about: str = ""
    data_root: Text = "data"
    source: Path | None = None

    def pairs(self, task: str) -> set[tuple[str, str]]:
        """The (task, metric) pairs that measuring `task` gives, to be compared with `scores.done`."""
        return {(t.name, metric) for t in self.tasks if t.name == task for metric in t.metrics}

    def remaining(self, done: Collection[tuple[str, str]]) -> list[str]:
        """Names of the tasks that `done` does not wholly contain."""
        return [task.name for task in self.tasks if not self.pairs(task.name) <= set(done)]


def load_suite(source: str | Path | Mapping[str, Any] | Suite) -> Suite:
    """A suite by the name of a file in eval/suites, by path, or from a mapping; or of data alone, e.g. "folder:photos/test".

    A suite may extend another, by name or path: it then has that one's tasks too, and its own take the place of
    those with the same name.

    Raises:
        UnknownNameError: no such suite, or an unknown key, role, kind or metric in it; lists the choices.
        CordaError: not YAML, or something missing.
    """
    if isinstance(source, Suite):
        return source
    if (data := data_of(source)) is not None:
        return _parse(suite_of(data), f"the task made of {brief(data)}", None, ())
    if isinstance(source, Mapping):
        return _parse(source, "the suite given", None, ())
    return _read(find_shipped(source, "suites/*.yaml", "suite", (), None), ())


def _read(path: Path, below: tuple[Path, ...]) -> Suite:
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise CordaError(f"suite {path} must be a mapping with name, version and tasks")
    return _parse(content, f"suite {path}", path, below)


def _parse(
    content: Mapping[str, Any], where: str, path: Path | None, below: tuple[Path, ...]
) -> Suite:
    known = [f.name for f in fields(Suite) if f.name != "source"]
    check_keys(content, [*known, "extends"], ("name", "version", "tasks"), where)
    kinds = {**hints_of(Suite), "tasks": Any, "extends": str | None}
    options = {key: fitted(content[key], kinds[key], key, where) for key in content}
    _check_printable(options["name"], where)
    by_name, extends = {}, options.pop("extends", None)
    own = _parse_tasks(options["tasks"], where, path)
    if extends is not None:
        extended = _extended(extends, where, path, below)
        by_name = {task.name: task for task in extended.tasks}
        options.setdefault("data_root", extended.data_root)
    by_name |= {task.name: task for task in own}
    return Suite(**{**options, "tasks": tuple(by_name.values()), "source": path})


def _extended(name: str, where: str, path: Path | None, below: tuple[Path, ...]) -> Suite:
    """The suite that another extends; `below` are those that led to it."""
    parent = find_shipped(name, "suites/*.yaml", "suite", (), path).resolve()
    if parent in below:
        raise CordaError(f"{where}: extends itself, by way of {parent}")
    return _read(parent, (*below, parent))


def _parse_tasks(tasks: Any, where: str, path: Path | None) -> list[Task]:
    if not isinstance(tasks, Sequence) or isinstance(tasks, str) or not tasks:
        raise CordaError(f"{where}: tasks must be a list of at least one task")
    own = [_parse_task(task, f"{where}, task {n}", path) for n, task in enumerate(tasks, start=1)]
    names = [task.name for task in own]
    if len(set(names)) < len(names):
        raise CordaError(f"{where}: two tasks have one name: {', '.join(names)}")
    return own


def _parse_task(content: Any, where: str, path: Path | None) -> Task:
    if not isinstance(content, Mapping):
        raise CordaError(f"{where} must be a mapping, got {brief(content)}")
    if isinstance(content.get("name"), str):
        where = f"{where} ({shown(content['name'])})"
    known = [f.name for f in fields(Task) if f.name != "source"]
    check_keys(content, known, ("name", "role", "kind", "data"), where)
    if not isinstance(content["data"], (str, Mapping)):
        raise CordaError(f"{where}: data must be a string like 'folder:PATH' or a mapping")
    kinds = {**hints_of(Task), "metrics": list[str] | str | None, "options": Any}
    content = {key: fitted(content[key], kinds[key], key, where) for key in content}
    _check_printable(content["name"], where)
    if content["role"] not in TASK_ROLES:
        raise UnknownNameError(f"role in {where}", content["role"], TASK_ROLES)
    if content["kind"] not in TASK_KINDS:
        raise UnknownNameError(f"kind in {where}", content["kind"], TASK_KINDS)
    _check_needs(content, where)
    _check_options(content, where)
    return Task(**{**content, "metrics": _metrics(content, where), "source": path})


def _check_needs(content: Mapping[str, Any], where: str) -> None:
    kind = content["kind"]
    needs = TASK_KINDS[kind].needs
    for key in ("classes", "templates"):
        if key in needs and content.get(key) is None:
            raise CordaError(f"{where}: a {kind} task needs {key}")
        if key not in needs and key in content:
            raise CordaError(f"{where}: a {kind} task takes no {key}")


def _metrics(content: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Those that a task names, or else its kind's usual ones."""
    declared = TASK_KINDS[content["kind"]]
    metrics = content.get("metrics") or declared.usual or declared.metrics
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    for metric in metrics:
        if metric not in declared.all_metrics:
            raise UnknownNameError(f"metric in {where}", metric, declared.all_metrics)
    return metrics


def _check_printable(name: str, where: str) -> None:
    if not name.isprintable():
        raise CordaError(
            f"{where}: its name {shown(name)!r} holds what does not print; give it a plain one"
        )


def _check_options(content: Mapping[str, Any], where: str) -> None:
    if "options" not in content:
        return
    options, kind = content["options"], content["kind"]
    known = TASK_KINDS[kind].options
    if known is None:
        raise CordaError(f"{where}: a {kind} task takes no options")
    if not isinstance(options, Mapping):
        raise CordaError(f"{where}: options must be a mapping, got {brief(options)}")
    read_options(known, options, f"options of {where}")


def check_keys(
    content: Mapping[str, Any], known: Sequence[str], needed: Sequence[str], where: str
) -> None:
    """Refuse a key that is not known, listing those that are, and the absence of one that is needed."""
    for key in content:
        if key not in known:
            raise UnknownNameError(f"key in {where}", key, known)
    for key in needed:
        if content.get(key) is None:
            raise CordaError(f"{where}: no {key!r}; it needs {', '.join(needed)}")
