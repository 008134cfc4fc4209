"""The sections of a run's report: what they say and show, and which of them it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from corda_vlm.names import listed
from corda_vlm.report.analysis.choose import choose
from corda_vlm.report.analysis.compare import Comparison, Dominance, compare
from corda_vlm.report.analysis.convergence import convergence, read_histories
from corda_vlm.report.analysis.findings import (
    SCALED_REFERENCE,
    findings,
    scaled_dominances,
    state,
)
from corda_vlm.report.analysis.forecast import rankings
from corda_vlm.report.analysis.learned import reference_learned
from corda_vlm.report.analysis.results import REFERENCE, Results
from corda_vlm.report.document import Picture, Report, Section, Table
from corda_vlm.report.gallery import gallery_sections
from corda_vlm.report.markup import bold, code
from corda_vlm.report.pictures import keep_pictures, kept_pictures
from corda_vlm.report.plots.forecast import forecast_picture
from corda_vlm.report.plots.live import tradeoff_svg
from corda_vlm.report.plots.plan import heatmap_picture
from corda_vlm.report.plots.tradeoff import tradeoff
from corda_vlm.report.plots.training import training_curves
from corda_vlm.report.tables import (
    base_table,
    chosen_table,
    convergence_table,
    dominance_table,
    equal_table,
    rankings_table,
    raw_table,
    trained_table,
)
from corda_vlm.report.words import FEW, PREDICTORS, percent, setting_text
from corda_vlm.run_files import FORECAST, TRADEOFF, TRAINING


class Sections:
    """The sections of one run's report, each a list of none or one, so that a report is their sum."""

    def __init__(
        self,
        results: Results,
        run_dir: Path,
        pictures: Sequence[Picture],
        predictions: Sequence[str | Path] = (),
    ) -> None:
        self.results, self.run_dir, self.more = results, run_dir, pictures
        self.predictions = predictions
        self.comparisons = compare(results) if reference_learned(results) else []
        self.dominances = scaled_dominances(results)
        self.findings = findings(results, self.dominances) or [state(results)]
        self.many = len(results.trained) > FEW

    def report(self, facts: dict[str, Any]) -> Report:
        """All of it, what matters first.

        Args:
            facts: of the run: its title, and what else is to be said of it.
        """
        sections = [*self._kept(), *self._against(), *self._chosen(), *self._convergence()]
        sections += gallery_sections(self.run_dir, self.predictions)
        sections += [*self._forecast(), *self._every(), *self._alone(), *self._scaled()]
        sections.append(Section("The model before training", tables=[base_table(self.results)]))
        if pictures := self._trained():
            sections.append(Section("How it was trained", pictures=pictures))
        return Report(str(facts["title"]), self.findings, [*sections, *_how_run(facts)])

    def _kept(self) -> list[Section]:
        results, drawn = self.results, []
        if tradeoff(results, self.run_dir / TRADEOFF):
            sentences = " ".join(self.findings)
            drawn.append(
                Picture(
                    self.run_dir / TRADEOFF,
                    "Accuracy on the new task, left to right, against knowledge kept, bottom to top, "
                    f"for {listed(list(results.trained))}. {sentences}",
                    "Up and to the right is better. Compare the curves at one task accuracy, never single points.",
                    live=tradeoff_svg(results),
                )
            )
        if not drawn and not self.comparisons:
            return []
        if not self.comparisons:  # why, the report's first words say
            return [Section("What was learnt and what was kept", pictures=drawn)]
        how = _how_compared(results, self.comparisons)
        tables = [equal_table(self._leading())]
        return [Section("What was kept at equal task accuracy", [how], drawn, tables)]

    def _leading(self) -> list[Comparison]:
        """All comparisons, or of many methods only those of their curves over learning rates and scales."""
        labels = {c.curve for c in self.comparisons}
        return [
            c
            for c in self.comparisons
            if not self.many or c.curve == REFERENCE or f"{c.curve}, scaled" not in labels
        ]

    def _against(self) -> list[Section]:
        dominances = self.dominances
        if not dominances:
            return []
        heading = f"Against {REFERENCE} scaled after training"
        table = dominance_table(dominances, len(self.results.seeds))
        return [Section(heading, [_dominance_text(dominances)], tables=[table])]

    def _chosen(self) -> list[Section]:
        # without selection tasks a single model could only be chosen by what it is then judged by
        choices = choose(self.results) if self.results.selection and self.comparisons else []
        if not choices:
            return []
        table = chosen_table(self.results, choices)
        return [Section("One model of each method, chosen on validation data", tables=[table])]

    def _convergence(self) -> list[Section]:
        methods = convergence(self.results, read_histories(self.run_dir))
        if len(methods) < 2:
            return []
        table = convergence_table(methods)
        return [Section(f"Steps to {REFERENCE}'s final loss", tables=[table], folded=self.many)]

    def _forecast(self) -> list[Section]:
        path = self.run_dir / FORECAST
        drawn = forecast_picture(self.results, path)
        if not drawn:
            return []
        first = drawn[0]
        correlation_text = f"{first.correlation:.2f}".replace("-", "−")
        name = PREDICTORS[first.predictor]
        others = "" if len(drawn) == 1 else f", and {len(drawn) - 1} more in panels beside it"
        picture = Picture(
            path,
            f"{name[0].upper()}{name[1:]}, left to right on a logarithmic axis, against the knowledge kept, for "
            f"{len(first.kept)} trained models; rank correlation {correlation_text}{others}.",
            f"Each mark is a trained model. Spearman's rank correlation of {name} over all "
            f"{len(first.kept)}: {bold(correlation_text)} (−1: it puts all models in the order in which they forgot"
            + (
                "; it is made on the calibration data alone)."
                if first.predictor == "forecast"
                else ")."
            ),
        )
        ranked = rankings(self.results)
        tables = [rankings_table(ranked)] if ranked else []
        return [
            Section("What the forecast of forgetting foretold", pictures=[picture], tables=tables)
        ]

    def _every(self) -> list[Section]:
        if not self.results.trained and not self.results.diverged:
            return []
        tables = [trained_table(self.results)]
        return [Section("Every method at every learning rate", tables=tables, folded=self.many)]

    def _scaled(self) -> list[Section]:
        results = self.results
        if all(setting.scale == 1.0 for of in results.trained.values() for setting in of):
            return []
        tables = [trained_table(results, scaled=True)]
        if len(self._leading()) < len(self.comparisons):
            caption = "Every curve, with and without scaling; otherwise as the first table."
            tables = [equal_table(self.comparisons, caption), *tables]
        return [Section("Scaled after training", tables=tables, folded=True)]

    def _alone(self) -> list[Section]:
        results = self.results
        if len(results.known) < 2 or not self.comparisons:
            return []
        tables = [raw_table(results, _raw(results))]
        for task in results.known:
            table = equal_table(compare(replace(results, retention=(task,))))
            tables.append(replace(table, caption=f"Kept knowledge, on {task} alone."))
        return [Section("Each retention task by itself", tables=tables, folded=True)]

    def _trained(self) -> list[Picture]:
        """How it was trained: the losses, the plans, what the caller adds, and what was in the report before.

        Some are drawn from what a run leaves beside its scores, and who keeps the scores and the pictures alone (as
        `eval/measured` does) keeps those pictures.
        """
        path = self.run_dir / TRAINING
        drawn: dict[str, Picture] = {}
        if training_curves(self.run_dir, path):
            drawn[path.name] = Picture(
                path,
                f"Training loss over steps, a panel for each of {listed(list(self.results.trained))}.",
                "Training loss, a running mean over a twentieth of the run; one line a seed.",
            )
        if (plans := heatmap_picture(self.run_dir)) is not None:
            drawn[plans.path.name] = plans
        drawn |= {picture.path.name: picture for picture in self.more}
        before = kept_pictures(self.run_dir)
        pictures = {name: drawn.get(name) or before[name] for name in {**before, **drawn}}
        keep_pictures(self.run_dir, pictures)
        return list(pictures.values())


