"""The laws of the algebra, for maps of every geometry, against the formula that `structrep.algebra` opens with.

The truth here is `Formula`: a map as the plain sum over its taps, dense, pixel by pixel, without a convolution in it.
It composes and adds by the same formula and never refuses, so it also says what *would* have come out of a merge that
the algebra refused: a refusal must show on some input.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, event, given
from hypothesis import strategies as st
from torch import Tensor

from structrep.algebra import ConvMap, Geometry, concat
from structrep.errors import Incompatible, Inexact, Refusal, Unreadable

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


# --- a map is its formula -----------------------------------------------------------------------------------------


@given(st.data())
def test_a_map_is_its_formula(data: st.DataObject) -> None:
    given_ = data.draw(arguments())
    map_, truth = ConvMap(**given_), Formula.of(**given_)
    dims = map_.geometry.dims
    size = [data.draw(st.integers(1, 5 if dims == 3 else 9), label="n") for _ in range(dims)]
    x = pixels(2, map_.geometry.in_channels, *size)
    predicted = map_.geometry.output_size(size)
    assert predicted == tuple(max(0, truth.size(n, dim)) for dim, n in enumerate(size))
    if all(truth.accepts(n, dim) for dim, n in enumerate(size)):
        y = map_(x)
        assert gap(y, truth(x), formula(absolute(map_))(x.abs())) < EXACT
        assert tuple(y.shape) == (2, map_.geometry.out_channels, *predicted)
        event("an output")
    else:
        with pytest.raises(RuntimeError):
            map_(x)
        event("torch raises")


def test_the_formula_by_hand() -> None:
    """The truth of this page, once, with nothing but numbers."""
    truth = Formula.of(
        torch.tensor([[[1.0, 10.0, 100.0]]], dtype=torch.float64), torch.tensor([0.5]), (2,), ((1, 2),), (2,), 1, 7.0,
        "constant",
    )  # fmt: skip
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64)
    # p = 0 reads x[-1], x[1], x[3]; p = 1 reads x[1], x[3], x[5]
    assert truth(x).flatten().tolist() == [0.5 + 7 + 20 + 400, 0.5 + 2 + 40 + 700]
    reads = {"reflect": (2.0, 2.0), "replicate": (1.0, 4.0), "circular": (4.0, 2.0)}
    for border, (before, after) in reads.items():
        y = replace(truth, border=border)(x).flatten().tolist()
        assert y == [0.5 + before + 20 + 400, 0.5 + 2 + 40 + 100 * after]


@given(st.data())
def test_a_map_is_the_convolution_torch_computes(data: st.DataObject) -> None:
    dims = data.draw(st.integers(0, 3))
    along = [
        (k, s, d, (p, p))
        for k, s, d, p in data.draw(
            st.lists(st.tuples(*[st.integers(1, 3)] * 3, st.integers(0, 2)), min_size=dims, max_size=dims)
        )
    ]
    map_ = data.draw(maps(dims=dims, along=along, border="constant", fill=torch.tensor(0.0)))
    g = map_.geometry
    xs = data.draw(inputs_for([map_]))
    for x in xs:
        if dims:
            conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
            truth = conv(x, map_.kernel, map_.bias, g.stride, tuple(lo for lo, _ in g.pad), g.dilation, g.groups)
        else:
            parts = zip(x.chunk(g.groups, 1), map_.kernel.chunk(g.groups), strict=True)
            truth = torch.cat([F.linear(*part) for part in parts], 1) + map_.bias
        assert gap(map_(x), truth, absolute(map_)(x.abs())) < EXACT


# --- additivity ---------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_sum_is_the_sum_of_the_outputs(data: st.DataObject) -> None:
    f = data.draw(maps())
    g = data.draw(parallel(f, outputs=f.out_channels))
    merged = f + g
    assert merged.geometry == f.geometry + g.geometry == g.geometry + f.geometry
    agree(
        data.draw(inputs_for([f], [g])),
        merged,
        lambda x: formula(f)(x) + formula(g)(x),
        lambda x: absolute(f)(x) + absolute(g)(x),
    )


@given(st.data())
def test_sums_commute_and_associate(data: st.DataObject) -> None:
    f = data.draw(maps())
    g, h = (data.draw(parallel(f, outputs=f.out_channels)) for _ in range(2))
    try:
        left = (f + g) + h
    except Inexact:  # f reads nothing outside, and so did not say what g and h should
        with pytest.raises(Inexact):
            f + (g + h)
        with pytest.raises(Inexact):
            g + h
        event("g and h cannot be added")
        return
    right = f + (g + h)
    assert left.geometry == right.geometry
    assert left.border == right.border
    size = max(1.0, f.magnitude + g.magnitude + h.magnitude)
    assert left.distance(right) <= EXACT * size
    assert (f + g).distance(g + f) <= EXACT * size
    assert sum([f, g, h]).distance(left) == 0


@given(st.data())
def test_zero_negation_subtraction_and_scaling(data: st.DataObject) -> None:
    f = data.draw(maps())
    g = data.draw(parallel(f, outputs=f.out_channels))
    # Below the smallest normal number, times its rounding, relative errors mean nothing.
    number = data.draw(st.floats(1e-200, 100) | st.floats(-100, -1e-200) | st.just(0.0))
    rows = data.draw(numbers(f.out_channels))
    assert f + 0 is f
    assert 0 + f is f
    assert (f - f).magnitude == 0
    assert (f - f + g).distance(g) == 0
    xs = data.draw(inputs_for([f], [g]))
    per_channel = rows.reshape(-1, *[1] * f.geometry.dims)
    size = absolute(f)
    agree(xs, -f, lambda x: -f(x), size)
    agree(xs, 0 - f, lambda x: -f(x), size)
    agree(xs, f - 0, f, size)
    agree(xs, f - g, lambda x: f(x) - g(x), lambda x: size(x) + absolute(g)(x))
    agree(xs, f * number, lambda x: f(x) * number, lambda x: size(x) * abs(number))
    agree(xs, number * f, lambda x: f(x) * number, lambda x: size(x) * abs(number))
    agree(xs, f * rows, lambda x: f(x) * per_channel, lambda x: size(x) * per_channel.abs())
    assert (f * number).geometry == (f * rows).geometry == (-f).geometry == f.geometry
    assert ((f + g) * number).distance(f * number + g * number) <= EXACT * abs(number) * (f.magnitude + g.magnitude)


@given(st.data())
def test_concat_stacks_the_outputs(data: st.DataObject) -> None:
    f = data.draw(maps())
    g, h = (data.draw(parallel(f)) for _ in range(2))
    try:
        merged = concat([f, g, h])
    except Inexact:
        merged, h = concat([f, g]), f
        stacked, parts = (f, g), [f, g]
    else:
        stacked, parts = (f, g, h), [f, g, h]
    frame = stacked[0].geometry
    for part in stacked[1:]:
        frame = frame.concat(part.geometry)
    assert merged.geometry == frame
    agree(
        data.draw(inputs_for(*[[part] for part in parts])),
        merged,
        lambda x: torch.cat([formula(part)(x) for part in parts], 1),
        lambda x: torch.cat([absolute(part)(x) for part in parts], 1),
    )
    assert concat([f]) is f


# --- composition --------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_composite_is_one_map_after_the_other(data: st.DataObject) -> None:
    f = data.draw(feeding())
    g = data.draw(following(f))
    merged = f >> g  # never refused: `following` keeps the border law
    assert merged.geometry == f.geometry >> g.geometry
    xs = data.draw(inputs_for([f, g]))
    agree(xs, merged, chain(formula(f), formula(g)), chain(absolute(f), absolute(g)))
    for x in xs:
        assert merged.geometry.output_size(x.shape[2:]) == tuple(merged(x).shape[2:])
    first = next(k for k in ("diagonal", "pointwise", "pads", "dims") if k == "dims" or getattr(f.geometry, k))
    event(f"{first}{' with bias' * bool(f.bias.any())} >> {g.border + ' pads' if g.geometry.pads else 'no pads'}")


def amplification(*maps: ConvMap) -> float:
    """A bound of the coefficients of a composite, before anything in them cancels."""
    return math.prod(1 + float(m.kernel.abs().flatten(1).sum(1).max() + m.bias.abs().max()) for m in maps)


def has_empty_taps(map_: ConvMap) -> bool:
    """Whether a lattice that holds the taps of two maps has places that neither uses."""
    return bool((map_.kernel.flatten(2).abs().sum((0, 1)) == 0).any())


@given(st.data())
def test_composition_associates(data: st.DataObject) -> None:
    """Where both inner composites exist, both associations do, or neither.

    Drawn without zero coefficients, which may hide a border from one association alone. Where an inner composite is
    refused, one association may still exist: a crop undoes a pad that could not be merged, and a wide pad on the first
    covers what the second alone would leave bare.
    """
    f = data.draw(feeding(zeros=False))
    g = data.draw(following(f, zeros=False))
    fg = f >> g
    h = data.draw(
        following(fg, zeros=False) | following(g, zeros=False) | maps(dims=g.geometry.dims, inputs=g.out_channels)
    )
    try:
        gh = g >> h
    except Inexact:
        event("g >> h refused")
        return
    try:
        left = fg >> h
    except Inexact:
        event("both refused")
        with pytest.raises(Inexact):
            f >> gh
        return
    try:
        right = f >> gh
    except Inexact:
        # f's pads may all be cropped away by g; f's fill is none of fg's business then, but it is f's
        cropped = f.geometry.pads and not any(
            side > 0 and side + s * crop > 0
            for sides, crops, s in zip(f.geometry.pad, g.geometry.pad, f.geometry.stride, strict=True)
            for side, crop in zip(sides, crops, strict=True)
        )
        assert cropped or has_empty_taps(gh)
        event("a cropped pad" if cropped else "empty taps")
        return
    event("both exist" + (", the last pads" if h.geometry.pads else ""))
    assert left.geometry == right.geometry == f.geometry >> (g.geometry >> h.geometry)
    assert left.border == right.border
    assert left.distance(right) <= EXACT * amplification(f, g, h)
    agree(
        data.draw(inputs_for([f, g, h])),
        right,
        chain(formula(f), formula(g), formula(h)),
        chain(absolute(f), absolute(g), absolute(h)),
    )


@given(st.data())
def test_composition_distributes_over_a_sum_before_it(data: st.DataObject) -> None:
    """(f + g) >> h == (f >> h) + (g >> h), for h without a constant and without a fill."""
    f = data.draw(feeding(linear=data.draw(st.booleans()), zeros=False))
    g = data.draw(parallel(f, outputs=f.out_channels, zeros=False))
    if not f.bias.any():
        g = ConvMap.of(g.geometry, g.kernel, like=g)
    h = data.draw(following(f, zeros=False))
    h = ConvMap.of(h.geometry, h.kernel, like=h)
    assume(not h.fill.any())
    try:
        right = (f >> h) + (g >> h)
    except Inexact:
        event("a half refused")
        return
    left = (f + g) >> h
    event("both exist" + (", the last pads" if h.geometry.pads else ""))
    assert left.geometry == right.geometry == (f.geometry + g.geometry) >> h.geometry
    assert left.distance(right) <= EXACT * (amplification(f, h) + amplification(g, h))


@given(st.data())
def test_composition_distributes_over_a_sum_after_it(data: st.DataObject) -> None:
    """f >> (g + h) == (f >> g) + (f >> h), bias, fill and all."""
    f = data.draw(feeding(zeros=False))
    g = data.draw(following(f, zeros=False))
    h = data.draw(parallel(g, outputs=g.out_channels, zeros=False))
    try:
        right = (f >> g) + (f >> h)
    except Inexact:
        event("a half refused")
        if h.geometry.pads and g.geometry.pads:
            with pytest.raises(Inexact):
                f >> (g + h)
        return
    try:
        left = f >> (g + h)
    except Inexact:
        event("empty taps")
        assert has_empty_taps(g + h)
        return
    event("both exist" + (", the last pads" if h.geometry.pads else ""))
    assert left.geometry == right.geometry == f.geometry >> (g.geometry + h.geometry)
    assert left.distance(right) <= EXACT * (amplification(f, g) + amplification(f, h))


@given(st.data())
def test_scaling_passes_through_composition(data: st.DataObject) -> None:
    """(f >> g) * s == f >> (g * s) == f >> g >> scale(s)."""
    f = data.draw(feeding())
    g = data.draw(following(f))
    rows = data.draw(numbers(g.out_channels))
    scale = ConvMap.scale(rows, dims=g.geometry.dims)
    size = EXACT * amplification(f, g, scale)
    for other in (f >> g * rows, (f >> g) >> scale, f >> (g >> scale)):
        assert ((f >> g) * rows).distance(other) <= size


@given(maps())
def test_identity_and_zero(f: ConvMap) -> None:
    g = f.geometry
    before, after = (ConvMap.identity(c, g.dims) for c in (g.in_channels, g.out_channels))
    for same in (before >> f, f >> after, f >> 1, 1 >> f):
        assert same.geometry == g
        assert same.border == f.border
        assert same.distance(f) == 0
    assert f >> 1 is f
    assert 1 >> f is f
    zero = ConvMap.of(g, torch.zeros_like(f.kernel), like=f)
    assert (f + zero).distance(f) == 0
    assert (f * 0).distance(zero) == 0
    assert (f >> after * 0).distance(zero) == 0


# --- the same map, written otherwise ------------------------------------------------------------------------------


@st.composite
def frames(draw: st.DrawFn, map_: ConvMap) -> Geometry:
    """A larger kernel on a finer lattice in fewer groups, around that map."""
    g = map_.geometry
    kernel, dilation, pad = [], [], []
    for (lo, _), reach, d, over in zip(g.pad, g.reach, g.dilation, g.overhang, strict=True):
        step = draw(st.sampled_from([s for s in (1, 2, 3) if d % s == 0 or not reach]))
        before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        kernel.append(reach // step + 1 + before + after)
        dilation.append(step)
        pad.append((lo + before * step, over + reach + after * step - lo))
    groups = draw(st.sampled_from([n for n in range(1, g.groups + 1) if g.groups % n == 0]))
    return replace(g, kernel=tuple(kernel), dilation=tuple(dilation), pad=tuple(pad), groups=groups)


@given(st.data())
def test_a_larger_frame_keeps_the_map(data: st.DataObject) -> None:
    f = data.draw(maps())
    frame = data.draw(frames(f))
    framed, regrouped = f.framed(frame), f.regrouped(frame.groups)
    assert framed.geometry == frame
    assert regrouped.geometry == replace(f.geometry, groups=frame.groups)
    assert framed.distance(f) == f.distance(framed) == regrouped.distance(f) == 0
    assert framed.magnitude == f.magnitude
    agree(data.draw(inputs_for([f], [framed])), framed, formula(f), absolute(f))
    agree(data.draw(inputs_for([f])), regrouped, formula(f), absolute(f))
    if frame != f.geometry:
        with pytest.raises(Incompatible, match="does not hold"):
            framed.framed(f.geometry)


@given(st.data())
def test_distance_is_zero_only_for_the_same_function(data: st.DataObject) -> None:
    f = data.draw(maps())
    g = data.draw(parallel(f, outputs=f.out_channels) | maps(dims=f.geometry.dims, inputs=f.geometry.in_channels))
    assert f.distance(f) == 0
    assert f.distance(g) == g.distance(f)
    if f.distance(g) < math.inf:
        event("comparable")
        assert f.distance(g) == (f - g).magnitude
    else:
        with pytest.raises(Refusal):
            f - g
    kernel, bias = f.kernel.clone(), f.bias.clone()
    where = data.draw(st.sampled_from((kernel, bias)))
    where.view(-1)[data.draw(st.integers(0, where.numel() - 1))] += 0.25
    other = ConvMap.of(f.geometry, kernel, bias, like=f)
    assert other.distance(f) == pytest.approx(0.25)
    # A coefficient always shows on some pixel of some input.
    assert differs(formula(other), [[f]], formula(f), formula(absolute(f)))


# --- every refusal is justified -----------------------------------------------------------------------------------


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


def conservative(f: ConvMap, g: ConvMap) -> str | None:
    """The refusals of f >> g that a closer look could avoid. There are no others but for coefficients that are zero.

    All are of a g that pads with other than a constant, and none is what a network has.
    """
    a, b = formula(f), formula(g)
    anyway = a >> b
    if g.border == "constant":
        return None
    alike = f.border == g.border or not a.pads

    def reason(dim: int) -> str | None:
        (lo1, hi1), (lo2, hi2), s1, reach = a.pad[dim], b.pad[dim], a.stride[dim], f.geometry.reach[dim]
        # A pixel of f is a copy if it is made of nothing but f's fill, or of nothing but one edge pixel.
        wide = {"constant": 1, "replicate": 0}.get(f.border, math.inf) if a.pads else math.inf

        def low(depth: int) -> bool:
            return s1 * depth + reach - lo1 <= -wide

        def high(depth: int) -> bool:
            return hi1 - reach + 1 - s1 - s1 * depth >= wide

        copies = {
            "replicate": (low(0), high(0)),
            "reflect": (low(lo2), high(hi2)),
            "circular": (low(-1) and high(lo2 - 1), high(-1) and low(hi2 - 1)),
        }[g.border]
        if g.border == "circular" and f.border != "constant":
            copies = (False, False)
        # Merged, g's border must not reach farther than torch allows, on any input that f and g accept.
        fits = replace(anyway, border=g.border).accepts(sizes([f, g], dim=dim, count=1)[0], dim)
        near = g.border != "circular" and alike and reach == 0 and fits
        mirrors = (near and lo1 == 0, near and hi1 == 0 and s1 == 1)
        sides = [side for side, wide in enumerate((lo2, hi2)) if wide > 0]
        if alike and not f.geometry.moves[dim]:
            return "pointwise"
        if all(copies[side] or mirrors[side] for side in sides):
            return "copies of a pad" if any(copies[side] for side in sides) else "pointwise on that side"
        if alike and g.border == "circular" and s1 == 1 and a.overhang[dim] == 0 and fits:
            return "a roll"
        return None

    found = [reason(dim) for dim in range(f.geometry.dims) if max(b.pad[dim]) > 0]
    return ", ".join(sorted({str(each) for each in found})) if all(found) else None


@given(st.data())
def test_a_refused_composite_would_show(data: st.DataObject) -> None:
    f = data.draw(feeding(zeros=False) | maps(zeros=False))
    g = data.draw(
        following(f, anywhere=True, zeros=False) | maps(dims=f.geometry.dims, inputs=f.out_channels, zeros=False)
    )
    assume(all(sizes([f, g], dim=dim, count=1) for dim in range(f.geometry.dims)))
    anyway = formula(f) >> formula(g)
    truth, size = chain(formula(f), formula(g)), chain(absolute(f), absolute(g))
    try:
        merged = f >> g
    except Inexact:
        known = conservative(f, g)
        shows = differs(anyway, [[f, g]], truth, size)
        event("justified" if shows else f"conservative: {known}")
        assert shows == (not known)
    else:
        event("merged")
        agree(data.draw(inputs_for([f, g])), merged, truth, size)


@given(st.data())
def test_a_refused_sum_would_show(data: st.DataObject) -> None:
    f = data.draw(maps(zeros=False))
    dims, stride, overhang = f.geometry.dims, f.geometry.stride, f.geometry.overhang
    along = [data.draw(axes(dims, stride=s, overhang=o)) for s, o in zip(stride, overhang, strict=True)]
    if data.draw(st.booleans()):
        along = [data.draw(axes(dims)) for _ in range(dims)]
    g = data.draw(maps(dims=dims, inputs=f.geometry.in_channels, outputs=f.out_channels, along=along, zeros=False))
    one, two = formula(f), formula(g)
    truth: Function = lambda x: one(x) + two(x)  # noqa: E731
    size: Function = lambda x: absolute(f)(x) + absolute(g)(x)  # noqa: E731
    try:
        merged = f + g
    except Incompatible:
        event("sizes differ")
        found = [(one.size(n, dim), two.size(n, dim)) for dim in range(dims) for n in range(1, 60)]
        assert any(a != b for a, b in found if max(a, b) > 0)
        with pytest.raises(Incompatible):
            concat([f, g])
    except Inexact:
        event("borders differ")
        assert differs(one + two, [[f], [g]], truth, size)
        with pytest.raises(Inexact):
            concat([f, g])
    else:
        event("added")
        agree(data.draw(inputs_for([f], [g])), merged, truth, size)


# --- what networks have, by name ----------------------------------------------------------------------------------


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def conv(o: int, i: int, *taps: int, bias: bool = False, **options: Any) -> ConvMap:
    return ConvMap(weights(o, i, *taps), weights(o, seed=1) if bias else None, **options)


def pad(channels: int, *sides: tuple[int, int], **options: Any) -> ConvMap:
    """Nothing but a pad or a crop."""
    return ConvMap(torch.ones(channels, 1, *[1] * len(sides)), pad=sides, groups=channels, **options)


SCALE, SHIFT = weights(4, seed=2), weights(4, seed=3)
WIDE, TALL = ((0, 0), (1, 1)), ((1, 1), (0, 0))
COMPOSITES = {
    "conv, batch norm": (conv(4, 3, 3, 3, pad=1, bias=True), ConvMap.scale(SCALE, SHIFT)),
    "1x1 without a bias, padded 3x3": (conv(4, 3, 1, 1), conv(2, 4, 3, 3, pad=1)),
    "padded 1x1 with a bias, unpadded 3x3": (conv(4, 3, 1, 1, pad=1, bias=True), conv(2, 4, 3, 3)),
    "1x1 with a bias, 3x3 padded with that bias": (
        conv(4, 3, 1, 1, bias=True),
        conv(2, 4, 3, 3, pad=1, fill=weights(4, seed=1)),
    ),
    "1x1 on a fill, 3x3 padded with what it gives": (
        conv(4, 3, 1, 1, pad=1, bias=True, fill=2.0),
        conv(2, 4, 3, 3, pad=1, fill=weights(4, seed=1) + 2 * weights(4, 3).sum(1)),
    ),
    "1x1 with a bias, reflecting 3x3": (conv(4, 3, 1, 1, bias=True), conv(2, 4, 3, 3, pad=1, border="reflect")),
    "batch norm with a shift, circular 3x3": (
        ConvMap.scale(SCALE, SHIFT),
        conv(2, 4, 3, 3, pad=1, border="circular"),
    ),
    "tall then wide": (conv(4, 3, 3, 1, pad=TALL), conv(2, 4, 1, 3, pad=WIDE)),
    "tall then wide, both reflecting": (
        conv(4, 3, 3, 1, pad=TALL, border="reflect", bias=True),
        conv(2, 4, 1, 3, pad=WIDE, border="reflect", bias=True),
    ),
    "tall without a pad, wide with a replicating one": (
        conv(4, 3, 3, 1, bias=True),
        conv(2, 4, 1, 3, pad=WIDE, border="replicate"),
    ),
    "padded 3x3, cropped": (conv(4, 3, 3, 3, pad=2, bias=True), pad(4, (-1, -1), (-1, -2))),
    "circular pad, cropped": (pad(3, (2, 0), (1, 1), border="circular"), pad(3, (0, -1), (-2, 0))),
    "reflecting pad, cropped": (pad(3, (2, 0), (1, 1), border="reflect"), pad(3, (0, -1), (-2, 0))),
    "pad, unpadded 3x3 of stride 2": (pad(3, (1, 2), (0, 1)), conv(2, 3, 3, 3, stride=2, bias=True)),
    "pad of a pad": (pad(3, (1, 2), (0, 1), fill=5.0), conv(2, 3, 3, 3, pad=1, fill=5.0)),
    "average pool, padded 3x3": (
        ConvMap(torch.full((3, 1, 2, 2), 0.25), stride=2, groups=3, pad=((0, 1), (0, 1))),
        conv(4, 3, 3, 3, pad=1),
    ),
    "1x1 of stride 2, padded 3x3": (conv(4, 3, 1, 1, stride=2), conv(2, 4, 3, 3, pad=1)),
    "depthwise with a multiplier, 1x1": (conv(6, 1, 3, 3, groups=3, pad=1, bias=True), conv(4, 6, 1, 1)),
    "1x1, depthwise of 2 groups": (conv(4, 3, 1, 1), conv(4, 2, 3, 3, groups=2, pad=1, dilation=2)),
    "4 groups, 6 groups": (conv(12, 2, 1, 1, groups=4), conv(6, 2, 3, 3, groups=6, pad=1)),
    "scale, then a pad with another constant": (ConvMap.scale(SCALE), conv(2, 4, 3, 3, pad=1, fill=SHIFT)),
    "a pad that a stride steps over": (conv(4, 3, 3, 3), conv(2, 4, 1, 1, stride=3, pad=((3, 0), (3, 0)))),
    "a fill that cancels the bias": (
        ConvMap(weights(4, 3, 1, 1), -0.1 * weights(4, 3).sum(1), pad=1, fill=0.1),
        conv(2, 4, 3, 3, pad=1),
    ),
    "linear, linear": (conv(4, 3, bias=True), conv(2, 4, bias=True)),
    "grouped linear, linear": (conv(4, 3, groups=2, bias=True), conv(2, 4, bias=True)),
    "1d": (conv(4, 3, 3, pad=((2, 1),), bias=True), conv(2, 4, 5, dilation=2, stride=2)),
    "3d": (conv(4, 3, 1, 1, 1), conv(2, 4, 3, 1, 3, pad=((1, 1), (0, 0), (1, 1)))),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_that_networks_have(name: str) -> None:
    f, g = COMPOSITES[name]
    merged = f >> g
    dims = f.geometry.dims
    legal = [sizes([f, g], dim=dim, count=3 if dims == 3 else 6) for dim in range(dims)]
    truth, size = chain(formula(f), formula(g)), chain(absolute(f), absolute(g))
    agree([pixels(2, f.geometry.in_channels, *n) for n in itertools.product(*legal)], merged, truth, size)


REFUSED = {
    "1x1 with a bias, zero-padded 3x3": (
        lambda: conv(4, 3, 1, 1, bias=True) >> conv(2, 4, 3, 3, pad=1),
        Inexact,
        ("4 -> 2, 3x3", "reads 0", "3 -> 4, 1x1", f"gives {float(max(weights(4, seed=1), key=abs)):.6g}", "without"),
    ),
    "batch norm with a shift, zero-padded 3x3": (
        lambda: ConvMap.scale(SCALE, SHIFT) >> conv(2, 4, 3, 3, pad=1), Inexact, ("4 -> 2, 3x3", "4 -> 4, 1x1", "bias"),
    ),
    "padded 3x3 twice": (
        lambda: conv(4, 3, 3, 3, pad=1) >> conv(2, 4, 3, 3, pad=1),
        Inexact, ("4 -> 2, 3x3", "reads 0", "spatial dim 0", "3 -> 4, 3x3", "padding belongs on the first"),
    ),
    "unpadded 1x3, 3x3": (
        lambda: conv(4, 3, 1, 3) >> conv(2, 4, 3, 3, pad=1), Inexact, ("spatial dim 1", "real pixels"),
    ),
    "a pad that a stride does not step over": (
        lambda: conv(4, 3, 3, pad=((1, 2),)) >> conv(2, 4, 3, stride=2, pad=((1, 0),)),
        Inexact, ("spatial dim 0", "real pixels"),
    ),
    "reflecting 3x3 twice": (
        lambda: conv(4, 3, 3, 3, pad=1, border="reflect") >> conv(2, 4, 3, 3, pad=1, border="reflect"),
        Inexact, ("reflect pad", "3 -> 4, 3x3", "spatial dim 0", "padding belongs on the first"),
    ),
    "circular 3x3 twice, which would wrap twice around one pixel": (
        lambda: conv(4, 3, 3, 3, pad=1, border="circular") >> conv(2, 4, 3, 3, pad=1, border="circular"),
        Inexact, ("circular pad", "padding belongs on the first"),
    ),
    "reflecting 3x1, zero-padded 1x3": (
        lambda: conv(4, 3, 3, 1, pad=TALL, border="reflect") >> conv(2, 4, 1, 3, pad=WIDE),
        Inexact, ("reads 0", "reads a reflect border", "pad both alike"),
    ),
    "sum of zero-padded and reflecting": (
        lambda: conv(4, 3, 3, 3, pad=1) + conv(4, 3, 3, 3, pad=1, border="reflect"),
        Inexact, ("0 in channel 0", "a reflect border", "pad both alike"),
    ),
    "sum of two fills": (
        lambda: conv(4, 3, 3, 3, pad=1, fill=torch.tensor([1.0, 2, 3])) + conv(4, 3, 3, 3, pad=1, fill=1.0),
        Inexact, ("3 in channel 2", "1 in channel 2", "pad both alike"),
    ),
    "channels that do not fit": (
        lambda: conv(4, 3, 1, 1) >> conv(4, 3, 1, 1), Incompatible, ("4 output", "3 input", "must be equal"),
    ),
    "a conv before a linear": (
        lambda: conv(4, 3, 1, 1) >> conv(2, 4), Incompatible, ("2 spatial dims", "one of 0", "must be equal"),
    ),
    "sum of other inputs": (
        lambda: conv(4, 3, 1, 1) + conv(4, 2, 1, 1), Incompatible, ("input channels", "3 and 2", "same input"),
    ),
    "sum of other outputs": (
        lambda: conv(4, 3, 1, 1) + conv(2, 3, 1, 1), Incompatible, ("output channels", "4 and 2", "concat"),
    ),
    "sum of other dims": (lambda: conv(4, 3, 1, 1) + conv(4, 3, 1), Incompatible, ("spatial dims", "2 and 1", "same")),
    "sum of other strides": (
        lambda: conv(4, 3, 1, 1, stride=2) + conv(4, 3, 1, 1), Incompatible, ("strides", "(2, 2) and (1, 1)", "same"),
    ),
    "sum of other sizes": (
        lambda: conv(4, 3, 3, 3, pad=1) + conv(4, 3, 3, 3),
        Incompatible, ("overhangs", "(0, 0) and (-2, -2)", "pad so that", "output sizes"),
    ),
    "concat of other sizes": (
        lambda: concat([conv(4, 3, 3, 3, pad=1), conv(2, 3, 1, 1, stride=2)]),
        Incompatible, ("strides", "(1, 1) and (2, 2)", "give both the same"),
    ),
    "fewer groups than there can be": (
        lambda: conv(6, 1, 3, 3, groups=6).regrouped(4), Incompatible, ("6 groups", "as 4", "divisor"),
    ),
    "a frame that is too small": (
        lambda: conv(4, 3, 3, 3, pad=1).framed(Geometry(3, 4, (1, 1))), Incompatible, ("frame", "does not hold", "sum"),
    ),
    "NaN": (
        lambda: ConvMap(torch.tensor([[1.0, math.nan]])), Inexact, ("kernel", "2 -> 1", "nan", "finite", "look for"),
    ),
    "infinite bias": (lambda: ConvMap(weights(1, 2), torch.tensor([-math.inf])), Inexact, ("bias", "-inf", "finite")),
    "infinite fill": (lambda: conv(1, 2, 3, pad=1, fill=math.inf), Inexact, ("fill", "inf", "finite")),
    "outgrown float64": (lambda: (conv(4, 3) * 1e200) >> (conv(2, 4) * 1e200), Inexact, ("kernel", "finite")),
    "complex": (lambda: ConvMap(torch.ones(2, 2, dtype=torch.cfloat)), Unreadable, ("complex64", "real", "stays")),
    "no channels": (lambda: ConvMap(torch.ones(3, 0, 3, 3)), Unreadable, ("(3, 0, 3, 3)", "empty", "nothing to merge")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_what_was_found_both_values_and_the_remedy(name: str) -> None:
    merge, kind, words = REFUSED[name]
    with pytest.raises(kind) as refused:
        merge()
    assert type(refused.value) is kind
    assert [word for word in words if word not in str(refused.value)] == [], str(refused.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ConvMap(torch.ones(3)), "(3,)"),
        (lambda: ConvMap(torch.ones(1, 1, 1, 1, 1, 1)), "0 to 3 spatial dims"),
        (lambda: ConvMap(torch.ones(2, 2, 0)), "start at 1"),
        (lambda: conv(2, 2, 3, stride=0), "start at 1"),
        (lambda: conv(2, 2, 3, dilation=0), "start at 1"),
        (lambda: conv(2, 2, 3, groups=0), "start at 1"),
        (lambda: conv(3, 2, 3, groups=2), "3 channels do not divide into 2 groups"),
        (lambda: conv(2, 2, 3, 3, stride=(1,)), "differ in spatial dims"),
        (lambda: conv(2, 2, 3, 3, dilation=(1, 2, 3)), "differ in spatial dims"),
        (lambda: conv(2, 2, 3, 3, pad=((1, 1),)), "differ in spatial dims"),
        (lambda: ConvMap(torch.ones(2, 2), torch.ones(3)), "a bias of shape (3,) for 2 output channels"),
        (lambda: conv(2, 2, 3, pad=1, fill=torch.ones(3)), "a fill of shape (3,) for 2 input channels"),
        (lambda: conv(2, 2, 3, pad=1, border="zeros"), "'zeros' is none of constant, reflect"),
        (lambda: conv(1, 2, 3) * torch.ones(3), "factors of shape (3,) for 1 output channels"),
        (lambda: conv(3, 2, 3) * torch.ones(3, 1), "factors of shape (3, 1) for 3 output channels"),
        (lambda: concat([]), "at least one map"),
    ],
)
def test_what_is_no_map_is_an_error(make: Callable[[], ConvMap], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


# --- what went wrong once, and what might -------------------------------------------------------------------------


def test_a_circular_pad_wraps_all_of_the_input_not_what_is_left_after_a_crop() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0]]])
    merged = pad(1, (2, 0), border="circular") >> pad(1, (0, -1))
    assert merged(x).flatten().tolist() == [2, 3, 1, 2]


def test_a_crop_of_more_than_the_input_reads_the_pad() -> None:
    assert pad(1, (-3, 4), fill=7.0)(torch.ones(1, 1, 2)).flatten().tolist() == [7, 7, 7]


@pytest.mark.parametrize("fill", [1e300, -1e17, 1e-300])
def test_a_fill_of_any_size_leaves_the_pixels_as_they_are(fill: float) -> None:
    y = pad(1, (1, 0), fill=fill)(torch.tensor([[[1.0, 3.0]]]))
    assert y.flatten().tolist() == [fill, 1.0, 3.0]


def test_the_identity_passes_any_pad() -> None:
    f = conv(2, 3, 3, 3, pad=1, fill=5.0, bias=True)
    assert (ConvMap.identity(3) >> f).distance(f) == 0


def test_a_channel_is_not_hidden_by_a_larger_one() -> None:
    """1e-15 beside 1 is not rounding in a channel that is as small, and that the next map multiplies by 1e15."""
    with pytest.raises(Inexact):
        ConvMap.scale(torch.tensor([1.0, 1e-15]), torch.tensor([1.0, 1e-15])) >> conv(
            1, 2, 3, 3, pad=1, fill=torch.tensor([1.0, 0.0])
        )
    with pytest.raises(Inexact):
        conv(1, 2, 3, pad=1, fill=torch.tensor([1.0, 1e-15])) + conv(1, 2, 3, pad=1, fill=torch.tensor([1.0, 0.0]))


def test_a_bias_that_cancels_is_known_up_to_rounding() -> None:
    """A norm's shift, computed by two routes, is 1e-16 of the mean and not of the little that is left."""
    mean, var, weight = weights(256, seed=4), weights(256, seed=5).abs() + 0.1, weights(256, seed=6)
    shift = mean * weight * var.rsqrt() * (1 + 1e-5)
    by_map = ConvMap.scale(torch.ones(256), -mean) >> ConvMap.scale(weight * var.rsqrt(), shift)
    by_hand = shift - mean * weight / var.sqrt()
    assert float(((by_map.bias - by_hand).abs() / by_hand.abs()).max()) > 1e-13
    pooled = ConvMap(torch.full((256, 1, 3, 3), 1 / 9), groups=256, pad=1, fill=by_hand)
    x = pixels(1, 256, 2, 3)
    agree([x], by_map >> pooled, chain(by_map, pooled), chain(absolute(by_map), absolute(pooled)))


