"""The verb evaluate: scores of a model on a suite."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from corda_vlm.evaluation.options import EvalOptions
from corda_vlm.experiment import checks
from corda_vlm.families.options import LoadOptions
from corda_vlm.verbs.shared import load_source, name_of


def evaluate(
    model: str,
    suite: str,
    adapter: str | None = None,
    scales: str | None = None,
    output: str | None = None,
    predictions: str | None = None,
    *,
    options: EvalOptions,
    load: LoadOptions,
) -> None:
    """Measure a model, with what was trained or without, on a suite of tasks; not what the file of scores has already.

    Example:
        corda-vlm evaluate emoji-clip emoji-digits --adapter adapter --limit 200

    Args:
        model: A built-in name, a folder, or an id on a hub; with --adapter the model before training.
        suite: The name of a shipped suite, or a YAML file; or data alone, e.g. folder:photos/test, or
            "{source: 'jsonl:qa.jsonl', format: qa}".
        adapter: Folder of a training: an adapter, or a full fine-tune.
        scales: Strengths of what was trained, from 0 to 2, e.g. 0.25,0.5,0.75,1 (WiSE-FT); 0 is the model before
            training, 1 the trained one, and above 1 it goes further than training did.
        output: A scores file (JSON lines) to add the scores to.
        predictions: A file (JSON lines) to add to what the model said of each example: the answer or the predicted class,
            the right ones, and whether it is right.
    """
    strengths = checks.check_strengths(scales, adapter)
    checks.check_source(model)
    to_measure = checks.check_evaluation(suite, options)
    if adapter is not None:
        checks.check_folder(adapter, "training's", "make it by corda-vlm train")
    checks.check_output(output)
    checks.check_output(predictions)
    from corda_vlm.distributed.agree import made_by_first, told_by_first
    from corda_vlm.evaluation import Cache
    from corda_vlm.evaluation.predictions import check_predicting, check_predictions, unpredicted
    from corda_vlm.evaluation.score_file import check_scores, read_rows, tasks_left
    from corda_vlm.experiment import steps
    from corda_vlm.train.trained import Trained, load_trained

    loaded, cache, added = load_source(model, load), Cache(), 0
    method = "base" if adapter is None else name_of(Path(adapter))
    if output is not None:  # before anything is measured for it
        made_by_first("the scores", partial(check_scores, output))
    if predictions is not None:
        check_predicting(to_measure, options.tasks)
        made_by_first("the predictions", partial(check_predictions, predictions))
    made_from = steps.measured_from(loaded, adapter, to_measure, options, cache)
    trained = Trained(loaded.model) if adapter is None else load_trained(loaded.model, adapter)
    former = [] if output is None else read_rows(output, missing_ok=True)
    former = [row for row in former if row.get("made_from") == made_from.get(row["task"])]
    for scale in strengths:
        if scales is not None:
            print(f"scale {scale:g}")
        model_of = {"method": method, "scale": scale}

        def to_do(model_of: dict[str, Any] = model_of) -> list[str]:
            left = tasks_left(to_measure, former, made_from, **model_of)
            if predictions is not None:
                left = unpredicted(to_measure, left, predictions, made_from, **model_of)
            return list(left)

        left = told_by_first("what is left to measure", to_do)
        for task in made_from:
            if task not in left:
                print(f"  {task}: measured before, see {output}")
        if not left:
            continue
        for result, rows in steps.measure_into(
            output,
            trained,
            to_measure,
            replace(options, tasks=left),
            scale=scale,
            about={"run": Path(output or "").stem, "method": method},
            processor=loaded.processor,
            cache=cache,
            made_from=made_from,
            predictions=predictions,
        ):
            print(f"  {result}")
            added += len(rows)
    if output is not None:
        same = "" if added else ", which has the same already"
        print(f"\nadded {added} scores to {output}{same}")
    if predictions is not None:
        print(f"what the model said of each example is in {predictions}")
