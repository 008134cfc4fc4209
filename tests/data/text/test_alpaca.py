"""What others' instruction data say reaches the model whole: inputs, system texts, completions, and pictures once."""

from __future__ import annotations

import json
import logging

import pytest

from corda_vlm.data import ChatOptions, ConversationBatches, load_records
from corda_vlm.errors import DataError

ADD = {"instruction": "Add", "input": "1 and 1", "output": "2"}


@pytest.fixture
def read(tmp_path):
    def load(*records, **options):
        path = tmp_path / "data.json"
        path.write_text(json.dumps(list(records)))
        return load_records({"source": f"json:{path}", **options})

    return load


@pytest.fixture
def pictures(tmp_path, digits):
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(digits[index][0])


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def learnt(builder, index):
    sample = builder.sample(index)
    ids, labels = sample["input_ids"], sample["labels"]
    return builder.processor.tokenizer.decode(ids), builder.processor.tokenizer.decode(
        labels[labels != -100]
    )


# ------------------------------------------------------------------ Alpaca's


def test_alpaca_asks_the_instruction_with_its_input(read, tiny_llm):
    data = read(ADD, {"instruction": "Name a fruit", "input": "", "output": "Fig"}, format="alpaca")
    assert data[0]["messages"] == [user("Add\n1 and 1"), answer("2")]
    assert data[1]["messages"] == [user("Name a fruit"), answer("Fig")]
    assert (data[0]["question"], data[0]["answers"]) == ("Add\n1 and 1", ["2"])
    builder = ConversationBatches(data, tiny_llm.processor, chat=ChatOptions(chat_template="plain"))
    assert learnt(builder, 0) == ("Question: Add\n1 and 1\nAnswer: 2</s>", " 2</s>")
    alone = read(ADD, format="alpaca", question="instruction", answer=None)
    assert alone[0]["messages"] == [user("Add")]
    dolly = read({"instruction": "Add", "context": "1 and 1", "response": "2"}, format="alpaca")
    assert dolly[0]["messages"] == data[0]["messages"]


def test_alpaca_leaves_neither_of_two_inputs_out_without_a_word(read):
    both = {**ADD, "context": "In base 2."}
    with pytest.raises(DataError, match=r"two inputs, input and context.*name what to ask"):
        read(ADD, both, format="alpaca")
    asked = read(both, format="alpaca", question="{context} {instruction} {input}")
    assert asked[0]["question"] == "In base 2. Add 1 and 1"
    (told,) = read({**both, "input": ""}, format="alpaca")
    assert told["question"] == "Add\nIn base 2.", "the one that says something"


def test_alpaca_has_a_system_text_and_a_history(read):
    before = [["Hi", "Hello"], ["Who?", "Me"]]
    record = {**ADD, "system": "Be exact.", "history": before}
    (told,) = read(record, format="alpaca")
    assert told["messages"] == [
        {"role": "system", "content": "Be exact."},
        user("Hi"), answer("Hello"), user("Who?"), answer("Me"), user("Add\n1 and 1"), answer("2"),
    ]  # fmt: skip
    assert len(read(record, format="alpaca", system=None)[0]["messages"]) == 6
    said = read(ADD, format="alpaca", system="Be kind, always.")
    assert said[0]["messages"][0]["content"] == "Be kind, always."


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"output": " "}, "has an empty answer"),
        ({"instruction": "", "input": None}, "has an empty question"),
        ({"instruction": 5}, "its instruction is an int, not text"),
        ({"input": ["x"]}, "its input is a list, not text"),
        ({"history": [["a"]]}, r"its history is no list of \[question, answer\]"),
        ({"history": [["a", None]]}, r"its history is no list of \[question, answer\]"),
        ({"system": 5}, "its system is an int, not text"),
    ],
)
def test_what_is_wrong_with_a_row_of_alpaca(read, changed, why):
    with pytest.raises(DataError, match=rf"record 0: {why}"):
        read({**ADD, **changed}, format="alpaca")


@pytest.mark.parametrize("more", ["input", "context", "history"])
def test_qa_does_not_ask_an_instruction_without_the_rest(read, more):
    record = {"instruction": "Add", more: [["a", "b"]] if more == "history" else "x", "output": "2"}
    with pytest.raises(DataError, match=rf"without its {more}; write format: alpaca"):
        read(record, format="qa")
    assert read({**record, more: ""}, format="qa")[0]["question"] == "Add"
    asked = read(record, format="qa", question="{instruction}:")
    assert asked[0]["question"] == "Add:", "what is named is meant"