FRAMED = ConvMap.identity(3).framed(Geometry(3, 3, (3, 3), pad=((1, 1), (1, 1)), groups=3))
DEAF = ConvMap(torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 3, 3), pad=1)  # to its second channel
UNNEEDED = {
    "zero taps": (FRAMED, conv(2, 3, 3, 3, pad=1)),
    "a zero map": (FRAMED * 0, conv(2, 3, 3, 3, pad=1)),
    "a channel of no weight": (ConvMap.scale(torch.ones(2), torch.tensor([0.0, 1.0])), DEAF),
    "copies of a replicated pad": (pad(3, (1, 1), border="replicate"), conv(2, 3, 3, pad=1, border="replicate")),
    "copies of a constant pad": (pad(3, (2, 2), fill=2.0), conv(2, 3, 3, pad=1, border="reflect")),
    "pointwise before the first pixel": (conv(3, 3, 1, stride=2), conv(2, 3, 3, pad=((2, 0),), border="reflect")),
    "pointwise after the last pixel": (pad(3, (-1, 0)), conv(2, 3, 3, pad=((0, 2),), border="reflect")),
    "a roll": (pad(3, (1, -1), border="circular"), conv(2, 3, 2, pad=((0, 1),), border="circular")),
    "a roll back": (pad(3, (1, -1), border="circular"), conv(2, 3, 2, pad=((-1, 2),), border="circular")),
}


