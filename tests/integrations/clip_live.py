"""Run by `test_clip_benchmark.py` with CLIP_benchmark's own interpreter: what our own measure gives on its data.

python clip_live.py MODEL FOLDER OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from corda_vlm import evaluate, load_model
from corda_vlm.integrations.clip_benchmark import suite_of


def main(source: str, folder: str, output: str) -> None:
    loaded = load_model(source)
    scores = evaluate(loaded, suite_of(folder), bf16=False)
    Path(output).write_text(json.dumps({score.metric: score.value for score in scores}))


if __name__ == "__main__":
    main(*sys.argv[1:])