def test_qa_says_which_column_it_does_not_ask(read, caplog):
    with caplog.at_level(logging.WARNING):
        read({"question": "Who?", "context": "Ann came.", "answer": "Ann"}, format="qa")
    assert "its column 'context' is not asked; question: '{context} {question}'" in caplog.text


# ------------------------------------------------------------------ TRL's


def test_the_completion_alone_is_learnt(read, tiny_llm):
    talk = {
        "prompt": [user("Hi"), answer("Hello"), user("what colour?")],
        "completion": [answer("blue")],
    }
    data = read({"prompt": "is it red?", "completion": " no"}, talk, format="prompt_completion")
    assert data[0]["messages"] == [user("is it red?"), answer("no")]
    assert data[1]["messages"] == [user("Hi"), answer("Hello", learn=False), user("what colour?"), answer("blue")]  # fmt: skip
    assert (data[1]["question"], data[1]["answers"]) == ("what colour?", ["blue"])
    builder = ConversationBatches(data, tiny_llm.processor, chat=ChatOptions(chat_template="plain"))
    assert learnt(builder, 0)[1] == " no</s>"
    text, labels = learnt(builder, 1)
    assert text == "Question: Hi\nAnswer: Hello\nQuestion: what colour?\nAnswer: blue</s>"
    assert labels == " blue</s>"


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_a_completion_keeps_its_indentation(read, tiny_llm, template):
    pair = {"prompt": "def one():", "completion": "    return 1\n"}
    data = read(pair, {**pair, "completion": "\n\treturn 1"}, format="prompt_completion")
    assert [row["messages"][1]["content"] for row in data] == ["    return 1", "\n\treturn 1"]
    builder = ConversationBatches(
        data, tiny_llm.processor, chat=ChatOptions(chat_template=template)
    )
    text = builder.chat.full(data[0]["messages"])
    (turn,) = text.turns
    parted = " " if template == "plain" else ""
    assert text.text[turn.start : turn.content_end] == f"{parted}    return 1"


def test_qa_takes_a_completion_for_the_answer(read):
    pair = {"prompt": "Red?", "completion": "no"}
    assert read(pair, format="qa")[0]["answers"] == ["no"]
    with pytest.raises(DataError, match="write format: prompt_completion"):
        read({"prompt": [user("x")], "completion": [answer("y")]}, format="qa")


@pytest.mark.parametrize(
    ("prompt", "completion", "why"),
    [
        ("x", "", "has an empty answer"),
        ("", "y", "has an empty question"),
        ("x", None, "has an empty completion"),
        ("x", 5, "its completion is neither text nor a list"),
        ([user("x")], [user("y")], "does not end in an answer"),
        ([{"content": "x"}], [answer("y")], "holds a message without 'role'"),
        ([user("x")], [answer("")], "has an empty answer"),
    ],
)
def test_what_is_wrong_with_a_prompt_or_its_completion(read, prompt, completion, why):
    with pytest.raises(DataError, match=why):
        read({"prompt": prompt, "completion": completion}, format="prompt_completion")


def test_answers_of_weight_0_are_not_learnt(read, tiny_llm):
    talk = [user("Hi"), answer("no", weight=0), user("Red?"), answer("yes", weight=1)]
    data = read({"messages": talk}, format="chat")
    builder = ConversationBatches(data, tiny_llm.processor, chat=ChatOptions(chat_template="plain"))
    assert learnt(builder, 0)[1] == " yes</s>"


# ------------------------------------------------------------------ ShareGPT's, and system texts


def test_sharegpt_keeps_its_system_text(read, tiny_llm):
    turns = [{"from": "human", "value": "Say <image>"}, {"from": "gpt", "value": "no"}]
    data = read({"conversations": turns, "system": "Be short."}, format="sharegpt")
    assert data[0]["messages"] == [{"role": "system", "content": "Be short."}, user("Say <image>"), answer("no")]  # fmt: skip
    builder = ConversationBatches(data, tiny_llm.processor, chat=ChatOptions(chat_template="plain"))
    assert learnt(builder, 0)[0].startswith("Be short.\n\nQuestion: Say")
    first = {"from": "system", "value": "Be long."}
    with pytest.raises(DataError, match="begin with another system text than its system"):
        read({"conversations": [first, *turns], "system": "Be short."}, format="sharegpt")
    same = read({"conversations": [first, *turns], "system": "Be long."}, format="sharegpt")
    assert len(same[0]["messages"]) == 3
    roles = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read({"conversations": roles}, format="sharegpt")[0]["messages"] == [user("a"), answer("b")]  # fmt: skip


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_every_format_keeps_a_system_text(read, name):
    for format, record in {
        "qa": {"question": "a", "answer": "b"},
        "chat": {"messages": [user("a"), answer("b")]},
        "llava": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "prompt_completion": {"prompt": "a", "completion": "b"},
    }.items():  # fmt: skip
        (found,) = read({**record, name: "S"}, format=format)
        assert found["messages"] == [{"role": "system", "content": "S"}, user("a"), answer("b")]
        (found,) = read({**record, name: ""}, format=format)
        assert len(found["messages"]) == 2


