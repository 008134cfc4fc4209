"""A language model calibrated block by block: the same matrices, with those of one block in memory."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

from corda_vlm.adapter import adapt
from corda_vlm.covariance import CovarianceStore, SecondMoment
from corda_vlm.errors import CalibrationError, CordaError, ForeignFileError
from corda_vlm.families import FAMILIES, Family, Rule, block_rules, register_family
from corda_vlm.families.generative import decoder
from corda_vlm.families.llm import family
from corda_vlm.plan import plan_adapter
from corda_vlm.sites import find_sites
from tests.covariance.covariance_toy import (
    Named,
    clip_batches,
    collect,
    hook_count,
    same,
    toy,
    toy_batches,
)
from tests.families.language_toy import TEXT, batch_for, make, text_batch, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*have no full rank")


def batches_for(name: str, sizes: tuple[int, ...] = (2, 3)) -> Named:
    return Named(batch_for(name, size) for size in sizes)


def untouched(model: nn.Module) -> bool:
    return not hook_count(model) and not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen2",
        "qwen3",
        "gemma",
        "smollm3",
        "phi",
        "phi3",
        "gpt2",
        "llava",
        "gemma3",
        "qwen2_vl",
        "idefics3",
    ],
)
def test_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    model, batches = make(name), batches_for(name)
    kinds = [type(module) for module in model.modules()]
    collect(model, batches, path=tmp_path / "whole")
    store = collect(model, batches, path=tmp_path / "blocks", blockwise=True)
    assert list(store) == [site.name for site in find_sites(model)]
    assert (tmp_path / "blocks").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blocks", "whole"]
    assert [type(module) for module in model.modules()] == kinds
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("Gemma2", "eager"), ("Gemma3", "eager"), ("Gemma3", "sdpa"), ("Mistral", "sdpa")],
)
def test_each_block_has_its_own_window(kind: str, attention: str) -> None:
    """Sliding windows of 4 tokens in every other block (Gemma) or in all of them; Gemma 3 turns them otherwise, too."""
    options = {**TEXT, "num_hidden_layers": 3, "sliding_window": 4, "head_dim": 8}
    if kind != "Mistral":
        options["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    config = getattr(t, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")

    def narrow(window: int) -> nn.Module:
        torch.manual_seed(0)
        made = config(**{**options, "sliding_window": window}, attn_implementation=attention)
        return getattr(t, f"{kind}ForCausalLM")(made).eval()

    batches = [text_batch(3), text_batch(2, 9)]
    whole = collect(narrow(4), batches)
    assert same(collect(narrow(4), batches, blockwise=True), whole)
    assert not same(collect(narrow(100), batches), whole)


@pytest.mark.parametrize(
    "options",
    [{"tokens": "prompt"}, {"tokens": "response"}, {"rounds": 2}, {"precision": "float64"}, {"precision": "bf16"}],
    ids=str,
)  # fmt: skip
def test_with_every_option(options: dict, tmp_path: Path) -> None:
    model, batches = make("llama").bfloat16(), batches_for("llama", (2, 3, 1, 2))
    whole = collect(model, batches, **options)
    assert same(collect(model, batches, blockwise=True, **options), whole)
    blocks = collect(model, batches, blockwise=True, path=tmp_path / "c", **options)
    assert same(blocks, whole)
    assert blocks.progress == whole.progress
    site = list(whole)[-1]
    assert blocks.counts(site) == whole.counts(site)


@pytest.mark.parametrize("tokens", ["image", "text", "response"])
def test_image_tokens(tokens: str) -> None:
    model, batches = make("llava"), batches_for("llava")
    whole = collect(model, batches, tokens=tokens)
    assert same(collect(model, batches, blockwise=True, tokens=tokens), whole)


def test_padding_on_the_left() -> None:
    model, batch = make("llama"), text_batch(3)
    flipped = {key: value.flip(1) for key, value in batch.items()}
    flipped["position_ids"] = (flipped["attention_mask"].cumsum(1) - 1).clamp_min(0)
    whole = collect(model, [flipped])
    assert same(collect(model, [flipped], blockwise=True), whole)
    assert whole.counts("model.layers.0.self_attn.q_proj") == [int(batch["attention_mask"].sum())]


def test_under_autocast_of_the_callers_own() -> None:
    model, batches = make("llama"), batches_for("llama")

    def forward(model: nn.Module, batch: dict) -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch, use_cache=False)

    whole = collect(model, batches, forward=forward)
    assert same(collect(model, batches, forward=forward, blockwise=True), whole)
    assert not same(collect(model, batches), whole)


def test_batches_that_can_be_read_once() -> None:
    model, batches = make("llama"), batches_for("llama")
    assert same(collect(model, iter(batches), blockwise=True), collect(model, batches))


@pytest.mark.parametrize(
    ("name", "choice", "blocks"),
    [("llama", {"roles": "q,down"}, {0, 1}), ("llava", {"towers": "language"}, {0, 1}), ("llava", None, {1})],
)  # fmt: skip
def test_some_of_the_sites(name: str, choice: dict | None, blocks: set[int]) -> None:
    model, batches = make(name), batches_for(name)
    sites = find_sites(model, **(choice or {"towers": "language"}))
    sites = [site for site in sites if site.block in blocks]
    assert same(collect(model, batches, sites, blockwise=True), collect(model, batches, sites))


def test_no_more_runs_than_are_needed() -> None:
    """Each block once a batch, and none after the last that holds a site; one run more says what blocks return."""
    model, batches, runs = make("llama"), batches_for("llama"), []
    layers: list = list(model.model.layers)  # type: ignore[union-attr]
    for number, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: runs.append(number))
    collect(model, batches, blockwise=True)
    assert runs == [0, 0, 0, 1, 1]
    runs.clear()
    collect(model, batches, find_sites(model)[:7], blockwise=True)
    assert runs == [0, 0]


def test_adding_to_a_store(tmp_path: Path) -> None:
    model, batches = make("llama"), batches_for("llama")
    first = collect(model, batches[:1])
    both = collect(model, batches[1:], store=first)
    for path in (None, tmp_path / "c"):
        assert same(collect(model, batches[1:], store=first, path=path, blockwise=True), both)


def test_under_an_adapter() -> None:
    model, batches = make("llama"), batches_for("llama")
    adapted = adapt(model, batches, rank=2, show_progress=False)
    assert same(collect(adapted, batches, blockwise=True), collect(adapted, batches))


def test_under_the_hooks_of_accelerate() -> None:
    """A model spread over devices: each block's `forward` is replaced already."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, batches = make("llama"), batches_for("llama")
    whole = collect(model, batches)
    layers: list = list(model.model.layers)  # type: ignore[union-attr]
    for layer in layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    forwards = [layer.forward for layer in layers]
    assert same(collect(model, batches, blockwise=True), whole)
    assert [layer.forward for layer in layers] == forwards


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device")
def test_hidden_states_rest_on_the_cpu() -> None:
    model, batches = make("llava").cuda(), batches_for("llava")
    whole, blocks = collect(model, batches), collect(model, batches, blockwise=True)
    for name in whole:
        torch.testing.assert_close(blocks[name].matrix, whole[name].matrix, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ memory


@pytest.fixture
def no_cycles():
    """Memory that only the garbage collector would give back counts as in use."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive(monkeypatch: pytest.MonkeyPatch, method: str) -> Callable[[], int]:
    """How many of what `SecondMoment.method` made (itself, for `__init__`) were alive at once, at the most."""
    made: list[weakref.ref] = []
    most = [0]
    original = getattr(SecondMoment, method)

    def counted(self: SecondMoment, *args: object) -> object:
        result = original(self, *args)
        made.append(weakref.ref(self if result is None else result))
        most[0] = max(most[0], sum(ref() is not None for ref in made))
        return result

    monkeypatch.setattr(SecondMoment, method, counted)
    return lambda: most[0]


@pytest.mark.usefixtures("no_cycles")
def test_the_sums_of_one_block_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = make("llama"), batches_for("llama")
    most = alive(monkeypatch, "__init__")
    store = collect(model, batches, blockwise=True)
    assert len({*store.site_streams.values()}) == 8
    assert most() == 4
    collect(model, batches)
    assert most() >= 8


@pytest.mark.usefixtures("no_cycles")
@pytest.mark.parametrize("options", [{}, {"dynamic_rank": True}, {"method": "lora-null"}], ids=str)
def test_a_plan_holds_one_covariance(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    store = collect(model, batches_for("llama"), blockwise=True)
    most = alive(monkeypatch, "matrix")
    plan_adapter(model, store, rank=4, show_progress=False, **options)
    assert most() == 1


# ------------------------------------------------------------------ stopped


def test_goes_on_after_the_last_finished_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches, path = make("llava"), batches_for("llava"), tmp_path / "c"
    last: Any = model.get_submodule("model.language_model.layers.1.mlp.down_proj")
    weight = last.weight.detach().clone()
    names = ["before", "model.language_model.layers.0"]

    def poison(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0] * float("nan"),)

    handle = last.register_forward_pre_hook(poison)
    with pytest.raises(CalibrationError, match=r"layers.1.mlp.down_proj.* has NaN.* in batch 0"):
        collect(model, batches, path=path, blockwise=True)
    handle.remove()
    assert torch.equal(last.weight, weight)
    folder = tmp_path / "c.blocks"
    assert not path.exists()
    assert sorted(p.name for p in folder.iterdir()) == [f"{name}.safetensors" for name in names]
    # a finished block is a store of its own
    assert CovarianceStore.load(folder / "before.safetensors", model=model).progress.complete  # type: ignore[union-attr]

    with pytest.raises(ForeignFileError, match="is of other data"):
        collect(model, Named(batches)[1:], path=path, blockwise=True)
    with pytest.raises(ForeignFileError, match="has rounds=1, now 2"):
        collect(model, batches, path=path, blockwise=True, rounds=2)
    added: list[str] = []
    add = SecondMoment.add
    monkeypatch.setattr(SecondMoment, "add", lambda s, *a: (added.append(s), add(s, *a)))
    resumed = collect(model, batches, path=path, blockwise=True)
    assert len(added) == 4 * len(batches)  # the streams of the last block
    assert same(resumed, collect(model, batches))
    assert list(tmp_path.iterdir()) == [path]


def test_blocks_that_are_all_finished_are_only_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches, path = make("llama"), batches_for("llama"), tmp_path / "c"
    save = CovarianceStore.save

    def killed(self: CovarianceStore, to: Path) -> Path:
        if to == path:
            raise OSError("no space")
        return save(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(CovarianceStore, "save", killed)
        with pytest.raises(OSError, match="no space"):
            collect(model, batches, path=path, blockwise=True)

    def forward(*_: object) -> None:
        raise AssertionError("the model ran")

    store = collect(model, batches, path=path, blockwise=True, forward=forward)
    assert same(store, collect(model, batches))
    # a finished file is returned at once
    assert same(collect(model, batches, path=path, blockwise=True, forward=forward), store)


def test_ctrl_c_finishes_the_batch_and_keeps_finished_blocks(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    model, batches, path = make("llama"), batches_for("llama"), tmp_path / "c"
    layers: list = list(model.model.layers)  # type: ignore[union-attr]

    def interrupt(*_: object) -> None:
        handle.remove()
        os.kill(os.getpid(), signal.SIGINT)

    handle = layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"within part 3 of 3, model\.layers\.1; those"):
        collect(model, batches, path=path, blockwise=True)
    assert "finishing the batch in flight" in capfd.readouterr().err
    assert untouched(model)
    assert [p.name for p in (tmp_path / "c.blocks").iterdir()] == ["model.layers.0.safetensors"]
    resumed = collect(model, batches, path=path, blockwise=True)
    assert same(resumed, collect(model, batches))


def test_a_checkpoint_of_one_go_is_not_gone_on_with(tmp_path: Path) -> None:
    model, batches, path = make("llama"), batches_for("llama"), tmp_path / "c"

    def failing(model: nn.Module, batch: dict) -> None:
        if batch is batches[1]:
            raise RuntimeError("stop")
        decoder.forward(model, batch)

    with pytest.raises(RuntimeError, match="stop"):
        collect(model, batches, path=path, forward=failing)
    with pytest.raises(ForeignFileError, match="in one go, which cannot go on blockwise"):
        collect(model, batches, path=path, blockwise=True)
    assert same(collect(model, batches, path=path), collect(model, batches))


# ------------------------------------------------------------------ other models


class Chained(nn.Module):
    """A language model in miniature whose blocks return tuples, as those of older transformers do."""

    def __init__(self, between: float = 1.0) -> None:
        super().__init__()
        self.embed, self.between = nn.Embedding(50, 6), between
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, {"shift": [torch.ones(6)]})[0]
            x = x * self.between if self.between != 1 else x
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor, more: dict) -> tuple[torch.Tensor, None]:
        return x + self.down(self.up(x + more["shift"][0]).relu()), None


def declared(name: str, rules: tuple[Rule, ...], kind: type) -> Family:
    return family(
        name,
        (),
        rules,
        matches=lambda model: isinstance(model, kind),
        refuses=lambda model: None,
        generative=None,
    )


@pytest.fixture
def chained():
    rules = block_rules("layers", "language", (("up", "up", "in"), ("down", "down", "mid")))
    register_family(declared("chained", rules, Chained))
    yield
    FAMILIES.pop("chained")


@pytest.mark.usefixtures("chained")
def test_blocks_that_return_tuples() -> None:
    model, batches = Chained().eval(), toy_batches(3)
    forward = lambda model, batch: model(batch["input_ids"])  # noqa: E731
    whole = collect(model, batches, forward=forward)
    assert same(collect(model, batches, forward=forward, blockwise=True), whole)


@pytest.mark.usefixtures("chained")
def test_blocks_that_cannot_run_one_by_one() -> None:
    forward = lambda model, batch: model(batch["input_ids"])  # noqa: E731
    model = Chained(between=2.0).eval()
    with pytest.raises(CordaError, match=r"layers\.1 does not read just what the block before"):
        collect(model, toy_batches(2), forward=forward, blockwise=True)
    assert untouched(model)
    model = Chained().eval()

    def first(model: Any, batch: dict) -> object:
        return model.layers[0](model.embed(batch["input_ids"]), {"shift": [torch.ones(6)]})

    with pytest.raises(CordaError, match=r"called 1 of the 3 blocks layers"):
        collect(model, toy_batches(2), forward=first, blockwise=True)
    assert untouched(model)


def test_a_cache_is_refused() -> None:
    with pytest.raises(CordaError, match=r"called with a DynamicCache.*use_cache=False"):
        collect(
            make("llama"),
            batches_for("llama"),
            forward=lambda model, batch: model(**batch),
            blockwise=True,
        )


def test_models_without_blocks_of_a_language_model(tiny_clip_hf: nn.Module) -> None:
    with pytest.raises(CordaError, match=r"CLIPModel are in 0 .*towers: text, vision"):
        collect(tiny_clip_hf, clip_batches([4]), blockwise=True)
    with pytest.raises(CordaError, match="Toy are in 0"):
        collect(toy(), toy_batches(3), blockwise=True)
    with pytest.raises(CordaError, match=r"towers: vision\)"):
        model = make("llava")
        collect(model, batches_for("llava"), find_sites(model, towers="vision"), blockwise=True)
    register_family(declared("flat", (Rule("a", "language", "up", "in"),), Flat))
    try:
        with pytest.raises(CordaError, match=r"a is in no block .*of Flat"):
            collect(Flat(), toy_batches(3), blockwise=True)
    finally:
        FAMILIES.pop("flat")


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)


def test_too_few_batches() -> None:
    model = make("llama")
    with pytest.raises(CalibrationError, match="3 rounds need at least 3 batches"):
        collect(model, iter(batches_for("llama")), rounds=3, blockwise=True)
    with pytest.raises(CalibrationError, match="no calibration batches"):
        collect(model, iter([]), blockwise=True)
    with pytest.raises(CalibrationError, match=r"batch 1 .* is a list of .*, not a mapping"):
        collect(model, [*batches_for("llama", (2,)), [1]], blockwise=True)


# ------------------------------------------------------------------ one call, one command


def test_adapt() -> None:
    batches = batches_for("llama")
    models = [
        adapt(make("llama"), batches, rank=2, blockwise=blockwise, show_progress=False)
        for blockwise in (False, True)
    ]
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(one, other)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from corda_vlm.__main__ import main

    monkeypatch.chdir(tmp_path)
    make("llama").save_pretrained("model")
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    words.save_pretrained("model")
    lines = [{"question": "What is this ?", "answer": "A red cat ."} for _ in range(6)]
    Path("qa.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    for name, flags in (("whole", []), ("blocks", ["--blockwise"])):
        data = '{"source": "jsonl:qa.jsonl", "format": "qa"}'
        main(["calibrate", "model", data, "--batch-size=2", f"--output={name}", *flags])
    assert Path("whole").read_bytes() == Path("blocks").read_bytes()