def _how_run(facts: dict[str, Any]) -> list[Section]:
    rows = [
        [key.replace("_", " "), code(str(value)) if key == "command" else _fact(value)]
        for key, value in facts.items()
        if key != "title"
    ]
    return [Section("How it was run", tables=[Table("", ["", ""], rows)])] if rows else []


def _raw(results: Results) -> dict[str, list[Comparison]]:
    """Retention task -> what is kept of it as accuracy over the base model's, chance not subtracted."""
    return {
        task: compare(
            replace(results, retention=(task,), chance={**results.chance, task: 0.0}),
            shares=(0.95,),
        )
        for task in results.known
    }


def _dominance_text(dominances: Sequence[Dominance]) -> str:
    first = dominances[0]
    return (
        f"Scaling costs no training, so a method has to beat {REFERENCE} together with it. Between task accuracies of "
        f"{percent(first.start)} (five points over the base model) and {percent(first.stop)} ({REFERENCE}'s best), how much "
        f"more than {code(SCALED_REFERENCE)} is kept, in points; in the same resampled seeds."
    )


def _how_compared(results: Results, comparisons: Sequence[Comparison]) -> str:
    best = results.best_setting(REFERENCE)
    assert best is not None
    judged = (
        "the validation split"
        if results.selection
        else "the task itself, which flatters it slightly"
    )
    seeds = len(results.seeds)
    aim = next(c.task for c in comparisons if c.share == 1.0)
    brackets = f"{seeds} seeds; brackets: 95% bootstrap interval over seeds"
    few = ", which with so few runs from about the worst to the best seed" if 1 < seeds < 4 else ""
    return (
        f"{code(REFERENCE)} learns the task best at {setting_text(best)}, judged on {judged}: {percent(aim)}. Kept is "
        "(score − chance) / (base − chance), averaged over the retention tasks. A curve stands for the most that any of "
        "its settings keeps at an accuracy; between neighbouring settings it is taken as straight. Means over "
        + (brackets + few if seeds > 1 else "one seed. One seed has no interval")
        + ". The luck of the test examples, which all models share, is not in the brackets."
    )


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_fact(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_fact(inner) for inner in value)
    return str(value)
