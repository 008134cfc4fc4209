"""Packed attention, unpacked: the same function of its inputs, and nothing left behind afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from corda_vlm.errors import CordaError
from corda_vlm.families.layers.attention import (
    PARTS,
    UnpackedAttention,
    is_packed,
    pack,
    packed_parts,
    unpack,
    unpacked,
)

EMBED, HEADS, BATCH, LENGTH, SOURCE = 24, 3, 2, 5, 7


class Holder(nn.Module):
    """Attention inside a model, as `unpack` meets it."""

    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(EMBED, HEADS, **options)
        with torch.no_grad():  # biases start at zero, which would hide a bias that is lost
            for parameter in self.parameters():
                parameter.normal_(std=0.3)

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def _inputs(batch_first=True, kdim=EMBED, vdim=EMBED, source=SOURCE):
    q, k, v = (
        torch.randn(BATCH, LENGTH, EMBED),
        torch.randn(BATCH, source, kdim),
        torch.randn(BATCH, source, vdim),
    )
    return (q, k, v) if batch_first else tuple(x.transpose(0, 1) for x in (q, k, v))


def _masks(kind):
    allowed = torch.ones(LENGTH, SOURCE).tril(2).bool()
    padding = torch.zeros(BATCH, SOURCE, dtype=torch.bool)
    padding[0, -2:] = True
    per_head = torch.randn(BATCH * HEADS, LENGTH, SOURCE)
    return {
        "none": {},
        "bool": {"attn_mask": ~allowed},
        "float": {"attn_mask": torch.zeros(LENGTH, SOURCE).masked_fill(~allowed, float("-inf"))},
        "per_head": {"attn_mask": per_head},
        "per_head_bool": {"attn_mask": per_head > 1},
        "padding": {"key_padding_mask": padding},
        "padding_float": {
            "key_padding_mask": torch.zeros(BATCH, SOURCE).masked_fill(padding, float("-inf"))
        },
        "both": {"attn_mask": ~allowed, "key_padding_mask": padding},
    }[kind]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "masks",
    ["none", "bool", "float", "per_head", "per_head_bool", "padding", "padding_float", "both"],
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_same_outputs_under_every_mask(masks, need_weights, batch_first):
    model: Any = Holder(batch_first=batch_first).eval()
    inputs, kwargs = _inputs(batch_first), {**_masks(masks), "need_weights": need_weights}
    expected, expected_weights = model(*inputs, **kwargs)
    with unpacked(model):
        assert isinstance(model.attn, UnpackedAttention)
        found, weights = model(*inputs, **kwargs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (weights is None) == (not need_weights)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"kdim": 10, "vdim": 14}, {"kdim": 10, "bias": False}, {"vdim": 14}],
)
def test_same_outputs_for_every_layout(options):
    model: Any = Holder(batch_first=True, **options).eval()
    inputs = _inputs(kdim=options.get("kdim", EMBED), vdim=options.get("vdim", EMBED))
    expected = model(*inputs, need_weights=False)[0]
    with unpacked(model):
        torch.testing.assert_close(
            model(*inputs, need_weights=False)[0], expected, atol=1e-5, rtol=1e-5
        )


def test_per_head_weights_and_unbatched_inputs():
    model: Any = Holder(batch_first=True).eval()
    x, padding = torch.randn(LENGTH, EMBED), torch.tensor([False] * (LENGTH - 1) + [True])
    kwargs = {"average_attn_weights": False, "key_padding_mask": padding}
    expected = model(x, x, x, **kwargs)
    with unpacked(model):
        found = model(x, x, x, **kwargs)
    assert found[0].shape == (LENGTH, EMBED)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_causal_hint_needs_a_mask_as_in_the_original():
    model: Any = Holder(batch_first=True).eval()
    x = torch.randn(BATCH, LENGTH, EMBED)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    expected = model(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    with unpacked(model):
        found = model(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(CordaError, match="attn_mask"):
            model(x, x, x, is_causal=True)


def test_dropout_acts_in_training_only():
    model: Any = Holder(batch_first=True, dropout=0.5)
    inputs = _inputs()
    with unpacked(model):
        for weights in (True, False):
            assert not torch.equal(*(model(*inputs, need_weights=weights)[0] for _ in range(2)))
        model.eval()
        torch.testing.assert_close(*(model(*inputs)[0] for _ in range(2)))
    assert not model.attn.training  # what was set while unpacked holds afterwards


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    model: Any = Holder(batch_first=True).eval()
    inputs = _inputs()
    mask = torch.zeros(LENGTH, SOURCE).masked_fill(
        torch.ones(LENGTH, SOURCE).triu(3).bool(), float("-inf")
    )
    exact = model(*inputs, attn_mask=mask)[0]

    def error(output):
        return ((output.float() - exact).norm() / exact.norm()).item()

    with torch.autocast("cpu", dtype=dtype):
        for weights in (False, True):
            original = model(*inputs, attn_mask=mask, need_weights=weights)[0]
            with unpacked(model):
                found = model(*inputs, attn_mask=mask, need_weights=weights)[0]
            assert found.dtype == original.dtype == dtype
            assert error(found) < 1.5 * error(original) + 1e-3


def test_hooks_see_batch_first_inputs_whatever_the_layout():
    model: Any = Holder(batch_first=False).eval()
    x = torch.randn(LENGTH, BATCH, EMBED)
    seen = {}
    with unpacked(model):
        for part in PARTS:
            getattr(model.attn, part).register_forward_hook(
                lambda module, args, output, part=part: seen.__setitem__(part, args[0])
            )
        model(x, x, x, need_weights=False)
    assert {part: tuple(value.shape) for part, value in seen.items()} == dict.fromkeys(
        PARTS, (BATCH, LENGTH, EMBED)
    )
    assert seen["q_proj"] is seen["k_proj"] is seen["v_proj"]


def test_gradients_reach_inputs_parts_and_the_packed_parameter():
    model: Any = Holder(batch_first=True)
    reference = copy.deepcopy(model)
    inputs = [x.requires_grad_() for x in _inputs()]
    reference(*inputs, need_weights=False)[0].square().sum().backward()
    expected = [x.grad.clone() for x in inputs]
    for x in inputs:
        x.grad = None
    with unpacked(model):
        model(*inputs, need_weights=False)[0].square().sum().backward()
        assert model.attn.q_proj.weight.grad is not None
    for x, grad in zip(inputs, expected, strict=True):
        torch.testing.assert_close(x.grad, grad, atol=1e-4, rtol=1e-4)
    for (name, found), (_, wanted) in zip(
        model.named_parameters(), reference.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, wanted.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_packing_gives_the_same_objects_keys_and_values_back():
    model: Any = Holder(batch_first=True)
    module, parameters = model.attn, dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    with unpacked(model):
        assert set(model.state_dict()) == {
            f"attn.{part}.{kind}" for part in PARTS for kind in ("weight", "bias")
        }
    assert model.attn is module
    assert {name: id(p) for name, p in model.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_an_edit_in_place_is_an_edit_of_the_packed_parameter():
    model: Any = Holder(batch_first=True)
    packed = model.attn
    with unpacked(model), torch.no_grad():
        model.attn.k_proj.weight.fill_(7.0)
        model.attn.v_proj.bias.fill_(3.0)
        assert (packed.in_proj_weight[EMBED : 2 * EMBED] == 7).all()  # shared storage: at once
    assert (model.attn.in_proj_weight[EMBED : 2 * EMBED] == 7).all()
    assert (model.attn.in_proj_bias[2 * EMBED :] == 3).all()


def test_a_replaced_storage_is_copied_back():
    model: Any = Holder(batch_first=True)
    new = torch.randn(EMBED, EMBED)
    with unpacked(model):
        model.attn.q_proj.weight.data = new.clone()
        model.attn.out_proj.weight.data = new.clone()
    assert torch.equal(model.attn.in_proj_weight[:EMBED], new)
    assert torch.equal(model.attn.out_proj.weight, new)


@pytest.mark.parametrize("options", [{}, {"kdim": 10, "vdim": 14}])
def test_a_change_of_dtype_while_unpacked_survives_packing(options):
    model: Any = Holder(batch_first=True, **options)
    expected = copy.deepcopy(model).to(torch.bfloat16).state_dict()
    with unpacked(model):
        model.to(torch.bfloat16)
    assert list(model.state_dict()) == list(expected)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[name]), name


def test_a_change_of_device_while_unpacked_survives_packing():
    model: Any = Holder(batch_first=True)
    with unpacked(model):
        model.to("meta")
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}
    assert model.attn.in_proj_weight.shape == (3 * EMBED, EMBED)


def test_nested_use_packs_once_at_the_end():
    model: Any = Holder()
    with unpacked(model):
        inner = model.attn
        with unpacked(model):
            assert model.attn is inner
        assert model.attn is inner
    assert is_packed(model.attn)


def test_an_exception_inside_still_packs():
    model: Any = Holder()
    with pytest.raises(KeyError), unpacked(model):
        raise KeyError
    assert is_packed(model.attn)


def test_a_copy_made_while_unpacked_packs_to_its_own_values():
    model: Any = Holder()
    with unpacked(model):
        clone: Any = copy.deepcopy(model)
        with torch.no_grad():
            clone.attn.q_proj.weight.zero_()
    pack(clone)
    assert (clone.attn.in_proj_weight[:EMBED] == 0).all()
    assert (model.attn.in_proj_weight[:EMBED] != 0).any()


def test_a_shared_layer_stays_one_layer():
    model = nn.ModuleDict({"a": Holder(), "b": Holder()})
    model["b"].attn = model["a"].attn
    assert unpack(model) == ["a.attn", "b.attn"]
    assert model["a"].attn is model["b"].attn
    assert pack(model) == ["a.attn", "b.attn"]
    assert model["a"].attn is model["b"].attn
    assert is_packed(model["a"].attn)


def test_hooks_on_the_original_keep_firing():
    model: Any = Holder(batch_first=True)
    fired = []
    handle = model.attn.register_forward_hook(lambda *args: fired.append(1))
    inputs = _inputs()
    with unpacked(model):
        model(*inputs)
        assert len(fired) == 1
        handle.remove()
        model(*inputs)
    assert len(fired) == 1


def test_frozen_parts_freeze_the_packed_parameter():
    model: Any = Holder()
    with unpacked(model):
        model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    with unpacked(model):
        assert not any(p.requires_grad for p in model.parameters())
        model.attn.k_proj.weight.requires_grad_(True)
    assert model.attn.in_proj_weight.requires_grad
    assert not model.attn.in_proj_bias.requires_grad


@pytest.mark.parametrize("option", ["add_zero_attn", "add_bias_kv"])
def test_what_cannot_be_unpacked_is_refused_by_name_and_nothing_changes(option):
    model = nn.ModuleDict({"good": Holder(), "bad": Holder(**{option: True})})
    with pytest.raises(CordaError, match=rf"bad\.attn.*{option}=True"):
        unpack(model)
    assert is_packed(model["good"].attn)


def test_a_subclass_with_a_forward_of_its_own_is_refused():
    class Own(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return args

    with pytest.raises(CordaError, match="Own overrides"):
        unpack(nn.ModuleDict({"attn": Own(EMBED, HEADS)}))


class TestAdapter:
    def _attach(self, model, target="attn.q_proj"):
        from peft import LoraConfig, inject_adapter_in_model

        unpack(model)
        return inject_adapter_in_model(
            LoraConfig(target_modules=[target], init_lora_weights=False), model
        )

    def test_packing_under_an_adapter_is_refused_and_changes_nothing(self):
        model = self._attach(nn.ModuleDict({"one": Holder(), "two": Holder()}), "one.attn.q_proj")
        with pytest.raises(
            CordaError, match=r"one\.attn\.q_proj is a Linear, not a plain nn\.Linear"
        ):
            pack(model)
        assert isinstance(model["two"].attn, UnpackedAttention)

    def test_an_adapter_attached_inside_the_context_outlives_it(self):
        model = nn.ModuleDict({"one": Holder(), "two": Holder()})
        with unpacked(model):
            self._attach(model, "one.attn.q_proj")
        assert isinstance(model["one"].attn, UnpackedAttention)
        assert is_packed(model["two"].attn)

    def test_wrapping_the_packed_layer_itself_is_named(self):
        from peft import LoraConfig, inject_adapter_in_model

        model = inject_adapter_in_model(
            LoraConfig(target_modules=["attn"]), Holder(batch_first=True)
        )
        with pytest.raises(CordaError, match="an adapter wraps the packed attention layer itself"):
            unpack(model)


class TestAttentionPool:
    """The pool of open_clip's ResNets."""

    @pytest.fixture
    def pool(self):
        from open_clip.modified_resnet import AttentionPool2d

        return AttentionPool2d(3, EMBED, HEADS, output_dim=10)

    def test_same_outputs_and_gradients(self, pool):
        model, x = nn.Sequential(pool), torch.randn(BATCH, EMBED, 3, 3, requires_grad=True)
        expected = pool(x)
        wanted = torch.autograd.grad(expected.square().sum(), [x, *pool.parameters()])
        with unpacked(model):
            found = model(x)
            gradients = torch.autograd.grad(found.square().sum(), [x, *model.parameters()])
            assert [n for n, _ in model.named_parameters()] == [
                f"0.{n}" for n, _ in pool.named_parameters()
            ]
        torch.testing.assert_close(found, expected)
        for a, b in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    def test_its_parts_are_called_on_what_has_an_effect(self, pool):
        model, seen = nn.Sequential(pool), {}
        with unpacked(model):
            for part in ("q_proj", "k_proj", "v_proj", "c_proj"):
                getattr(model[0], part).register_forward_pre_hook(
                    lambda _, args, part=part: seen.update({part: tuple(args[0].shape)})
                )
            model(torch.randn(BATCH, EMBED, 3, 3))
        assert seen == {
            "q_proj": (BATCH, 1, EMBED), "k_proj": (BATCH, 10, EMBED), "v_proj": (BATCH, 10, EMBED),
            "c_proj": (BATCH, EMBED),
        }  # fmt: skip

    def test_packing_gives_the_same_objects_back(self, pool):
        model = nn.Sequential(pool)
        before = dict(pool.named_parameters())
        with unpacked(model):
            assert not is_packed(model[0])
            model.to(torch.float64)
        assert model[0] is pool
        assert is_packed(pool)
        assert all(p is before[n] for n, p in pool.named_parameters())
        assert {p.dtype for p in pool.parameters()} == {torch.float64}
        assert set(packed_parts(pool)) == {"q_proj", "k_proj", "v_proj", "c_proj"}

    def test_an_adapter_on_a_part_keeps_it_unpacked(self, pool):
        from peft import LoraConfig, get_peft_model

        model = nn.Sequential(pool)
        unpack(model)
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(CordaError, match=r"0\.q_proj is a Linear, not a plain nn\.Linear"):
            pack(model)
        wrapped.unload()
        assert pack(model) == ["0"]
        assert model[0] is pool


