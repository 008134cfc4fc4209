"""Labels are the answers and nothing else, padding and truncation leave images whole, and every refusal is counted."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from corda_vlm.data import Chat, ChatOptions, ConversationBatches, load_records, make_batches
from corda_vlm.errors import CordaError, DataError, UnknownNameError

MESSAGES = [
    {"role": "user", "content": "is there a circle?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "what colour?"},
    {"role": "assistant", "content": "dark blue"},
]


@pytest.fixture
def questions(tmp_path):
    def make(*pairs, **options):
        path = tmp_path / "qa.jsonl"
        path.write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in pairs))
        return load_records({"source": f"jsonl:{path}", "format": "qa", **options})

    return make


@pytest.fixture
def shapes(tmp_path, digits):
    """LLaVA records about two pictures; the second conversation has two turns."""
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(digits[index][0])
    records = []
    for index, turns in enumerate([["A zero", None], ["A one", "no"]]):
        said = []
        for number, answer in enumerate(t for t in turns if t):
            place = "<image>\n" if not number else ""
            said += [
                {"from": "human", "value": f"{place}question {number}"},
                {"from": "gpt", "value": answer},
            ]
        records.append({"image": f"{index}.png", "conversations": said})
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(records))
    return load_records({"source": f"json:{path}", "format": "llava"})


def learnt(processor, sample):
    return processor.tokenizer.decode(sample["input_ids"][sample["labels"] != -100])


# ------------------------------------------------------------------ templates


@pytest.mark.parametrize(
    ("template", "text", "answers"),
    [
        ("plain", "Question: what colour?\nAnswer: dark blue</s>", [" yes", " dark blue</s>"]),
        ("bare", "what colour? dark blue</s>", ["yes", "dark blue</s>"]),
        ("vicuna", "USER: what colour? ASSISTANT: dark blue</s>", [" yes</s>", " dark blue</s>"]),
    ],
)
def test_where_the_answers_are(tiny_llm, template, text, answers):
    chat = Chat(tiny_llm.processor, template)
    whole = chat.full(MESSAGES)
    assert whole.text.endswith(text)
    assert [whole.text[turn.start : turn.end] for turn in whole.turns] == answers
    assert whole.text[whole.turns[1].start : whole.turns[1].content_end].strip() == "dark blue"
    prompt = chat.prompt(MESSAGES)
    assert whole.text.startswith(prompt.text)
    assert not prompt.text.endswith(" ")
    assert whole.text[len(prompt.text) :].strip() == "dark blue</s>"


# Each writes a space before or after the answer that byte-level BPE merges with the word beside it.
MERGING: dict[str, Any] = {
    "space before": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    "space after": "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    "no opening": "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("kind", MERGING)
def test_labels_are_exact_where_white_space_merges(tiny_llm, kind):
    """What a model is trained to say after a prompt is what follows the prompt's own tokens."""
    processor = tiny_llm.processor
    chat = Chat(processor, MERGING[kind])
    whole, prompt = chat.full(MESSAGES[:2]), chat.prompt(MESSAGES[:2])
    (turn,) = whole.turns
    sample = processor.encode(
        whole.text, responses=[(turn.start, turn.end)], special_tokens=whole.special_tokens
    )
    given = processor.encode(prompt.text, special_tokens=prompt.special_tokens)["input_ids"]
    labels = sample["labels"]
    assert sample["input_ids"][: len(given)].tolist() == given.tolist()
    assert (labels[: len(given)] == -100).all()
    assert (labels[len(given) :] != -100).all(), "the answer and its end, to the last token"
    assert processor.tokenizer.decode(labels[len(given) :]).strip() == "yes</s>"


