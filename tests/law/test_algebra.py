"""The laws of the algebra, for maps of every geometry, against the formula that `structrep.algebra` opens with.

The truth here is `Formula`, which has no convolution in it, and says of a refused merge what would have come out of it:
a refusal must show on some input.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, event, given
from hypothesis import strategies as st

from structrep.algebra import ConvMap, Geometry, concat
from structrep.errors import Incompatible, Inexact, Refusal
from tests.support.maps import (
    EXACT,
    Formula,
    Function,
    absolute,
    agree,
    amplification,
    arguments,
    axes,
    chain,
    differs,
    feeding,
    following,
    formula,
    gap,
    inputs_for,
    maps,
    numbers,
    parallel,
    pixels,
    sizes,
)

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
