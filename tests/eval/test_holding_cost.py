"""What ways to hold a model cost, measured briefly."""

from __future__ import annotations

import json
import sys

from corda_vlm.files import asset


def test_the_ways_take_turns_and_tell_what_they_need(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.syspath_prepend(str(asset("eval/benchmarks")))
    import holding_cost

    monkeypatch.setattr(holding_cost, "ROUND", 3)
    ways = ["natural-kfac", "lora-distill"]
    out = tmp_path / "cost.json"
    words = ["--rounds", "1", "--ways", *ways, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["holding_cost.py", *words])
    holding_cost.main()
    rows = {row["way"]: row for row in json.loads(out.read_text())["ways"]}
    assert list(rows) == ["lora", *ways]
    assert rows["lora"]["held MB"] == 0.0
    assert rows["lora"]["of lora"] == 1.0
    assert rows["lora"]["needs"] == "nothing"
    assert rows["natural-kfac"]["held MB"] > 20, "both sides of 36 layers"
    assert "covariances" in rows["natural-kfac"]["needs"]
    assert rows["lora-distill"]["needs"] == "the knowledge's records"
    assert "a step, × lora" in capsys.readouterr().out
