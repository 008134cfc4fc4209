"""The names of the files of a run's folder: for those who write them, and for those who read or delete them."""

from __future__ import annotations

MARKER = ".corda_vlm.run"
"""The first file that a run writes into its folder, and the last that is deleted of it."""

CONFIG, MADE_FROM, DESCRIPTION = "config.yaml", "made-from.json", "run.json"

SCORES, DIVERGED = "scores.jsonl", "diverged.jsonl"

BASE_EXAMPLES = "-base-examples.jsonl"
"""Behind the stem of a file of scores: what the model before training did on each example."""

COVARIANCES = "covariance*.safetensors*"
"""A pattern: with the folders of blocks."""

GRADIENTS = "gradient-*.safetensors"
"""A pattern: of the new task's loss, for methods that start from it."""

TEACHER = "teacher-*.safetensors"
"""A pattern: what the model gave on the knowledge before training, one file for each way to look at it."""

REPORT, PAGE, PICTURES = "report.md", "report.html", "pictures.json"

TRADEOFF, TRAINING, PLANS, FORECAST = "tradeoff.png", "training.png", "plans.png", "forecast.png"

PREDICTIONS = "predictions.jsonl"
"""What models said of each example, where somebody had that written into a run's folder."""

GALLERIES = "gallery-*.png"
"""A pattern: examples that a model gained or lost."""

PLAN = "plan.json"
"""In a variant's folder."""

BEGUN, DONE, HISTORY = "train.json", "result.json", "history.jsonl"
"""In a training's folder, which is one of a variant's."""

CARD, CHANGE = "card.json", "change.png"
"""Of the comparison of two results, beside its report and page."""

STUDY = "study.json"
"""In the folder of a study, beside its experiments' folders."""

PATTERNS = (
    CONFIG, MADE_FROM, DESCRIPTION, SCORES, SCORES.removesuffix(".jsonl") + BASE_EXAMPLES, DIVERGED, COVARIANCES, TEACHER,
    GRADIENTS,
    REPORT, PAGE, PICTURES, TRADEOFF, TRAINING, PLANS, FORECAST, PREDICTIONS, GALLERIES,
)  # fmt: skip
"""What a run writes into its folder, its variants' folders aside."""
