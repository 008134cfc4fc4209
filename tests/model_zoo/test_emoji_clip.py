"""The built-in CLIP: its card tells the truth, its files are what plain open_clip loads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

open_clip = pytest.importorskip("open_clip")
pq = pytest.importorskip("pyarrow.parquet")

FOLDER = Path(__file__).resolve().parents[2] / "model_zoo" / "emoji-clip"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    return {path.stem: pq.read_table(path) for path in sorted((FOLDER / "data").glob("*.parquet"))}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any, Any]:
    name = f"local-dir:{FOLDER}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


def test_card_has_the_measured_numbers(card: dict[str, Any], metrics: dict[str, Any]) -> None:
    for split in ("heldout", "openmoji"):
        for number in ("n", "top1", "top5", "top1_interval", "top5_interval"):
            assert card["metrics"][split][number] == metrics[split][number], (split, number)
    assert card["templates"] == metrics["templates"]
    assert card["classes"]["count"] == metrics["classes"]
    assert card["training"]["samples"] == metrics["training"]["samples"]
    assert card["training"]["wall_minutes"] == metrics["training"]["wall_minutes"]
    assert card["training"]["seed"] == metrics["training"]["options"]["seed"]


def test_the_targets_are_met(metrics: dict[str, Any]) -> None:
    assert metrics["heldout"]["top1"] >= 0.25
    assert metrics["heldout"]["top5"] >= 0.55
    assert metrics["openmoji"]["top5"] >= 0.18
    assert metrics["training"]["samples"] >= 1_000_000


def test_splits_are_disjoint_and_as_large_as_said(
    card: dict[str, Any], tables: dict[str, Any]
) -> None:
    assert set(tables) == set(card["data"]["styles"])
    split_of: dict[tuple[str, str], str] = {}
    for style, table in tables.items():
        rows = table.select(["style", "hexcode", "split"]).to_pylist()
        assert {row["style"] for row in rows} == {style}
        for row in rows:
            pair = (row["hexcode"], row["style"])
            assert pair not in split_of, f"{pair} is there twice"
            split_of[pair] = row["split"]
        counts = Counter(row["split"] for row in rows)
        said = {k: v for k, v in card["data"]["styles"][style].items() if k in counts}
        assert said == counts
        assert ("openmoji" in counts) == (style == "openmoji")
    trained = Counter(split for split in split_of.values() if split != "openmoji")
    assert 0.18 < trained["heldout"] / sum(trained.values()) < 0.22


def test_splits_follow_from_the_seed(
    tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import make_data  # the recipe itself, as a script in its folder sees it

    for row in tables["noto"].select(["hexcode", "split"]).to_pylist():
        assert make_data.split_of(row["hexcode"], "noto") == row["split"]


def test_licences_are_there(card: dict[str, Any], tables: dict[str, Any]) -> None:
    text = (FOLDER / "data" / "LICENSES.md").read_text(encoding="utf-8")
    sections = {part.split("\n", 1)[0]: part for part in text.split("\n## ")[1:]}
    for style, table in tables.items():
        metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
        section = sections[style]
        assert metadata["licence"] == card["data"]["styles"][style]["licence"]
        assert metadata["licence"] in section
        assert f"`{metadata['source_package']}` {metadata['source_version']}" in section
        assert "rasterised" in section
        named = section.split("`licenses/", 1)[1].split("`", 1)[0]
        assert (FOLDER / "data" / "licenses" / named).stat().st_size > 500


def test_files_stay_small() -> None:
    weights = FOLDER / "open_clip_model.safetensors"
    assert weights.stat().st_size <= 30 * MEGABYTE
    data = sum(path.stat().st_size for path in (FOLDER / "data").rglob("*") if path.is_file())
    assert data <= 30 * MEGABYTE


def test_plain_open_clip_loads_it(card: dict[str, Any], loaded: tuple[Any, Any, Any]) -> None:
    model, preprocess, tokenizer = loaded
    assert model.visual.image_size in (64, (64, 64))
    assert sum(p.numel() for p in model.parameters()) == card["architecture"]["parameters"]
    assert tokenizer(["a cat"]).shape == (1, 16)
    normalise = preprocess.transforms[-1]
    assert tuple(normalise.mean) == tuple(card["preprocess"]["mean"])
    assert tuple(normalise.std) == tuple(card["preprocess"]["std"])
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_sample_scores_as_the_card_says(
    card: dict[str, Any],
    loaded: tuple[Any, Any, Any],
    tables: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """200 held-out drawings through open_clip's own preprocessing, decoded anew."""
    import io

    from PIL import Image

    model, preprocess, tokenizer = loaded
    monkeypatch.syspath_prepend(str(FOLDER))
    import evaluate

    labels: dict[str, str] = {}
    heldout: list[dict[str, Any]] = []
    for style, table in tables.items():
        if style == "openmoji":
            continue
        for row in table.select(["image", "hexcode", "label", "split"]).to_pylist():
            labels[row["hexcode"]] = row["label"]
            if row["split"] == "heldout":
                heldout.append(row)
    assert len(labels) == card["classes"]["count"]
    order = torch.randperm(len(heldout), generator=torch.Generator().manual_seed(0))[:200]
    sample = [heldout[i] for i in order.tolist()]
    classes = sorted(labels)
    emoji = [evaluate.Emoji(code, labels[code], (), "") for code in classes]
    weights = evaluate.classifier(model, tokenizer, emoji, card["templates"][:1])
    pixels = torch.stack([preprocess(Image.open(io.BytesIO(row["image"]))) for row in sample])
    with torch.inference_mode():
        scores = torch.nn.functional.normalize(model.encode_image(pixels), dim=-1) @ weights
    own = torch.tensor([classes.index(row["hexcode"]) for row in sample])
    top5 = (scores.topk(5, dim=1).indices == own[:, None]).any(1).float().mean().item()
    # Three standard errors of 200 drawings, and a little for one template instead of four.
    assert abs(top5 - card["metrics"]["heldout"]["top5"]) < 0.13
