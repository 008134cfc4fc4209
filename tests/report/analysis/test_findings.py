"""What a report claims: nothing where nothing was learnt, no winner among ties. All numbers are invented."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from corda_vlm.report import Results, leading_finding, summary_table, write_report
from corda_vlm.report.analysis.findings import findings
from corda_vlm.report.analysis.learned import learned
from corda_vlm.report.plots.tradeoff import tradeoff
from corda_vlm.report.words import OVER_ALL

Row = dict[str, Any]


def nothing_learnt(invented: Any) -> list[Row]:
    """lora 8.3% against a base of 13.3%, and it "keeps" 101.9%."""
    rows = invented.rows_of("base", {**invented.BASE, "new": 0.133})
    for method, task, kept in (("lora", 0.083, 1.019), ("corda-kpm", 0.081, 1.02)):
        rows += invented.rows_of(method, invented.at(task, kept), rate=1e-3, seed=0)
    return rows


def with_gain(
    rows: Sequence[Row], of: Callable[[Row], tuple[float, float, float] | None]
) -> list[Row]:
    """Rows of trained models on the gain task with a paired interval."""
    found = []
    for row in rows:
        gain = of(row) if row["method"] != "base" and row["role"] == "gain" else None
        more = (
            {} if gain is None else dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
        )
        found.append({**row, **more})
    return found


def everywhere(invented: Any, rows: Sequence[Row], folder: Path) -> list[str]:
    """The page, the HTML, the table in the terminal, the finding of a study's overview."""
    run = invented.write_run(folder, rows)
    write_report(run)
    pages = [(run / name).read_text() for name in ("report.md", "report.html")]
    return [*pages, summary_table(run), leading_finding(Results.of(rows))]


def test_where_nothing_was_learnt_nothing_is_claimed(invented: Any, tmp_path: Path) -> None:
    for text in everywhere(invented, nothing_learnt(invented), tmp_path / "none"):
        assert "No method learnt the task, best 8.3% against 13.3% before" in text
        for claim in ("times as much", "kept at task", "keeps 10", "**"):
            assert claim not in text
    text = (tmp_path / "none" / "report.md").read_text()
    assert "| lora | 0.001 | 8.3% |" in text, "the scores themselves are there"
    assert "101.9%" in text
    assert OVER_ALL.partition(":")[0] in text
    assert "](tradeoff.png)" in text


def test_above_the_base_within_the_paired_interval_is_not_learnt(
    invented: Any, tmp_path: Path
) -> None:
    """Even where the two models' own intervals are apart, the paired one decides: it is the finer one."""
    rows = with_gain(invented.study(invented.DEMO), lambda row: (0.3, -0.01, 0.6))
    for text in everywhere(invented, rows, tmp_path / "run"):
        assert "No method learnt the task, best 90.0% against 10.0% before" in text
        assert "+30.0 points on the same examples, 95% interval −1.0 to +60.0" in text
        assert "times as much" not in text


def test_a_paired_gain_is_finer_than_two_intervals(invented: Any) -> None:
    """One point above the base: the intervals overlap, the paired one does not hold 0."""
    rows = invented.rows_of("base", invented.BASE)
    for method, kept in (("lora", 0.5), ("kpm", 0.8)):
        for seed in (0, 1):
            rows += invented.rows_of(method, invented.at(0.11, kept), rate=1.0, seed=seed)
    without = learned(Results.of(rows), "lora")
    assert without is not None
    assert without.verdict == "unknown"
    told = leading_finding(Results.of(rows))
    assert told.startswith(
        "Whether any method learnt the task cannot be said: lora reaches 11.0% against 10.0% before"
    )
    assert "no comparison on the same examples" in told
    paired = Results.of(with_gain(rows, lambda row: (0.01, 0.002, 0.018)))
    assert "**kpm** keeps 80.0%" in leading_finding(paired)


def test_seeds_count_together(invented: Any) -> None:
    """One seed of two is above the base beyond its interval; their mean is not."""
    rows = with_gain(
        invented.study(invented.DEMO),
        lambda row: (0.1, 0.05, 0.15) if row["seed"] else (-0.1, -0.16, -0.04),
    )
    found = learned(Results.of(rows), "lora")
    assert found is not None
    assert found.verdict == "no"
    assert found.gain is not None
    assert found.gain.low == pytest.approx(-0.055)


def test_another_method_may_have_learnt_it(invented: Any) -> None:
    rows = nothing_learnt(invented)
    rows += invented.rows_of("full", invented.at(0.6, 0.5), rate=1e-4, seed=0)
    told = leading_finding(Results.of(rows))
    assert told.startswith(
        "`lora`, at whose task accuracy the methods are compared, did not learn the task"
    )
    assert "The task was learnt by full (60.0%)" in told
    assert "**" not in told


