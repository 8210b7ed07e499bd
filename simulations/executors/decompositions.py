"""What compiled programs do in place of operators that torch's processor libraries are slow at, to float tolerance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_FEW = 32
"""Numbers that each output of a convolution is made from, at most, for it to be faster as one product of matrices."""

_aten = torch.ops.aten


def _is_small(inputs: Tensor, weight: Tensor, dilation: Sequence[int], transposed: bool, groups: int) -> bool:
    plain = groups == 1 and not transposed and set(dilation) == {1} and inputs.device.type == "cpu"
    return plain and inputs.dim() == 4 and weight[0].numel() <= _FEW


def _columns(inputs: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """What each output is made from: (numbers, n, rows, columns)."""
    (high, wide), (down, right) = weight.shape[2:], stride
    padded = torch.nn.functional.pad(inputs, (padding[1], padding[1], padding[0], padding[0]))
    rows, columns = (padded.shape[2] - high) // down + 1, (padded.shape[3] - wide) // right + 1
    return torch.stack(
        [
            padded[:, channel, i : i + down * (rows - 1) + 1 : down, j : j + right * (columns - 1) + 1 : right]
            for channel in range(inputs.shape[1])
            for i in range(high)
            for j in range(wide)
        ]
    )


def convolution(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """aten.convolution, of images with few channels. The outputs lie channels last."""
    if not _is_small(inputs, weight, dilation, transposed, groups):
        return NotImplemented
    made = _columns(inputs, weight, stride, padding)
    flat, kernels = made.flatten(1).t(), weight.flatten(1).t()
    outputs = flat @ kernels if bias is None else torch.addmm(bias, flat, kernels)
    return outputs.view(*made.shape[1:], len(weight)).permute(0, 3, 1, 2)


def convolution_backward(
    gradient: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    """aten.convolution_backward of the same, where nobody asks for the inputs' gradient."""
    if output_mask[0] or not _is_small(inputs, weight, dilation, transposed, groups):
        return NotImplemented
    flat = gradient.permute(0, 2, 3, 1).reshape(-1, len(weight))
    made = _columns(inputs, weight, stride, padding).flatten(1)
    return (
        None,
        (made @ flat).t().reshape(weight.shape) if output_mask[1] else None,
        flat.sum(0) if output_mask[2] else None,
    )


def max_pool2d_with_indices_backward(
    gradient: Tensor,
    inputs: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Any:
    """The aten operator of that name, of windows that do not overlap: the first of a window's largest takes its gradient."""
    high, wide = (*kernel_size, *kernel_size)[:2]
    apart = not stride or (*stride, *stride)[:2] == (high, wide)
    plain = set(padding) == {0} and set(dilation) == {1} and not ceil_mode
    if not apart or not plain or inputs.device.type != "cpu":
        return NotImplemented
    rows, columns = gradient.shape[-2:]
    covered = inputs[..., : rows * high, : columns * wide]
    windows = covered.reshape(*inputs.shape[:-2], rows, high, columns, wide)
    largest = windows.amax(dim=(-3, -1))
    taken = torch.zeros_like(largest, dtype=torch.bool)
    parts = []
    for i in range(high):
        for j in range(wide):
            equal = windows[..., i, :, j] == largest
            parts.append(torch.where(equal & ~taken, gradient, 0.0))
            taken = taken | equal
    back = torch.stack(parts).view(high, wide, *gradient.shape).movedim((0, 1), (-3, -1)).reshape(covered.shape)
    rest = inputs.shape[-1] - columns * wide, inputs.shape[-2] - rows * high
    return torch.nn.functional.pad(back, (0, rest[0], 0, rest[1])) if any(rest) else back


FASTER: Mapping[Any, Callable[..., Any]] = {
    _aten.convolution.default: convolution,
    _aten.convolution_backward.default: convolution_backward,
    _aten.max_pool2d_with_indices_backward.default: max_pool2d_with_indices_backward,
}
