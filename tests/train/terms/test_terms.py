"""Distillation and replay: what they are, that they hold, and that a training with them is gone on with to the bit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from corda_vlm.data import load_records, make_batches
from corda_vlm.errors import CordaError, DataError
from corda_vlm.families import detect_family
from corda_vlm.methods import prepare_method
from corda_vlm.run_files import TEACHER
from corda_vlm.train import TrainOptions, train
from corda_vlm.train.history import read_history
from corda_vlm.train.next_token import NextTokenObjective
from corda_vlm.train.terms import (
    KnowledgeData,
    TaskData,
    Term,
    TermOptions,
    distillation,
    make_terms,
)
from corda_vlm.train.terms.features import FeatureDistillation
from corda_vlm.train.terms.knowledge import as_knowledge
from corda_vlm.train.terms.make import held_to
from corda_vlm.train.terms.options import DISTILL
from corda_vlm.train.terms.tokens import TokenDistillation, shares_of
from tests.train.terms.conftest import OPTIONS, PLAIN, Stop, moved, weights

# ------------------------------------------------------------------ what it is


@pytest.mark.parametrize("method", ["lora", "full"])
def test_distillation_is_one_minus_the_cosine(method, tiny_open_clip, held_out, processor):
    model = prepare_method(method, tiny_open_clip, rank=2, towers="vision")
    batches = make_batches(held_out, processor, batch_size=16)
    parts = detect_family(tiny_open_clip).need_contrastive(tiny_open_clip)
    before = copy.deepcopy(tiny_open_clip).eval()
    distill = distillation(model, batches)
    assert isinstance(distill, FeatureDistillation)
    assert distill.towers == ("vision",), "the text tower is not trained"
    assert float(distill(0).detach()) == pytest.approx(0, abs=1e-6)
    moved(model)
    rows, batch = as_knowledge(batches).at(3)
    assert len(rows) == 16
    with torch.no_grad():
        old, new = (
            parts.encode_image(one, batch["pixel_values"])
            for one in (before, tiny_open_clip.eval())
        )
    wanted = (1 - F.cosine_similarity(old, new)).mean()
    value = distill(3)
    torch.testing.assert_close(value.detach(), wanted, rtol=1e-4, atol=1e-6)
    value.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_similarity_is_zero_at_the_start_and_not_after(tiny_open_clip, held_out, processor):
    for towers, spec in (("vision", "vision"), (None, ["vision", "text"])):
        model = prepare_method("lora", copy.deepcopy(tiny_open_clip), rank=2, towers=towers)
        batches = make_batches(held_out, processor, batch_size=16, towers=spec)
        distill = distillation(model, batches, loss="similarity")
        assert float(distill(0)) == pytest.approx(0, abs=1e-5)
        moved(model, 0.3)
        assert float(distill(0)) > 1e-4


def test_every_record_is_looked_at_once_an_epoch(held_out, processor):
    knowledge = as_knowledge(make_batches(held_out, processor, batch_size=16), seed=3)
    epochs = [[r for n in range(at, at + 3) for r in knowledge.at(n)[0]] for at in (0, 3)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = as_knowledge(make_batches(held_out, processor, batch_size=16), seed=3)
    assert list(again.at(5)[0]) == list(knowledge.at(5)[0])


def test_ready_batches_are_knowledge_too(tiny_open_clip, held_out, processor):
    model = prepare_method("lora", tiny_open_clip, rank=2, towers="vision")
    ready = list(make_batches(held_out, processor, batch_size=16))
    distill = distillation(model, ready)
    moved(model)
    values = sorted(float(distill(n)) for n in range(3))
    assert values == sorted(float(distill(n)) for n in range(3, 6))
    assert values[0] > 0
    with pytest.raises(CordaError, match="no batches"):
        distillation(model, [])


def test_token_distillation_is_the_divergence(tiny_llm, questions):
    """Where all tokens are kept; and where few are, it is no more than that."""
    model = prepare_method("lora", tiny_llm.model, rank=2)
    batches = make_batches(questions, tiny_llm.processor, batch_size=4, chat=PLAIN, must_learn=True)
    before = copy.deepcopy(model)
    distill = distillation(model, batches)
    assert float(distill(0).detach()) == pytest.approx(0, abs=1e-6)
    moved(model, 0.5)
    _, batch = as_knowledge(batches).at(1)
    learnt = batch["labels"][:, 1:] != -100
    inputs = {n: v for n, v in batch.items() if n != "labels"}
    with torch.no_grad():
        old, new = (
            one.eval()(**inputs).logits[:, :-1][learnt].log_softmax(-1) for one in (before, model)
        )
    whole = F.kl_div(new, old, log_target=True, reduction="batchmean")
    some = float(distill(1).detach())
    assert 0 < some <= float(whole) * (1 + 1e-4)
    every = shares_of(old, torch.arange(old.shape[1]).expand_as(old))
    torch.testing.assert_close(every, old, rtol=1e-4, atol=1e-5)
    few = shares_of(old, old.topk(3).indices)
    torch.testing.assert_close(few.exp().sum(1), torch.ones(len(few)))


def test_replay_is_the_knowledges_own_loss(tiny_llm, questions):
    model = prepare_method("lora", tiny_llm.model, rank=2)
    given = KnowledgeData(questions, chat=PLAIN)
    (term,) = make_terms(
        TermOptions(replay=0.5, replay_batch_size=4, replay_every=1),
        model,
        tiny_llm.processor,
        given,
        TaskData(questions, TrainOptions(loss="next_token")),
    )
    assert (term.name, term.weight, term.every) == ("replay", 0.5, 1)
    _, batch = as_knowledge(given.batches(tiny_llm.processor, 4)).at(2)
    torch.testing.assert_close(term.value(2), NextTokenObjective()(tiny_llm.model, batch)[0])


@pytest.mark.parametrize(("loss", "kind"), [("auto", "prompt"), ("contrastive", "contrastive")])
def test_replay_of_pictures(loss, kind, tiny_open_clip, held_out, processor):
    model = prepare_method("lora", tiny_open_clip, rank=2)
    asked = TermOptions(replay=1.0, replay_loss=loss, replay_batch_size=8, replay_every=2)
    (term,) = make_terms(
        asked, model, processor, KnowledgeData(held_out), TaskData(held_out, TrainOptions())
    )
    assert term.plan["loss"] == kind
    first, same, other = term.value(0), term.value(1), term.value(2)
    assert torch.isfinite(first)
    assert torch.equal(first, same), "every second step has a batch of its own"
    assert not torch.equal(first, other)


# ------------------------------------------------------------------ what was kept


def test_what_the_model_gave_is_kept_in_a_file(
    tiny_open_clip, held_out, processor, tmp_path, caplog
):
    def value(base):
        model = prepare_method("lora", copy.deepcopy(base), rank=2, towers="vision")
        torch.manual_seed(5)
        distill = distillation(
            model, make_batches(held_out, processor, batch_size=16), cache=tmp_path
        )
        moved(model)
        return float(distill(0))

    first = value(tiny_open_clip)
    (path,) = tmp_path.glob(TEACHER)
    written = path.stat().st_mtime_ns
    assert value(tiny_open_clip) == first
    assert path.stat().st_mtime_ns == written
    path.write_bytes(path.read_bytes()[:-9])
    assert value(tiny_open_clip) == first
    assert "is made again" in caplog.text
    other = copy.deepcopy(tiny_open_clip)
    with torch.no_grad():
        for parameter in other.visual.parameters():  # with the same signs
            parameter.mul_(1 + torch.rand_like(parameter))
    caplog.clear()
    value(other)
    assert "of another model" in caplog.text


def test_tokens_are_kept_in_a_file(tiny_llm, questions, tmp_path):
    def made(seed):
        model = prepare_method("lora", copy.deepcopy(tiny_llm.model), rank=2)
        batches = make_batches(
            questions, tiny_llm.processor, batch_size=4, chat=PLAIN, must_learn=True
        )
        distill = distillation(model, batches, cache=tmp_path, seed=seed)
        moved(model)
        return distill

    first = made(0)
    (path,) = tmp_path.glob(TEACHER)
    written = path.stat().st_mtime_ns
    assert isinstance(made(1), TokenDistillation), "another order of the same records"
    assert path.stat().st_mtime_ns == written
    assert list(tmp_path.glob(TEACHER)) == [path]
    assert float(first(0)) > 0


# ------------------------------------------------------------------ in a training


def clip_terms(model, held_out, processor, **asked):
    given = {"distill_batch_size": 8, "replay_batch_size": 8, **asked}
    return make_terms(
        TermOptions(**given),
        model,
        processor,
        KnowledgeData(held_out),
        TaskData(held_out, TrainOptions()),
    )


def test_distillation_holds_what_is_trained(tiny_open_clip, digits, held_out, processor, tmp_path):
    found = {}
    for weight in (0.0, 300.0):
        model = prepare_method("lora", copy.deepcopy(tiny_open_clip), rank=4, towers="vision")
        distill = distillation(model, make_batches(held_out, processor, batch_size=8))
        result = train(
            model, digits, processor, options=TrainOptions(**OPTIONS), output_dir=tmp_path / str(weight),
            terms=[Term("distill", distill, weight)], show_progress=False,
        )  # fmt: skip
        found[weight] = [entry["distill"] for entry in result.history if "loss" in entry]
    assert len(found[0.0]) == 4
    assert found[300.0][-1] < 0.5 * found[0.0][-1]


def test_knowledge_is_one_word(tiny_open_clip, digits, held_out, processor, tmp_path):
    """`knowledge=` is distillation with the weight that the docs name, and its records are found again."""
    model = prepare_method("lora", copy.deepcopy(tiny_open_clip), rank=4, towers="vision")
    told = {"options": TrainOptions(**OPTIONS), "output_dir": tmp_path, "show_progress": False}
    result = train(model, digits, processor, knowledge=held_out, **told)
    plan = json.loads((tmp_path / "train.json").read_text())
    assert plan["terms"]["distill"]["weight"] == DISTILL
    assert result.history[-1]["distill"] > 0
    assert len(list(tmp_path.glob("teacher-*.safetensors"))) == 1


def test_conversations_of_the_knowledge_are_read_as_those_of_the_task(
    tiny_llm, questions, tmp_path
):
    model, processor = prepare_method("lora", copy.deepcopy(tiny_llm.model), rank=4), tiny_llm.processor  # fmt: skip
    widths = {}
    for template in ("plain", "chatml"):
        task = TaskData(questions, TrainOptions(loss="next_token", chat_template=template))
        (term,) = held_to(questions, model, processor, task, tmp_path / template)
        assert isinstance(term.penalty, TokenDistillation)
        widths[template] = term.penalty.knowledge.at(0)[1]["input_ids"].shape[1]
    assert widths["plain"] < widths["chatml"]


@pytest.mark.parametrize("method", ["lora", "corda-kpm", "full"])
def test_a_training_with_terms_is_gone_on_with_to_the_bit(
    method, tiny_open_clip, digits, held_out, processor, tmp_path
):
    from corda_vlm.covariance import collect_covariance
    from corda_vlm.sites import find_sites

    sites = find_sites(tiny_open_clip, towers="vision")
    pixels = {"pixel_values": torch.randn(64, 3, 32, 32)}
    store = collect_covariance(tiny_open_clip, [pixels], sites, show_progress=False)
    options = TrainOptions(**{**OPTIONS, "learning_rate": 1e-3}, save_every=2)

    def run(folder, *callbacks):
        given = {"store": store} if method == "corda-kpm" else {}
        model = prepare_method(
            method,
            copy.deepcopy(tiny_open_clip),
            rank=4,
            towers="vision",
            show_progress=False,
            **given,
        )
        terms = clip_terms(model, held_out, processor, distill=30.0, distill_every=2, replay=0.3)
        result = train(model, digits, processor, options=options, output_dir=folder, terms=terms,
                       callbacks=callbacks, show_progress=False)  # fmt: skip
        return model, result

    straight, expected = run(tmp_path / "straight")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "cut", Stop(5))
    model, result = run(tmp_path / "cut")
    assert result.resumed_from == 4
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(model)[name]), name
    entries = zip(expected.history, read_history(tmp_path / "cut" / "history.jsonl"), strict=True)
    for one, other in entries:
        assert (one["distill"], one["replay"]) == (other["distill"], other["replay"])


def test_a_language_model_is_gone_on_with_to_the_bit(tiny_llm, questions, tmp_path):
    options = TrainOptions(loss="next_token", chat_template="plain", steps=6, batch_size=4, bf16=False,
                           learning_rate=1e-2, log_every=2, save_every=2)  # fmt: skip

    def run(folder, *callbacks):
        model = prepare_method("lora", copy.deepcopy(tiny_llm.model), rank=2)
        asked = TermOptions(
            distill=1.0, distill_batch_size=4, distill_every=1, replay=0.5, replay_batch_size=4
        )
        terms = make_terms(
            asked,
            model,
            tiny_llm.processor,
            KnowledgeData(questions, chat=PLAIN),
            TaskData(questions, options),
        )
        train(model, questions, tiny_llm.processor, options=options, output_dir=folder, terms=terms,
              callbacks=callbacks, show_progress=False)  # fmt: skip
        return weights(model)

    straight = run(tmp_path / "straight")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "cut", Stop(3))
    for name, value in run(tmp_path / "cut").items():
        assert torch.equal(value, straight[name]), name


def test_the_plan_of_a_training_tells_its_terms(
    tiny_open_clip, digits, held_out, processor, tmp_path
):
    def again(**asked):
        model = prepare_method("lora", copy.deepcopy(tiny_open_clip), rank=4, towers="vision")
        terms = clip_terms(model, held_out, processor, **asked)
        train(model, digits, processor, options=TrainOptions(**{**OPTIONS, "steps": 1}), output_dir=tmp_path,
              terms=terms, show_progress=False)  # fmt: skip

    again(distill=30.0)
    plan = json.loads((tmp_path / "train.json").read_text())["terms"]["distill"]
    assert (plan["weight"], plan["every"], plan["loss"]) == (30.0, 3, "cosine")
    again(distill=30.0)
    for asked, match in (
        ({"distill": 10.0}, r"the distill's weight: 30\.0 there, 10\.0 now"),
        (
            {"distill": 30.0, "distill_loss": "similarity"},
            "the distill's loss: cosine there, similarity now",
        ),
        ({"distill": 30.0, "distill_batch_size": 4}, "the distill's batch_size: 8 there, 4 now"),
        ({"distill": 30.0, "replay": 1.0}, "the replay's weight: None there, 1.0 now"),
        ({}, r"the distill's weight: 30\.0 there, None now"),
    ):
        with pytest.raises(CordaError, match=match):
            again(**asked)


def test_a_training_of_a_former_version_is_gone_on_with(
    tiny_open_clip, digits, processor, tmp_path
):
    """Its plan named the anchor and one further weight, each in a place of its own."""

    def again(weight):
        model = prepare_method("lora", copy.deepcopy(tiny_open_clip), rank=4, towers="vision")
        first = next(p for p in model.parameters() if p.requires_grad)
        train(model, digits, processor, options=TrainOptions(**{**OPTIONS, "steps": 1}), output_dir=tmp_path,
              extra_loss=lambda: first.square().sum(), extra_weight=weight, show_progress=False)  # fmt: skip

    again(2.0)
    begun = json.loads((tmp_path / "train.json").read_text())
    assert begun.pop("terms") == {"extra_loss": {"weight": 2.0, "every": 1}}
    (tmp_path / "train.json").write_text(json.dumps({**begun, "anchor": None, "extra_weight": 2.0}))
    again(2.0)
    with pytest.raises(CordaError, match=r"the extra_loss's weight: 2\.0 there, 3\.0 now"):
        again(3.0)


# ------------------------------------------------------------------ what is refused


def test_terms_that_cannot_be(tiny_open_clip, tiny_llm, held_out, questions, processor):
    model = prepare_method("lora", tiny_open_clip, rank=2, towers="vision")
    with pytest.raises(
        CordaError, match=r"distill looks at records of the knowledge .* there are none"
    ):
        make_terms(
            TermOptions(distill=1.0), model, processor, None, TaskData(held_out, TrainOptions())
        )
    with pytest.raises(CordaError, match="tokens is for models that generate text"):
        clip_terms(model, held_out, processor, distill=1.0, distill_loss="tokens")
    spoken = prepare_method("lora", tiny_llm.model, rank=2)
    given = KnowledgeData(questions, chat=PLAIN)
    with pytest.raises(CordaError, match="generate text: choose the loss tokens"):
        make_terms(
            TermOptions(distill=1.0, distill_loss="cosine"),
            spoken,
            tiny_llm.processor,
            given,
            TaskData(questions, TrainOptions()),
        )
    unlabeled = make_batches(questions, tiny_llm.processor, batch_size=4, chat=PLAIN)
    bare = [{n: v for n, v in batch.items() if n != "labels"} for batch in unlabeled]
    with pytest.raises(DataError, match="have no labels"):
        distillation(spoken, bare)


def test_what_is_trained_lies_in_another_tower(tiny_open_clip, held_out, processor):
    model = prepare_method("lora", tiny_open_clip, rank=2, towers="text")
    batches = make_batches(held_out, processor, batch_size=8, towers="vision")
    with pytest.raises(CordaError, match="nothing that is trained changes the embeddings"):
        distillation(model, batches)


def test_replay_without_labels_or_texts(tiny_open_clip, processor):
    model = prepare_method("lora", tiny_open_clip, rank=2, towers="vision")
    data = load_records({"source": "sklearn:digits", "split": "val", "limit": 8, "label": None})
    data.labels = data.class_names = data.texts = None
    with pytest.raises(DataError, match="its records have neither; name their column"):
        make_terms(
            TermOptions(replay=1.0),
            model,
            processor,
            KnowledgeData(data),
            TaskData(data, TrainOptions()),
        )


def test_two_terms_of_one_name(tiny_open_clip, digits, processor, tmp_path):
    model = prepare_method("lora", tiny_open_clip, rank=2, towers="vision")
    zero = lambda: torch.zeros((), requires_grad=True)  # noqa: E731
    for names in (["mine", "mine"], ["loss"]):
        with pytest.raises(CordaError, match=f"are called '{names[-1]}'"):
            train(model, digits, processor, options=TrainOptions(**OPTIONS), output_dir=tmp_path,
                  terms=[Term(name, zero) for name in names], show_progress=False)  # fmt: skip
    with pytest.raises(CordaError, match="every is 0"):
        Term("mine", zero, every=0)


def test_the_folder_of_another_training_is_refused_before_terms_are_made(
    tiny_open_clip, digits, processor, tmp_path
):
    model = prepare_method("lora", tiny_open_clip, rank=2, towers="vision")
    given = {"output_dir": tmp_path, "show_progress": False}
    train(model, digits, processor, options=TrainOptions(**{**OPTIONS, "steps": 1}), **given)

    def terms():
        raise AssertionError("the knowledge was looked at")

    with pytest.raises(CordaError, match="holds another training"):
        train(model, digits, processor, options=TrainOptions(**OPTIONS), terms=terms, **given)


def test_a_share_of_the_batch_is_replayed():
    """Every record counts alike, so that the gradient is that of one mixed batch, times what Adam does not see."""
    training = TrainOptions(steps=1, batch_size=16, gradient_accumulation=2)
    terms, left = TermOptions(replay_share=0.25).shared(training)
    assert (left.batch_size, terms.replay_batch_size, terms.replay_every) == (12, 8, 1)
    assert terms.replay == pytest.approx(4 / 12)
    assert terms.shared(left) == (terms, left)
    assert (
        TermOptions(replay_share=0.25).names
        == TermOptions(replay_share=0.25).needs_data
        == ["replay"]
    )
    for share, known in ((0.01, 1), (0.99, 6)):
        few, rest = TermOptions(replay_share=share).shared(TrainOptions(steps=1, batch_size=7))
        assert (few.replay_batch_size, rest.batch_size) == (known, 7 - known)
    with pytest.raises(CordaError, match="batch_size is 1"):
        TermOptions(replay_share=0.5).check_training(TrainOptions(steps=1, batch_size=1), "prompt")
    with pytest.raises(CordaError, match="choose one of the two"):
        TermOptions(replay=1.0, replay_share=0.5)
