"""Kernels, placed, regrouped and composed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structrep.algebra.geometry import CONV_TRANSPOSE, Geometry


def swapped(kernel: Tensor, groups: int) -> Tensor:
    """(O, I / groups, *K) <-> (I, O / groups, *K), torch's layout of a transposed convolution's kernel."""
    blocks = kernel.reshape(groups, -1, *kernel.shape[1:]).transpose(1, 2)
    return blocks.reshape(-1, *blocks.shape[2:])


def peak(values: Tensor) -> float:
    return float(values.abs().max())


def channel_mix(kernel: Tensor, channels: Tensor, groups: int) -> Tensor:
    """What a kernel makes of an input that is constant per channel: (I,) -> (O,)."""
    mixed = kernel.reshape(groups, kernel.shape[0] // groups, kernel.shape[1], -1).sum(-1)
    return torch.bmm(mixed, channels.reshape(groups, -1, 1)).flatten()


def regroup(kernel: Tensor, groups: int, fewer: int) -> Tensor:
    """(O, I / groups, *K) -> (O, I / fewer, *K), block by block on the diagonal."""
    if groups == fewer:
        return kernel
    ratio = groups // fewer
    out, inner, *taps = kernel.shape[0] // groups, kernel.shape[1], *kernel.shape[2:]
    blocks = kernel.new_zeros(fewer, ratio, out, ratio, inner, *taps)
    blocks.diagonal(dim1=1, dim2=3).copy_(kernel.reshape(fewer, ratio, out, inner, *taps).movedim(1, -1))
    return blocks.reshape(kernel.shape[0], ratio * inner, *taps)


def compose_kernels(first: Tensor, second: Tensor, f: Geometry, g: Geometry, result: Geometry) -> Tensor:
    """kernel[o, i, u] = sum over m and s1 d2 t2 + d1 t1 = u of second[o, m, t2] first[m, i, t1]: a transposed
    convolution.

    Both kernels come in `result.groups` groups.
    """
    groups = result.groups
    one = first.reshape(groups, -1, *first.shape[1:])  # (G, M/G, I/G, *K1)
    two = second.reshape(groups, -1, *second.shape[1:])  # (G, O/G, M/G, *K2)
    if math.prod(f.kernel) == 1:
        return torch.einsum("gom...,gmi->goi...", two, one.flatten(2)).reshape(-1, one.shape[2], *result.kernel)
    if math.prod(g.kernel) == 1:
        return torch.einsum("gom,gmi...->goi...", two.flatten(2), one).reshape(-1, one.shape[2], *result.kernel)
    steps = [
        s1 * d2 // d if k2 > 1 else 1
        for s1, d2, d, k2 in zip(f.stride, g.dilation, result.dilation, g.kernel, strict=True)
    ]
    spread = [d1 // d if k1 > 1 else 1 for d1, d, k1 in zip(f.dilation, result.dilation, f.kernel, strict=True)]
    images = two.movedim(0, 1).flatten(1, 2)  # (O/G, G M/G, *K2)
    composed = CONV_TRANSPOSE[g.dims](images, first, stride=steps, groups=groups, dilation=spread)  # type: ignore[misc]
    return (
        composed.reshape(-1, groups, one.shape[2], *result.kernel)
        .movedim(0, 1)
        .reshape(-1, one.shape[2], *result.kernel)
    )
