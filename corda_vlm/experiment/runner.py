"""One experiment end to end. Each step writes a file, and a second call goes on from what is there.

base scores → covariance.safetensors → <variant>/plan.json → <variant>/<rate>-<seed>/ → scores.jsonl
→ report.md, report.html, tradeoff.png
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from corda_vlm.adapter.attach import whole_modules
from corda_vlm.anchor import Anchor, anchor_penalty
from corda_vlm.covariance import CovarianceStore, collect_covariance
from corda_vlm.data import (
    Records,
    batch_builder,
    data_warnings,
    load_records,
    make_batches,
    with_root,
)
from corda_vlm.errors import CordaError, ForeignFileError, NotFiniteError
from corda_vlm.evaluation import Cache, Suite, add_result, done, load_suite, read_rows, task_data
from corda_vlm.evaluation.class_names import load_class_names, load_templates, match_labels
from corda_vlm.evaluation.diverged import note_diverged, read_diverged
from corda_vlm.evaluation.measure import measure
from corda_vlm.evaluation.scores import value_text
from corda_vlm.evaluation.suite import Task
from corda_vlm.experiment.checks import check_chosen, check_experiment
from corda_vlm.experiment.folder import check_claim, claim
from corda_vlm.experiment.load import load_experiment
from corda_vlm.experiment.spec import Experiment, Training
from corda_vlm.families import Loaded, load_model
from corda_vlm.families.options import LoadOptions
from corda_vlm.files import read_json, resolve, write_json
from corda_vlm.locks import locks
from corda_vlm.methods import METHODS, MethodRequest
from corda_vlm.options import as_keywords
from corda_vlm.plan import AdapterPlan, check_rank
from corda_vlm.precision import Bf16, takes_bf16
from corda_vlm.progress import note
from corda_vlm.report import summary_table, write_report
from corda_vlm.run_files import BEGUN, CONFIG, DESCRIPTION, MADE_FROM, PLAN, SCORES, TRADEOFF
from corda_vlm.sites import Site, find_sites, lies_in, model_fingerprint, site_shape
from corda_vlm.train import Head, TrainOptions, train
from corda_vlm.train.trained import Trained

_AUTOCAST = "bfloat16 (autocast)"


def _trained_in(variant: str) -> str:
    """The name under which a description tells the precision of a variant that chooses its own."""
    return f"{variant} trained in"


def run(
    config: str | Path,
    *,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    only: Sequence[str] | None = None,
    fresh: bool = False,
    device: str | None = None,
) -> Path:
    """Run an experiment, or go on with it; returns the folder of its results.

    Args:
        config: a YAML file, as given or a shipped one, e.g. "configs/demo.yaml".
        output: the folder; None for runs/<name>.
        overrides: "key=value" pairs, see `load_experiment`.
        only: names of the variants to train; None for all.
        fresh: delete the folder's former results first.
        device: "cpu", "cuda", …, or "auto"; None for what the experiment says.

    Raises:
        CordaError: a config that cannot be, or a folder that holds another experiment's results.
        KeyboardInterrupt: after Ctrl-C, once what is in flight is saved; the same command goes on.
    """
    experiment = load_experiment(config, overrides)
    folder = Path(output) if output is not None else Path("runs") / experiment.name
    return run_experiment(
        experiment,
        folder,
        command=command_of(config, overrides),
        config=resolve(config),
        only=only,
        fresh=fresh,
        device=device,
    )


def command_of(config: str | Path, overrides: Sequence[str]) -> str:
    """What a person types to get the same results."""
    pairs = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["corda-vlm", "run", str(config), *pairs])


@locks("folder", inside=True)
def run_experiment(
    experiment: Experiment,
    folder: Path,
    *,
    command: str,
    config: Path,
    only: Sequence[str] | None = None,
    fresh: bool = False,
    device: str | None = None,
) -> Path:
    """`run` for an experiment that is read already; `command` and `config` are where it came from."""
    check_chosen(only, experiment.variants, "variant")
    check_experiment(experiment, config)
    check_claim(folder, experiment, fresh)
    started = time.perf_counter()
    lab = _Laboratory(experiment, folder, config, device)
    if not fresh:
        lab.check_sources()
    # only now, as whatever could be wrong has been looked at: --fresh deletes
    claim(folder, experiment, fresh)
    lab.begin()
    lab.describe(command)
    lab.measure_base()
    lab.train_all([t for t in experiment.trainings() if only is None or t.variant in only])
    page = write_report(folder)
    print(f"\n{summary_table(folder)}\n")
    print(f"report   {page}\npicture  {folder / TRADEOFF}")
    print(f"scores   {folder / SCORES}\n{(time.perf_counter() - started) / 60:.1f} minutes")
    return folder


class _Laboratory:
    """What all trainings of an experiment share: the base model, the data, the covariances."""

    def __init__(
        self, experiment: Experiment, folder: Path, config: Path, device: str | None
    ) -> None:
        self.experiment, self.folder, self.config = experiment, folder, config
        note(
            f"{experiment.title or experiment.name}: {experiment.model} on {device or experiment.device}, into {folder}"
        )
        self.suite: Suite = load_suite(experiment.suite)
        self.loaded: Loaded = load_model(
            experiment.model,
            **as_keywords(replace(experiment, device=device or experiment.device), LoadOptions),
        )
        self.cache = Cache()
        self.task_data = self.load(experiment.task.data)
        self._check_conversations()
        self._check_variants()
        self.classes, self.templates = self._prompts()
        self.stores: dict[str, CovarianceStore] = {}
        self.plans: dict[str, AdapterPlan] = {}
        self.sources = self._sources()
        self.bf16: dict[str, bool] = {}

    def _check_variants(self) -> None:
        """Refuse what a variant asks of layers that the model has not."""
        model, experiment = self.loaded.model, self.experiment
        sites = [site.name for site in find_sites(model, towers=experiment.towers)]
        shapes = {name: site_shape(model, name) for name in sites}
        for name, variant in experiment.variants.items():
            whole_modules(model, variant.modules_to_save, sites)
            if METHODS[experiment.method_of(name)].has_rank and not variant.dynamic_rank:
                check_rank(shapes, experiment.request(name).rank)

    def begin(self) -> None:
        """Write what the results are made from, and settle in which precision to go on."""
        experiment = self.experiment
        write_json(self.folder / MADE_FROM, self.sources)
        wanted: dict[str, Bf16] = {
            "trained in": experiment.training.get("bf16", "auto"),
            "measured in": experiment.evaluation.bf16,
        }
        for name, variant in experiment.variants.items():
            if "bf16" in variant.training:
                wanted[_trained_in(name)] = variant.training["bf16"]
        begun = self._begun()
        self.bf16 = {
            fact: self._bf16(bf16, begun.get(fact, "auto")) for fact, bf16 in wanted.items()
        }

    def _sources(self) -> dict[str, str]:
        """Fingerprints of what the results are made from."""
        root = str(self.experiment.data_root or self.suite.data_root)
        return {
            "the model": model_fingerprint(self.loaded.model),
            "the task's data": self.task_data.fingerprint,
            **{f"the suite's task {task.name!r}": _task_digest(task) for task in self.suite.tasks},
            **{
                f"the data of task {task.name!r}": task_data(task, root, self.cache).fingerprint
                for task in self.suite.tasks
            },
        }

    def check_sources(self) -> None:
        """Refuse to add to scores of another model, other training data or other tasks under the same names."""
        path = self.folder / MADE_FROM
        former = read_json(path, "list of sources") if path.is_file() else {}
        if not isinstance(former, dict):
            raise ForeignFileError(f"{path} is no list of sources; give another folder, or --fresh")
        # a task that is new to the suite is measured on all models, finished ones included
        changed = [name for name, digest in former.items() if self.sources.get(name) != digest]
        if changed:
            raise CordaError(
                f"{self.folder} holds results of {', '.join(changed)} as it was before; it has changed since. Give "
                "another folder with --output, or --fresh to delete them and begin anew"
            )

    def _begun(self) -> dict[str, Bf16]:
        """In which precision the folder's results were made, fact by fact; "auto" where nothing says."""
        path = self.folder / DESCRIPTION
        told = read_json(path, "description of a run") if path.is_file() else None
        told = told if isinstance(told, dict) else {}
        config = load_experiment((self.folder / CONFIG).resolve())
        # before there was auto, what a config left out was false, and no description named a precision
        left_out: Bf16 = False if told and "measured in" not in told else "auto"
        begun: dict[str, Bf16] = {
            "trained in": config.training.get("bf16", left_out),
            "measured in": config.evaluation.bf16,
        }
        for name, variant in config.variants.items():
            if "bf16" in variant.training:
                begun[_trained_in(name)] = variant.training["bf16"]
        return begun | {fact: told[fact] == _AUTOCAST for fact in begun if fact in told}

    def _bf16(self, wanted: Bf16, begun: Bf16) -> bool:
        """Whether to run under bfloat16; where the config leaves it open as the folder began, on whatever machine."""
        weight = next(self.loaded.model.parameters())
        former = None if begun == "auto" else begun
        return takes_bf16(wanted, weight.device, former=former, weights=weight.dtype)

    def _check_conversations(self) -> None:
        """Refuse what a model that generates text cannot read, before anything is measured."""
        if self.loaded.family.generative is None:
            return
        batch_builder(self.task_data, self.loaded.processor, chat=self.experiment.chat_of("task"))
        if self.experiment.calibration is not None:
            batch_builder(
                self.knowledge, self.loaded.processor, chat=self.experiment.chat_of("knowledge")
            )

    @cached_property
    def knowledge(self) -> Records:
        """The records that stand for the knowledge to keep."""
        assert self.experiment.calibration is not None  # checked by Experiment
        return self.load(self.experiment.calibration.data)

    def load(self, spec: str | Mapping[str, Any]) -> Records:
        """The records of `spec`, which may be relative to the config or to `data_root`."""
        root = self.experiment.data_root or self.suite.data_root
        return load_records(with_root(spec, root), beside=self.config)

    def _prompts(self) -> tuple[Sequence[str] | None, Sequence[str] | None]:
        """Class names in the order of the task's labels, and templates; None for the training's own."""
        task, classes = self.experiment.task, None
        if task.classes is not None:
            wanted = task.classes
            if isinstance(wanted, str):
                wanted = load_class_names(wanted, self.config)
            labels = match_labels(wanted, self.task_data.class_names, what="the task's data")
            order = range(len(labels.names)) if labels.remap is None else labels.remap
            classes = [labels.names[index] for index in order]
        return classes, task.templates and load_templates(task.templates, self.config)

    def describe(self, command: str) -> None:
        """What the report tells about how the numbers came about."""
        experiment = self.experiment
        write_json(
            self.folder / DESCRIPTION,
            {
                "title": experiment.title or experiment.name,
                "command": command,
                "model": experiment.model,
                "learnt from": f"{len(self.task_data):,} records of {experiment.task.data}",
                "suite": f"{self.suite.name}, version {self.suite.version}",
                "seeds": experiment.seeds,
                "machine": _machine(self.loaded.model),
                **{fact: _AUTOCAST if on else experiment.dtype for fact, on in self.bf16.items()},
                "versions": {
                    name: version(name) for name in ("corda-vlm", "torch", "transformers", "peft")
                },
            },
        )

    # -------------------------------------------------------------- measuring

    def measure_base(self) -> None:
        note("the model before training")
        self._measure(self.loaded.model, tell=True, method="base")

    def _measure(
        self,
        model: nn.Module,
        *,
        head: Head | None = None,
        scale: float = 1.0,
        tell: bool = False,
        **labels: Any,
    ) -> list[dict[str, Any]]:
        """Measure what is not measured yet; rows are written, and told, task by task. Returns all rows of this model."""
        path = self.folder / SCORES
        identity = {key: labels.get(key) for key in ("method", "learning_rate", "seed")}
        identity["scale"] = scale
        finished = done(read_rows(path, missing_ok=True), **identity)  # type: ignore[arg-type]
        remaining = self.suite.remaining(finished)
        results = measure(
            model,
            self.suite,
            processor=self.loaded.processor,
            tasks=remaining,
            data_root=self.experiment.data_root,
            batch_size=self.experiment.evaluation.batch_size,
            bf16=self.bf16["measured in"],
            cache=self.cache,
            head=head,
            show_progress=True,
        )
        for result in results if remaining else ():
            add_result(path, result, run=self.experiment.name, scale=scale, **labels)
            if tell:
                note(f"  {result}")
        return [
            row
            for row in read_rows(path)
            if all(row[key] == value for key, value in identity.items())
        ]

    def _is_measured(self, training: Training, rows: Sequence[Mapping[str, Any]]) -> bool:
        return not any(
            self.suite.remaining(
                done(
                    rows,
                    method=training.variant,
                    learning_rate=training.learning_rate,
                    seed=training.seed,
                    scale=scale,
                )
            )
            for scale in (1.0, *self.experiment.scales_of(training.variant))
        )

    # -------------------------------------------------------------- covariances

    def store(self, of: str) -> CovarianceStore:
        """The covariances of the "knowledge" to keep or of the new "task", from disk if they are there."""
        if of not in self.stores:
            note(f"covariances of the {of}")
            calibration = self.experiment.calibration
            assert calibration is not None  # checked by Experiment
            data = self.task_data if of == "task" else self.knowledge
            batches = make_batches(
                data,
                self.loaded.processor,
                batch_size=calibration.batch_size,
                shuffle=True,
                limit=calibration.samples,
                towers=self.experiment.towers,
                chat=self.experiment.chat_of(of),
            )
            name = "covariance" if of == "knowledge" else f"covariance-{of}"
            self.stores[of] = collect_covariance(
                self.loaded.model,
                batches,
                self._sites(of),
                precision=calibration.precision,
                tokens=calibration.tokens,
                blockwise=calibration.blockwise,
                rounds=calibration.rounds if of == "knowledge" else 1,
                path=self.folder / f"{name}.safetensors",
            )
            for told in data_warnings(batches.builder):
                note(told)
        return self.stores[of]

    def _sites(self, of: str) -> list[Site]:
        """The layers of the chosen towers; of the knowledge also those that a variant trains whole and looks at."""
        model, experiment = self.loaded.model, self.experiment
        adapted = find_sites(model, towers=experiment.towers)
        if of != "knowledge" or self.loaded.family.generative is None:
            return adapted  # batches for one tower of a CLIP do not reach another
        whole = [
            name
            for variant in experiment.variants.values()
            if variant.anchor or experiment.forecast
            for name in variant.modules_to_save
        ]
        return [s for s in find_sites(model) if s in adapted or lies_in(s.name, whole)]

    # -------------------------------------------------------------- training

    def _request(self, name: str) -> MethodRequest:
        """What a variant asks of its method, with the variant's plan, which is made once and kept as a file."""
        method = METHODS[self.experiment.method_of(name)]
        request = replace(
            self.experiment.request(name),
            # methods that know one of the two take it as `store`, whichever it is
            store=self.store(method.covariances[0]) if method.covariances else None,
            task_store=self.store("task") if len(method.covariances) > 1 else None,
        )
        if method.plan is None:
            return request
        if name not in self.plans:
            path = self.folder / name / PLAN
            if path.is_file():
                plan = AdapterPlan.load(path, model=self.loaded.model)
                made_from = (plan.data_fingerprint, plan.task_fingerprint)
                stores = (request.store, request.task_store)
                if any(
                    store is not None and store.data_fingerprint != made
                    for store, made in zip(stores, made_from, strict=True)
                ):
                    raise ForeignFileError(
                        f"{path} was made from other covariances than this experiment's; delete it, or run with --fresh"
                    )
            else:
                plan = method.plan(self.loaded.model, request)
                plan.save(path)
            self.plans[name] = plan
        return replace(request, plan=self.plans[name])

    def train_all(self, trainings: Sequence[Training]) -> None:
        rows = read_rows(self.folder / SCORES)
        diverged = read_diverged(self.folder)
        gone = [t for t in trainings if (t.variant, t.learning_rate, t.seed) in diverged]
        left = [t for t in trainings if t not in gone and not self._is_measured(t, rows)]
        if len(left) < len(trainings):
            note(
                f"{len(trainings) - len(left)} of {len(trainings)} trainings are finished already"
                + (f", {len(gone)} of them diverged" if gone else "")
            )
        started = time.perf_counter()
        for number, training in enumerate(left, start=1):
            try:
                told = self._train(training)
            except NotFiniteError as error:  # the others of a sweep go on
                note_diverged(
                    self.folder,
                    method=training.variant,
                    learning_rate=training.learning_rate,
                    seed=training.seed,
                    reason=str(error),
                )
                told = f"diverged. {error}"
            passed = time.perf_counter() - started
            ahead = passed / number * (len(left) - number) / 60
            note(f"[{number}/{len(left)}] {training}: {told}; about {ahead:.1f} min left")

    def _options(self, training: Training) -> TrainOptions:
        """With the precision that the folder began with, unless the training has begun, which then knows its own."""
        name = training.variant
        options = self.experiment.train_options(name, training.learning_rate, training.seed)
        if options.bf16 != "auto" or (self.folder / training.folder / BEGUN).is_file():
            return options
        return replace(options, bf16=self.bf16.get(_trained_in(name), self.bf16["trained in"]))

    def _train(self, training: Training) -> str:
        experiment = self.experiment
        method = METHODS[training.method]
        folder = self.folder / training.folder
        request = replace(self._request(training.variant), seed=training.seed)
        # a copy: adapters and full fine-tuning change the model in place
        prepared = method.prepare(copy.deepcopy(self.loaded.model), request)
        result = train(
            prepared.model,
            self.task_data,
            self.loaded.processor,
            options=self._options(training),
            output_dir=folder,
            classes=self.classes,
            templates=self.templates,
            anchor=(anchor := self._anchor(training, prepared.model)),
            anchor_weight=experiment.variants[training.variant].anchor,
        )
        facts: dict[str, Any] = {
            "method": training.variant,
            "learning_rate": training.learning_rate,
            "seed": training.seed,
            "steps": result.steps,
            "seconds": result.seconds,
            "trainable": prepared.trainable,
        }
        if anchor is not None:
            with torch.no_grad():
                facts["forecast"] = float(anchor())
            if not math.isfinite(facts["forecast"]):
                raise NotFiniteError(f"the forecast of forgetting is {facts['forecast']}")
        trained = Trained(prepared.model, result.head and result.head.cpu(), self.loaded.model)
        measured = []
        for scale in (1.0, *experiment.scales_of(training.variant)):
            with trained.at_scale(scale) as head:
                rows = self._measure(trained.model, head=head, scale=scale, **facts)
            measured.append(rows)
        first = {row["task"]: row for row in reversed(measured[0]) if row["role"] != "selection"}
        told = ", ".join(
            f"{name} {value_text(row['metric'], row['value'])}"
            for name, row in sorted(first.items())
        )
        return f"{told} ({result.seconds:.0f} s, {result.samples_per_second:.3g} records/s)"

    def _anchor(self, training: Training, model: nn.Module) -> Anchor | None:
        """The penalty of a variant that has one; or if a forecast is wanted, the same to be logged only."""
        wanted = self.experiment.variants[training.variant].anchor or self.experiment.forecast
        # what a probe trains changes no layer
        if not wanted or training.method == "linear-probe":
            return None
        return anchor_penalty(model, self.store("knowledge"))


def _task_digest(task: Task) -> str:
    """Of what a task measures, wherever it is written."""
    told = {**asdict(task), "source": None}
    if not task.options:  # tasks had none when folders that may still be gone on with were begun
        del told["options"]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _machine(model: nn.Module) -> str:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        if cpuinfo.is_file()
        else []
    )
    return models[0] if models else platform.processor() or platform.machine()