def test_calls_of_tools_are_read_and_not_learned(read):
    tool = {"type": "function", "function": {"name": "search"}}
    called = {"function": {"name": "search", "arguments": '{"for": "b"}'}}
    talk = [user("a"), {"role": "assistant", "content": None, "tool_calls": [called]}, answer("b")]
    (found,) = read({"messages": talk, "tools": json.dumps([tool])}, format="chat")
    assert found["may_call"] == [tool]
    calling = found["messages"][1]
    assert calling["tool_calls"][0]["function"] == {"name": "search", "arguments": {"for": "b"}}
    assert (calling["content"], calling["learn"]) == ("", False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [user("a"), answer("b", tool_calls=[{"id": 1}])]}, "a call of a tool without a name"),
        ({"messages": [user("a"), answer("b")], "tools": "search"}, "no list of descriptions"),
        ({"messages": [user("a"), answer("")]}, "has an empty answer"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_read_are_told(read, row, message):
    with pytest.raises(DataError, match=message):
        read(row, format="chat")


def test_a_format_of_other_columns_names_the_right_one(read):
    with pytest.raises(DataError, match=r"Write format: alpaca$"):
        read(ADD, format="llava")
    with pytest.raises(DataError, match=r"Write format: llava or format: sharegpt$"):
        read({"conversations": []}, format="chat")


# ------------------------------------------------------------------ pictures


SHOWN = [{"type": "image"}, {"type": "text", "text": "What is it?"}]


@pytest.mark.parametrize("asked", ["<image>\nWhat is it?", "What is it?", "What is it?\n<image>"])
@pytest.mark.parametrize("format", ["qa", "alpaca", "prompt_completion", "sharegpt", "chat"])
def test_the_place_of_a_picture_is_there_once(read, pictures, tiny_llava, format, asked):
    if format in ("sharegpt", "chat") and "<image>" not in asked:
        return  # conversations say where their pictures are
    record = {
        "qa": {"question": asked, "answer": "A digit"},
        "alpaca": {"instruction": asked, "input": "", "output": "A digit"},
        "prompt_completion": {"prompt": asked, "completion": "A digit"},
        "sharegpt": {
            "conversations": [
                {"from": "human", "value": asked},
                {"from": "gpt", "value": "A digit"},
            ]
        },
        "chat": {"messages": [user(asked), answer("A digit")]},
    }[format]
    data = read({**record, "image": "0.png"}, format=format)
    (first, _) = data[0]["messages"]
    last = asked.endswith("<image>")
    assert first["content"] == (SHOWN[::-1] if last else SHOWN)
    if "question" in data[0]:
        assert data[0]["question"] == "What is it?"
    builder = ConversationBatches(data, tiny_llava.processor)
    assert int((builder.sample(0)["input_ids"] == 3).sum()) == 16, "the patches of one picture"
    (without,) = read({**record, "image": "0.png"}, format=format, image=None)
    assert without["messages"] == [user("What is it?"), answer("A digit")]


def test_places_that_are_not_as_many_as_the_pictures(read, pictures):
    two = {"question": "<image> <image> Alike?", "answer": "Yes", "image": "0.png"}
    with pytest.raises(DataError, match="2 places for images, and the record has 1 images"):
        read(two, format="qa")
    spoken = {"question": "What?", "answer": "an <image>", "image": "0.png"}
    with pytest.raises(DataError, match="has an image in an answer"):
        read(spoken, format="qa")


def test_pictures_within_a_prompt(read, pictures):
    shown = [{"type": "image", "path": "1.png"}, {"type": "text", "text": "What is it?"}]
    data = read(
        {"prompt": [user(shown)], "completion": [answer("A one")]}, format="prompt_completion"
    )
    assert data[0]["messages"][0]["content"] == SHOWN
    assert data[0]["image"].size == (8, 8)
    assert data[0]["question"] == "What is it?"
