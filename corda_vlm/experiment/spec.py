"""What an experiment, a study and a run of them are: the classes that the YAML files of `configs/` are read into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from corda_vlm.covariance.options import CalibrationOptions
from corda_vlm.data.spec import parse_spec
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.errors import UnknownNameError
from corda_vlm.evaluation.options import EvalOptions
from corda_vlm.experiment.rules import check_variants
from corda_vlm.families.options import (
    TOWERS,
    LoadOptions,
    Names,
    SiteOptions,
    chosen_names,
    listed_names,
)
from corda_vlm.methods import METHODS, MethodRequest
from corda_vlm.methods.options import MethodOptions
from corda_vlm.names import check_name
from corda_vlm.options import (
    Count,
    Items,
    Positive,
    Seed,
    Text,
    as_keywords,
    check_options,
    current_name,
    narrowed,
    option_names,
    read_options,
    renamed,
)
from corda_vlm.train.options import (
    GradientOptions,
    LossOptions,
    TaskGradientOptions,
    TrainOptions,
)
from corda_vlm.train.terms.options import TermOptions

Scales = Annotated[list[float], Items(distinct=True)]
Rates = Annotated[list[Positive], Items(distinct=True)]


@dataclass(frozen=True)
class Calibration(CalibrationOptions):
    """The data whose second moments orient the adapters, and how they are collected.

    What is left out of `towers`, `targets` and `chat_template` is the experiment's. `rounds` are of the knowledge; `tokens` of the
    covariances of the new task too.

    Attributes:
        data: What stands for the knowledge to keep; a spec as in `corda_vlm.data.load_records`.
    """

    data: str | dict[str, Any]
    chat_template: Text | None = field(default=None, kw_only=True)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_spec(self.data)


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
    classes: Annotated[list[Text], Items(least=1)] | Text | None = None
    templates: Annotated[list[Text], Items(least=1)] | Text | None = None

    def __post_init__(self) -> None:
        check_options(self)
        parse_spec(self.data)


@dataclass(frozen=True)
class Evaluation(EvalOptions):
    """How models are measured. `data_root` is the experiment's where it is left out.

    Attributes:
        scales: Strengths besides 1 at which every trained model is measured, without training it again
            (WiSE-FT): from 0, the model before training, to 2, as far again as the training went.
    """

    scales: Scales = field(default_factory=list)


@dataclass(frozen=True)
class Variant(MethodOptions, TermOptions):
    """One curve of the trade-off: a method with its options, over its learning rates.

    What is left out of `rank`, `towers` and `targets` is the experiment's. The seeds are the experiment's. Terms that look at
    records of the knowledge take those of `calibration` that covariances are collected of. Anchor and forecast see
    `modules_to_save` where they are sites or hold sites (LLaVA's projector), and not an output layer.

    Attributes:
        learning_rates: Each is trained with every seed.
        method: Key of `METHODS`; None takes the variant's own name.
        scales: None takes the evaluation's.
        training: Options of `TrainOptions` that differ from the experiment's.
    """

    learning_rates: Rates
    method: str | None = None
    rank: Count | None = field(default=None, kw_only=True)  # pyright: ignore[reportIncompatibleVariableOverride]
    seed: int = field(default=0, init=False)
    scales: Scales | None = None
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

    @property
    def identity(self) -> dict[str, Any]:
        """What tells its rows of scores from those of other trainings."""
        return {"method": self.variant, "learning_rate": self.learning_rate, "seed": self.seed}

    def __str__(self) -> str:
        return f"{self.variant}, learning rate {self.learning_rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Experiment(LoadOptions):
    """A model learns a task by several methods; a suite measures what each gained and kept.

    What is trained of the model is in its `dtype` too, adapters are in float32.

    Attributes:
        name: names the folder `runs/<name>`.
        model: as in `load_model`.
        task: what is learned.
        suite: what is measured, as in `load_suite`.
        variants: name -> method, options and learning rates.
        title: heading of the report.
        calibration: the knowledge to keep; needed by methods that take covariances.
        towers: which towers are adapted; None for all.
        targets: patterns of the layers that are adapted, see `SiteOptions`; None for all.
        rank: of the adapters.
        seeds: each learning rate is trained with each of them.
        training: options of `TrainOptions`, learning rate and seed aside.
        gradient: from how much of the new task the gradient of its loss is taken, for methods that start from it.
        evaluation: how models are measured, and at which strengths.
        forecast: log what the anchor would be during every training, also where it has no weight: the change of the
            layers' outputs on the calibration data, which foretells what is forgotten. Beside it, what others say foretells it:
            the KL divergence to the base on the new task and the size of the update; the report ranks them.
        chat_template: of calibration and training, as in `ChatOptions`; the tasks of a suite name their own.
        data_root: the folder that `{data_root}` stands for, here and in the suite.
        plugins: Python files of your own that are run first, e.g. to register a method; see `corda_vlm.plugins`. Paths may be
            relative to the config.
    """

    FORMER: ClassVar[Mapping[str, str]] = {"chat": "chat_template"}

    name: str
    model: Text
    task: NewTask
    suite: Text
    variants: dict[str, Variant]
    title: str | None = None
    calibration: Calibration | None = None
    towers: Names | str | None = None
    targets: Names | str | None = None
    rank: Count = MethodOptions.rank
    seeds: Annotated[list[Seed], Items(least=1, distinct=True)] = field(default_factory=lambda: [0])
    training: dict[str, Any] = field(default_factory=dict)
    gradient: GradientOptions = field(default_factory=GradientOptions)
    evaluation: Evaluation = field(default_factory=Evaluation)
    forecast: bool = False
    chat_template: Text = ChatOptions.chat_template
    data_root: str | None = None
    plugins: Annotated[list[Text], Items(distinct=True)] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen_names("tower", self.towers, TOWERS)
        listed_names("target", self.targets)
        check_name(self.name, "the experiment's name")
        if self.calibration is not None:
            self.chat_of("knowledge")  # raises
        check_variants(self)

    def method_of(self, variant: str) -> str:
        return self.variants[variant].method or variant

    def request(self, variant: str) -> MethodRequest:
        """What a variant asks of its method, but for the covariances."""
        asked = self.variants[variant]
        options = as_keywords(asked, MethodOptions)
        options["rank"] = self.rank if asked.rank is None else asked.rank
        options["towers"] = self.towers if asked.towers is None else asked.towers
        if asked.targets is None and "targets" in METHODS[self.method_of(variant)].takes:
            options["targets"] = self.targets
        return MethodRequest(**options)

    def chat_of(self, data: str) -> ChatOptions:
        """How conversations become tokens where covariances are taken of the "knowledge" or of the new "task"."""
        if data == "task":
            known = option_names(ChatOptions)
            training = renamed(TrainOptions, self.training)
            own = {name: value for name, value in training.items() if name in known}
            return ChatOptions(**{"chat_template": self.chat_template, **own})
        assert self.calibration is not None  # who asks for covariances has one
        own = as_keywords(self.calibration, ChatOptions)
        if own["chat_template"] is None:
            own["chat_template"] = self.chat_template
        return ChatOptions(**own)

    def calibration_options(self, data: str) -> CalibrationOptions:
        """How covariances are taken of the "knowledge", or of the new "task", which has no rounds."""
        assert self.calibration is not None  # who asks for covariances has one
        own = as_keywords(self.calibration, CalibrationOptions)
        for name in ("towers", "targets"):
            if own[name] is None:
                own[name] = getattr(self, name)
        own |= as_keywords(self.chat_of(data), ChatOptions)
        if data == "task":
            own |= {"rounds": 1, "output_side": own["output_side"] and self._feels_task()}
        return CalibrationOptions(**own)

    def _feels_task(self) -> bool:
        """Whether an anchor takes the output side on the new task."""
        asked = map(self.terms_of, self.variants)
        return any(one.anchors_to("task") and one.anchor_output != "none" for one in asked)

    def gradient_options(self, variant: str) -> TaskGradientOptions:
        """The gradient of which loss, on how much of the new task, a variant's method starts from."""
        training = self.train_options(variant, self.variants[variant].learning_rates[0], 0)
        # as many records as were asked for, in batches that fit where the training's do
        records = self.gradient.batches * self.gradient.batch_size
        size = min(self.gradient.batch_size, training.batch_size)
        return TaskGradientOptions(
            **as_keywords(training, LossOptions),
            batches=-(-records // size),
            batch_size=size,
            seed=self.gradient.seed,
            **as_keywords(self.request(variant), SiteOptions),
        )

    @property
    def eval_options(self) -> EvalOptions:
        """How models are measured, with the experiment's own `data_root` where the evaluation has none."""
        own = narrowed(self.evaluation, EvalOptions)
        return own if own.data_root is not None else replace(own, data_root=self.data_root)

    def terms_of(self, variant: str) -> TermOptions:
        """The terms of a variant's loss, with the one that is steered for its budget."""
        calibration = self.calibration
        return narrowed(self.variants[variant], TermOptions).with_budget(
            has_data=calibration is not None,
            has_store=calibration is not None,
            output_side=calibration is not None and calibration.output_side,
        )

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
        where = f"the training of {variant!r}"
        given: dict[str, Any] = {"chat_template": self.chat_template}
        for options in (self.training, self.variants[variant].training):
            given |= {current_name(TrainOptions, n, where): value for n, value in options.items()}
        if (loss := METHODS[self.method_of(variant)].loss) is not None:
            given["loss"] = loss
        for name in ("learning_rate", "seed"):
            if name in given:
                known = set(option_names(TrainOptions)) - {"learning_rate", "seed"}
                raise UnknownNameError(f"option in the training of {variant!r}", name, known)
        return read_options(
            TrainOptions, {**given, "learning_rate": learning_rate, "seed": seed}, where
        )


@dataclass(frozen=True)
class Study:
    """Experiments that belong together, in one YAML file.

    Attributes:
        name: names the folder `runs/<name>`.
        experiments: name -> experiment, which has that name.
        title: heading of the overview.
    """

    name: str
    experiments: Mapping[str, Experiment]
    title: str | None = None


@dataclass(frozen=True)
class Run:
    """An experiment that is to be run, or gone on with.

    Attributes:
        folder: gets the results.
        config: the file that the experiment was read from; paths may be relative to it.
        command: what a person types to get the same results.
        only: names of the variants to train; None for all.
        fresh: delete the folder's former results first.
    """

    experiment: Experiment
    folder: Path
    config: Path
    command: str
    only: Sequence[str] | None = None
    fresh: bool = False

    @property
    def trainings(self) -> list[Training]:
        """Those to do."""
        every = self.experiment.trainings()
        return [t for t in every if self.only is None or t.variant in self.only]


@dataclass(frozen=True)
class StudyRun:
    """A study that is to be run, or gone on with.

    Attributes:
        folder: gets the overview, and a folder for each experiment.
        runs: of those of its experiments that are to be run now.
        only: their names; None for all.
    """

    study: Study
    folder: Path
    runs: Sequence[Run]
    only: Sequence[str] | None = None