@pytest.mark.parametrize("name", UNNEEDED)
def test_refusals_that_are_known_not_to_be_needed(name: str) -> None:
    """Legality does not hang on a coefficient that happens to be zero: such taps count. The others are rare, see
    `conservative`. Where one of these is merged, and rightly, it goes from this list to that of `COMPOSITES`."""
    f, g = UNNEEDED[name]
    assert not differs(
        formula(f) >> formula(g), [[f, g]], chain(formula(f), formula(g)), chain(absolute(f), absolute(g))
    )
    with pytest.raises(Inexact):
        f >> g


def test_a_sum_of_borders_that_no_tap_reads_is_refused() -> None:
    """Zeros count as taps here, too."""
    with pytest.raises(Inexact):
        FRAMED + conv(3, 3, 3, 3, pad=1, border="reflect")


def test_a_fill_is_not_solved_for() -> None:
    """Also known: a constant that the first map would turn into what the second reads is found for a scale only."""
    with pytest.raises(Inexact, match="its bias"):
        ConvMap.scale(SCALE, SHIFT) >> conv(2, 4, 3, 3, pad=1)  # -SHIFT / SCALE
    with pytest.raises(Inexact, match="its bias"):
        conv(4, 3, 1, 1) >> conv(2, 4, 3, 3, pad=1, fill=weights(4, 3).sum(1))  # 1
    with pytest.raises(Inexact, match="its bias"):  # nothing that the crop leaves reads the first fill
        pad(3, (1, 0), fill=5.0) >> pad(3, (-1, 1))


