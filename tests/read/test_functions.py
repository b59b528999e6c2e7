"""Functions of torch, and operators: those that are affine maps, read as such, and those that only look so."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import bn, conv, made, noise, settled
from tests.support.truth import CLOSE, check, relative_error

X = noise(2, 4, 6, 7)


def third(self, x):
    return (self.a(x) * 0.3 + 0.1 - self.b(x) / 3).relu()


def stacked(self, x):
    return torch.stack([self.a(x), self.b(x)]).sum(0)


def sizes(self, x):
    return F.avg_pool2d(self.a(x) + self.b(x), x.shape[2:])


def out_argument(self, x):
    a = torch.empty_like(x)
    torch.add(self.a(x), self.b(x), out=a)
    return a


def from_zeros(self, x):
    total = torch.zeros_like(x)
    total = total + self.a(x)
    return total + self.b(x)


def from_zeros_in_place(self, x):
    total = torch.zeros_like(x)
    for branch in (self.a, self.b):
        total += branch(x)
    return total


def zeros_read_again(self, x):
    zeros = torch.zeros_like(x)
    return (zeros + self.a(x)) * 2 + self.b(x) * (zeros + 1)


FORWARDS = {
    third: 1,  # by numbers that float32 cannot hold
    stacked: 1,
    sizes: 1,
    out_argument: 0,
    from_zeros: 1,
    from_zeros_in_place: 1,
    zeros_read_again: 0,
}


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_sums(forward):
    check(made(forward), X, merges=FORWARDS[forward])


class Spreads(nn.Module):
    """One channel, scaled by a number for each of two: what a scale per channel looks like, and is not."""

    def __init__(self):
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.randn(2, 1, 1)), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.conv(x[:, :1] * self.scale)


def test_a_scale_that_spreads_one_channel_over_several():
    check(Spreads(), noise(2, 2, 3, 3), merges=0, refused="Incompatible", within=0.0)


@pytest.mark.parametrize(("slope", "merges", "convs"), [(1.0, 1, 1), (0.5, 1, 2)])
def test_a_leaky_curve_of_slope_1_is_none(slope, merges, convs):
    model = nn.Sequential(conv(k=1), bn(4), nn.LeakyReLU(slope), conv(k=1))
    check(model, noise(1, 4, 3, 3), merges=merges, within=CLOSE, conv=convs)


@pytest.mark.parametrize(("slope", "convs"), [(1.0, 1), (0.5, 2)])
def test_a_learned_slope_of_1_is_none(slope, convs):
    model = settled(nn.Sequential(conv(k=1), bn(4), nn.PReLU(4, slope), conv(k=1)))
    deploy = structrep.reparameterize(model, X)
    assert sum(isinstance(one, nn.Conv2d) for one in deploy.modules()) == convs
    assert relative_error(deploy(X), model(X)) < CLOSE


class Rows(nn.Module):
    """A matrix and a bias that are no layer, and the norm or Linear behind."""

    def __init__(self, product, behind):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(16, 5)), nn.Parameter(torch.randn(5))
        self.product, self.behind = product, behind

    def forward(self, x):
        return self.behind(self.product(self, x))


@pytest.mark.parametrize("product", [
    lambda m, x: torch.mm(x, m.w),
    lambda m, x: x.mm(m.w) + m.b,
    lambda m, x: torch.addmm(m.b, x, m.w),
    lambda m, x: m.b.addmm(x, m.w),
    lambda m, x: torch.tensordot(x, m.w, dims=1),
    lambda m, x: torch.tensordot(x, m.w, ([-1], [0])),
])  # fmt: skip
def test_products_with_a_matrix(product):
    check(Rows(product, nn.BatchNorm1d(5)), noise(3, 16), merges=1, within=CLOSE, ways=("with an example",))
    check(Rows(product, nn.Linear(5, 3)), noise(3, 16), merges=1, within=CLOSE)


@pytest.mark.parametrize("product", [
    lambda m, x: torch.addmm(m.b, x, m.w, alpha=2),
    lambda m, x: torch.addmm(x[:, :5], x, m.w),
    lambda m, x: torch.mm(x[:, :5], m.w.T),
    lambda m, x: torch.tensordot(x, m.w, ([0], [0])),
    lambda m, x: torch.mm(m.w.T, x.T),
])  # fmt: skip
def test_products_that_are_none(product):
    """Scaled, with a bias of the input's, or along another dim: what is not read stays, and is right."""
    for behind in (nn.Identity(), nn.ReLU()):
        check(Rows(product, behind), noise(16, 16), merges=0, within=0.0)


class Spread(nn.Module):
    def __init__(self, how, *shape):
        super().__init__()
        self.c, self.n, self.p = conv(), bn(4), nn.Parameter(torch.rand(shape) + 0.5)
        self.how = how

    def forward(self, x):
        return self.n(self.how(self.p, self.c(x)))


@pytest.mark.parametrize("how", [
    lambda p, x: p.expand_as(x) + x,
    lambda p, x: x - p.expand_as(x),
    lambda p, x: x * p.expand_as(x),
    lambda p, x: p.expand(x.shape) + x,
    lambda p, x: torch.broadcast_to(p, x.size()) * x,
    lambda p, x: x.mul(p.expand(x.size())),
])  # fmt: skip
def test_a_constant_that_is_repeated_to_the_shape_of_a_value(how):
    check(Spread(how, 1, 4, 1, 1), X, merges=1, within=CLOSE, conv=1, norm=0)
    check(Spread(how, 4, 1, 1), X, merges=1, within=CLOSE, conv=1, norm=0)


@pytest.mark.parametrize("how", [
    lambda p, x: p.expand_as(x) + x[:1],  # of another batch
    lambda p, x: p.expand(x.shape[0], 4, x.shape[2], x.shape[3]) * x.mean((2, 3), keepdim=True),
    lambda p, x: p.expand_as(x) + p.expand_as(x) * 0 + x.sin(),
])  # fmt: skip
def test_a_constant_of_another_shape_stays(how):
    check(Spread(how, 1, 4, 1, 1), X, merges=0, refused="Isolated", within=0.0)