# As Qwen3's: empty thoughts before the last answer and no other; thoughts that are given are kept there alone.
THINKS = """{% for m in messages %}{% set content = m['content'] %}{{ '<|im_start|>' + m['role'] + '\n' }}
{%- if m['role'] == 'assistant' %}{% if '</think>' in content %}{% set thought = content.split('</think>')[0] %}
{%- set content = content.split('</think>')[-1].strip() %}{% else %}{% set thought = '<think>\n\n' %}{% endif %}
{%- if loop.last %}{{ thought + '</think>\n\n' }}{% endif %}{% endif %}{{ content + '</s>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
FORGETS_EARLY = "{% for m in messages %}{{ m['role'] }}: {{ '...' if m['role'] == 'assistant' and not loop.last else m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def test_the_models_own_template_and_unknown_ones(tiny_llm, tiny_llava, tmp_path, questions):
    with pytest.raises(CordaError, match=r"unknown chat template.*brings none.*plain"):
        Chat(tiny_llm.processor).full(MESSAGES)
    with pytest.raises(
        UnknownNameError, match=r"unknown chat template 'plian'.*Did you mean 'plain'"
    ):
        Chat(tiny_llm.processor, "plian").full(MESSAGES)
    (tmp_path / "own.jinja").write_text(MERGING["no opening"])
    assert (
        Chat(tiny_llm.processor, str(tmp_path / "own.jinja"))
        .full(MESSAGES)
        .text.startswith("[INST]")
    )
    own = Chat(tiny_llava.processor).full(MESSAGES[:2])
    assert own.text == "USER: is there a circle? ASSISTANT: yes</s>", (
        "made to end, as LLaVA's template does not"
    )
    assert own.special_tokens, "and without a token to begin with, which the tokenizer may add"
    picky = "{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}x"
    data = questions(("a", "b"), ("c", "d"))
    with pytest.raises(
        DataError,
        match=r"qa\.jsonl, line 1: the chat template does not take it \(one message only\)",
    ):
        ConversationBatches(data, tiny_llm.processor, chat=ChatOptions(chat_template=picky)).batch(
            [0]
        )


def test_a_template_that_rewrites_answers_is_refused(tiny_llm):
    forgets = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] if loop.last else '...' }}\n{% endfor %}"
    with pytest.raises(DataError, match="writes message 1 in other words"):
        Chat(tiny_llm.processor, forgets).full(MESSAGES)
    with pytest.raises(DataError, match=r"message 1 .*or learn: last"):
        Chat(tiny_llm.processor, FORGETS_EARLY).full(MESSAGES)
    whole = Chat(tiny_llm.processor, FORGETS_EARLY).full(MESSAGES, "last")
    assert [whole.text[turn.start : turn.end] for turn in whole.turns] == [" dark blue</s>"]
    shouts = "{% for m in messages %}{{ m['content'] | upper }}\n{% endfor %}"
    with pytest.raises(DataError, match="writes message 1 in other words"):
        Chat(tiny_llm.processor, shouts).full(MESSAGES[:2])


@pytest.mark.parametrize("learn", ["all", "last"])
@pytest.mark.parametrize("answer", ["yes", "hi", "s"])  # two are in the marks beside them as well
def test_a_template_that_writes_the_last_answer_in_another_way(tiny_llm, learn, answer):
    """Labels are each answer with its end, and of the last one the empty thoughts that the model is to say too."""
    chat = Chat(tiny_llm.processor, THINKS)
    said = [MESSAGES[0], {"role": "assistant", "content": answer}, MESSAGES[2]]
    whole = chat.full([*said, {"role": "assistant", "content": answer}], learn)
    assert whole.text.count("<think>") == 1
    last = f"<think>\n\n</think>\n\n{answer}</s>"
    expected = [f"{answer}</s>", last] if learn == "all" else [last]
    assert [whole.text[turn.start : turn.end] for turn in whole.turns] == expected
    assert whole.text[: whole.turns[-1].start] == chat.prompt(said).text
    for turn in whole.turns:
        assert whole.text[: turn.content_end].endswith(answer)
        assert whole.text[turn.content_end : turn.end] == "</s>"
    for thought in ("<think>\nA circle.\n</think>\n\nyes", "<think>\n\n</think>\n\nyes"):
        (turn,) = chat.full([MESSAGES[0], {"role": "assistant", "content": thought}], learn).turns
        assert turn.content_end - turn.start == len(thought)


# ------------------------------------------------------------------ batches


def test_a_batch_of_text(tiny_llm, questions):
    processor = tiny_llm.processor
    data = questions(("is there a circle or a square?", "yes"), ("?", "dark blue"))
    loader = make_batches(data, processor, batch_size=2, chat=ChatOptions(chat_template="plain"))
    (batch,) = loader
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    assert bool((batch["attention_mask"][0] == 1).all())
    short = int(batch["attention_mask"][1].sum())
    assert bool((batch["input_ids"][1, short:] == 0).all()), "padded on the right"
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())
    said = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert said == [" yes</s>", " dark blue</s>"]
    assert torch.isfinite(tiny_llm.model(**batch).loss)
    other = make_batches(data, processor, batch_size=2, chat=ChatOptions(chat_template="bare"))
    assert other.fingerprint != loader.fingerprint


def test_a_batch_with_images(tiny_llava, shapes):
    processor = tiny_llava.processor
    builder = ConversationBatches(shapes, processor)
    batch = builder.batch([0, 1])
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert ((batch["input_ids"] == 3).sum(1) == 16).all()
    assert bool((batch["labels"][batch["input_ids"] == 3] == -100).all())
    assert learnt(processor, builder.sample(1)).split("</s>") == [" A one no", ""]
    last = ConversationBatches(shapes, processor, chat=ChatOptions(learn="last"))
    assert learnt(processor, last.sample(1)) == " no</s>"
    assert torch.isfinite(tiny_llava.model(**batch).loss)
    again = builder.batch([0, 1])
    assert all(torch.equal(batch[name], again[name]) for name in batch), "as kept"


def test_an_image_is_preprocessed_once_for_all_its_questions(
    tiny_llava, tmp_path, digits, monkeypatch
):
    import pyarrow as pa
    import pyarrow.parquet as pq

    qa = json.dumps([{"question": f"q{k}", "answer": "yes"} for k in range(3)])
    pq.write_table(
        pa.table({"image": [d[0] for d in digits[:2]], "qa_json": [qa] * 2}), tmp_path / "x.parquet"
    )
    data: Any = load_records({"source": f"parquet:{tmp_path}/x.parquet", "format": "qa"})
    builder = ConversationBatches(data, tiny_llava.processor)
    first = builder.batch(range(6))
    kept = [builder._kept.images[data.picture_key(i)]["pixel_values"] for i in range(6)]
    assert kept[0] is kept[2]
    assert kept[0] is not kept[3]
    monkeypatch.setattr(data, "get", None)
    assert torch.equal(builder.batch(range(6))["pixel_values"], first["pixel_values"])


def test_documents_are_learnt_whole(tiny_llm, tmp_path):
    (tmp_path / "a.txt").write_text("is there a red circle in the image?")
    data = load_records({"source": f"text:{tmp_path}/a.txt", "format": "text"})
    sample = ConversationBatches(data, tiny_llm.processor).sample(0)
    assert torch.equal(sample["labels"], sample["input_ids"])


# ------------------------------------------------------------------ refusals


def test_a_sequence_that_is_too_long(tiny_llm, questions, caplog):
    data = questions(("x " * 200, "yes"), ("is there?", "no"), max_bad_share=0.5)
    skip, error = (ChatOptions(chat_template="plain", too_long=kind) for kind in ("skip", "error"))
    builder = ConversationBatches(data, tiny_llm.processor, chat=skip)
    assert builder.batch([0, 1])["input_ids"].shape[0] == 1
    assert "tokens are more than the 128 that fit" in data.bad[0]
    fresh = data.select([0, 1])
    with pytest.raises(
        DataError,
        match=r"qa\.jsonl, line 1: 4\d\d tokens are more than the 128.*model's context of 128",
    ):
        ConversationBatches(fresh, tiny_llm.processor, chat=error).batch([0])
    with pytest.raises(
        DataError, match=r"2 of 2 records cannot be used(.|\n)*more than the 8 that fit"
    ):
        ConversationBatches(
            fresh, tiny_llm.processor, chat=dataclasses.replace(skip, max_tokens=8)
        ).batch([0, 1])

    long = questions(("is there?", "yes " * 200))
    cut = ConversationBatches(
        long, tiny_llm.processor, chat=ChatOptions(chat_template="plain", too_long="truncate")
    )
    sample = cut.sample(0)
    assert all(len(value) == 128 for value in sample.values())
    assert cut.truncated == 1
    assert "line 1" in caplog.text
    gone = questions(("x " * 200, "yes"))
    with pytest.raises(DataError, match="all its labels are masked"):
        ConversationBatches(gone, tiny_llm.processor, chat=cut.options, must_learn=True).sample(0)


def test_an_image_is_never_cut(tiny_llava, shapes):
    options = ChatOptions(max_tokens=15, too_long="truncate")
    with pytest.raises(DataError, match="cutting it would cut an image"):
        ConversationBatches(shapes, tiny_llava.processor, chat=options).sample(0)
    roomy = ConversationBatches(
        shapes.select([0, 1]),
        tiny_llava.processor,
        chat=dataclasses.replace(options, max_tokens=25),
    )
    sample = roomy.sample(0)
    assert len(sample["input_ids"]) == 25
    assert int((sample["input_ids"] == 3).sum()) == 16


def test_data_that_does_not_go_with_the_model(tiny_llm, shapes, questions, processor):
    with pytest.raises(DataError, match="reads text alone"):
        ConversationBatches(shapes, tiny_llm.processor)
    with pytest.raises(DataError, match="compares images with texts"):
        ConversationBatches(shapes, processor)
    with pytest.raises(DataError, match="say which format"):
        make_batches(load_records("sklearn:digits"), tiny_llm.processor, batch_size=2)
    for bad in ({"learn": "some"}, {"too_long": "cut"}):
        with pytest.raises(UnknownNameError):
            ChatOptions(**bad)
    with pytest.raises(CordaError, match="max_tokens is 1"):
        ChatOptions(max_tokens=1)


def test_a_question_without_an_answer_calibrates_but_is_not_learnt(tiny_llm, questions):
    data = questions(("is there?", "yes"), answer=None)
    chat = ChatOptions(chat_template="plain")
    sample = ConversationBatches(data, tiny_llm.processor, chat=chat).sample(0)
    assert bool((sample["labels"] == -100).all())
    with pytest.raises(DataError, match="line 1: holds no token to learn"):
        ConversationBatches(data, tiny_llm.processor, chat=chat, must_learn=True).sample(0)


WITH_TOOLS = (
    "{% if tools %}can {% for t in tools %}{{ t['function']['name'] }} {% endfor %}; {% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {% if m.tool_calls %}"
    "{% for c in m.tool_calls %}{{ c['function']['name'] }} {{ c['function']['arguments']['a'] }}{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}; {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def calling(tmp_path):
    """A conversation with a call of a tool, whose answer follows."""
    call = {"function": {"name": "add", "arguments": '{"a": 3}'}}
    row = {
        "messages": [
            {"role": "user", "content": "what colour?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "blue"},
            {"role": "assistant", "content": "dark blue"},
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps(row))
    return load_records({"source": f"jsonl:{path}", "format": "chat", "max_bad_share": 0.0})


def test_tools_are_written_where_the_template_writes_them(tiny_llm, calling):
    record = calling[0]
    chat = Chat(tiny_llm.processor, WITH_TOOLS).with_tools(record["may_call"])
    whole = chat.full(record["messages"])
    assert whole.text.startswith("can add ; user: what colour?; assistant: add 3; tool: blue; ")
    ((start, end),) = [(turn.start, turn.content_end) for turn in whole.turns]
    assert whole.text[start:end].strip() == "dark blue"
    batches = ConversationBatches(
        calling, tiny_llm.processor, chat=ChatOptions(chat_template=WITH_TOOLS)
    )
    assert int((batches.batch([0])["labels"] != -100).sum()) > 0
    assert chat.prompt(record["messages"]).text.endswith("tool: blue; assistant:")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chatml", "has tools, which the chat template does not write"),
        (WITH_TOOLS.replace("m.tool_calls", "m.calls"), "has tool calls, which the chat template"),
    ],
)
def test_tools_are_not_left_out_in_silence(tiny_llm, calling, template, message):
    batches = ConversationBatches(
        calling, tiny_llm.processor, chat=ChatOptions(chat_template=template)
    )
    with pytest.raises(DataError, match=message):
        batches.batch([0])