def test_who_is_compared_has_no_accuracy_marked_in_the_picture(
    invented: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(
        "corda_vlm.report.plots.tradeoff.save", lambda figure, path: figures.append(figure)
    )
    many = [f"method-{n}" for n in range(4)]
    few = nothing_learnt(invented)
    more = [r for m in many for r in invented.rows_of(m, invented.at(0.08, 1.01), rate=1.0, seed=0)]
    learnt_by_all = invented.study(invented.DEMO, seeds=1)
    for rows in (few, [*few, *more], learnt_by_all):
        assert tradeoff(Results.of(rows), tmp_path / "tradeoff.png")
    together, panels, fine = figures
    assert "lora did not learn the task, so nothing is compared" in together.axes[0].get_title(
        loc="left"
    )
    assert "lora did not learn the task, so nothing is compared" in panels.get_suptitle().replace(
        "\n", " "
    )
    assert not [p for p in panels.axes if p.get_title(loc="right")]
    assert "did not learn" not in fine.axes[0].get_title(loc="left")
    assert [t for t in fine.axes[0].texts if t.get_text() == "lora's best"]
    assert not [t for t in together.axes[0].texts if t.get_text() == "lora's best"]


def two_seeds(invented: Any, kept: dict[str, tuple[float, float]]) -> list[Row]:
    rows = invented.rows_of("base", invented.BASE)
    for method, of in kept.items():
        for seed, value in enumerate(of):
            rows += invented.rows_of(method, invented.at(0.8, value), rate=1.0, seed=seed)
    return rows


@pytest.mark.parametrize(
    ("kept", "sentence"),
    [
        ({"lora": (0.2, 0.3), "kpm": (0.5, 0.6)}, "**kpm** keeps 55.0% of what the model knew and lora keeps 25.0%, 2.20 times as much."),
        ({"lora": (0.2, 0.5), "kpm": (0.4, 0.4)}, "kpm keeps 40.0% of what the model knew and lora keeps 35.0%: a tie, as the difference of +5.0 points is within the 95% interval over 2 seeds (−10.0 to +20.0)."),
        ({"lora": (0.2, 0.2), "kpm": (0.5, 0.6), "dora": (0.6, 0.45)}, "kpm (55.0%) and dora (52.5%) keep more of what the model knew than lora (20.0%) and are a tie"),
        ({"lora": (0.5, 0.6), "kpm": (0.2, 0.3)}, "**lora** keeps most of what the model knew, 55.0%, and of the others kpm most, 25.0%."),
        ({"lora": (0.2,), "kpm": (0.5,)}, "kpm keeps 50.0% of what the model knew and lora keeps 20.0%, 2.50 times as much (one seed: no interval)."),
    ],
)  # fmt: skip
def test_winners_ties_and_one_seed(
    invented: Any, tmp_path: Path, kept: dict[str, tuple[float, ...]], sentence: str
) -> None:
    rows = two_seeds(invented, kept)  # type: ignore[arg-type]
    told = leading_finding(Results.of(rows))
    assert sentence in told
    assert told.count("**") == sentence.count("**")
    plain = sentence.replace("**", "")
    page, html, terminal, overview = everywhere(invented, rows, tmp_path / "run")
    assert sentence in page
    assert plain in terminal
    assert overview == told
    assert plain in html.replace("<strong>", "").replace("</strong>", "")
    assert "![" in page
    assert plain in page[page.index("![") : page.index("](tradeoff.png)")], (
        "the picture's words say the same"
    )


def test_who_learns_as_much_by_luck_alone_is_no_winner(invented: Any) -> None:
    """kpm keeps far more wherever it gets to lora's accuracy, which it does with one of its two seeds."""
    rows = two_seeds(invented, {"lora": (0.2, 0.2)})
    for seed, task in enumerate((0.9, 0.72)):
        rows += invented.rows_of("kpm", invented.at(task, 0.6), rate=1.0, seed=seed)
    told = leading_finding(Results.of(rows))
    assert (
        "kpm keeps 60.0% of what the model knew and lora keeps 20.0%, 3.00 times as much, but it learns that much in 7"
        in told
    )
    assert "% of the resamples of 2 seeds only." in told
    assert "**" not in told


def test_over_100_is_explained_where_it_occurs(invented: Any, tmp_path: Path) -> None:
    rows = two_seeds(invented, {"lora": (0.9, 0.9), "kpm": (1.05, 1.06)})
    page, _, terminal, overview = everywhere(invented, rows, tmp_path / "run")
    assert "**kpm** keeps 105.5%" in page
    for text in (page, terminal, overview):
        assert OVER_ALL in text
    below = two_seeds(invented, {"lora": (0.9, 0.9), "kpm": (0.95, 0.96)})
    for text in everywhere(invented, below, tmp_path / "below"):
        assert "Over 100%" not in text


def test_against_the_scaled_reference_one_seed_and_ties(invented: Any) -> None:
    def told(seeds: int, offsets: Sequence[float]) -> str:
        rows = invented.rows_of("base", invented.BASE)
        for seed in range(seeds):
            for scale, task, kept in ((1.0, 0.8, 0.4), (0.5, 0.5, 0.8)):
                for method, more in (("lora", 0.0), ("kpm", offsets[seed])):
                    values = invented.at(task, kept + more)
                    rows += invented.rows_of(method, values, rate=1.0, seed=seed, scale=scale)
        return findings(Results.of(rows))[-1]

    assert "(one seed: no interval)" in told(1, [0.1])
    assert "a tie, as the interval holds 0" in told(2, [0.1, -0.02])
    assert "\ufdd0" not in told(2, [0.1, -0.02]), "no bold winner among ties"
    assert "\ufdd0kpm, scaled\ufdd1 keeps +" in told(2, [0.1, 0.12])