class TestOpenClipAttention:
    """open_clip's own `Attention`, in blocks with qk_norm and the like."""

    @pytest.mark.parametrize(
        "options",
        [{"qk_norm": True}, {"scale_heads": True}, {"inner_norm": True}, {"qkv_bias": False}],
    )
    def test_same_outputs(self, options):
        from open_clip.transformer import Attention

        model = nn.ModuleDict({"attn": Attention(EMBED, HEADS, **options)}).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        state = copy.deepcopy(model.state_dict())
        x, mask = (
            torch.randn(BATCH, LENGTH, EMBED),
            torch.full((LENGTH, LENGTH), float("-inf")).triu(1),
        )
        expected = [model["attn"](x), model["attn"](x, attn_mask=mask)]
        with unpacked(model):
            assert not is_packed(model["attn"])
            torch.testing.assert_close(model["attn"](x), expected[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                model["attn"](x, attn_mask=mask), expected[1], atol=1e-5, rtol=1e-5
            )
        assert list(model.state_dict()) == list(state)

    def test_scaled_cosine_is_refused_by_name(self):
        from open_clip.transformer import Attention

        with pytest.raises(
            CordaError, match=r"attn: open_clip\.transformer\.Attention with scaled_cosine"
        ):
            unpack(nn.ModuleDict({"attn": Attention(EMBED, HEADS, scaled_cosine=True)}))

    def test_parts_are_views(self):
        from open_clip.transformer import Attention

        attention = Attention(EMBED, HEADS)
        parts = packed_parts(attention)
        assert parts["v_proj"][0].data_ptr() == attention.in_proj_weight[2 * EMBED :].data_ptr()


def test_timm_layers_that_bypass_their_qkv_call_it_while_unpacked():
    from timm.models.beit import Attention

    layer = Attention(EMBED, HEADS, qkv_bias=True).eval()
    model = nn.ModuleDict({"attn": layer})
    with torch.no_grad():
        layer.q_bias.normal_()
        layer.v_bias.normal_()
    x, calls = torch.randn(BATCH, LENGTH, EMBED), []
    layer.qkv.register_forward_hook(lambda *args: calls.append(1))
    expected = layer(x)
    assert not calls
    with unpacked(model):
        with unpacked(model):
            pass
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
        assert calls == [1]
    layer(x)
    assert calls == [1]
