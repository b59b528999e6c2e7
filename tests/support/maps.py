"""Maps of every geometry, drawn at random, and the formula that says what each is: the truth of the algebra's laws.

`Formula` is a map as the plain sum over its taps, dense, pixel by pixel, without a convolution in it. It composes and
adds by the same formula and never refuses, so it also says what *would* have come out of a merge that the algebra
refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from structrep.algebra import ConvMap

Ints = tuple[int, ...]
Function = Callable[[Tensor], Tensor]
BORDERS = ("constant", "reflect", "replicate", "circular")
EXACT = 1e-12  # of float64, relative to the sum of absolute values that a number was summed from
SHOWS = 1e-9  # a difference that is no rounding


# --- the truth ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Formula:
    """y[p] = bias + sum over taps of matrix @ x[stride * p + offset], where x reads its border outside."""

    taps: dict[Ints, Tensor]  # offset -> (O, I)
    bias: Tensor
    stride: Ints
    pad: tuple[tuple[int, int], ...]
    overhang: Ints
    fill: Tensor
    border: str

    @staticmethod
    def of(
        kernel: Tensor,
        bias: Tensor | None,
        stride: Ints,
        pad: Sequence[tuple[int, int]],
        dilation: Ints,
        groups: int,
        fill: Tensor | float,
        border: str,
    ) -> Formula:
        (out, inner), sizes = kernel.shape[:2], kernel.shape[2:]
        taps = {}
        for tap in itertools.product(*map(range, sizes)):
            matrix = torch.zeros(out, inner * groups, dtype=torch.float64)
            for o in range(out):
                first = o // (out // groups) * inner
                matrix[o, first : first + inner] = kernel[(o, slice(None), *tap)]
            taps[tuple(d * t - lo for d, t, (lo, _) in zip(dilation, tap, pad, strict=True))] = matrix
        return Formula(
            taps,
            torch.zeros(out, dtype=torch.float64) if bias is None else bias.double(),
            tuple(stride),
            tuple(pad),
            tuple(lo + hi - d * (k - 1) for (lo, hi), d, k in zip(pad, dilation, sizes, strict=True)),
            torch.as_tensor(fill, dtype=torch.float64).expand(inner * groups),
            border,
        )

    @property
    def pads(self) -> bool:
        return any(side > 0 for sides in self.pad for side in sides)

    def size(self, n: int, dim: int) -> int:
        """Output pixels along one dim; below 1 there is no output."""
        return (n + self.overhang[dim] - 1) // self.stride[dim] + 1

    def accepts(self, n: int, dim: int) -> bool:
        """Whether torch takes n pixels along one dim: some output, and no reflection or wrap of more than all of x."""
        wide = max(0, *self.pad[dim])
        widest = {"reflect": n - 1, "circular": n}.get(self.border, wide)
        return self.size(n, dim) >= 1 and wide <= widest

    def __call__(self, x: Tensor) -> Tensor:
        out = [self.size(n, dim) for dim, n in enumerate(x.shape[2:])]
        y = self.bias.reshape(-1, *[1] * len(out)).expand(len(x), -1, *out).clone()
        for offset, matrix in self.taps.items():
            read, outside = x, torch.zeros(out, dtype=torch.bool)
            for dim, (count, step, first) in enumerate(zip(out, self.stride, offset, strict=True)):
                n = x.shape[2 + dim]
                at = step * torch.arange(count) + first
                if self.border == "reflect":
                    at = n - 1 - (n - 1 - at.abs()).abs()
                elif self.border == "circular":
                    at = at % n
                beyond = ((at < 0) | (at >= n)) & (self.border == "constant")
                outside |= beyond.reshape(-1, *[1] * (len(out) - dim - 1))
                read = read.index_select(2 + dim, at.clamp(0, n - 1))
            read = torch.where(outside, self.fill.reshape(-1, *[1] * len(out)), read)
            y += torch.einsum("oi,ni...->no...", matrix, read)
        return y

    def __add__(self, other: Formula) -> Formula:
        taps = dict(self.taps)
        for offset, matrix in other.taps.items():
            taps[offset] = taps.get(offset, 0) + matrix
        outside = self if self.pads else other
        pad = tuple((max(lo1, lo2), max(hi1, hi2)) for (lo1, hi1), (lo2, hi2) in zip(self.pad, other.pad, strict=True))
        return replace(self, taps=taps, bias=self.bias + other.bias, pad=pad, fill=outside.fill, border=outside.border)

    def __rshift__(self, other: Formula) -> Formula:
        taps: dict[Ints, Tensor] = {}
        for (first, one), (second, two) in itertools.product(self.taps.items(), other.taps.items()):
            offset = tuple(a + s * b for a, b, s in zip(first, second, self.stride, strict=True))
            taps[offset] = taps.get(offset, 0) + two @ one
        return Formula(
            taps,
            other.bias + sum(other.taps.values()) @ self.bias,
            tuple(a * b for a, b in zip(self.stride, other.stride, strict=True)),
            tuple(
                (lo1 + s * lo2, hi1 + s * hi2)
                for (lo1, hi1), (lo2, hi2), s in zip(self.pad, other.pad, self.stride, strict=True)
            ),
            tuple(a + s * b for a, b, s in zip(self.overhang, other.overhang, self.stride, strict=True)),
            self.fill if self.pads else torch.zeros_like(self.fill),
            self.border if self.pads else other.border,
        )

    def outside(self) -> Tensor:
        """What the map gives where it reads nothing but its fill."""
        return self.bias + sum(self.taps.values()) @ (self.fill if self.pads else torch.zeros_like(self.fill))


def formula(map_: ConvMap) -> Formula:
    g = map_.geometry
    return Formula.of(map_.kernel, map_.bias, g.stride, g.pad, g.dilation, g.groups, map_.fill, map_.border)


def absolute(map_: ConvMap) -> ConvMap:
    """The map of the absolute coefficients: what rounding is relative to."""
    g = map_.geometry
    return ConvMap(
        map_.kernel.abs(), map_.bias.abs(), stride=g.stride, pad=g.pad, dilation=g.dilation, groups=g.groups,
        fill=map_.fill.abs(), border=map_.border,
    )  # fmt: skip


def chain(*maps: Function) -> Function:
    def apply(x: Tensor) -> Tensor:
        for map_ in maps:
            x = map_(x)
        return x

    return apply


def gap(mine: Tensor, truth: Tensor, size: Tensor) -> float:
    """Largest difference, relative to the sum of absolute values that each number was summed from."""
    assert mine.shape == truth.shape
    return float(((mine - truth).abs() / size.clamp_min(1e-300)).max())


def sizes(*chains: Sequence[ConvMap], dim: int, count: int) -> list[int]:
    """The smallest input sizes along one dim that every map of every chain accepts."""

    def accepted(n: int) -> bool:
        for maps in chains:
            m = n
            for each in map(_frame, maps):
                if not each.accepts(m, dim):
                    return False
                m = each.size(m, dim)
        return True

    return list(itertools.islice(filter(accepted, range(1, 400)), count))


def _frame(map_: ConvMap) -> Formula:
    """Its geometry alone."""
    g = map_.geometry
    return Formula({}, map_.bias, g.stride, g.pad, g.overhang, map_.fill, map_.border)


def pixels(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


# --- strategies ---------------------------------------------------------------------------------------------------

Axis = tuple[int, int, int, tuple[int, int]]  # kernel, stride, dilation, (lo, hi)


@st.composite
def numbers(draw: st.DrawFn, *shape: int) -> Tensor:
    seed = draw(st.integers(0, 2**16))
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@st.composite
def axes(draw: st.DrawFn, dims: int, *, stride: int | None = None, overhang: int | None = None, most: int = 3) -> Axis:
    """One spatial dim of any map, or of a map that can be added to one of that stride and overhang.

    Args:
        most: the largest pad.
    """
    small = dims == 3
    k = draw(st.integers(1, 3 if small else 4))
    s = draw(st.integers(1, 2 if small else 3)) if stride is None else stride
    d = draw(st.integers(1, 2 if small else 3)) if k > 1 else 1
    lo = draw(st.integers(-2, most))
    return k, s, d, (lo, draw(st.integers(-2, most)) if overhang is None else overhang + d * (k - 1) - lo)


@st.composite
def arguments(
    draw: st.DrawFn,
    *,
    dims: int | None = None,
    inputs: int | None = None,
    outputs: int | None = None,
    along: list[Axis] | None = None,
    border: str | None = None,
    fill: Tensor | None = None,
    bias: Tensor | None = None,
    zeros: bool = True,
) -> dict[str, Any]:
    """What a map is made from; all that is not given is free.

    Args:
        zeros: whether some coefficients may be exactly zero.
    """
    dims = draw(st.sampled_from((2, 1, 2, 0, 3))) if dims is None else dims
    along = [draw(axes(dims)) for _ in range(dims)] if along is None else along
    inputs = draw(st.integers(1, 6)) if inputs is None else inputs
    groups = draw(st.sampled_from([g for g in range(1, inputs + 1) if inputs % g == 0 and not (outputs or 0) % g]))
    outputs = groups * draw(st.integers(1, max(1, 6 // groups))) if outputs is None else outputs
    kernel = draw(numbers(outputs, inputs // groups, *[k for k, *_ in along]))
    if zeros:
        match draw(st.sampled_from(("none", "none", "none", "a tap", "a channel", "all"))):
            case "a tap" if dims:
                kernel[(..., *[draw(st.integers(0, k - 1)) for k, *_ in along])] = 0
            case "a channel":
                kernel[draw(st.integers(0, outputs - 1))] = 0
            case "all":
                kernel.zero_()
    if border is None:
        border = draw(st.sampled_from(("constant", *BORDERS)))
    if fill is None:
        shape = draw(st.sampled_from((None, (), (inputs,))))
        fill = torch.tensor(0.0) if shape is None else draw(numbers(*shape))
    return dict(
        kernel=kernel,
        bias=draw(st.none() | numbers(outputs)) if bias is None else bias,
        stride=tuple(s for _, s, _, _ in along),
        pad=tuple(sides for *_, sides in along),
        dilation=tuple(d for _, _, d, _ in along),
        groups=groups,
        fill=fill,
        border=border,
    )


@st.composite
def maps(draw: st.DrawFn, **fixed: Any) -> ConvMap:
    """Any map; `fixed` as in `arguments`."""
    return ConvMap(**draw(arguments(**fixed)))


@st.composite
def parallel(draw: st.DrawFn, map_: ConvMap, *, outputs: int | None = None, zeros: bool = True) -> ConvMap:
    """A map that can be added to that one, or stacked on it where it has other outputs."""
    g = map_.geometry
    along = [
        draw(axes(g.dims, stride=s, overhang=o, most=1 + max(0, *p)))
        for s, o, p in zip(g.stride, g.overhang, g.pad, strict=True)
    ]
    outside: dict[str, Any] = dict(border=map_.border, fill=map_.fill) if g.pads else {}
    return draw(maps(dims=g.dims, inputs=g.in_channels, outputs=outputs, along=along, zeros=zeros, **outside))


@st.composite
def feeding(draw: st.DrawFn, *, linear: bool = False, zeros: bool = True) -> ConvMap:
    """A map that a padded one can often follow: per dim it is anything, pointwise, or padded at least as wide as it
    reaches; over all, it often has no bias.

    Args:
        linear: it has no bias and no fill.
    """
    dims = draw(st.sampled_from((2, 1, 2, 0, 3)))
    along = []
    kinds = draw(
        st.sampled_from((("pointwise",), ("pointwise", "padded"), ("pointwise", "padded", "nearly padded", "anything")))
    )
    for _ in range(dims):
        k, s, d, (lo, hi) = draw(axes(dims))
        reach = d * (k - 1)
        match draw(st.sampled_from(kinds)):
            case "pointwise":
                k, s, d, (lo, hi) = 1, 1, 1, (0, 0)
            case "padded":
                lo, hi = draw(st.integers(max(0, reach + 1 - s), reach + 1)), draw(st.integers(reach, reach + 1))
            case "nearly padded":
                lo, hi = draw(st.integers(reach - s, reach + 1 - s)), draw(st.integers(reach - 1, reach))
        along.append((k, s, d, (lo, hi)))
    fixed: dict[str, Any] = {}
    if draw(st.booleans()):
        fixed["border"] = "constant"
    if linear:
        fixed["fill"] = torch.tensor(0.0)
    if linear or draw(st.booleans()):
        inputs = draw(st.integers(1, 6))
        outputs = inputs * draw(st.integers(1, 2))
        fixed |= dict(inputs=inputs, outputs=outputs, bias=torch.zeros(outputs))
    return draw(maps(dims=dims, along=along, zeros=zeros, **fixed))


@st.composite
def following(draw: st.DrawFn, map_: ConvMap, *, anywhere: bool = False, zeros: bool = True) -> ConvMap:
    """A map that can follow that one, by the border law, which is written here a second time, forwards: it pads only
    where, and with what, it may.

    Args:
        anywhere: it pads with what it may, but wherever.
    """
    f, g = formula(map_), map_.geometry
    reach = [d * (k - 1) for d, k in zip(g.dilation, g.kernel, strict=True)]
    borders = ["constant", *BORDERS] if not f.pads else [f.border]
    border = draw(st.sampled_from(borders))
    along = []
    for dim in range(g.dims):
        k, s, d, (lo, hi) = draw(axes(g.dims))
        (lo1, hi1), s1 = g.pad[dim], g.stride[dim]
        if anywhere:
            before = after = True
        elif border == "constant":
            before, after = lo1 + s1 - 1 >= reach[dim], hi1 >= reach[dim]
        else:
            before = after = (reach[dim], s1, lo1, hi1) == (0, 1, 0, 0)
        along.append((k, s, d, (lo if before else min(0, lo), hi if after else min(0, hi))))
    if f.pads and f.border != "constant" and all(max(sides) <= 0 for *_, sides in along):
        border = "constant"
    fixed: dict[str, Any] = dict(border=border, fill=f.outside() if border == "constant" else torch.tensor(0.0))
    if g.diagonal and not map_.bias.any() and map_.kernel.all() and draw(st.booleans()):
        fixed = dict(border="constant")  # a scale commutes with any pad
    return draw(maps(dims=g.dims, inputs=g.out_channels, along=along, zeros=zeros, **fixed))


@st.composite
def inputs_for(draw: st.DrawFn, *chains: Sequence[ConvMap]) -> list[Tensor]:
    """The smallest input that all maps of the chains accept, and some other, seldom square."""
    g = chains[0][0].geometry
    legal = [sizes(*chains, dim=dim, count=3 if g.dims == 3 else 8) for dim in range(g.dims)]
    assume(all(legal))
    some = [draw(st.sampled_from(each)) for each in legal]
    return [pixels(2, g.in_channels, *size) for size in ([each[0] for each in legal], some)]


def agree(xs: Sequence[Tensor], mine: Function, truth: Function, size: Function) -> None:
    """`mine` is `truth` on every input, up to rounding; `size` is the truth of absolute coefficients."""
    for x in xs:
        assert gap(mine(x), truth(x), size(x.abs())) < EXACT


def amplification(*maps: ConvMap) -> float:
    """A bound of the coefficients of a composite, before anything in them cancels."""
    return math.prod(1 + float(m.kernel.abs().flatten(1).sum(1).max() + m.bias.abs().max()) for m in maps)


def differs(merged: Formula, chains: Sequence[Sequence[ConvMap]], truth: Function, size: Function) -> bool:
    """Whether a merge done anyway shows, on some input that all maps of the chains accept: another output, another
    size, or none. One dim is varied at a time."""
    dims, channels = len(merged.stride), chains[0][0].geometry.in_channels
    legal = [sizes(*chains, dim=dim, count=20) for dim in range(dims)]
    bases = [[each[at] for each in legal] for at in (0, 3, -1)]
    tried = [(*base[:dim], n, *base[dim + 1 :]) for base in bases for dim in range(dims) for n in legal[dim]]
    for shape in tried or [()]:
        x = pixels(1, channels, *shape)
        if not all(merged.accepts(n, dim) for dim, n in enumerate(shape)):
            return True
        y, expected = merged(x), truth(x)
        if y.shape != expected.shape or gap(y, expected, size(x.abs())) > SHOWS:
            return True
    return False
