"""The border law: when one map behind another is one map, and what helps where it is not.

`f >> g` is one map iff g reads nothing outside f's output, or f evaluated outside its input gives exactly what g reads
there. Decided on geometry, bias and what is read outside, never on which taps happen to be zero.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from structrep.algebra.geometry import Strictness
from structrep.algebra.kernels import channel_mix, peak
from structrep.errors import Inexact

if TYPE_CHECKING:
    from structrep.algebra.convmap import ConvMap

CANCELLATION = 64.0  # a factor: a pad may cost six bits of the bias that it stands for, and no more
ROUNDING = 64 * torch.finfo(torch.float64).eps  # two routes to one number may differ so much, relative to its size


def composed_fill(first: ConvMap, second: ConvMap, strictness: Strictness) -> Tensor:
    """What the composite is to read outside, (I,).

    Args:
        strictness: what to do where the border law forbids it, as for `ConvMap.then`.

    Raises:
        Inexact: nothing that it could read there would do.
        ValueError: a strictness of another name.
    """
    if strictness not in get_args(Strictness):
        raise ValueError(f"strictness {strictness!r} is none of {', '.join(get_args(Strictness))}")
    try:
        return _fill_before(first, second)
    except Inexact:
        solved = _solved_fill(first, second) if strictness != "exact" else None
        transposed = first.geometry.transposed or second.geometry.transposed
        copied = {first.border, second.border} != {"constant"}
        if solved is None and (strictness != "inside" or transposed or copied):
            raise
        return first.fill if solved is None else solved


def _fill_before(first: ConvMap, second: ConvMap) -> Tensor:
    """What the composite is to read outside; raises unless the first map makes of that what the second reads.

    Decided from geometry, bias and fill alone: a tap whose coefficient happens to be zero counts as a tap.
    """
    f, g = first.geometry, second.geometry
    if g.transposed:
        if first.bias.any():
            raise Inexact(
                f"{second} adds up what it is given, in second numbers near the border and between strides, so the "
                f"bias of {first} before it is none behind it"
            )
        return first.fill
    padded = [dim for dim, sides in enumerate(g.pad) if max(sides) > 0]
    if not padded:
        return first.fill
    if f.pads and first.border != second.border:
        raise Inexact(
            f"{second} reads {_reading(second)} outside, but {first} reads {_reading(first)}: one map has one border, "
            f"so pad both alike"
        )
    if second.border != "constant":
        if moved := [dim for dim in padded if f.moves[dim]]:
            raise Inexact(
                f"a {second.border} pad of the output of {first} is not one of its input, for it is not pointwise "
                f"along spatial dim {moved[0]}: padding belongs on the first of two convolutions"
            )
        return first.fill  # copies of pixels: what is pointwise commutes with them, bias and all
    if (dim := _sees_pixels(first, second)) is not None:
        raise Inexact(
            f"{second} reads {_reading(second)} outside its input along spatial dim {dim}, but there {first} "
            f"still sees real pixels: padding belongs on the first of two convolutions, or on a pointwise one"
        )
    fill = first.fill
    if f.diagonal and not first.bias.any():
        scale = first.kernel.flatten()
        fill = torch.where(scale == 0, 0.0, second.fill / scale)  # a scale commutes with any pad
    outside = first.bias + channel_mix(first.kernel, fill, f.groups)
    size = first.bias.abs() + channel_mix(first.kernel.abs(), 1 + fill.abs(), f.groups)
    if not _same(outside, second.fill, size + second.fill.abs()):
        worst = int((outside - second.fill).abs().argmax())
        raise Inexact(
            f"{second} reads {_reading(second, worst)} outside its input, but {first} gives "
            f"{float(outside[worst]):.6g} there (its bias): without that bias, or padded with it, the two would be "
            f"one convolution"
        )
    return fill


def _solved_fill(first: ConvMap, second: ConvMap) -> Tensor | None:
    """What the first map would have to read outside to give what the second reads there; None if nothing does."""
    f, g = first.geometry, second.geometry
    odd = f.transposed or g.transposed or f.pads or second.border != "constant"
    if odd or _sees_pixels(first, second) is not None:
        return None
    mixed = first.kernel.reshape(f.groups, f.out_channels // f.groups, -1, math.prod(f.kernel)).sum(-1)
    wanted = (second.fill - first.bias).reshape(f.groups, -1, 1)
    # On the CPU, whose solver is the one that takes matrices of any rank.
    found: Tensor = torch.linalg.lstsq(mixed.cpu(), wanted.cpu(), driver="gelsd").solution.to(mixed)
    if _same(found, found.mean(), found.abs()):
        found = torch.full_like(found, float(found.mean()))  # one constant for all, which layers can pad with
    spread = torch.bmm(mixed.abs(), found.abs()).flatten()
    outside = torch.bmm(mixed, found).flatten()
    size = first.bias.abs() + second.fill.abs()
    if not _same(outside, wanted.flatten(), size + spread) or peak(spread) > CANCELLATION * peak(size):
        return None
    return found.flatten()


def _sees_pixels(first: ConvMap, second: ConvMap) -> int | None:
    """A spatial dim along which the first map still reads real pixels where the second reads outside its output."""
    for dim, ((lo, hi), (_, after)) in enumerate(zip(first.geometry.pad, second.geometry.pad, strict=True)):
        reach, stride, before = first.geometry.reach[dim], first.geometry.stride[dim], second.geometry.nearest[dim]
        if (before > 0 and lo + stride * before <= reach) or (after > 0 and hi < reach):
            return dim
    return None


def common_border(first: ConvMap, second: ConvMap) -> ConvMap:
    """Whichever of the two says what is read outside.

    Raises:
        Inexact: both do, and differ.
    """
    if not second.geometry.pads:
        return first
    if first.geometry.pads and not (
        first.border == second.border and _same(first.fill, second.fill, first.fill.abs() + second.fill.abs())
    ):
        worst = int((first.fill - second.fill).abs().argmax())
        raise Inexact(
            f"two parallel maps read different things outside their input, {_reading(first, worst)} and "
            f"{_reading(second, worst)}: pad both alike"
        )
    return second


def _same(one: Tensor, two: Tensor, size: Tensor) -> bool:
    """Equal but for rounding, each number relative to what it is made of."""
    return bool(((one - two).abs() <= ROUNDING * size).all())


def _reading(map_: ConvMap, channel: int | None = None) -> str:
    """What a map reads outside its input, for an error message."""
    if map_.border != "constant":
        return f"a {map_.border} border"
    if channel is not None:
        return f"{float(map_.fill[channel]):.6g} in channel {channel}"
    low, high = float(map_.fill.min()), float(map_.fill.max())
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
