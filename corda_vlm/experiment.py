"""What one experiment is: a YAML file of `configs/`, checked as it is read."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from corda_vlm.data import ChatOptions, parse_spec
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.families import TOKENS
from corda_vlm.files import resolve
from corda_vlm.methods import METHODS, MethodRequest
from corda_vlm.precision import Bf16, check_bf16
from corda_vlm.train import TrainOptions

Dtype = Literal["float32", "bfloat16", "float16"]
"""What the weights of a model are kept in."""


@dataclass(frozen=True)
class Calibration:
    """The data whose second moments orient the adapters.

    Attributes:
        data: what stands for the knowledge to keep; a spec as in `corda_vlm.data.load_records`.
        samples: at most so many records, drawn at random.
        batch_size: records a forward pass.
        precision: of the sums, see `collect_covariance`.
        rounds: disjoint parts of the samples, among which `dynamic_covariance` chooses; other methods take all.
        blockwise: of a language model: one block at a time, whose sums alone are in memory.
        tokens: which of a language model's tokens count, as in `collect_covariance`; in covariances of the new task too.
        max_tokens, too_long: of conversations, see `ChatOptions`.
    """

    data: str | dict[str, Any]
    samples: int = 256
    batch_size: int = 64
    precision: str = "float32"
    rounds: int = 1
    blockwise: bool = False
    tokens: str = "all"
    max_tokens: int | None = None
    too_long: str = "skip"


@dataclass(frozen=True)
class NewTask:
    """What the model is to learn.

    Attributes:
        data: the training records, a spec as in `corda_vlm.data.load_records`; for models that generate text one with
            a `format`, and `loss: next_token` in the training.
        classes: names the prompts are made of, in label order, or the name of a file in eval/class_names; None takes
            the data's own.
        templates: prompts, `{}` is the class, or the name of a file in eval/templates; None takes
            "a photo of a {}.".
    """

    data: str | dict[str, Any]
    classes: list[str] | str | None = None
    templates: list[str] | str | None = None


@dataclass(frozen=True)
class Evaluation:
    """How models are measured.

    Attributes:
        scales: strengths besides 1 at which every trained model is measured, without training it again
            (WiSE-FT): 0 is the model before training.
        batch_size: examples a forward pass.
        bf16: run the model under bfloat16 autocast; "auto" as in `TrainOptions`.
    """

    scales: list[float] = field(default_factory=list)
    batch_size: int = 256
    bf16: Bf16 = "auto"

    def __post_init__(self) -> None:
        check_bf16(self.bf16)


@dataclass(frozen=True)
class Variant:
    """One curve of the trade-off: a method with its options, over its learning rates.

    Attributes:
        learning_rates: each is trained with every seed.
        method: key of `METHODS`; None takes the variant's own name.
        rank: None takes the experiment's.
        a_norm, damping, side, beta, freeze_a, dynamic_rank, min_rank, max_rank, dynamic_covariance: as in `prepare_method`.
        modules_to_save: trained whole beside the adapter, see `attach_adapter`; such a model cannot be scaled. Anchor and
            forecast see them where they are sites or hold sites (LLaVA's projector), and not an output layer.
        anchor: weight of `anchor_penalty` in the loss, for any method; needs the experiment's calibration.
        scales: None takes the evaluation's.
        training: options of `TrainOptions` that differ from the experiment's.
    """

    learning_rates: list[float]
    method: str | None = None
    rank: int | None = None
    a_norm: float | None = None
    damping: float = 1e-4
    side: str | None = None
    beta: float | None = None
    freeze_a: bool = False
    dynamic_rank: bool = False
    min_rank: int = 1
    max_rank: int | None = None
    dynamic_covariance: bool = False
    modules_to_save: list[str] = field(default_factory=list)
    anchor: float = 0.0
    scales: list[float] | None = None
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """One training of an experiment."""

    variant: str
    method: str
    learning_rate: float
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.variant}/{self.learning_rate:g}-{self.seed}"

    def __str__(self) -> str:
        return f"{self.variant}, learning rate {self.learning_rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Experiment:
    """A model learns a task by several methods; a suite measures what each gained and kept.

    Attributes:
        name: names the folder `runs/<name>`.
        model: as in `load_model`.
        task: what is learnt.
        suite: what is measured, as in `load_suite`.
        variants: name -> method, options and learning rates.
        title: heading of the report.
        calibration: the knowledge to keep; needed by methods that take covariances.
        towers: which towers are adapted; None for all.
        rank: of the adapters.
        seeds: each learning rate is trained with each of them.
        training: options of `TrainOptions`, learning rate and seed aside.
        evaluation: how models are measured, and at which strengths.
        forecast: log what the anchor would be during every training, also where it has no weight: the change of the
            layers' outputs on the calibration data, which foretells what is forgotten.
        chat: the chat template of calibration and training, as in `ChatOptions`; the tasks of a suite name their own.
        family, device_map: as in `load_model`.
        dtype: of the model's weights; what is trained of them is in it too, adapters are in float32.
        data_root: the folder that `{data_root}` stands for, here and in the suite.
    """

    name: str
    model: str
    task: NewTask
    suite: str
    variants: dict[str, Variant]
    title: str | None = None
    calibration: Calibration | None = None
    towers: list[str] | None = None
    rank: int = 16
    seeds: list[int] = field(default_factory=lambda: [0])
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    forecast: bool = False
    chat: str = "auto"
    family: str = "auto"
    dtype: Dtype = "float32"
    device_map: str | None = None
    data_root: str | None = None

    def __post_init__(self) -> None:
        if not self.variants:
            raise CordaError(f"experiment {self.name!r} has no variants: nothing to train")
        if self.calibration is not None:
            if (tokens := self.calibration.tokens) not in TOKENS:
                raise UnknownNameError("choice of tokens in the calibration", tokens, TOKENS)
            self.chat_of("knowledge")  # raises
        for name, variant in self.variants.items():
            if name in ("base", "", ".", "..") or "/" in name or "\\" in name:
                raise CordaError(
                    f"a variant cannot be called {name!r}: it names a folder, and 'base' is the model before training"
                )
            method = METHODS.get(self.method_of(name))
            if method is None:
                raise UnknownNameError(f"method of variant {name!r}", self.method_of(name), METHODS)
            if not variant.learning_rates:
                raise CordaError(f"variant {name!r} has no learning rates")
            if self.calibration is None and (method.needs_store or variant.anchor or self.forecast):
                why = (
                    f"is {method.name}, which takes its directions from data"
                    if method.needs_store
                    else "has an anchor to that knowledge"
                    if variant.anchor
                    else "is to log a forecast of forgetting"
                )
                raise CordaError(
                    f"variant {name!r} {why}, and the experiment has no `calibration`; say there which data stands "
                    "for the knowledge to keep"
                )
            if not (math.isfinite(variant.anchor) and variant.anchor >= 0):
                raise CordaError(
                    f"variant {name!r}: anchor {variant.anchor} must be a finite weight, 0 or more"
                )
            if variant.dynamic_covariance and self.calibration and self.calibration.rounds < 2:
                raise CordaError(
                    f"variant {name!r} chooses among calibration rounds, and there is one; give calibration.rounds, e.g. 4, "
                    "or leave dynamic_covariance out"
                )
            for scale in self.scales_of(name):
                if not 0 < scale < 1:
                    raise CordaError(
                        f"variant {name!r}: scales hold {scale}; give strengths between 0 (the base model) and 1 (as "
                        "trained), both of which are measured anyway"
                    )
            method.check_options(self.request(name))
            options = self.train_options(name, variant.learning_rates[0], 0)
            self._check_loss(name, options.loss)
            if options.loss == "linear" and self.scales_of(name):
                raise CordaError(
                    f"variant {name!r} trains a linear head, which has no counterpart in the base model to be scaled "
                    "towards; give it `scales: []`"
                )
            if variant.modules_to_save and self.scales_of(name):
                raise CordaError(
                    f"variant {name!r} trains modules whole, which cannot be scaled; give it `scales: []`"
                )
            if method.name == "linear-probe" and variant.anchor:
                raise CordaError(
                    f"variant {name!r} changes no layer, so there is nothing to anchor; leave its anchor out"
                )

    def _check_loss(self, variant: str, loss: str) -> None:
        kind = parse_spec(self.task.data).format
        if kind is not None and loss != "next_token":
            raise CordaError(
                f"variant {variant!r} has the {loss} loss, and the task's data are conversations (format: {kind}); give "
                "training: {loss: next_token}"
            )
        if kind is None and loss == "next_token":
            raise CordaError(
                f"variant {variant!r} has the next_token loss; say which format: the task's data has (llava, chat, qa or text)"
            )

    def method_of(self, variant: str) -> str:
        return self.variants[variant].method or variant

    def request(self, variant: str) -> MethodRequest:
        """What a variant asks of its method, but for the covariances."""
        asked = self.variants[variant]
        return MethodRequest(
            rank=self.rank if asked.rank is None else asked.rank,
            towers=self.towers,
            a_norm=asked.a_norm,
            damping=asked.damping,
            side=asked.side,
            beta=asked.beta,
            dynamic_rank=asked.dynamic_rank,
            min_rank=asked.min_rank,
            max_rank=asked.max_rank,
            dynamic_covariance=asked.dynamic_covariance,
            freeze_a=asked.freeze_a,
            modules_to_save=tuple(asked.modules_to_save),
            show_progress=False,
        )

    def chat_of(self, data: str) -> ChatOptions:
        """How conversations become tokens where covariances are taken of the "knowledge" or of the new "task"."""
        if data == "task":
            known = ChatOptions.__dataclass_fields__
            own = {name: value for name, value in self.training.items() if name in known}
            return ChatOptions(**{"template": self.chat, **own})
        assert self.calibration is not None  # who asks for covariances has one
        limits = {name: getattr(self.calibration, name) for name in ("max_tokens", "too_long")}
        return ChatOptions(self.chat, **limits)

    def scales_of(self, variant: str) -> list[float]:
        """The strengths besides 1 at which its trained models are measured."""
        own = self.variants[variant].scales
        return self.evaluation.scales if own is None else own

    def trainings(self) -> Iterator[Training]:
        """All trainings, seed by seed, so that an early look sees every curve."""
        for seed in self.seeds:
            for name, variant in self.variants.items():
                for rate in variant.learning_rates:
                    yield Training(name, self.method_of(name), rate, seed)

    def train_options(self, variant: str, learning_rate: float, seed: int) -> TrainOptions:
        """The options of one training.

        Raises:
            UnknownNameError: an option that training does not have.
        """
        given = {"template": self.chat, **self.training, **self.variants[variant].training}
        if self.method_of(variant) == "linear-probe":
            given["loss"] = "linear"  # there is nothing else to train
        known = TrainOptions.__dataclass_fields__
        for name in given:
            if name not in known or name in ("learning_rate", "seed"):
                choices = set(known) - {"learning_rate", "seed"}
                raise UnknownNameError(f"option in the training of {variant!r}", name, choices)
            if known[name].type == "Bf16":
                check_bf16(given[name], f"bf16 in the training of {variant!r}")
            elif not _fits(value := given[name], known[name].default):
                raise CordaError(f"the training of {variant!r}: {name} cannot be {value!r}")
        return TrainOptions(**given, learning_rate=learning_rate, seed=seed)


def _fits(value: Any, default: Any) -> bool:
    """Is `value` of the kind of an option with this default? Those without a default are numbers."""
    if isinstance(default, (bool, str)):
        return isinstance(value, type(default))
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and len(value) == len(default)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number or (value is None and default is None)


def load_experiment(
    path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()
) -> Experiment:
    """Read and check an experiment.

    Args:
        path: as given, or a shipped one, e.g. "configs/demo.yaml".
        overrides: "key=value" with dots for nested keys, e.g. "training.steps=10"; values are YAML.

    Raises:
        CordaError: not YAML, an unknown key, or a value of the wrong type; names the file and the key.
    """
    content = read_config(path)
    apply_overrides(content, overrides)
    return parse_experiment(content, str(path))


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        CordaError: no such file, not YAML, or not a mapping.
    """
    path = resolve(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CordaError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise CordaError(f"{path} must be a mapping of the options of an experiment")
    return content


def apply_overrides(content: dict[str, Any], overrides: Mapping[str, Any] | Sequence[str]) -> None:
    """Set nested keys of a config in place, see `load_experiment`."""
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_override, overrides)
    for key, value in pairs:
        _set(content, key, value)


def parse_experiment(content: Mapping[str, Any], where: str) -> Experiment:
    """An experiment from a mapping; `where` names it in errors."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--experiment", type=Experiment)
    try:
        # a copy: jsonargparse writes what it makes of the values into the mapping
        parsed = parser.parse_object({"experiment": copy.deepcopy(dict(content))})
        found = parser.instantiate(parsed).experiment
        return _with_data_as_written(found, content)
    except ArgumentError as error:
        if isinstance(error.__cause__, CordaError):
            raise error.__cause__ from error
        lines = (line.strip() for line in str(error).replace("experiment.", "").splitlines())
        raise CordaError(f"{where}: {' '.join(lines)}") from error


def _with_data_as_written(experiment: Experiment, content: Mapping[str, Any]) -> Experiment:
    """jsonargparse reads strings within a mapping as YAML, which makes a mapping of `answer: "{a}"`."""
    given = {}
    for name in ("task", "calibration"):
        if (part := getattr(experiment, name)) is not None:
            given[name] = replace(part, data=content[name]["data"])
    return replace(experiment, **given)


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise CordaError(f"an override is written KEY=VALUE, e.g. training.steps=10; got {text!r}")
    return key, yaml.safe_load(value)


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = content.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise CordaError(f"{key}: {parent!r} is {inner!r}, which has no keys")
        content = inner
    content[last] = value