def test_a_map_keeps_its_own_coefficients() -> None:
    kernel, bias, fill = torch.ones(2, 3, 3, dtype=torch.float64), torch.ones(2).double(), torch.ones(3).double()
    f = ConvMap(kernel, bias, pad=1, fill=fill)
    for given_ in (kernel, bias, fill):
        given_.fill_(7)
    assert f.magnitude == 1
    assert f.fill.eq(1).all()


def test_parameters_give_a_map_without_gradients() -> None:
    layer = torch.nn.Conv2d(4, 6, 3, groups=2)
    fill = torch.ones(4, requires_grad=True)
    f = ConvMap(layer.weight, layer.bias, groups=2, pad=1, fill=fill)
    scale = torch.ones(6, requires_grad=True)
    for map_ in (f, f * scale, f + f, f >> ConvMap.scale(scale, scale), concat([f, f])):
        assert not any(t.requires_grad for t in (map_.kernel, map_.bias, map_.fill))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
def test_kernels_of_any_dtype_are_read_exactly(dtype: torch.dtype) -> None:
    kernel, bias = (weights(4, 3, 3, 3) * 9).to(dtype), (weights(4) * 9).to(dtype)
    f = ConvMap(kernel, bias, pad=1)
    assert (f.kernel.dtype, f.bias.dtype, f.fill.dtype) == (torch.float64,) * 3
    assert f.kernel.equal(kernel.double())
    assert f(torch.ones(1, 3, 2, 2, dtype=dtype)).dtype == torch.float64


