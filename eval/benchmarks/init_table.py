"""The tables of init_vs_peft.py, from whatever measurements are there."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from init_measure import RANK, SETTINGS

ENERGY_HEAD = [
    *("", "damping", "PEFT", "corda_vlm"),
    *("undamped: PEFT", "corda_vlm", "corda_vlm, δ = 1e-4"),
]


def report(out: Path, threads: int) -> None:
    """Write `results.json` and `table.md` from the measurements in `out`."""
    runs: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    rates = None
    for path in sorted((out / "measurements").glob("*.json")):
        measured = json.loads(path.read_text())
        if path.stem == "rates":
            rates = measured
        else:
            part, tool, what, mode, _ = path.stem.split("_")
            runs.setdefault((part, what, mode, tool), []).append(measured)
    rows = [_row(key, group) for key, group in runs.items()]
    for row in rows:
        peer = next((other for other in rows if _peers(row, other)), None)
        if peer is not None:
            row["times_faster"] = peer["seconds"]["total"] / row["seconds"]["total"]
            # a peak below a MiB is one that was not seen: memory freed before was taken again
            row["memory_share"] = row["peak_mb"] / max(peer["peak_mb"], 1.0)
        if rates is not None and "flops" in row:
            row["floor_seconds"] = _floor(row, rates["gflops"])
    results = {**(rates or {}), "threads": threads, "rank": RANK, "rows": rows}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "table.md").write_text("\n".join(_markdown(results)))


def _row(key: tuple[str, ...], runs: list[dict[str, Any]]) -> dict[str, Any]:
    part, what, mode, tool = key
    seconds = {s: statistics.median(r["stages"][s] for r in runs) for s in runs[0]["stages"]}
    if "forward" in seconds:
        seconds["covariance"] = seconds["collection"] - seconds["forward"]
    totals = [r["stages"]["total"] for r in runs]
    row = {
        "part": part,
        "tool": tool,
        "what": what,
        "mode": mode,
        "runs": len(runs),
        "seconds": seconds,
        "fastest": min(totals),
        "slowest": max(totals),
        "peak_mb": statistics.median(r["peak_mb"] for r in runs),
    }
    row |= {"flops": runs[0]["flops"]} if "flops" in runs[0] else {}
    sites = next((r["sites"] for r in runs if r.get("sites")), [])
    groups: dict[str, list[dict[str, Any]]] = {}
    for site in sites:
        if tool == "ours":
            group = f"{mode}, δ = {site['damping']:g}"
        else:
            group = site["name"] if mode == "both" else mode
        groups.setdefault(group, []).append(site)
    if groups:
        row["energy"] = {group: _energies(judged) for group, judged in groups.items()}
    return row


def _peers(ours: dict[str, Any], other: dict[str, Any]) -> bool:
    """Is `other` PEFT's run of the same work?"""
    same = other["tool"] == "peft" and ours["tool"] == "ours" and ours["part"] == other["part"]
    return same and (
        other["mode"] == ours["mode"] if ours["part"] == "clip" else other["what"] == ours["what"]
    )


def _floor(row: dict[str, Any], gflops: dict[str, float]) -> float:
    """Seconds that no arrangement of this arithmetic goes below: the forward pass, the upper triangles of
    the covariances, and `W C'` once for every layer, at this machine's best rate for large products."""
    products = "bf16" if SETTINGS[row["what"]][0] == "bf16" else "float32"
    covariance = row["flops"]["covariance"] / gflops[products] / 1e9
    oriented = row["flops"]["oriented"] / gflops["float32"] / 1e9
    return row["seconds"]["forward"] + covariance + oriented


