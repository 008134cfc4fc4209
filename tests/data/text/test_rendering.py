"""Chat templates come from anywhere: they write what transformers' do, and end within limits, whatever they do."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

from corda_vlm.data import Chat, ChatOptions, ConversationBatches, load_records
from corda_vlm.data.text import rendering
from corda_vlm.data.text.chat import TEMPLATES
from corda_vlm.data.text.rendering import render
from corda_vlm.errors import CordaError, DataError

ASKED = [{"role": "user", "content": "is it red?"}, {"role": "assistant", "content": "no <b>"}]

# As of Qwen, Llama 3 and Mistral: what they use of Jinja and of transformers' own names.
REAL = {
    "loops": "{% for m in messages %}{%- if loop.first and m.role != 'system' %}{{ bos_token }}{% endif %}\n"
    "{% if m.role == 'tool' %}{% continue %}{% endif %}[{{ loop.index0 }}/{{ loop.length }}] {{ m['content'] | trim }}\n{% endfor %}",
    "namespace": "{% set ns = namespace(last='') %}{% for m in messages %}{% set ns.last = m.content %}{% endfor %}{{ ns.last }}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ tools is none }}{{ documents }}",
    "macro": "{% macro say(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "slices": "{% set rest = messages[1:] %}{{ rest | length }}{{ rest | map(attribute='content') | join(',') }}{{ 'red' in messages[0].content }}"
    "{{ messages[0].content.split(' ')[-1] }}{{ messages[0]['content'][:3] }}{{ dict(a=1) }}{{ strftime_now('%Y') }}",
    **TEMPLATES,
}

ENDLESS = {
    "a long range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}words{% endfor %}{% endfor %}",
    "loops that write nothing": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "calls of calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a product": "{{ messages[0].content * 10**9 }}",
    "a product in the template": "{{ 'a' * 10**9 }}",
    "a power": "{% for m in messages %}{{ (9 ** (9 ** 9)) | string }}{% endfor %}",
    "a format": "{{ '%999999999d' % 1 }}{{ '{:>999999999}'.format(1) }}",
    "a filter": "{{ messages[0].content | center(999999999) }}",
    "doubling": "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "a comparison": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "a list of lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nesting": "{{" + "(" * 50_000 + "1" + ")" * 50_000 + "}}",
    "no Jinja": "{% for %}",
}  # fmt: skip


@pytest.fixture
def hurried(monkeypatch):
    """A third of a second for a template, so that many of them are tried in little time."""
    stop = rendering._RENDERERS.setdefault(os.getpid(), rendering._Renderer()).stop
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    stop()  # the next one is started with it
    yield
    stop()


def took(what) -> float:
    """Seconds of the clock that a refusal took, the start of a process aside."""
    render("x", ASKED)
    started = time.monotonic()
    with pytest.raises(CordaError, match="chat template"):
        what()
    return time.monotonic() - started


@pytest.mark.parametrize("name", REAL)
def test_templates_write_what_transformers_writes(tiny_tokenizer, name):
    told = tiny_tokenizer.apply_chat_template(
        ASKED, chat_template=REAL[name], tokenize=False, add_generation_prompt=True
    )
    special = tiny_tokenizer.special_tokens_map
    assert render(REAL[name], ASKED, add_generation_prompt=True, **special) == told


def test_the_models_own_template_writes_what_transformers_writes(tiny_llava):
    whole = tiny_llava.processor.hf_processor
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    shown = [{"role": "user", "content": parts}]
    told = whole.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
    assert Chat(tiny_llava.processor).prompt(shown).text == told.rstrip(" ")


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_an_end_is_ended(name, hurried):
    # Twenty is where a machine without a free processor is given up; with one it takes a part of a second.
    assert took(lambda: render(ENDLESS[name], ASKED)) < 60
    assert render("{{ messages[0].content }}", ASKED) == "is it red?", "the next one is rendered"


def test_the_limit_is_of_processor_time():
    spent = os.times()
    took(lambda: render(ENDLESS["loops that write nothing"], ASKED))
    rendering._RENDERERS[os.getpid()].stop()
    now = os.times()
    used = now.children_user + now.children_system - spent.children_user - spent.children_system
    assert used < 2 * rendering.SECONDS + 1


def test_a_template_is_ended_in_threads_too(hurried):
    """Signals reach the main thread alone, so that a limit by them would not."""
    told = []

    def run():
        try:
            render(ENDLESS["loops that write nothing"], ASKED)
        except CordaError as error:
            told.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(told) == 2
    assert all("ran for more than" in one for one in told)


def test_threads_do_not_get_each_others_texts():
    found = {}

    def run(number):
        asked = [{"role": "user", "content": f"{number}"}]
        found[number] = {render("{{ messages[0].content }}", asked) for _ in range(50)}

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: {f"{number}"} for number in range(4)}


def test_a_long_conversation_is_no_long_text():
    asked = [{"role": "user", "content": "x" * 3_000_000}]
    assert len(render("{{ messages[0].content * 2 }}", asked)) == 6_000_000
    with pytest.raises(CordaError, match="wrote more than"):
        render("{{ messages[0].content * 20 }}", asked)


def test_a_process_that_was_killed_is_started_again():
    render("x", ASKED)
    process = rendering._RENDERERS[os.getpid()].process
    process.kill()
    with pytest.raises(CordaError, match="ended its process"):
        render("x", ASKED)
    assert render("x", ASKED) == "x"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_its_own():
    render("x", ASKED)
    mine = rendering._RENDERERS[os.getpid()].process
    child = os.fork()
    if not child:
        same = render("{{ 1 + 1 }}", ASKED) == "2"
        apart = rendering._RENDERERS[os.getpid()].process.pid != mine.pid
        os._exit(0 if same and apart else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert render("{{ 1 + 2 }}", ASKED) == "3"
    assert rendering._RENDERERS[os.getpid()].process is mine


def test_templates_reach_nothing_of_the_system():
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__.json }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
    ):
        with pytest.raises(DataError, match="does not take it"):
            render(template, ASKED)


# ------------------------------------------------------------------ where models bring them


def test_a_models_own_template_is_under_the_limits(tiny_llm, tmp_path):
    tokenizer = tiny_llm.processor.tokenizer
    path = tmp_path / "qa.jsonl"
    path.write_text(json.dumps({"question": "a", "answer": "b"}))
    data = load_records({"source": f"jsonl:{path}", "format": "qa"})
    tokenizer.chat_template = ENDLESS["loops that write nothing"]
    try:
        with pytest.raises(CordaError, match=r"ran for more than .*choose another chat template"):
            ConversationBatches(data, tiny_llm.processor)  # before a record is looked at
        tokenizer.chat_template = {"default": TEMPLATES["plain"], "tools": "x"}
        assert Chat(tiny_llm.processor).prompt(ASKED).text == "Question: is it red?\nAnswer:"
    finally:
        tokenizer.chat_template = None


def test_files_of_templates_that_are_none(tiny_llm, tmp_path):
    (tmp_path / "latin.jinja").write_bytes("é{{ x }}".encode("latin-1"))
    (tmp_path / "folder.jinja").mkdir()
    for template, why in (
        (str(tmp_path / "latin.jinja"), "not UTF-8 text"),
        (str(tmp_path / "folder.jinja"), "is a folder"),
        (str(tmp_path / "none.jinja"), "no file"),
        ("~nosuchuser/a.jinja", "no path"),
        ("x" * 300 + ".jinja", "no path"),
        ("{% for %}", "is no Jinja .*line 1"),
    ):
        with pytest.raises(CordaError, match=why):
            Chat(tiny_llm.processor, template).check()
    with pytest.raises(CordaError, match="unknown chat template"):
        ChatOptions(chat_template="x" * 5000) and Chat(tiny_llm.processor, "x" * 5000).check()
