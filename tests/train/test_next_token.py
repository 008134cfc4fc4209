"""Models that generate text are trained on their answers alone, and an interrupted training ends where it would have."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from corda_vlm.data import ChatOptions, ConversationBatches, load_records
from corda_vlm.errors import CordaError, DataError
from corda_vlm.evaluation import evaluate
from corda_vlm.train import TrainOptions, train
from corda_vlm.train.next_token import NextTokenObjective

OPTIONS = TrainOptions(
    loss="next_token", chat_template="plain", steps=6, batch_size=4, learning_rate=1e-2, bf16=False, log_every=2
)  # fmt: skip


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "qa.jsonl"
    rows = [{"question": f"is {i} even?", "answer": "no" if i % 2 else "yes"} for i in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_records({"source": f"jsonl:{path}", "format": "qa"})


@pytest.fixture
def shades(shades):
    """The pictures of the fixture of that name, with their questions, as records."""
    return load_records({"source": f"parquet:{shades}", "format": "qa"})


def test_the_loss_is_that_of_transformers(tiny_llm, questions) -> None:
    batch = ConversationBatches(
        questions, tiny_llm.processor, chat=ChatOptions(chat_template="plain")
    ).batch(range(5))
    loss, right = NextTokenObjective()(tiny_llm.model, batch)
    torch.testing.assert_close(loss, tiny_llm.model(**batch).loss)
    assert right.tolist() == [False] * 5
    masked = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(DataError, match="all its labels are masked"):
        NextTokenObjective()(tiny_llm.model, masked)


def test_only_the_answers_are_learnt(tiny_llm, questions) -> None:
    builder = ConversationBatches(
        questions, tiny_llm.processor, chat=ChatOptions(chat_template="plain")
    )
    batch = builder.batch([0])
    logits = tiny_llm.model(**batch).logits.detach().requires_grad_()
    given = type(
        "Stub",
        (torch.nn.Module,),
        {"forward": lambda self, **_: type("Out", (), {"logits": logits})},
    )()
    NextTokenObjective()(given, batch)[0].backward()
    moved = logits.grad[0].abs().sum(-1) > 0
    learnt = batch["labels"][0] != -100
    assert moved[:-1].tolist() == learnt[1:].tolist(), (
        "the position before each token of the answer, no other"
    )
    assert not moved[-1]


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_training_ends_where_it_would_have(tiny_llm, questions, tmp_path) -> None:
    options = replace(OPTIONS, save_every=2)
    first, second, again = tiny_llm.model, *(copy.deepcopy(tiny_llm.model) for _ in range(2))
    straight = train(first, questions, tiny_llm.processor, options=options, output_dir=tmp_path / "one",
                     eval_data=questions, show_progress=False)  # fmt: skip
    assert straight.final_loss < straight.history[0]["loss"]
    assert any("eval_loss" in entry for entry in straight.history)
    with pytest.raises(KeyboardInterrupt):
        train(second, questions, tiny_llm.processor, options=options, output_dir=tmp_path / "two",
              callbacks=[_StopAt(3)], show_progress=False)  # fmt: skip
    resumed = train(again, questions, tiny_llm.processor, options=options, output_dir=tmp_path / "two",
                    show_progress=False)  # fmt: skip
    assert resumed.resumed_from == 2
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=1e-5, atol=1e-6)
    changed = replace(options, learn="last")
    with pytest.raises(CordaError, match="learn: all there, last now"):
        train(
            again,
            questions,
            tiny_llm.processor,
            options=changed,
            output_dir=tmp_path / "two",
            show_progress=False,
        )


def test_a_tiny_llava_learns_to_see(tiny_llava, shades, tmp_path) -> None:
    options = replace(OPTIONS, chat_template="auto", steps=120, batch_size=12, learning_rate=5e-3)
    done = train(
        tiny_llava.model,
        shades,
        tiny_llava.processor,
        options=options,
        output_dir=tmp_path / "t",
        show_progress=False,
    )
    task = {"name": "shades", "role": "gain", "kind": "vqa", "options": {"max_new_tokens": 4},
            "data": {"source": str(shades.spec.source), "format": "qa"}}  # fmt: skip
    sure = {**task, "name": "sure", "kind": "likelihood", "options": {}}
    scores = evaluate(tiny_llava, {"name": "s", "version": 1, "tasks": [task, sure]})
    assert scores[0].value == 1.0, "no answer can be told without the picture"
    assert done.final_loss < 0.2
    assert scores[1].value > 0.8


def test_data_and_models_that_do_not_go_with_the_loss(
    tiny_llm, tiny_open_clip, questions, digits, processor, tmp_path
) -> None:
    with pytest.raises(DataError, match="for models that generate text"):
        train(
            tiny_open_clip,
            digits,
            processor,
            options=OPTIONS,
            output_dir=tmp_path / "a",
            show_progress=False,
        )
    for changes, message in (
        ({"loss": "prompt"}, "holds conversations.*choose loss next_token"),
        ({"chat_template": "auto"}, "unknown chat template: this model's tokenizer brings none"),
        ({"chat_template": "vicnua"}, "unknown chat template 'vicnua'.*Did you mean 'vicuna'"),
    ):
        with pytest.raises(CordaError, match=message):
            train(
                tiny_llm.model,
                questions,
                tiny_llm.processor,
                options=replace(OPTIONS, **changes),
                output_dir=tmp_path / "c",
                show_progress=False,
            )
    with pytest.raises(DataError, match="say which format"):
        train(
            tiny_llm.model,
            digits,
            tiny_llm.processor,
            options=OPTIONS,
            output_dir=tmp_path / "b",
            show_progress=False,
        )
