"""One experiment end to end. Each step writes a file, and a second call goes on from what is there.

base scores → covariance.safetensors → <variant>/plan.json → <variant>/<rate>-<seed>/ → scores.jsonl
→ report.md, report.html, tradeoff.png
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from corda_vlm.adapter.wrapped.full_modules import check_full_modules
from corda_vlm.covariance import CovarianceStore, GradientStore
from corda_vlm.data import Records, batch_builder
from corda_vlm.errors import CordaError, NotFiniteError
from corda_vlm.evaluation import Cache, load_suite, read_rows
from corda_vlm.evaluation.diverged import note_diverged, read_diverged
from corda_vlm.evaluation.measure import tasks_with_data
from corda_vlm.evaluation.score_file import rows_of, tasks_left
from corda_vlm.evaluation.scores import BASE, value_text
from corda_vlm.experiment import steps
from corda_vlm.experiment.folder import check_claim, claim
from corda_vlm.experiment.origin import (
    KNOWLEDGE_DATA,
    MEASURED_IN,
    PROBE,
    check_sources,
    describe,
    machine_of,
    options_of,
    settle_precisions,
)
from corda_vlm.experiment.spec import Run, Training
from corda_vlm.families import load_model
from corda_vlm.families.options import LoadOptions, SiteOptions
from corda_vlm.files import write_json
from corda_vlm.locks import locked
from corda_vlm.methods import METHODS, MethodRequest
from corda_vlm.options import as_keywords, narrowed
from corda_vlm.plan import AdapterPlan, check_rank
from corda_vlm.plugins import named_in_command, run_plugins
from corda_vlm.progress import note
from corda_vlm.report import summary_table, write_report
from corda_vlm.run_files import GRADIENTS, MADE_FROM, PLAN, SCORES, TRADEOFF
from corda_vlm.sites import find_sites, model_fingerprint, site_shapes
from corda_vlm.train import task_gradient
from corda_vlm.train.budget.check import check_budget
from corda_vlm.train.terms.make import KnowledgeData, check_terms
from corda_vlm.train.terms.options import TermOptions
from corda_vlm.train.trained import Trained

KNOWLEDGE, TASK = "knowledge", "task"
"""Whose covariances there are: of the knowledge to keep, and of the new task."""


Rows = Sequence[Mapping[str, Any]]
"""Of scores."""


def run_experiment(run: Run, *, device: str | None = None) -> Path:
    """Run an experiment, or go on with it, and write its report; returns its folder.

    Args:
        run: what to run, which `check_run` let pass.
        device: "cpu", "cuda", …, or "auto"; None for what the experiment says.

    Raises:
        CordaError: something that cannot be, or a folder that holds another experiment's results.
        KeyboardInterrupt: after Ctrl-C, once what is in flight is saved; the same command goes on.
    """
    started = time.perf_counter()
    with locked(run.folder, inside=True):
        # another process may have written there since it was looked at
        check_claim(run.folder, run.experiment, run.fresh)
        runner = ExperimentRunner(run, device)
        runner.check()
        runner.begin()
        runner.measure_base()
        runner.train_all()
        page = write_report(run.folder)
    print(f"\n{summary_table(run.folder)}\n")
    print(f"report   {page}\npicture  {run.folder / TRADEOFF}")
    print(f"scores   {run.folder / SCORES}\n{(time.perf_counter() - started) / 60:.1f} minutes")
    return run.folder


class ExperimentRunner:
    """The steps of one experiment, with what its trainings share: the base model, the data, covariances and plans."""

    def __init__(self, run: Run, device: str | None) -> None:
        experiment = run.experiment
        self.run, self.experiment, self.folder = run, experiment, run.folder
        title = experiment.title or experiment.name
        load = replace(narrowed(experiment, LoadOptions), device=device or experiment.device)
        place = "" if load.device == "auto" else f" on {load.device}"
        note(f"{title}: {experiment.model}{place}, into {run.folder}")
        self.suite = load_suite(experiment.suite)
        self.loaded = load_model(experiment.model, **as_keywords(load, LoadOptions))
        self.cache = Cache()
        self.stores: dict[str, CovarianceStore] = {}
        self.gradients: dict[str, GradientStore] = {}
        self.plans: dict[str, AdapterPlan] = {}
        self.precisions: dict[str, bool] = {}
        self.probes: dict[str, Records] = {}

    # -------------------------------------------------------------- data

    @property
    def data_root(self) -> str:
        return str(self.experiment.data_root or self.suite.data_root)

    @cached_property
    def task_data(self) -> Records:
        """The records to learn from."""
        return self._load(self.experiment.task.data)

    @cached_property
    def knowledge(self) -> Records:
        """The records that stand for the knowledge to keep."""
        assert self.experiment.calibration is not None  # checked by Experiment
        return self._load(self.experiment.calibration.data)

    @cached_property
    def knowledge_data(self) -> KnowledgeData | None:
        """The records of the knowledge for the terms that look at such: those that covariances are collected of."""
        if self.experiment.calibration is None:
            return None
        options = self.experiment.calibration_options(KNOWLEDGE)
        return KnowledgeData(
            self.knowledge,
            samples=options.samples,
            seed=options.seed,
            chat=self.experiment.chat_of(KNOWLEDGE),
            cache=self.folder,
        )

    def probe(self, variant: str) -> Records | None:
        """The records that tell what a variant keeps; None for such of the knowledge's as nothing else looks at."""
        spec = self.experiment.variants[variant].probe
        if spec is None:
            return None
        key = repr(spec)
        if key not in self.probes:
            self.probes[key] = self._load(spec)
        return self.probes[key]

    @cached_property
    def prompts(self) -> tuple[Sequence[str] | None, Sequence[str] | None]:
        """Class names in the order of the task's labels, and templates."""
        task = self.experiment.task
        return steps.training_prompts(
            self.task_data, task.classes, task.templates, beside=self.run.config
        )

    @cached_property
    def sources(self) -> dict[str, str]:
        """Fingerprints of what the results are made from."""
        return {
            "the model": model_fingerprint(self.loaded.model),
            **run_plugins(
                self.experiment.plugins, self.run.config, run_plugins(named_in_command())
            ),
            "the task's data": self.task_data.fingerprint,
            **self._knowledge_source(),
            **{f"the suite's task {name!r}": digest for name, (digest, _) in self.tasks.items()},
            **{f"the data of task {name!r}": data for name, (_, data) in self.tasks.items()},
        }

    def _knowledge_source(self) -> dict[str, str]:
        """The fingerprint of the records that a term of a loss looks at; those of covariances are noted in their file."""
        variants = self.experiment.variants
        probes = {
            f"{PROBE}{name!r}": probe.fingerprint
            for name in variants
            if (probe := self.probe(name)) is not None
        }
        if not any(self._looks_at_records(name) for name in variants):
            return probes
        return {KNOWLEDGE_DATA: self.knowledge.fingerprint, **probes}

    @cached_property
    def tasks(self) -> dict[str, tuple[str, str]]:
        """The tasks that are measured, with the digest of each and the fingerprint of its data."""
        measured = tasks_with_data(self.suite, self.experiment.eval_options, self.cache)
        return {task.name: (task.digest, data.fingerprint) for task, data in measured}

    def _load(self, spec: Any) -> Records:
        return steps.load_data(spec, data_root=self.data_root, beside=self.run.config)

    # -------------------------------------------------------------- before anything is written

    def check(self) -> None:
        """Raise what only the model and the data themselves show to be wrong; nothing is written."""
        self._check_conversations()
        self._check_variants()
        _ = self.prompts
        sources = self.sources
        if not self.run.fresh:
            check_sources(self.folder, sources)

    def _check_conversations(self) -> None:
        """Refuse what a model that generates text cannot read."""
        if self.loaded.family.generative is None:
            return
        chat = self.experiment.chat_of
        batch_builder(self.task_data, self.loaded.processor, chat=chat(TASK))
        if self.experiment.calibration is not None:
            batch_builder(self.knowledge, self.loaded.processor, chat=chat(KNOWLEDGE))

    def _check_variants(self) -> None:
        """Refuse what a variant asks of layers that the model has not."""
        model, experiment = self.loaded.model, self.experiment
        for name, variant in experiment.variants.items():
            method, request = METHODS[experiment.method_of(name)], experiment.request(name)
            sites = find_sites(model, **as_keywords(request, SiteOptions))
            names = [site.name for site in sites]
            check_full_modules(model, variant.modules_to_save, names)
            if method.has_rank and not variant.dynamic_rank:
                check_rank(site_shapes(model, names), request.rank, method.name)
            looked_at = [KNOWLEDGE] if self._looks_at_knowledge(name) else []
            looked_at += [TASK] if self._looks_at_task(name) else []
            terms = experiment.terms_of(name)
            if terms.needs_data:
                check_terms(terms, self.loaded.family, self.knowledge, f"variant {name!r}: ")
            if terms.keep is not None:
                self._check_budget(name, terms)
            for of in sorted({*method.covariances, *looked_at}):
                self._check_calibrated(name, names, of)

    def _check_calibrated(self, variant: str, sites: Sequence[str], of: str) -> None:
        """Refuse a variant of which a layer would have no covariance."""
        options = self.experiment.calibration_options(of)
        calibrated = {site.name for site in steps.calibrated_sites(self.loaded, options)}
        if left_out := [name for name in sites if name not in calibrated]:
            raise CordaError(
                f"variant {variant!r} adapts {left_out[0]}, and the covariances of the {of} are taken of other layers; let "
                "the towers, roles and targets of `calibration` hold those of the variant"
            )

    def _check_budget(self, variant: str, terms: TermOptions) -> None:
        """Refuse a budget that the model, or the number of the probe's records, cannot tell of."""
        try:
            known = self.knowledge_data if self._looks_at_records(variant) else None
            _, probe = steps.probed(terms, known, self.probe(variant), self.task_data)
            check_budget(terms, self.loaded.family, len(probe))
        except CordaError as error:
            raise CordaError(f"variant {variant!r}: {error}") from None

    def begin(self) -> None:
        """Make the folder this run's, which deletes former results if they are not wanted, and say what it is."""
        model = self.loaded.model
        claim(self.folder, self.experiment, self.run.fresh)
        write_json(self.folder / MADE_FROM, self.sources)
        self.precisions = settle_precisions(self.experiment, self.folder, model)
        describe(
            self.folder,
            self.experiment,
            command=self.run.command,
            records=len(self.task_data),
            suite=self.suite,
            machine=machine_of(model),
            precisions=self.precisions,
        )

    # -------------------------------------------------------------- measuring

    def measure_base(self) -> None:
        """Measure the model before training."""
        note("the model before training")
        self._measure(Trained(self.loaded.model), 1.0, {"method": BASE}, say=True)

    def _measure(
        self,
        trained: Trained,
        scale: float,
        identity: Mapping[str, Any],
        *,
        say: bool = False,
        **facts: Any,
    ) -> None:
        """Measure at one strength what is not measured yet; rows are written task by task."""
        path, experiment = self.folder / SCORES, self.experiment
        tasks = self._tasks_left(read_rows(path, missing_ok=True), identity, scale)
        if not tasks:
            return
        measured = steps.measure_into(
            path,
            trained,
            self.suite,
            replace(experiment.eval_options, tasks=tasks, bf16=self.precisions[MEASURED_IN]),
            scale=scale,
            about={"run": experiment.name, **identity, **facts},
            processor=self.loaded.processor,
            cache=self.cache,
        )
        for result, _ in measured:
            if say:
                note(f"  {result}")

    def _tasks_left(self, rows: Rows, identity: Mapping[str, Any], scale: float) -> list[str]:
        """Names of the suite's tasks that there are no scores of yet, of one model at one strength."""
        return tasks_left(self.suite, rows, self.tasks, **identity, scale=scale)

    # -------------------------------------------------------------- covariances and plans

    def store(self, of: str) -> CovarianceStore:
        """The covariances of `KNOWLEDGE` or `TASK`, from disk if they are there."""
        if of not in self.stores:
            self.stores[of] = self._calibrate(of)
        return self.stores[of]

    def _calibrate(self, of: str) -> CovarianceStore:
        note(f"covariances of the {of}")
        name = "covariance" if of == KNOWLEDGE else f"covariance-{of}"
        return steps.calibrate(
            self.loaded,
            self.knowledge if of == KNOWLEDGE else self.task_data,
            self.folder / f"{name}.safetensors",
            self.experiment.calibration_options(of),
            modules=self._anchored_modules() if of == KNOWLEDGE else (),
        )

    def gradient(self, variant: str) -> GradientStore:
        """The gradient of the new task's loss, as a variant trains it; from disk if it is there."""
        options = self.experiment.gradient_options(variant)
        digest = hashlib.sha256(repr(options).encode()).hexdigest()[:8]
        if digest not in self.gradients:
            note("gradient of the task's loss")
            classes, templates = self.prompts
            self.gradients[digest] = task_gradient(
                self.loaded.model,
                self.task_data,
                self.loaded.processor,
                options=options,
                classes=classes,
                templates=templates,
                path=self.folder / GRADIENTS.replace("*", digest),
            )
        return self.gradients[digest]

    def _anchored_modules(self) -> list[str]:
        """The modules that a variant trains whole, and whose outputs an anchor or a forecast looks at."""
        return [
            module
            for name, variant in self.experiment.variants.items()
            if self.experiment.terms_of(name).anchor or self.experiment.forecast
            for module in variant.modules_to_save
        ]

    def _request(self, name: str) -> MethodRequest:
        """What a variant asks of its method, with the variant's plan, which is made once and kept as a file."""
        method = METHODS[self.experiment.method_of(name)]
        request = replace(
            self.experiment.request(name),
            # methods that know one of the two take it as `store`, whichever it is
            store=self.store(method.covariances[0]) if method.covariances else None,
            task_store=self.store(TASK) if len(method.covariances) > 1 else None,
            gradient=self.gradient(name)
            if method.takes_gradient(self.experiment.request(name))
            else None,
        )
        if (make := method.plan) is None:
            return request
        if name not in self.plans:
            self.plans[name] = steps.load_or_write_plan(
                self.folder / name / PLAN,
                lambda: make(self.loaded.model, request),
                model=self.loaded.model,
                store=request.store,
                task=request.gradient if request.task_store is None else request.task_store,
            )
        return replace(request, plan=self.plans[name])

    # -------------------------------------------------------------- training

    def train_all(self) -> None:
        """Train and measure what is not finished yet; one that diverges stops no other."""
        left = self._unfinished(self.run.trainings)
        started = time.perf_counter()
        for number, training in enumerate(left, start=1):
            try:
                outcome = self._train(training)
            except NotFiniteError as error:
                note_diverged(self.folder, **training.identity, reason=str(error))
                outcome = f"diverged. {error}"
            passed = time.perf_counter() - started
            ahead = passed / number * (len(left) - number) / 60
            note(f"[{number}/{len(left)}] {training}: {outcome}; about {ahead:.1f} min left")

    def _unfinished(self, trainings: Sequence[Training]) -> list[Training]:
        """The trainings that are neither measured at all their strengths nor known to diverge."""
        rows, diverged = read_rows(self.folder / SCORES), read_diverged(self.folder)
        gone = [t for t in trainings if tuple(t.identity.values()) in diverged]
        left = [t for t in trainings if t not in gone and self._lacks_scores(t, rows)]
        if len(left) < len(trainings):
            note(
                f"{len(trainings) - len(left)} of {len(trainings)} trainings are finished already"
                + (f", {len(gone)} of them diverged" if gone else "")
            )
        return left

    def _lacks_scores(self, training: Training, rows: Rows) -> bool:
        return any(
            self._tasks_left(rows, training.identity, scale) for scale in self._scales(training)
        )

    def _scales(self, training: Training) -> tuple[float, ...]:
        return tuple(dict.fromkeys((1.0, *self.experiment.scales_of(training.variant))))

    def _train(self, training: Training) -> str:
        """Train and measure; returns what it gave, in a line."""
        method, variant = METHODS[training.method], self.experiment.variants[training.variant]
        request = replace(self._request(training.variant), seed=training.seed)
        # a copy: adapters and full fine-tuning change the model in place
        prepared = method.prepare(copy.deepcopy(self.loaded.model), request)
        classes, templates = self.prompts
        result, predicted = steps.train_anchored(
            prepared.model,
            self.task_data,
            self.loaded.processor,
            options=options_of(training, self.experiment, self.folder, self.precisions),
            output_dir=self.folder / training.folder,
            classes=classes,
            templates=templates,
            knowledge=self.store(KNOWLEDGE) if self._looks_at_knowledge(training.variant) else None,
            terms=narrowed(variant, TermOptions),
            knowledge_data=self.knowledge_data
            if self._looks_at_records(training.variant)
            else None,
            task=self._task_store(training.variant),
            probe=self.probe(training.variant),
            extra_loss=prepared.penalty,
            predict=self.experiment.forecast,
        )
        facts = {
            "steps": result.steps,
            "seconds": result.seconds,
            "trainable": prepared.trainable,
            **predicted,
            **({} if result.budget is None else {"strength": result.budget.strength}),
        }
        trained = Trained(prepared.model, result.head and result.head.cpu(), self.loaded.model)
        for scale in self._scales(training):
            self._measure(trained, scale, training.identity, **facts)
        speed = f"{result.seconds:.0f} s, {result.samples_per_second:.3g} records/s"
        return f"{self._scores_of(training)} ({speed})"

    def _looks_at_records(self, variant: str) -> bool:
        """Do terms of the loss look at records of the knowledge, or does a budget?"""
        asked = self.experiment.terms_of(variant)
        held_out = asked.keep is not None and asked.probe is None
        return held_out or bool(asked.needs_data)

    def _looks_at_knowledge(self, variant: str) -> bool:
        """Is there an anchor, or the same to be logged as a forecast? Where no layer changes, neither."""
        asked = self.experiment.terms_of(variant)
        wanted = asked.anchors_to("knowledge") or self.experiment.forecast
        return wanted and METHODS[self.experiment.method_of(variant)].changes_layers

    def _looks_at_task(self, variant: str) -> bool:
        return self.experiment.terms_of(variant).anchors_to("task")

    def _task_store(self, variant: str) -> CovarianceStore | None:
        """The task's covariances, where a training's loss looks at them, or where forgetting is to be foretold and some
        variant needs them anyway."""
        needed = self._looks_at_task(variant) or (
            self.experiment.forecast
            and any(
                self._looks_at_task(name)
                or TASK in METHODS[self.experiment.method_of(name)].covariances
                for name in self.experiment.variants
            )
        )
        return self.store(TASK) if needed else None

    def _scores_of(self, training: Training) -> str:
        """The first metric of each task at full strength, but of those that choose the learning rate."""
        rows = rows_of(read_rows(self.folder / SCORES), **training.identity)
        first = {row["task"]: row for row in reversed(rows) if row["role"] != "selection"}
        return ", ".join(
            f"{name} {value_text(row['metric'], row['value'])}"
            for name, row in sorted(first.items())
        )
