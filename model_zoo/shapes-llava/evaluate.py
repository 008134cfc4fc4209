"""Measure the model in this folder on easy-VQA's official test questions, with corda_vlm's own VQA evaluation.

::

    python model_zoo/shapes-llava/evaluate.py

The model answers freely and greedily. Beside it stands the blind baseline: for each question the answer that it
has most often in the official training set. Prints both and writes metrics.json. With ``--split val`` it scores
the questions that choices were made on, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import transformers

from corda_vlm import evaluate, load_model
from corda_vlm.experiment.origin import cpu_name

HERE = Path(__file__).resolve().parent
DATA = HERE / "data" / "easy_vqa.parquet"
# The evaluation's names of the three numbers, and those of metrics.json.
METRICS = {"vqa_accuracy": "all", "accuracy_yes_no": "yes_no", "accuracy_other": "open"}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def suite(data: Path, split: str) -> dict[str, Any]:
    """A suite of one task: the questions of `split`."""
    records = {"source": f"parquet:{data}", "split": split, "format": "qa"}
    task = {"name": "easy-vqa", "role": "retention", "kind": "vqa", "data": records}
    options = {"max_new_tokens": 4}
    return {
        "name": "shapes-llava",
        "version": 1,
        "tasks": [task | {"metrics": list(METRICS), "options": options}],
    }


def blind(data: Path, split: str) -> dict[str, Any]:
    """What the usual answer to each question scores, for an onlooker who sees no image."""
    known: dict[str, Counter[str]] = {}
    asked: list[tuple[str, str]] = []
    for row in pq.read_table(data, columns=["qa_json", "split"]).to_pylist():
        for pair in json.loads(row["qa_json"]):
            question, answer = pair["question"], pair["answer"]
            if row["split"] != "test":
                known.setdefault(question, Counter())[answer] += 1
            if row["split"] == split:
                asked.append((question, answer))
    usual = {question: answers.most_common(1)[0][0] for question, answers in known.items()}
    right = [(answer in ("yes", "no"), usual[question] == answer) for question, answer in asked]
    parts = {
        "all": [hit for _, hit in right],
        "yes_no": [hit for closed, hit in right if closed],
        "open": [hit for closed, hit in right if not closed],
    }
    return {name: rounded(sum(hits) / len(hits)) for name, hits in parts.items()}


def rounded(value: float) -> float:
    return round(float(value), 4)


def scores(folder: Path, data: Path, split: str, batch_size: int = 128) -> dict[str, Any]:
    """Accuracy on all, on yes/no and on open questions, with 95 % bootstrap intervals over questions."""
    found = {}
    for score in evaluate(load_model(folder), suite(data, split), batch_size=batch_size):
        found[METRICS[score.metric]] = {
            "n": score.n,
            "accuracy": rounded(score.value),
            "interval": [rounded(score.low), rounded(score.high)],
        }
    return found


def main() -> None:
    """Score, print, and write metrics.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--training", type=Path, help="train.py's --out, to copy how it was trained"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    measured = scores(arguments.model, arguments.data, arguments.split)
    unseen = blind(arguments.data, arguments.split)
    for name, title in (("all", "all"), ("yes_no", "yes/no"), ("open", "not yes/no")):
        one = measured[name]
        print(f"{title:12} {one['accuracy']:6.1%}  blind {unseen[name]:6.1%}  n={one['n']}")
    if arguments.split != "test":
        return
    out = arguments.model / "metrics.json"
    old = json.loads(out.read_text()) if out.exists() else {}
    training = old.get("training")
    if arguments.training:
        lines = (arguments.training / "log.jsonl").read_text().splitlines()
        last = [record for line in lines if "val_all" in (record := json.loads(line))][-1]
        training = {
            "command": "python model_zoo/shapes-llava/train.py --out runs/shapes-llava",
            "options": json.loads((arguments.training / "options.json").read_text()),
            "questions": last["questions"],
            "wall_minutes": round(last["minutes"], 1),
            **{name: last[name] for name in ("val_all", "val_open", "val_yes_no")},
        }
    metrics = {
        "test": measured,
        "blind": unseen,
        "bootstrap_seed": 0,
        "command": "python model_zoo/shapes-llava/evaluate.py",
        "machine": machine() | {"threads": arguments.threads},
        "evaluation_seconds": round(time.monotonic() - started, 1),
        "training": training,
    }
    out.write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main()