def _energies(sites: list[dict[str, Any]]) -> dict[str, Any]:
    """Energy over the optimum at equal damping, and as a share of `‖W C‖_F` without: over the layers."""
    found: dict[str, Any] = {"dampings": sorted({s["damping"] for s in sites})}
    for tool in ("peft", "ours"):
        ratios = [s["damped"][tool] / s["damped"]["optimum"] for s in sites if tool in s["damped"]]
        found |= {tool: _spread(ratios)} if ratios else {}
    for tool in ("peft", "ours", "ours at 1e-4"):
        shares = [s["undamped"][tool] for s in sites if tool in s.get("undamped", {})]
        found |= {f"{tool}, undamped": _spread(shares)} if shares else {}
    return found


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _markdown(results: dict[str, Any]) -> Iterator[str]:
    if "machine" in results:
        m = results["machine"]
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in results["gflops"].items())
        yield (
            f"{m['cpu']}, {results['threads']} thread(s), torch {m['torch']}, transformers "
            f"{m['transformers']}, PEFT {m['peft']}; r = {results['rank']}; seconds, medians. "
            f"Products of large matrices, GFLOP a CPU second: {rates}.\n"
        )
    for part, title in (
        ("clip", "A ViT-B/32-sized CLIP, 64 images and 64 texts"),
        ("layers", "One layer, its covariance given"),
    ):
        rows = [row for row in results["rows"] if row["part"] == part]
        if rows:
            yield f"**{title}**\n"
            yield from _times(part, rows)
            yield ""
    energies = [(row, group) for row in results["rows"] for group in row.get("energy", {})]
    if energies:
        yield (
            "**Knowledge energy** `‖B A C'‖_F`: over the optimum of a float64 SVD, median layer (lowest to "
            "highest). KPM is to be low, IPM high; 1 is best. Undamped: `‖B A C‖_F / ‖W C‖_F`, median layer.\n"
        )
        yield from _table(ENERGY_HEAD, [_energy_cells(row, group) for row, group in energies])
        yield ""


def _times(part: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """PEFT first in each group, then ours from the plainest setting on."""
    stages = ["forward", "covariance", "decomposition"] if part == "clip" else []
    head = ["", "", "total", *stages, "times faster", "extra peak MB", "of PEFT's"]
    if part == "clip":
        head.append("floor")
    order = ["peft", *SETTINGS]

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        if part == "clip":
            return row["mode"], order.index("peft" if row["tool"] == "peft" else row["what"])
        return row["what"], row["tool"] != "peft", row["mode"]

    cells = []
    for row in sorted(rows, key=place):
        group = row["mode"] if part == "clip" else row["what"]
        numbers = [row["seconds"].get(s) for s in ["total", *stages]]
        numbers.append(row.get("times_faster"))
        share = f"{row['memory_share']:.0%}" if "memory_share" in row else ""
        line = [group, _who(row), *map(_number, numbers), f"{row['peak_mb']:.0f}", share]
        cells.append([*line, _number(row.get("floor_seconds"))][: len(head)])
    yield from _table(head, cells)


def _energy_cells(row: dict[str, Any], group: str) -> list[str]:
    e = row["energy"][group]
    if row["part"] == "layers":
        who = f"{row['what']} {group}"
    elif row["tool"] == "peft":
        who = f"{group}, both on PEFT's covariance"
    else:
        who = f"{row['mode']}, collected in {row['what']}, judged in float64"
    cells = [who, ", ".join(f"{d:g}" for d in e["dampings"])]
    for tool in ("peft", "ours"):
        s = e.get(tool)
        cells.append(f"{s['median']:.4f} ({s['lowest']:.4f} to {s['highest']:.4f})" if s else "")
    for tool in ("peft", "ours", "ours at 1e-4"):
        s = e.get(f"{tool}, undamped")
        cells.append(f"{s['median']:.3g}" if s else "")
    return cells


def _who(row: dict[str, Any]) -> str:
    if row["tool"] == "peft":
        return "PEFT"
    return f"corda_vlm, {row['what'] if row['part'] == 'clip' else row['mode']}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _table(head: list[str], cells: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for line in cells:
        yield "| " + " | ".join(line) + " |"
