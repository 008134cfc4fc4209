"""EWC: the diagonal Fisher information, and the penalty that weighs a change of the weights by it."""

from __future__ import annotations

import copy

import pytest
import torch

from corda_vlm.data import make_batches
from corda_vlm.errors import CordaError
from corda_vlm.families import detect_family
from corda_vlm.methods import prepare_method
from corda_vlm.run_files import TEACHER
from corda_vlm.train import TrainOptions, train
from corda_vlm.train.terms import KnowledgeData, TaskData, TermOptions, distillation, make_terms
from corda_vlm.train.terms.ewc import consolidation
from tests.train.terms.conftest import OPTIONS, PLAIN, Stop, moved, weights


@pytest.mark.parametrize("method", ["lora", "milora", "full"])
def test_it_is_zero_at_the_start_and_grows_by_the_square(
    method, tiny_open_clip, held_out, processor
):
    model = prepare_method(method, tiny_open_clip, rank=2, towers="vision",
                           **({"show_progress": False} if method == "milora" else {}))  # fmt: skip
    requires = {n: p.requires_grad for n, p in model.named_parameters()}
    ewc = consolidation(model, make_batches(held_out, processor, batch_size=4))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == requires
    assert float(ewc().detach()) == 0
    first = weights(model)
    step = {n: 0.01 * torch.randn_like(p) for n, p in first.items()}
    values = []
    for size in (1.0, 2.0):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in step and (
                    "lora_A" not in name
                ):  # of an adapter B alone: a linear change
                    parameter.copy_(first[name] + size * step[name])
        values.append(float(ewc().detach()))
    assert values[0] > 0
    assert values[1] == pytest.approx(4 * values[0], rel=1e-3)
    ewc().backward()


def test_the_fisher_information_is_that_of_the_outputs(tiny_open_clip, held_out, processor):
    """For random small changes it foretells half the squared distance of the embeddings, which distillation measures."""
    model = prepare_method("full", tiny_open_clip, towers="vision")
    batches = make_batches(held_out, processor, batch_size=1)
    ewc, distill = consolidation(model, batches), distillation(model, batches, batch_size=40)
    first, ratios = weights(model), []
    for _ in range(6):
        moved(model, 1e-3)
        ratios.append(float(ewc().detach()) / float(distill(0).detach()))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in first:
                    parameter.copy_(first[name])
    assert sum(ratios) / 6 == pytest.approx(1.0, rel=0.35)


def test_a_language_model_has_one_too_and_a_file_keeps_it(tiny_llm, questions, tmp_path):
    def made():
        model = prepare_method("lora", copy.deepcopy(tiny_llm.model), rank=2)
        torch.manual_seed(3)
        ewc = consolidation(model, make_batches(questions, tiny_llm.processor, batch_size=2, chat=PLAIN, must_learn=True),
                            cache=tmp_path)  # fmt: skip
        moved(model, 0.1)
        return float(ewc())

    first = made()
    (path,) = tmp_path.glob(TEACHER)
    written = path.stat().st_mtime_ns
    assert made() == first > 0
    assert path.stat().st_mtime_ns == written


def test_it_holds_and_is_gone_on_with_to_the_bit(
    tiny_open_clip, digits, held_out, processor, tmp_path
):
    options = TrainOptions(**OPTIONS, save_every=2)

    def run(folder, weight, *callbacks):
        model = prepare_method("lora", copy.deepcopy(tiny_open_clip), rank=4, towers="vision")
        (term,) = make_terms(TermOptions(ewc=1.0, ewc_every=2), model, processor, KnowledgeData(held_out),
                             TaskData(digits, options))  # fmt: skip
        term = type(term)(term.name, term.penalty, weight, term.every, term.identity)
        result = train(model, digits, processor, options=options, output_dir=folder, terms=[term],
                       callbacks=callbacks, show_progress=False)  # fmt: skip
        return weights(model), [entry["ewc"] for entry in result.history if "loss" in entry]

    _, free = run(tmp_path / "free", 0.0)
    straight, held = run(tmp_path / "straight", 1000.0)
    assert held[-1] < 0.5 * free[-1]
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "cut", 1000.0, Stop(5))
    again, told = run(tmp_path / "cut", 1000.0)
    assert told == held
    for name, value in again.items():
        assert torch.equal(value, straight[name]), name


def test_dora_is_refused(tiny_open_clip, held_out, processor):
    model = prepare_method("dora", tiny_open_clip, rank=2, towers="vision")
    assert detect_family(tiny_open_clip).contrastive is not None
    with pytest.raises(
        CordaError, match=r"ewc weighs the change B A .* take another method, or distill"
    ):
        consolidation(model, make_batches(held_out, processor, batch_size=4))


def test_what_is_squared_together_and_added_already_is_told_apart(
    tiny_open_clip, held_out, processor, tmp_path
):
    """The Fisher information that was kept is not taken for another."""
    model = prepare_method("lora", tiny_open_clip, rank=2, towers="vision")

    def files(size):
        consolidation(model, make_batches(held_out, processor, batch_size=size), cache=tmp_path)
        return len(list(tmp_path.glob(TEACHER)))

    assert (files(4), files(4), files(8)) == (1, 1, 2)
    moved(model, 0.1)
    assert files(8) == 3
