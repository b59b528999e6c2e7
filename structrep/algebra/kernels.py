"""Kernels, checked, placed in frames, regrouped and composed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structrep.algebra.geometry import CONV_TRANSPOSE, Geometry
from structrep.errors import Inexact


def swapped(kernel: Tensor, groups: int) -> Tensor:
    """(O, I / groups, *K) <-> (I, O / groups, *K), torch's layout of a transposed convolution's kernel.

    Raises:
        RuntimeError: the groups do not divide the first dim.
    """
    blocks = kernel.reshape(groups, -1, *kernel.shape[1:]).transpose(1, 2)
    return blocks.reshape(-1, *blocks.shape[2:])


def check_finite(owner: object, **coefficients: Tensor) -> None:
    """Raise if a coefficient of a map is no finite number.

    Args:
        owner: the map, for the message.
        coefficients: by what they are.

    Raises:
        Inexact: one is NaN or infinite.
    """
    for name, numbers in coefficients.items():
        # A finite sum has finite terms, and is quicker to have.
        if not math.isfinite(float(numbers.sum())) and not bool(numbers.isfinite().all()):
            raise Inexact(
                f"the {name} of {owner} holds {float(numbers[~numbers.isfinite()][0])}: only finite numbers can be "
                f"merged; look for weights, norm statistics or pad values that are none"
            )


def peak(values: Tensor) -> float:
    """Largest absolute value."""
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


def place(kernel: Tensor, mine: Geometry, frame: Geometry) -> Tensor:
    """A kernel with its taps at their places in a frame, and zeros between: (O, I / frame.groups, *frame.kernel)."""
    kernel = regroup(kernel, mine.groups, frame.groups)
    if (mine.kernel, mine.pad) == (frame.kernel, frame.pad):
        return kernel
    places = [slice(None), slice(None)]
    for (lo, _), (frame_lo, _), reach, step, dilation in zip(
        mine.pad, frame.pad, mine.reach, frame.dilation, mine.dilation, strict=True
    ):
        first = (frame_lo - lo) // step
        places.append(slice(first, first + reach // step + 1, max(1, dilation // step)))
    out = kernel.new_zeros(*kernel.shape[:2], *frame.kernel)
    out[tuple(places)] = kernel
    return out


def compose_kernels(first: Tensor, second: Tensor, f: Geometry, g: Geometry, result: Geometry) -> Tensor:
    """kernel[o, i, u] = sum over m and s1 d2 t2 + d1 t1 = u of second[o, m, t2] first[m, i, t1]: a transposed
    convolution, where neither is a scale per channel or of one tap."""
    if g.diagonal:
        return first * second.reshape(-1, *[1] * (first.ndim - 1))
    if f.diagonal:
        scale = first.reshape(g.groups, 1, -1, *[1] * g.dims)
        return (second.reshape(g.groups, -1, *second.shape[1:]) * scale).reshape(second.shape)
    groups = result.groups
    first, second = regroup(first, f.groups, groups), regroup(second, g.groups, groups)
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
