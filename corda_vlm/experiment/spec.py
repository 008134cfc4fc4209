"""What one experiment is: a YAML file of `configs/`, checked as it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

from corda_vlm.anchor.options import AnchorOptions
from corda_vlm.covariance.options import CalibrationOptions
from corda_vlm.data.spec import parse_spec
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.evaluation.options import EvalOptions
from corda_vlm.families.options import TOWERS, LoadOptions, Names, chosen_names
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
)
from corda_vlm.run_files import PATTERNS
from corda_vlm.train.options import TrainOptions

Scales = Annotated[list[float], Items(distinct=True)]
Rates = Annotated[list[Positive], Items(distinct=True)]


@dataclass(frozen=True)
class Calibration(CalibrationOptions):
    """The data whose second moments orient the adapters, and how they are collected.

    What is left out of `towers` and `chat_template` is the experiment's. `rounds` are of the knowledge; `tokens` of the
    covariances of the new task too.

    Attributes:
        data: What stands for the knowledge to keep; a spec as in `corda_vlm.data.load_records`.
    """

    data: str | dict[str, Any]

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
            (WiSE-FT): 0 is the model before training.
    """

    scales: Scales = field(default_factory=list)


@dataclass(frozen=True)
class Variant(MethodOptions, AnchorOptions):
    """One curve of the trade-off: a method with its options, over its learning rates.

    What is left out of `rank` and `towers` is the experiment's. The seeds are the experiment's. Anchor and forecast see
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

    def __str__(self) -> str:
        return f"{self.variant}, learning rate {self.learning_rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Experiment(LoadOptions):
    """A model learns a task by several methods; a suite measures what each gained and kept.

    What is trained of the model is in its `dtype` too, adapters are in float32.

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
        chat_template: of calibration and training, as in `ChatOptions`; the tasks of a suite name their own.
        data_root: the folder that `{data_root}` stands for, here and in the suite.
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
    rank: Count = MethodOptions.rank
    seeds: Annotated[list[Seed], Items(least=1, distinct=True)] = field(default_factory=lambda: [0])
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    forecast: bool = False
    chat_template: Text = ChatOptions.chat_template
    data_root: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen_names("tower", self.towers, TOWERS)
        check_name(self.name, "the experiment's name")
        if not self.variants:
            raise CordaError(f"experiment {self.name!r} has no variants: nothing to train")
        if self.calibration is not None:
            self.chat_of("knowledge")  # raises
        for name in self.variants:
            self._check_variant(name)
        lowered: dict[str, str] = {}
        for name in self.variants:
            if (other := lowered.setdefault(name.casefold(), name)) != name:
                raise CordaError(
                    f"the variants {other!r} and {name!r} would share a folder where file systems do not tell capital "
                    "from small letters; rename one of them"
                )

    def _check_variant(self, name: str) -> None:
        if name == "base":
            raise CordaError("a variant cannot be called 'base': that is the model before training")
        check_name(name, "a variant's name")
        if any(fnmatchcase(name.casefold(), pattern) for pattern in PATTERNS):
            raise CordaError(
                f"a variant cannot be called {name!r}: a run writes a file of that name beside its variants' folders"
            )
        variant = self.variants[name]
        method = METHODS.get(self.method_of(name))
        if method is None:
            raise UnknownNameError(f"method of variant {name!r}", self.method_of(name), METHODS)
        if not variant.learning_rates:
            raise CordaError(f"variant {name!r} has no learning rates")
        self._check_calibration(name)
        for scale in self.scales_of(name):
            if not 0 < scale < 1:
                raise CordaError(
                    f"variant {name!r}: scales hold {scale}; give strengths between 0 (the base model) and 1 (as "
                    "trained), both of which are measured anyway"
                )
        method.check_options(self.request(name))
        self._check_training(name)
        if method.name == "linear-probe" and variant.anchor:
            raise CordaError(
                f"variant {name!r} changes no layer, so there is nothing to anchor; leave its anchor out"
            )

    def _check_calibration(self, name: str) -> None:
        variant, method = self.variants[name], METHODS[self.method_of(name)]
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
        if variant.dynamic_covariance and self.calibration and self.calibration.rounds < 2:
            raise CordaError(
                f"variant {name!r} chooses among calibration rounds, and there is one; give calibration.rounds, e.g. 4, "
                "or leave dynamic_covariance out"
            )

    def _check_training(self, name: str) -> None:
        variant = self.variants[name]
        folders = [Training(name, "", rate, 0).folder for rate in variant.learning_rates]
        if len(set(folders)) < len(folders):
            raise CordaError(
                f"variant {name!r}: learning rates that are equal to six digits would share a folder; "
                "give one of them"
            )
        format = parse_spec(self.task.data).format
        options = [self.train_options(name, rate, 0) for rate in variant.learning_rates]
        (loss,) = {one.loss_for(format) for one in options}
        self._check_loss(name, loss)
        if loss == "linear" and self.scales_of(name):
            raise CordaError(
                f"variant {name!r} trains a linear head, which has no counterpart in the base model to be scaled "
                "towards; give it `scales: []`"
            )
        if variant.modules_to_save and self.scales_of(name):
            raise CordaError(
                f"variant {name!r} trains modules whole, which cannot be scaled; give it `scales: []`"
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
                f"variant {variant!r} has the next_token loss; say which format: the task's data has, e.g. llava, chat, qa or alpaca"
            )

    def method_of(self, variant: str) -> str:
        return self.variants[variant].method or variant

    def request(self, variant: str) -> MethodRequest:
        """What a variant asks of its method, but for the covariances."""
        asked = self.variants[variant]
        options = as_keywords(asked, MethodOptions)
        options["rank"] = self.rank if asked.rank is None else asked.rank
        options["towers"] = self.towers if asked.towers is None else asked.towers
        return MethodRequest(**options)

    def chat_of(self, data: str) -> ChatOptions:
        """How conversations become tokens where covariances are taken of the "knowledge" or of the new "task"."""
        if data == "task":
            own = {TrainOptions.FORMER.get(n, n): value for n, value in self.training.items()}
            known = option_names(ChatOptions)
            own = {name: value for name, value in own.items() if name in known}
            return ChatOptions(**{"chat_template": self.chat_template, **own})
        assert self.calibration is not None  # who asks for covariances has one
        chat = narrowed(self.calibration, ChatOptions)
        given = chat.chat_template != ChatOptions.chat_template
        return chat if given else replace(chat, chat_template=self.chat_template)

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
        if self.method_of(variant) == "linear-probe":
            given["loss"] = "linear"  # there is nothing else to train
        for name in ("learning_rate", "seed"):
            if name in given:
                known = set(option_names(TrainOptions)) - {"learning_rate", "seed"}
                raise UnknownNameError(f"option in the training of {variant!r}", name, known)
        return read_options(
            TrainOptions, {**given, "learning_rate": learning_rate, "seed": seed}, where
        )