def test_kernels_of_any_strides_are_read() -> None:
    dense = weights(4, 4, 3, 3)
    for kernel in (
        dense.transpose(2, 3),
        dense.transpose(0, 1),
        dense.contiguous(memory_format=torch.channels_last),
        dense[:, :1].expand(4, 4, 3, 3),
        dense.flip(3)[::2, ::2],
    ):
        f, g = ConvMap(kernel, pad=1), ConvMap(kernel.contiguous(), pad=1)
        assert f.distance(g) == 0
        diagonal, dense_1x1 = ConvMap.scale(weights(len(kernel))), conv(5, len(kernel), 1, 1)
        for second in (diagonal, dense_1x1, pad(len(kernel), (0, 0), (-1, 0))):
            assert (f >> second).distance(g >> second) == 0
        assert (f.regrouped(1) * weights(len(kernel))).distance(g * weights(len(kernel))) == 0


@pytest.mark.parametrize("size", [1e-150, 1e-30, 1e30, 1e150])
def test_coefficients_of_any_size_compose_exactly(size: float) -> None:
    f, g = conv(4, 3, 1, 1) * size, conv(2, 4, 3, 3, pad=1)
    assert ((f >> g) * (1 / size)).distance(conv(4, 3, 1, 1) >> g) < EXACT * amplification(g, g)
    assert ((g >> conv(3, 2, 1, 1) * size) * (1 / size)).distance(g >> conv(3, 2, 1, 1)) < EXACT * amplification(g, g)


