"""The border: what is exact, what is made exact by a pad or shift of its own, what may differ if the user allows it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import structrep
from structrep.algebra import ConvMap
from structrep.errors import BadInput, Inexact
from tests.support.models import settled
from tests.support.truth import CLOSE, SAME, relative_error, says

X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def chain(first, second):
    torch.manual_seed(1)
    return settled(nn.Sequential(first, second))


def convs(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("make", [
    lambda: chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 3, padding=1)),  # as many channels: one solution
    lambda: chain(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 6, 3, padding=1)),
    lambda: chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 3, padding="same", dilation=2)),
    lambda: chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, (2, 3), padding=1, stride=2)),
    lambda: settled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4))),
])  # fmt: skip
def test_a_bias_before_a_pad_is_solved_for(make):
    model = make()
    plan = structrep.plan(model)
    deploy = plan.apply()
    assert relative_error(deploy(X), model(X)) < CLOSE
    assert len(convs(deploy)) == 1
    assert "per channel, for the border" in plan.merges[0].border
    plan.prove()
    assert plan.merges
    again = structrep.plan(deploy)
    assert not again.merges


def test_one_constant_for_all_channels_is_a_pad():
    model = chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1))
    model[0].bias.data = -0.5 * model[0].weight.data.sum((1, 2, 3))
    plan = structrep.plan(model)
    assert relative_error(plan.apply()(X), model(X)) < SAME
    assert "with 0.5" in plan.merges[0].border


@pytest.mark.parametrize("make", [
    lambda: chain(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1)),  # more channels than before: no solution
    lambda: chain(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, padding=1)),  # still sees pixels
    lambda: chain(nn.Conv2d(4, 4, 1, padding=1), nn.Conv2d(4, 4, 3, padding=1)),  # pads itself, with 0
])  # fmt: skip
def test_what_no_pad_makes_exact_is_refused(make):
    model = make()
    plan = structrep.plan(model)
    assert not plan.merges
    assert "Inexact" in {refusal.kind for refusal in plan.refusals}
    assert torch.equal(plan.apply()(X), model(X))


def test_a_pad_that_would_cost_precision_is_refused():
    model = chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1))
    weight = model[0].weight.data
    weight[1] = weight[0] * (1 + 1e-6)  # nearly singular: the pad would be in the millions
    plan = structrep.plan(model)
    assert not plan.merges


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, padding=1)


def test_a_convolution_with_a_forward_of_its_own_gets_its_pad_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = OwnForward(4, 4, 3)
            self.register_buffer("mean", torch.randn(1, 4, 1, 1))

        def forward(self, x):
            return self.conv(x - self.mean)

    model = settled(Net())
    deploy = structrep.plan(model).apply()
    assert relative_error(deploy(X), model(X)) < CLOSE


# --- allowed to differ -----------------------------------------------------------------------------------------------


def test_an_inexact_border_is_done_only_where_it_is_allowed_and_says_how_far_it_is_off():
    model = chain(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1))
    assert not structrep.plan(model, inexact_borders=()).merges
    with pytest.raises(BadInput, match="no module named '2'"):
        structrep.plan(model, inexact_borders="2")
    plan = structrep.plan(model, X, inexact_borders=["1"])
    plan.prove()
    (merge,) = plan.merges
    deploy = plan.apply()
    error = (deploy(X) - model(X)).abs().amax((0, 1))
    assert error[1:-1, 1:-1].max() < CLOSE
    off = int((error > 1e-10).sum())
    assert off == 7 * 6 - 5 * 4
    assert f"7x6 pixels {off} of 42 output pixels differ" in merge.border
    assert "inexact" in str(plan)


def test_reparameterize_takes_inexact_borders_by_glob():
    model = chain(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1))
    with_, without = (structrep.reparameterize(model, X, inexact_borders=globs) for globs in ("*", ()))
    assert [len(convs(deploy)) for deploy in (with_, without)] == [1, 2]


def test_an_exact_border_is_preferred_to_an_allowed_one():
    model = chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1))
    plan = structrep.plan(model, inexact_borders="*")
    assert relative_error(plan.apply()(X), model(X)) < CLOSE
    assert "inexact" not in plan.merges[0].border


# --- sizes -----------------------------------------------------------------------------------------------------------


class Added(nn.Module):
    def __init__(self, *branches, stem=None):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.stem = stem or nn.Identity()

    def forward(self, x):
        x = self.stem(x)
        return sum(branch(x) for branch in self.branches)


SIZED = {
    "a pool that drops the last pixel": (
        lambda: Added(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.AvgPool2d(2)), (8, 6), [(10, 12)], [(7, 6), (8, 7)],
    ),
    "behind a stem": (
        lambda: Added(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.AvgPool2d(2), stem=nn.Conv2d(4, 4, 1, bias=False)),
        (8, 12), [(16, 8), (10, 12)], [(11, 12)],
    ),
    "ceil_mode where it is nothing": (
        lambda: Added(nn.Conv2d(4, 4, 2, stride=2), nn.AvgPool2d(2, ceil_mode=True)), (8, 6), [(6, 4)], [(7, 6)],
    ),
    "an adaptive pool": (
        lambda: Added(nn.Conv2d(4, 4, 2, stride=2), nn.AdaptiveAvgPool2d((4, 3))), (8, 6), [], [(6, 6), (16, 12)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZED)
def test_merges_that_hold_for_some_sizes(name):
    make, size, more, others = SIZED[name]
    model = settled(make())
    assert len(convs(structrep.reparameterize(model))) == len(convs(model)), "without example inputs it is refused"
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    plan = structrep.plan(model, x)
    plan.prove()
    deploy = plan.apply()
    assert len(convs(deploy)) == 1
    assert any("holds for inputs of" in merge.sizes for merge in plan.merges)
    for good in (size, *more):
        x = torch.randn(2, 4, *good, dtype=torch.float64)
        assert relative_error(deploy(x), model(x)) < CLOSE
    for bad in others:
        with pytest.raises(ValueError, match="reparameterize with example_inputs of that size"):
            deploy(torch.randn(2, 4, *bad, dtype=torch.float64))
    assert not structrep.plan(deploy, x).merges


def test_branches_of_different_sizes_stay():
    model = settled(Added(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.AvgPool2d(2)))
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    assert structrep.plan(model, x).merges  # 1x1 from both
    broadcast = torch.randn(1, 4, 3, 3, dtype=torch.float64)  # 2x2 and 1x1
    plan = structrep.plan(model, broadcast)
    assert not plan.merges
    assert torch.equal(plan.apply()(broadcast), model(broadcast))


# --- the algebra -----------------------------------------------------------------------------------------------------

sizes = st.integers(1, 3)


@st.composite
def pairs(draw):
    """A map that does not pad, with a bias, and one behind it that pads with a constant, in one to three dims."""
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2]))
    i, m, o = (groups * draw(sizes) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def each(values):
        return tuple(draw(values) for _ in range(dims))

    kernel, stride = each(st.sampled_from([1, 1, 2])), each(st.integers(1, 2))
    first = ConvMap(random(m, i // groups, *kernel), random(m), groups=groups, stride=stride)
    pad = tuple((lo, hi) for lo, hi in zip(each(st.integers(0, 2)), each(st.integers(0, 2)), strict=True))
    second = ConvMap(random(o, m, *each(sizes)), random(o), pad=pad, fill=random(m) * draw(st.sampled_from([0, 1])))
    size = tuple(n + 2 * k * s for n, k, s in zip(each(st.integers(4, 6)), kernel, stride, strict=True))
    return first, second, random(2, i, *size)


@given(pairs())
def test_what_a_pad_makes_exact_is_exact(pair):
    first, second, x = pair
    try:
        padded = first.then(second, "padded")
    except Inexact:
        with pytest.raises(Inexact):
            first >> second
        return
    truth = second(first(x))
    size = second.kernel.abs().sum() * (first.kernel.abs().sum() * (x.abs().max() + padded.fill.abs().max()) + 1)
    assert float((padded(x) - truth).abs().max()) <= SAME * float(size)
    shift = padded.fill.reshape(-1, *[1] * padded.geometry.dims)
    assert float((padded.shifted(padded.fill)(x - shift) - truth).abs().max()) <= SAME * float(size)


@given(pairs())
def test_without_a_border_the_inside_is_exact(pair):
    first, second, x = pair
    merged, truth = first.then(second, "inside")(x), second(first(x))
    inside = [slice(lo, n - hi) for n, (lo, hi) in zip(truth.shape[2:], second.geometry.pad, strict=True)]
    gap = (merged - truth)[(slice(None), slice(None), *inside)]
    assert not gap.numel() or float(gap.abs().max()) <= 1e-11 * float(truth.abs().max())


class BottleBeside(nn.Module):
    """Three branches, one of which is no single convolution at the border."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.b = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1))
        self.c = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.a(x) + self.b(x) + self.c(x)


def test_a_border_that_may_differ_may_do_so_in_a_sum():
    model = settled(BottleBeside())
    plan = structrep.plan(model, inexact_borders="b.1")
    assert len(plan.merges) == 1
    assert plan.inexact
    deploy = plan.reparameterize()
    structrep.assert_merged(deploy)
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    assert relative_error(deploy(x)[..., 1:-1, 1:-1], model(x)[..., 1:-1, 1:-1]) < CLOSE


def test_a_bias_before_a_transposed_convolution_is_no_border():
    model = settled(nn.Sequential(nn.Conv2d(4, 8, 1), nn.ConvTranspose2d(8, 4, 4, 2, 1)))
    says(structrep.plan(model, inexact_borders="*"), 0, "Inexact")
