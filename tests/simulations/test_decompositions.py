"""What compiled programs do in place of some operators is what these do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedpace.simulations.executors.decompositions import FASTER

aten = torch.ops.aten


def check_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def both(operator: Any, *arguments: Any) -> tuple[Any, Any]:
    return FASTER[operator](*arguments), operator(*arguments)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 1)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 2)])
def test_small_convolutions(
    channels: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    torch.manual_seed(1)
    inputs, weight, bias = torch.randn(4, channels, 9, 8), torch.randn(5, channels, *kernel), torch.randn(5)
    told = (stride, padding, (1, 1), False, (0, 0), 1)
    for given in (bias, None):
        found, expected = both(aten.convolution.default, inputs, weight, given, *told)
        check_close(found, expected)
    gradient = torch.randn_like(expected)
    for mask in ((False, True, True), (False, True, False), (False, False, True)):
        parts = both(aten.convolution_backward.default, gradient, inputs, weight, [5], *told, mask)
        for one, other, wanted in zip(*parts, mask, strict=True):
            assert (one is not None) is wanted
            if wanted:
                check_close(one, other)


@pytest.mark.parametrize("kernel", [[2, 2], [3, 1], [3]])
@pytest.mark.parametrize("size", [(6, 6), (7, 5)])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_pools_whose_windows_do_not_overlap(kernel: list[int], size: tuple[int, int], batch: tuple[int, ...]) -> None:
    """The inputs have few values: windows hold the same largest one more than once, and some nothing but zeros."""
    torch.manual_seed(2)
    inputs = torch.randint(-2, 2, (*batch, 4, *size)).float().relu()
    inputs[..., 0, 0] = -torch.inf
    outputs, indices = aten.max_pool2d_with_indices(inputs, kernel)
    gradient = torch.randn_like(outputs)
    for stride in ([], kernel):
        told = (kernel, stride, [0, 0], [1, 1], False, indices)
        found, expected = both(aten.max_pool2d_with_indices_backward.default, gradient, inputs, *told)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_others_are_left_to_torch() -> None:
    convolve, back = FASTER[aten.convolution.default], FASTER[aten.convolution_backward.default]
    inputs, weight = torch.randn(4, 2, 9, 8), torch.randn(6, 2, 3, 3)
    plain = ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    assert convolve(inputs, weight, None, *plain) is not NotImplemented
    for other in (
        (inputs, torch.randn(6, 2, 5, 5), None, *plain),
        (inputs, torch.randn(6, 1, 3, 3), None, *plain[:-1], 2),
        (inputs, weight, None, (1, 1), (0, 0), (2, 1), False, (0, 0), 1),
        (inputs, weight.transpose(0, 1), None, (1, 1), (0, 0), (1, 1), True, (0, 0), 1),
        (inputs[:, 0], torch.randn(6, 9, 3), None, (1,), (0,), (1,), False, (0,), 1),
    ):
        assert convolve(*other) is NotImplemented
    gradient = torch.randn(4, 6, 7, 6)
    assert back(gradient, inputs, weight, [6], *plain, (True, True, True)) is NotImplemented
    pool = FASTER[aten.max_pool2d_with_indices_backward.default]
    for told in (
        ([2, 2], [1, 1], [0, 0], [1, 1], False),
        ([2, 2], [2, 2], [1, 1], [1, 1], False),
        ([2, 2], [2, 2], [0, 0], [2, 1], False),
        ([2, 2], [2, 2], [0, 0], [1, 1], True),
    ):
        outputs, indices = aten.max_pool2d_with_indices(inputs, *told)
        assert pool(outputs, inputs, *told, indices) is NotImplemented
