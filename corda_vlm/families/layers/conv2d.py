"""Convolutions, which multiply patches by a matrix as an `nn.Linear` multiplies tokens.

The weight (out, in, kh, kw) of an `nn.Conv2d` is the matrix (out, in·kh·kw), and its tokens are the patches of the image that it reads, one
for each place of its output, padding included. Unlike packed attention and GPT-2's `Conv1D` it is not put into another form while it
is worked on: its hooks fire, PEFT has a LoRA for it (a k×k convolution to r channels, and a 1×1 one from there), and as an `nn.Linear` it
would need all patches of a batch at once, k² times the size of its input. So what reads a weight takes the matrix, what reads
its inputs takes the patches from here, some at a time, and what computes `B A x` takes two convolutions.

A grouped convolution is several small matrices, each of which sees some channels alone; a depthwise one has 9 or 49 numbers a
channel, which nothing of low rank makes smaller. They are no sites, and neither are classes with an arithmetic of their own.
"""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

_BYTES = 24 * 2**20  # of patches at a time
_ROWS = 1024  # but at least so many: fewer would be multiplied slowly


def is_conv2d(module: object) -> bool:
    """Is `module` a convolution that multiplies patches by one matrix?"""
    return isinstance(module, nn.Conv2d) and left_out(module) is None


def left_out(module: nn.Module) -> str | None:
    """Why a convolution is none that can be adapted; None of those that can, and of all other modules."""
    if not isinstance(module, nn.Conv2d):
        return None
    kind = type(module)
    if kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward:
        return "of a class with an arithmetic of its own"
    return "grouped" if module.groups > 1 else None


def conv_matrix(conv: nn.Conv2d) -> Float[Tensor, "out inp"]:
    """The weight as a matrix, differentiable; a view unless its storage is channels last."""
    return conv.weight.flatten(1)


def as_kernel(conv: nn.Conv2d, matrix: Float[Tensor, "n inp"]) -> Float[Tensor, "n c kh kw"]:
    """Rows of a matrix as filters of the size of the convolution's own."""
    return matrix.unflatten(1, conv.weight.shape[1:])


def patches(
    conv: nn.Conv2d, x: Float[Tensor, "*b c h w"], at_once: int = _BYTES
) -> Iterator[Float[Tensor, "n inp"]]:
    """The patches that a convolution multiplies when it reads `x`, as rows in blocks of about so many bytes.

    A block is a few images, or where one is too large a strip of its places. Nothing larger is made, and for a 1×1
    convolution the values are those of the input, copied once.
    """
    images = x[None] if x.dim() == 3 else x
    height, width = out_size(conv, images)
    if not height * width * len(images):
        return
    inp = conv.weight[0].numel()
    rows = max(_ROWS, at_once // (inp * x.element_size()))
    strip = min(height, max(1, rows // width))
    for some in images.split(max(1, rows // (height * width))):
        view = _as_patches(conv, _padded(conv, some), height, width)  # (n, oh, ow, c, kh, kw)
        for part in view.split(strip, dim=1):
            # the places last while it is copied: in that order the memory of the image is read in runs
            yield part.permute(3, 4, 5, 0, 1, 2).reshape(inp, -1).T


def out_size(conv: nn.Conv2d, x: Float[Tensor, "b c h w"]) -> tuple[int, int]:
    """Height and width of the convolution's output."""
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    padded = x.shape[2] + top + bottom, x.shape[3] + left + right
    height, width = (
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, dilation, stride in zip(
            padded, conv.kernel_size, conv.dilation, conv.stride, strict=True
        )
    )
    return height, width


def _padded(conv: nn.Conv2d, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c *size"]:
    widths = conv._reversed_padding_repeated_twice  # of "same" padding too
    if not any(widths):
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, widths, mode=mode)


def _as_patches(
    conv: nn.Conv2d, x: Float[Tensor, "b c h w"], height: int, width: int
) -> Float[Tensor, "b oh ow c kh kw"]:
    """A view of a padded input: no value is copied."""
    image, channel, row, column = x.stride()
    (down, right), (below, beside) = conv.stride, conv.dilation
    return x.as_strided(
        (len(x), height, width, x.shape[1], *conv.kernel_size),
        (image, row * down, column * right, channel, row * below, column * beside),
    )


def places_as_rows(x: Float[Tensor, "*b c h w"]) -> Float[Tensor, "n c"]:
    """What a convolution reads or gives out, with a row for each place."""
    return x.movedim(-3, -1).reshape(-1, x.shape[-3])


def geometry(layer: nn.Module) -> tuple[object, ...]:
    """What decides which patches a convolution makes of its input; of other layers nothing."""
    if not isinstance(layer, nn.Conv2d):
        return ()
    padding = (*layer._reversed_padding_repeated_twice, layer.padding_mode)
    return layer.kernel_size, layer.stride, layer.dilation, padding


def convolved(
    conv: nn.Conv2d, x: Tensor, A: Float[Tensor, "r inp"], B: Float[Tensor, "out r"]
) -> Tensor:
    """`B A` on the patches of `x`, as two convolutions: no patch is made, and no product of B and A."""
    # with the layer's stride, padding and its mode, and dilation
    narrow = conv._conv_forward(x, as_kernel(conv, A), None)  # (*b, r, oh, ow)
    return F.conv2d(narrow, B[:, :, None, None])


def not_in_peft(conv: nn.Conv2d) -> str | None:
    """What of a convolution PEFT's LoRA for it leaves out, so that it would multiply other patches; None if nothing.

    Its first factor is made with kernel, stride and padding alone (`peft.tuners.lora.layer._ConvNd`).
    """
    if any(d > 1 and k > 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
        return f"dilation {max(conv.dilation)}"
    if conv.padding_mode != "zeros" and any(conv._reversed_padding_repeated_twice):
        return f"padding_mode {conv.padding_mode!r}"
    return None