def test_a_linear_takes_any_leading_dims() -> None:
    f = conv(4, 3, groups=2, bias=True)
    x = pixels(5, 7, 6)
    assert f(x).shape == (5, 7, 4)
    assert gap(f(x)[:, 2], formula(f)(x[:, 2]), formula(absolute(f))(x[:, 2].abs())) < EXACT


def test_far_strides_dilations_and_pads() -> None:
    f = conv(2, 1, 2, stride=50, dilation=97, pad=((120, 30),), bias=True, fill=3.0)
    g = conv(1, 2, 2, stride=3, dilation=5)
    xs = [pixels(2, 1, n) for n in sizes([f, g], dim=0, count=60)]
    agree(xs, f >> g, chain(formula(f), formula(g)), chain(absolute(f), absolute(g)))


def test_one_tap_has_no_dilation() -> None:
    assert conv(2, 3, 1, 3, dilation=5).geometry == conv(2, 3, 1, 3, dilation=(1, 5)).geometry
    assert (conv(2, 3, 1, 3, dilation=(7, 2)) + conv(2, 3, 1, 3, dilation=2)).geometry.dilation == (1, 2)


def test_dilated_branches_stay_dilated() -> None:
    merged = conv(2, 3, 3, 3, dilation=4, pad=4) + conv(2, 3, 3, 3, dilation=2, pad=2) + conv(2, 3, 1, 1)
    assert (merged.geometry.kernel, merged.geometry.dilation) == ((5, 5), (2, 2))


def test_other_operands_are_no_maps() -> None:
    f = conv(2, 3, 1, 1)
    for operation in (
        lambda: f + 1,
        lambda: f + torch.ones(2),
        lambda: f >> 2,
        lambda: f >> torch.relu,
        lambda: 2 >> f,
    ):
        with pytest.raises(TypeError):
            operation()
    assert (torch.tensor(2.0) * f).distance(f * 2) == (torch.ones(2) * f).distance(f) == 0
