"""Transposed convolutions: the adjoint of maps, what they are one map with, and how they are read and written."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import structrep
from structrep.algebra import ConvMap, concat, swapped
from structrep.errors import Incompatible, Inexact, Unreadable
from structrep.read.lower import lower
from structrep.read.modules import read_module
from tests.support.models import Branches, bn, noise, settled
from tests.support.truth import EXACT, check, relative_error


def numbers(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@st.composite
def transposed(draw, *, along=None, inputs=None, outputs=None, bias=None):
    """A transposed map; `along` gives (stride, overhang) per dim."""
    dims = draw(st.integers(1, 2)) if along is None else len(along)
    taps = tuple(draw(st.integers(1, 4)) for _ in range(dims))
    strides = tuple(draw(st.integers(1, 3)) for _ in range(dims)) if along is None else tuple(s for s, _ in along)
    steps = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    pads = []
    for dim, (k, d) in enumerate(zip(taps, steps, strict=True)):
        lo = draw(st.integers(-2, 3))
        reach = (d if k > 1 else 1) * (k - 1)
        pads.append((lo, draw(st.integers(-2, 3)) if along is None else along[dim][1] + reach - lo))
    inputs = draw(st.integers(1, 4)) if inputs is None else inputs
    groups = draw(st.sampled_from([g for g in range(1, inputs + 1) if not inputs % g and not (outputs or 0) % g]))
    outputs = outputs or groups * draw(st.integers(1, 2))
    seed = draw(st.integers(0, 2**16))
    return ConvMap(
        numbers(outputs, inputs // groups, *taps, seed=seed),
        numbers(outputs, seed=seed + 1) if draw(st.booleans()) and bias is None else bias,
        stride=strides,
        dilation=steps,
        pad=pads,
        groups=groups,
        transposed=True,
    )


@st.composite
def pointwise(draw, inputs, outputs, dims, *, bias=True):
    seed = draw(st.integers(0, 2**16))
    if inputs == outputs and draw(st.booleans()):
        return ConvMap.scale(numbers(inputs, seed=seed), numbers(inputs, seed=seed + 1) if bias else None, dims=dims)
    kernel = numbers(outputs, inputs, *[1] * dims, seed=seed)
    return ConvMap(kernel, numbers(outputs, seed=seed + 1) if bias else None)


def pixels(*maps):
    """An input that all of some parallel maps take."""
    g = maps[0].geometry
    sizes = [max(1, math.ceil(max(0, o) / s) + 1) for o, s in zip(g.overhang, g.stride, strict=True)]
    return numbers(2, g.in_channels, *(n + index for index, n in enumerate(sizes)))


@given(transposed())
def test_it_is_the_adjoint_of_the_convolution_with_its_kernel(map_):
    """<T x, y> = <x, C y>, where C reads zeros outside."""
    g, x = map_.geometry, pixels(map_)
    y = map_(x) - map_.bias.reshape(-1, *[1] * g.dims)
    assert tuple(y.shape[2:]) == g.output_size(x.shape[2:])
    pad = [(lo, hi) for lo, hi in g.pad]
    conv = ConvMap(swapped(map_.kernel, g.groups), stride=g.stride, dilation=g.dilation, pad=pad, groups=g.groups)
    w = numbers(*y.shape, seed=7)
    left, right = (y * w).sum(), (x * conv(w)[(..., *(slice(n) for n in x.shape[2:]))]).sum()
    assert abs(left - right) <= 1e-10 * (1 + y.abs().sum() * w.abs().max())


@given(st.data())
def test_sums_and_stacks(data):
    f = data.draw(transposed())
    g = f.geometry
    along = list(zip(g.stride, g.overhang, strict=True))
    h = data.draw(transposed(along=along, inputs=g.in_channels, outputs=g.out_channels))
    x = pixels(f)
    assert relative_error((f + h)(x), f(x) + h(x)) <= EXACT
    assert relative_error((f - h)(x), f(x) - h(x)) <= EXACT
    assert relative_error(concat([f, h])(x), torch.cat([f(x), h(x)], 1)) <= EXACT
    assert relative_error((f * 3.0)(x), 3 * f(x)) <= EXACT
    assert (f + h).distance(h + f) == 0


@given(st.data())
def test_what_is_pointwise_goes_into_it_from_either_side(data):
    f = data.draw(transposed())
    g, x = f.geometry, pixels(f)
    after = data.draw(pointwise(g.out_channels, data.draw(st.integers(1, 3)), g.dims))
    assert relative_error((f >> after)(x), after(f(x))) <= EXACT
    before = data.draw(pointwise(g.in_channels, g.in_channels, g.dims, bias=False))
    assert relative_error((before >> f)(x), f(before(x))) <= EXACT
    biased = before + ConvMap(torch.zeros_like(before.kernel), numbers(g.in_channels), groups=before.geometry.groups)
    with pytest.raises(Inexact, match="near the border"):
        biased >> f


@given(transposed())
def test_it_is_written_as_a_layer_or_refused(map_):
    g, x = map_.geometry, pixels(map_)
    fits = all(lo >= 0 and 0 <= lo - hi < max(s, d) for (lo, hi), s, d in zip(g.pad, g.stride, g.dilation, strict=True))
    if not fits:
        with pytest.raises(Unreadable):
            lower(map_, map_.kernel)
        return
    layer = lower(map_, map_.kernel)
    assert type(layer).__name__ == f"ConvTranspose{g.dims}d"
    assert relative_error(layer(x), map_(x)) <= EXACT


@given(
    dims=st.integers(1, 3), k=st.integers(1, 4), s=st.integers(1, 3), p=st.integers(0, 2), d=st.integers(1, 2),
    more=st.integers(0, 2), groups=st.sampled_from([1, 2]),
)  # fmt: skip
def test_torchs_layers_are_read(dims, k, s, p, d, more, groups):
    make = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    layer = make(4, 6, k, s, p, min(more, max(s, d) - 1), groups, dilation=d).double()
    x = numbers(1, 4, *(5 + n for n in range(dims)))
    try:
        truth = layer(x)
    except RuntimeError:
        return  # no output of that size
    map_ = read_module(layer).load(4, dims)
    assert map_.geometry.transposed == (s > 1)
    assert relative_error(map_(x), truth) <= EXACT


def test_chains_of_two_are_no_one_map():
    up = ConvMap(numbers(4, 4, 2, 2), stride=2, transposed=True)
    wide = ConvMap(numbers(4, 4, 3, 3), pad=1)
    for one, two in ((up, wide), (wide, up), (up, up)):
        with pytest.raises(Incompatible, match="pointwise"):
            one >> two
    with pytest.raises(Incompatible, match="transposed or not"):
        up + ConvMap(numbers(4, 4, 2, 2), stride=2)
    assert replace(up.geometry, transposed=False) != up.geometry


class Up(nn.Module):
    """A decoder as in segmentation: 1x1, transposed, norm; a functional one; two added."""

    def __init__(self):
        super().__init__()
        self.narrow = nn.Conv2d(6, 4, 1, bias=False)
        self.up, self.norm = nn.ConvTranspose2d(4, 5, 3, 2, 1, 1, bias=False), nn.BatchNorm2d(5)
        self.weight = nn.Parameter(torch.randn(5, 3, 2, 2))
        self.scale = nn.Parameter(torch.randn(3, 1, 1))
        self.four, self.two = nn.ConvTranspose2d(3, 4, 4, 2, 1), nn.ConvTranspose2d(3, 4, 2, 2)

    def forward(self, x):
        x = self.norm(self.up(self.narrow(x))).relu()
        x = (F.conv_transpose2d(x, self.weight, stride=2) * self.scale).relu()
        return self.four(x) + self.two(x)


def test_a_decoder_merges():
    model, x = settled(Up()), numbers(2, 6, 5, 4)
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(x), model(x)) <= EXACT
    assert isinstance(deploy.norm, nn.Identity)
    assert deploy.four is None
    assert deploy.two is None
    kinds = [type(m).__name__ for m in deploy.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    assert kinds.count("ConvTranspose2d") == 3
    half = structrep.reparameterize(model.float())
    assert all(p.dtype == torch.float32 for p in half.parameters())


def test_a_stride_of_one_is_a_convolution():
    model = settled(Branches(nn.ConvTranspose2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    deploy, x = structrep.reparameterize(model), numbers(2, 4, 5, 6)
    assert relative_error(deploy(x), model(x)) <= EXACT
    assert [type(m) for m in deploy.modules() if isinstance(m, nn.modules.conv._ConvNd)] == [nn.Conv2d]


def test_a_norm_before_it_stays():
    """Its shift would be in other numbers near the border."""
    model = settled(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 3, 2, 1)))
    deploy, x = structrep.reparameterize(model), numbers(2, 4, 5, 6)
    assert relative_error(deploy(x), model(x)) <= EXACT
    assert isinstance(deploy[1], nn.BatchNorm2d)
    assert "Inexact" in {refusal.kind for refusal in structrep.plan(model).refusals}


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_a_transposed_convolution_of_stride_1_and_a_norm(padding):
    """It is an ordinary one, and becomes one."""
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, padding=padding), bn(4), nn.ReLU())
    deploy = check(model, noise(2, 4, 6, 7), merges=1)
    assert isinstance(deploy[1], nn.Identity)
