"""Convolutions as matrices that multiply patches, against PyTorch's own convolution and unfolding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from corda_vlm.covariance.moments import SecondMoment
from corda_vlm.families.layers.conv2d import (
    as_kernel,
    conv_matrix,
    convolved,
    is_conv2d,
    left_out,
    not_in_peft,
    out_size,
    patches,
    places_as_rows,
)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv2d, torch.Tensor]:
    """A convolution of any geometry, and an input that it takes."""
    pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    kernel = draw(pair(1, 3))
    odd = all(size % 2 for size in kernel)  # else PyTorch warns that "same" copies its input
    named = ["same", "valid"] if odd else ["valid"]
    padding: Any = draw(st.one_of(pair(0, 2), st.sampled_from(named)))
    stride = (1, 1) if padding == "same" else draw(pair(1, 3))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    conv = nn.Conv2d(
        draw(st.integers(1, 3)), draw(st.integers(1, 4)), kernel, stride, padding, draw(pair(1, 2)), padding_mode=mode
    ).double()  # fmt: skip
    height, width = draw(pair(3, 9))
    x = torch.randn(draw(st.integers(1, 3)), conv.in_channels, height, width, dtype=torch.float64)
    widths = conv._reversed_padding_repeated_twice
    assume(max(widths[:2]) < width and max(widths[2:]) < height)  # PyTorch reflects no further
    assume(min(out_size(conv, x)) > 0)
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    if draw(st.booleans()):
        conv = conv.to(memory_format=torch.channels_last)
    return conv, x


class TestPatches:
    @settings(deadline=None, max_examples=40)
    @given(convolutions(), st.sampled_from([1, 10**6]))
    def test_times_the_matrix_they_are_the_convolution_s_output(self, drawn, at_once):
        conv, x = drawn
        rows = torch.cat([*patches(conv, x, at_once)])
        expected = conv(x)
        assert expected.shape[2:] == out_size(conv, x)
        torch.testing.assert_close(rows @ conv_matrix(conv).T + conv.bias, places_as_rows(expected))

    @settings(deadline=None, max_examples=40)
    @given(convolutions())
    def test_their_covariance_is_that_of_all_patches_unfolded_at_once(self, drawn):
        conv, x = drawn
        moment = SecondMoment(conv_matrix(conv).shape[1], torch.float64)
        for rows in patches(conv, x, 1):
            moment.add(rows, "float64")
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        unfolded = F.unfold(padded, conv.kernel_size, conv.dilation, stride=conv.stride)
        X = unfolded.transpose(0, 1).flatten(1)  # (inp, patches)
        assert moment.count == X.shape[1]
        torch.testing.assert_close(moment.matrix(), X @ X.T / X.shape[1])

    @pytest.mark.parametrize(("size", "most"), [((64, 3, 8, 8), 16), ((1, 3, 200, 200), 9)])
    def test_no_block_is_much_larger_than_asked_for(self, size, most):
        conv = nn.Conv2d(3, 2, 3, padding=1)
        blocks = [len(rows) for rows in patches(conv, torch.randn(size), 2000 * 27 * 4)]
        places = size[2] * size[3]
        assert sum(blocks) == size[0] * places
        assert max(blocks) <= 2000
        assert len(blocks) <= size[0] * places / 2000 * 1.2 + 2

    def test_a_single_image_and_none(self):
        conv = nn.Conv2d(3, 2, 3)
        x = torch.randn(1, 3, 5, 5)
        torch.testing.assert_close(
            torch.cat([*patches(conv, x[0])]), torch.cat([*patches(conv, x)])
        )
        assert not [*patches(conv, x[:0])]

    def test_of_a_1x1_convolution_they_are_the_channels(self):
        conv, x = nn.Conv2d(4, 2, 1), torch.randn(1, 4, 5, 5)
        (rows,) = patches(conv, x)
        assert rows.data_ptr() == x.data_ptr()  # of one image not even a copy
        torch.testing.assert_close(rows, places_as_rows(x))


class TestProducts:
    @settings(deadline=None, max_examples=40)
    @given(convolutions())
    def test_two_convolutions_are_the_product_on_the_patches(self, drawn):
        conv, x = drawn
        out, inp = conv_matrix(conv).shape
        A, B = torch.randn(2, inp).double(), torch.randn(out, 2).double()
        with torch.no_grad():
            conv.weight.copy_(as_kernel(conv, B @ A))
            conv.bias = None
            torch.testing.assert_close(convolved(conv, x, A, B), conv(x))


class TestWhichOnes:
    def test_those_of_torch_s_own_arithmetic_and_one_group(self):
        class Standardized(nn.Conv2d):
            def forward(self, input):
                return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)

        class Renamed(nn.Conv2d):
            pass

        assert is_conv2d(nn.Conv2d(4, 4, 3))
        assert is_conv2d(Renamed(4, 4, 3))
        assert not is_conv2d(nn.Linear(4, 4))
        assert left_out(nn.Linear(4, 4)) is None
        for conv, why in (
            (nn.Conv2d(4, 4, 3, groups=2), "grouped"),
            (Standardized(4, 4, 3), "of a class with an arithmetic of its own"),
        ):
            assert not is_conv2d(conv)
            assert left_out(conv) == why

    @pytest.mark.parametrize(
        ("conv", "why"),
        [
            (nn.Conv2d(2, 2, 3, padding=1, stride=2), None),
            (nn.Conv2d(2, 2, 3, dilation=2), "dilation 2"),
            (nn.Conv2d(2, 2, 1, dilation=2), None),
            (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "padding_mode 'reflect'"),
            (nn.Conv2d(2, 2, 3, padding_mode="reflect"), None),
        ],
    )
    def test_what_peft_leaves_out(self, conv, why):
        assert not_in_peft(conv) == why
