"""The options of a comparison of two results: which they are, and which task is what."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from corda_vlm.errors import CordaError
from corda_vlm.options import check_options, read_options
from corda_vlm.yaml_file import read_yaml


@dataclass(frozen=True)
class Roles:
    """Which task is what.

    Attributes:
        gain: A task that was learned, e.g. gsm8k, or several as a pattern, e.g. "mmlu_*"; may be given many times. All others count
            as retention, but for those that the results themselves call gain.
        retention: A task whose knowledge should stay, or a pattern; may be given many times. With it, tasks that are named
            neither here nor as gain are left out.
        chance: What guessing gives on tasks, as a share, where the results do not tell it, e.g. "{ai2d: 0.25}".
        metrics: The metric that counts for a task, where it is not the first one that the results have, e.g. "{arc_easy:
            acc_norm}".
    """

    gain: list[str] | None = None
    retention: list[str] | None = None
    chance: dict[str, float] | None = None
    metrics: dict[str, str] | None = None

    def __post_init__(self) -> None:
        check_options(self)
        for task, level in (self.chance or {}).items():
            if not 0 <= level < 1:
                raise CordaError(
                    f"chance of {task!r} is {level:g}; it is a share from 0 to below 1, e.g. 0.25 of four choices"
                )


@dataclass(frozen=True)
class BeforeAfterOptions(Roles):
    """Results of any tool before and after training.

    Attributes:
        before: Results of the model before training: a folder or a file of lm-eval, lmms-eval, CLIP_benchmark, VLMEvalKit, or
            scores of our own. May be given many times, for several tools.
        after: Results of a trained model, by its folder's name, or NAME=PATH. May be given many times; equal names are one
            model.
        roles: A YAML file with gain, retention, chance and metrics, in place of those options.
        output: The folder to write report.md, report.html, change.png and card.json into.
        title: The title of the report.
    """

    before: list[str] | None = None
    after: list[str] | None = None
    roles: str | None = None
    output: str = "before-after"
    title: str = "Before and after training"

    @property
    def is_given(self) -> bool:
        """Does it ask for a comparison at all?"""
        return bool(self.before or self.after)

    def with_file(self) -> BeforeAfterOptions:
        """With what the file of roles says, where the options themselves say nothing.

        Raises:
            CordaError: no such file, or one that holds something else.
        """
        if self.roles is None:
            return self
        content = read_yaml(self.roles)
        if not isinstance(content, dict):
            raise CordaError(
                f"{self.roles} must hold a mapping with gain, retention, chance or metrics"
            )
        told = read_options(Roles, content, self.roles)
        names = [field.name for field in fields(Roles)]
        return replace(self, **{n: getattr(told, n) for n in names if getattr(self, n) is None})
