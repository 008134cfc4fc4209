"""How far an adapter on a quantised base starts from the original model, by each way to start one.

    python eval/benchmarks/quantized_start.py                                             # emoji-clip, a minute on one core
    python eval/benchmarks/quantized_start.py MODEL --data '{source: "jsonl:DIR/nq_open_dev_3610.jsonl", format: qa}'

Of every way the relative error of the weights, `‖W − V‖ / ‖W‖`, and of the layers' outputs on the data, `‖(W − V) C^½‖ / ‖W C^½‖`,
energies added up over all layers, and the latter's mean over the layers too: a few with massive activations have most of the energy.

- `Q(W)`: the untouched base, of QLoRA and of the pair that is taken out of what is trained;
- `Q(W − B₀A₀) + B₀A₀`: the residual base, with the pair of PiSSA (QPiSSA) and those of CorDA;
- `Q(W) + B A`: with the pair that takes back what quantising took away, of LoftQ (one step, no data) and of QERA (in the metric of C).
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import yaml
from init_measure import machine

from corda_vlm import collect_covariance, find_sites, load_model, plan_adapter
from corda_vlm.data import load_records, make_batches
from corda_vlm.files import asset, write_json
from corda_vlm.plan import quantization_errors
from corda_vlm.text_table import text_table

WAYS: dict[str, dict[str, Any]] = {
    "pissa": {"method": "pissa"},
    "corda-ipm": {"method": "corda", "mode": "ipm"},
    "corda-kpm": {"method": "corda", "mode": "kpm"},
    "loftq": {"method": "loftq"},
    "qera": {"method": "qera"},
}
HEADINGS = ("start", "rank", "weight", "outputs", "outputs, mean of layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="emoji-clip-hf")
    parser.add_argument("--data", help="a data spec; the default is of emoji-clip")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kind", default="nf4", choices=("nf4", "int8"))
    parser.add_argument("--ranks", default="16", help="e.g. 16,64")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    began = time.perf_counter()
    towers = None if asked.data else "vision"  # those pictures have no texts
    spec = asked.data or f"parquet:{asset('model_zoo/emoji-clip/data/noto.parquet')}"
    loaded = load_model(asked.model, dtype=asked.dtype)
    records = load_records(yaml.safe_load(spec) if spec.startswith("{") else spec)
    batches = make_batches(
        records, loaded.processor, batch_size=asked.batch_size, shuffle=True, limit=asked.samples
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fewer tokens than their width")
        sites = find_sites(loaded.model, towers=towers)
        store = collect_covariance(loaded.model, batches, sites, show_progress=False)
    rows = []
    for rank in map(int, asked.ranks.split(",")):
        for name, how in WAYS.items():
            corrects = {"quantize_to": asked.kind} if name in ("loftq", "qera") else {}
            plan = plan_adapter(
                loaded.model,
                store,
                rank=rank,
                towers=towers,
                show_progress=False,
                **how,
                **corrects,
            )
            errors = quantization_errors(
                loaded.model, asked.kind, store=store, plan=plan, show_progress=False
            )
            for way in errors.errors:
                total = errors.total(way)
                row = (f"{way}, {name}" if way != "Q(W)" else way, rank if way != "Q(W)" else 0)
                of_layers = [e.relative_outputs or 0.0 for e in errors.errors[way].values()]
                row = (*row, total.relative, total.relative_outputs, statistics.mean(of_layers))
                if row not in rows:
                    rows.append(row)
    shown = [(w, r or "", *(f"{100 * share:.2f} %" for share in shares)) for w, r, *shares in rows]
    print(text_table(shown, HEADINGS, (False, *[True] * 4)))
    print(f"\n{asked.kind}, {asked.model}, {time.perf_counter() - began:.0f} s")
    if asked.out is not None:
        found = [dict(zip(HEADINGS, row, strict=True)) for row in rows]
        about = {"model": str(asked.model), "kind": asked.kind, "samples": asked.samples}
        write_json(asked.out, {**about, "machine": machine(), "starts": found})


if __name__ == "__main__":
    main()
