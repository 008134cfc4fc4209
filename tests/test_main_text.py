"""The verbs, one after another, on models that generate text: a tiny Llama and a tiny LLaVA."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import yaml

from corda_vlm.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than their width")
FAST = ["--steps=2", "--batch-size=4", "--bf16=false", "--learning-rate=0.01"]


def sizes(folder):
    return {json.loads(line)["task"]: json.loads(line)["n"] for line in folder.read_text().splitlines()}  # fmt: skip


def test_a_language_model_from_sites_to_export(tiny_llm, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = str(saved(tiny_llm, "llm"))
    rows = [{"question": f"is {i} even?", "answer": "no" if i % 2 else "yes"} for i in range(12)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = '{source: "jsonl:qa.jsonl", format: qa, rows: [0, 8]}'
    task = {"name": "even", "role": "gain", "kind": "qa", "options": {"chat_template": "plain", "max_new_tokens": 2},
            "data": {"source": "jsonl:qa.jsonl", "format": "qa", "rows": [8, 12]}}  # fmt: skip
    suite = {"name": "s", "version": 1, "tasks": [task]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))

    main(["sites", model])
    assert "model.layers.*.mlp.mid" in capsys.readouterr().out
    main(
        [
            "calibrate",
            model,
            first,
            "--samples=6",
            "--batch-size=2",
            "--chat=plain",
            "--tokens=response",
        ]
    )
    main(["init", model, "--covariance=covariance.safetensors", "--rank=2", "--a-norm=10"])
    main(["train", model, first, "--chat=plain", *FAST, "--gradient-checkpointing"])
    assert json.loads((tmp_path / "adapter" / "train.json").read_text())["options"]["loss"] == "next_token"  # fmt: skip
    assert "wrote adapter/weights. Next: corda-vlm evaluate" in capsys.readouterr().out
    main(["train", model, first, "--chat=plain", *FAST, "--gradient-checkpointing"])
    assert "adapter was finished before. Next:" in capsys.readouterr().out
    assert "corda-vlm export MODEL" in (tmp_path / "adapter" / "weights" / "README.md").read_text()
    main(["evaluate", model, "suite.yaml", "--adapter=adapter", "--output=scores.jsonl"])
    assert sizes(tmp_path / "scores.jsonl") == {"even": 4}
    rows = (tmp_path / "scores.jsonl").read_text()
    main(["evaluate", model, "suite.yaml", "--adapter=adapter", "--output=scores.jsonl"])
    assert (tmp_path / "scores.jsonl").read_text() == rows
    said = capsys.readouterr().out
    assert "even: measured before, see scores.jsonl" in said
    assert "added 0 scores to scores.jsonl, which has the same already" in said
    main(
        ["evaluate", model, "suite.yaml", "--adapter=adapter", "--output=scores.jsonl", "--limit=3"]
    )
    assert "even: measured before" not in capsys.readouterr().out, "other examples"
    (tmp_path / "scores.jsonl").write_text(rows)
    main(["export", model, "adapter/weights", "merged"])
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    before = transformers.AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(5, 15)[None]
    assert not torch.allclose(plain(ids).logits, before(ids).logits, atol=1e-4), "it has learnt"
    assert (tmp_path / "merged" / "tokenizer.json").is_file()

    for args, message in (
        (["calibrate", model, first, "--chat=auto"], "tokenizer brings none"),
        (
            ["calibrate", model, "jsonl:qa.jsonl", "--chat=plain"],
            "question, answer: write format: qa",
        ),
        (["train", model, first, "--loss=prompt"], "choose loss next_token"),
        (["evaluate", "emoji-clip", "suite.yaml"], "generates none"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([*args, "--output=new"])
        assert message in capsys.readouterr().err


def test_what_is_left_out_or_cut_is_counted(tiny_llm, saved, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    model = str(saved(tiny_llm, "my llm"))
    rows = [{"question": f"is {i} even?", "answer": "" if i == 3 else "it may be"} for i in range(12)]  # fmt: skip
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = '{source: "jsonl:qa.jsonl", format: qa, max_bad_share: 0.2}'
    cut = ["--chat=plain", "--max-tokens=4", "--too-long=truncate"]
    calibrate = ["calibrate", model, data, "--batch-size=4", *cut]
    main(calibrate)
    said = capsys.readouterr()
    assert "1 record is left out, the first qa.jsonl, line 4" in caplog.text
    assert "11 records were cut to 4 tokens" in caplog.text
    assert f"wrote covariance.safetensors. Next: corda-vlm plan '{model}'" in said.out
    main(calibrate)
    assert "covariance.safetensors was complete before. Next:" in capsys.readouterr().out


def test_a_llava_from_sites_to_export(tiny_llava, saved, shades, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, data = str(saved(tiny_llava, "llava")), f'{{source: "parquet:{shades}", format: qa}}'
    task = {"name": "shades", "role": "gain", "kind": "vqa", "options": {"max_new_tokens": 2},
            "data": {"source": f"parquet:{shades}", "format": "qa"}}  # fmt: skip
    (tmp_path / "suite.yaml").write_text(
        yaml.safe_dump({"name": "s", "version": 1, "tasks": [task]})
    )
    half = ["--dtype=bfloat16", "--device-map=auto"]

    main(["sites", model, "--dtype=bfloat16"])
    printed = capsys.readouterr().out
    assert "projector" in printed
    main(
        [
            "calibrate",
            model,
            data,
            "--samples=8",
            "--batch-size=4",
            "--towers=language",
            "--tokens=image",
            *half,
        ]
    )
    main(
        [
            "init",
            model,
            "--covariance=covariance.safetensors",
            "--rank=2",
            "--towers=language",
            "--dtype=bfloat16",
        ]
    )
    whole = ["--modules-to-save=[model.multi_modal_projector]", "--projector-learning-rate=0.001"]
    main(["train", model, data, *FAST, *whole, *half])
    main(["evaluate", model, "suite.yaml", "--adapter=adapter", "--output=scores.jsonl", *half])
    assert sizes(tmp_path / "scores.jsonl") == {"shades": 24}
    main(["export", model, "adapter/weights", "merged", "--dtype=bfloat16"])
    plain = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    before = tiny_llava.model.state_dict()
    moved = {name for name, value in plain.state_dict().items() if not torch.equal(value.float(), before[name].to(value.dtype).float())}  # fmt: skip
    assert any("multi_modal_projector" in name for name in moved)
    assert any("language_model.layers.0" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)
    transformers.AutoProcessor.from_pretrained(tmp_path / "merged")
