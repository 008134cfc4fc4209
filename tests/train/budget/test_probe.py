"""What probes tell of a model: accuracy by prompts, the nearest of texts and images, and answers."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from corda_vlm.data import load_records, make_batches
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.errors import CordaError, DataError
from corda_vlm.evaluation import evaluate
from corda_vlm.methods import prepare_method
from corda_vlm.train.budget.parts import PART, grouped
from corda_vlm.train.budget.probe import (
    AnswerProbe,
    HowProbed,
    LabeledProbe,
    NearestProbe,
    make_probe,
)
from corda_vlm.train.terms import KnowledgeData
from tests.train.terms.conftest import PLAIN, moved


def test_labels_are_told_as_by_a_suite(tiny_open_clip, held_out, processor) -> None:
    suite = {
        "name": "one",
        "version": 1,
        "tasks": [
            {"name": "digits", "role": "retention", "kind": "zero_shot", "data": "sklearn:digits",
             "classes": {"from": "data"}, "templates": ["a {}"]}
        ],
    }  # fmt: skip
    data = load_records("sklearn:digits")
    probe = make_probe(tiny_open_clip, data, HowProbed(processor, templates=("a {}",)))
    assert isinstance(probe, LabeledProbe)
    assert probe.metric == "top1"
    assert probe.chance == 0.1
    assert probe.parts == 15
    values = probe.look_at_all(tiny_open_clip)
    (score,) = (
        s
        for s in evaluate(tiny_open_clip, suite, processor=processor, bf16=False)
        if s.metric == "top1"
    )
    assert values.mean() == pytest.approx(score.value, abs=1e-6)
    assert len(values) == len(data)


def test_more_class_names_are_taken_where_they_hold_the_records_own(
    tiny_open_clip, held_out, processor
) -> None:
    more = [*held_out.class_names, *map(str, range(100, 200))]
    probe = make_probe(tiny_open_clip, held_out, HowProbed(processor, classes=more))
    assert probe.metric == "top5"
    assert probe.chance == 5 / len(more)
    other = make_probe(tiny_open_clip, held_out, HowProbed(processor, classes=["cat", "dog"]))
    assert other.chance == 1 / len(held_out.class_names)


@pytest.mark.parametrize("towers", ["vision", "text", None])
def test_without_labels_the_nearest_is_to_stay_the_nearest(
    towers, tiny_open_clip, held_out, processor
) -> None:
    batches = [
        {name: value for name, value in batch.items() if name != "labels"}
        for batch in make_batches(held_out, processor, batch_size=20, towers=towers)
    ]
    probe = make_probe(tiny_open_clip, batches, HowProbed())
    assert isinstance(probe, NearestProbe)
    assert probe.look_at_all(tiny_open_clip).tolist() == [1.0] * len(held_out)
    changed = prepare_method("full", copy.deepcopy(tiny_open_clip), towers=towers)
    moved(changed, 0.3)
    values = probe.look(changed, 0)
    assert 0 < values.mean() < 1
    if towers == "vision":
        before, now = (nearest(model, batches[0]) for model in (tiny_open_clip, changed))
        assert values[:20].tolist() == (before == now).double().tolist()
        assert probe.chance == pytest.approx(1 / 19)


def test_ready_batches_are_looked_at_many_together() -> None:
    batches = [{"input_ids": torch.zeros(size, 3)} for size in (7,) * 50 + (200, 1)]
    parts = grouped(batches)
    assert [batch for part in parts for batch in part] == batches
    sizes = [sum(len(batch["input_ids"]) for batch in part) for part in parts]
    assert min(sizes) >= PART
    assert len(sizes) == 3
    assert [len(part) for part in grouped(batches[:2])] == [2]


def test_a_batch_without_a_choice_tells_nothing(tiny_open_clip, held_out, processor) -> None:
    pixels = next(iter(make_batches(held_out, processor, batch_size=40)))["pixel_values"]
    batches = [{"pixel_values": one} for one in (pixels[:1], pixels[1:3], pixels[3:9], pixels[9:])]
    probe = make_probe(tiny_open_clip, batches, HowProbed())
    assert len(probe.look_at_all(tiny_open_clip)) == 6 + 31
    assert probe.chance == pytest.approx((6 / 5 + 31 / 30) / 37)
    with pytest.raises(CordaError, match="no batch of the probe has two texts"):
        make_probe(tiny_open_clip, batches[:2], HowProbed())


def test_similarities_are_not_rounded(tiny_open_clip, held_out, processor, monkeypatch) -> None:
    """Under bfloat16 embeddings are, and nothing else."""
    seen, normalize = [], torch.nn.functional.normalize

    def noted(value, **how):
        seen.append((value.dtype, torch.is_autocast_enabled("cpu")))
        return normalize(value, **how)

    batches = list(make_batches(held_out, processor, batch_size=20, towers="vision"))
    monkeypatch.setattr("corda_vlm.train.budget.probe.torch.nn.functional.normalize", noted)
    make_probe(tiny_open_clip, batches, HowProbed(bf16=True))
    assert (torch.float32, False) in seen


def test_what_decides_is_in_its_identity(
    tiny_open_clip, tiny_llm, held_out, questions, processor
) -> None:
    def labeled(data=held_out, **how):
        return make_probe(tiny_open_clip, data, HowProbed(processor, **how)).identity

    def answered(**how):
        how = HowProbed(tiny_llm.processor, **{"chat": PLAIN, **how})
        return make_probe(tiny_llm.model, questions, how).identity

    def ready(size):
        batches = list(make_batches(held_out, processor, batch_size=size, towers="vision"))
        return make_probe(tiny_open_clip, batches, HowProbed()).identity

    more = [*held_out.class_names, "eleven"]
    others = [
        labeled(), labeled(templates=("a {}",)), labeled(classes=more), labeled(bf16=True), labeled(metric="top5"),
        labeled(held_out[:30]), labeled(metric="agreement"), ready(20), ready(10), answered(metric="answers"),
        answered(metric="agreement"), answered(metric="answers", chat=ChatOptions(chat_template="chatml")),
    ]  # fmt: skip
    written = [json.dumps(one, sort_keys=True) for one in others]
    assert len(set(written)) == len(written)
    assert labeled() == labeled()


@torch.no_grad()
def nearest(model, batch) -> torch.Tensor:
    """For each image of a batch the number of the one that lies nearest."""
    unit = torch.nn.functional.normalize(model.eval().encode_image(batch["pixel_values"]), dim=-1)
    return (unit @ unit.T).fill_diagonal_(-9).argmax(1)


def test_answers_of_a_language_model(tiny_llm, questions) -> None:
    model, processor = tiny_llm.model, tiny_llm.processor
    for metric in ("answers", "agreement"):
        probe = make_probe(model, questions, HowProbed(processor, metric=metric, chat=PLAIN))
        assert isinstance(probe, AnswerProbe)
        values = probe.look_at_all(model)
        assert values.shape == (len(questions),)
        assert ((values >= 0) & (values <= 1)).all()
        assert metric != "agreement" or values.min() == 1.0
    # a random model answers nothing, so that only agreement tells
    assert make_probe(model, questions, HowProbed(processor, chat=PLAIN)).metric == "agreement"
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.copy_(torch.randn_like(other.lm_head.weight))
    assert probe.look_at_all(other).mean() < 0.5


def test_metrics_that_cannot_be(tiny_open_clip, tiny_llm, held_out, questions, processor) -> None:
    with pytest.raises(CordaError, match="answers is for models that generate text"):
        make_probe(tiny_open_clip, held_out, HowProbed(processor, metric="answers"))
    model, language = tiny_llm.model, tiny_llm.processor
    with pytest.raises(CordaError, match="top5 classifies images by prompts"):
        make_probe(model, questions, HowProbed(language, metric="top5", chat=PLAIN))
    with pytest.raises(CordaError, match="needs the model's processor"):
        make_probe(tiny_open_clip, held_out, HowProbed())
    with pytest.raises(CordaError, match="no batches"):
        make_probe(tiny_open_clip, [], HowProbed())
    batches = list(make_batches(held_out, processor, batch_size=20))
    with pytest.raises(DataError, match="top1 needs records with labels"):
        make_probe(tiny_open_clip, batches, HowProbed(metric="top1"))


@pytest.mark.parametrize(
    ("samples", "count", "held", "left"),
    [(40, 30, 30, 40), (None, 30, 22, 68), (80, 5, 5, 80), (80, 60, 22, 68)],
)
def test_what_is_held_out_is_nothing_that_terms_look_at(
    samples, count, held, left, digits, processor
) -> None:
    knowledge, probe = KnowledgeData(digits, samples, seed=3).hold_out(count)
    assert len(probe) == held
    seen = knowledge.batches(processor, 8).indices
    assert len(seen) == left
    texts = [digits.place(int(i)) for i in seen]
    assert not set(texts) & {probe.place(i) for i in range(len(probe))}
    former = KnowledgeData(digits, samples, seed=3).batches(processor, 8).indices
    assert np.array_equal(former[:left], seen), "the same draw"
