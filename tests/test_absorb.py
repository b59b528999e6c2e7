"""Norms that several layers take between them: all do, or none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.models import relative_error, settled

X = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def norms(model):
    return sum(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules())


class Attention(nn.Module):
    """Queries, keys and values of one norm, whose input goes on as a skip."""

    def __init__(self, **value):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout()
        self.q, self.k = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
        self.v = nn.Conv2d(4, 4, **{"kernel_size": 1, **value})

    def forward(self, x):
        y = self.drop(self.norm(x))
        n, c, h, w = y.shape
        weights = (self.q(y) * self.k(y)).mean(1, keepdim=True).sigmoid()
        return x + (weights * self.v(y)).reshape(n, -1, h, w)[:, :c]


class Mixed(nn.Module):
    """As MixNet: kernels of several sizes on shares of the channels, one norm behind them all."""

    def __init__(self, norm=None):
        super().__init__()
        self.three, self.five = nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Conv2d(3, 5, 5, padding=2)
        self.norm = norm or nn.BatchNorm2d(7)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        a, b = x.split([1, 3], 1)
        return self.act(self.norm(torch.cat([self.three(a), self.five(b)], 1)))


class Functional(nn.Module):
    """The same, written out; a norm of their own on one branch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 3, 3))
        self.conv, self.own, self.norm = nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(5)

    def forward(self, x):
        y = torch.cat([F.conv2d(x.relu(), self.weight, padding=1), self.own(self.conv(x.sigmoid()))], dim=1)
        n = self.norm
        return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)


class TwiceCalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Attention()

    def forward(self, x):
        return self.inner(self.inner(x) * 2)


@pytest.mark.parametrize("make", [Attention, Mixed, Functional, TwiceCalled, lambda: nn.Sequential(Mixed(), nn.ReLU())])
@pytest.mark.parametrize("inplace", [False, True])
def test_all_take_their_part(make, inplace):
    model = settled(make())
    truth = model(X.clone())
    deploy = structrep.reparameterize(model, inplace=inplace)
    assert relative_error(deploy(X.clone()), truth) < 1e-12
    assert norms(deploy) == 0 or make is Functional
    if make is Functional:
        assert deploy.norm is None
    plan = structrep.plan(deploy)
    assert not plan.merges


def refusals(model):
    return {refusal.kind for refusal in structrep.plan(model).refusals}


def stays(model, norm="norm", x=X):
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(x.clone()), model(x.clone())) < 1e-12
    assert isinstance(deploy.get_submodule(norm), nn.BatchNorm2d)
    return deploy


def test_none_does_where_one_is_padded():
    model = settled(Attention(kernel_size=3, padding=1))
    deploy = stays(model)
    assert refusals(model) == {"Inexact"}
    assert torch.equal(deploy.q.weight, model.q.weight)


def test_none_does_where_one_is_hooked():
    model = settled(Attention())
    seen = []
    model.k.register_forward_hook(lambda module, args, output: seen.append(args))
    stays(model)
    mixed = settled(Mixed())
    mixed.five.register_forward_hook(lambda module, args, output: seen.append(args))
    stays(mixed)


def test_none_does_where_one_is_used_elsewhere():
    class Elsewhere(Attention):
        def forward(self, x):
            return super().forward(x) + self.k(x)

    stays(settled(Elsewhere()))

    class Seen(Mixed):
        def forward(self, x):
            a, b = x.split([1, 3], 1)
            y = self.three(a)
            return self.norm(torch.cat([y, self.five(b)], 1)) * y.mean()

    stays(settled(Seen()))


def test_none_does_where_what_is_normed_is_overwritten():
    class Overwrites(Attention):
        def forward(self, x):
            x = x * 1.5
            y = self.norm(x)
            q = self.q(y)
            x += 1
            return q * self.k(y) + x

    model = settled(Overwrites())
    stays(model)
    assert "Mutated" in refusals(model)


def test_none_does_where_the_code_of_one_cannot_be_written():
    """The value of one is read in a forward that also changes itself."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.calls = nn.Parameter(torch.randn(4, 4, 1, 1)), 0

        def forward(self, x):
            self.calls += 1
            return F.conv2d(x, self.weight)

    class Counted(Attention):
        def __init__(self):
            super().__init__()
            self.v = Counting()

    model = settled(Counted())
    deploy = stays(model)
    assert torch.equal(deploy.q.weight, model.q.weight)


def test_one_layer_may_take_parts_of_two():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(5)
            self.a, self.b, self.c = nn.Conv2d(4, 3, 3), nn.Conv2d(4, 2, 3), nn.Conv2d(4, 1, 1)

        def forward(self, x):
            y = self.first(x.relu())
            return self.second(torch.cat([self.a(y), self.b(y)], 1)).relu(), self.c(y)

    model = settled(Chain())
    deploy = structrep.reparameterize(model)
    for mine, truth in zip(deploy(X), model(X), strict=True):
        assert relative_error(mine, truth) < 1e-12
    assert norms(deploy) == 0
