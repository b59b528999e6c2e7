"""A merge that begins inside a call and ends behind it holds for what that call gives on the path that was traced: what
it may give instead gets what stood behind too, or an error says so."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, followed_or_told, relative_error

X = torch.randn(2, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.flag = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), False

    def run(self, x):
        return F.conv2d(x, self.a.weight, self.a.bias, padding=1)


class Behind(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.n, self.c = inner, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.c(torch.relu(self.n(self.inner(x))))


class Before(Behind):
    def forward(self, x):
        return self.inner(self.n(x))


def early(self, x):
    if self.flag:
        return self.b(x)
    return self.a(x)


def late(self, x):
    if not self.flag:
        return self.a(x)
    return self.b(x)


def either(self, x):
    return self.b(x) if self.flag else self.a(x)


def named(self, x):
    if self.flag:  # noqa: SIM108
        y = self.b(x)
    else:
        y = self.a(x)
    return y


def functional(self, x):
    if self.flag:
        return F.conv2d(x, self.b.weight, self.b.bias)
    return F.conv2d(x, self.a.weight, self.a.bias, padding=1)


def nested(self, x):
    with torch.no_grad():
        try:
            if self.flag:
                return self.b(x)
        finally:
            x = x + 0
    return self.a(x)


def twice(self, x):
    if self.flag:
        return self.run(x) * 2
    return self.run(x)


def exchanged(self, x):
    y = self.a(x)
    if self.flag:
        y, x = self.b(x), y
    return y


BY_FLAG = (early, late, either, named, functional, nested, twice, exchanged)


@pytest.mark.parametrize("around", [Behind, Before])
@pytest.mark.parametrize("forward", BY_FLAG)
def test_a_flag(forward, around):
    for example in ((), (X,)):
        torch.manual_seed(0)
        model = settled(around(type("Ways", (Inner,), {"forward": forward})()))
        deploy = structrep.plan(model, *example).apply()
        assert relative_error(deploy(X), model(X)) < EXACT
        for one in (model, deploy):
            one.inner.flag = True
        assert followed_or_told(model, deploy, X)


def test_the_path_that_is_taken_merges():
    torch.manual_seed(0)
    for forward in (early, late, functional):
        model = settled(Behind(type("Ways", (Inner,), {"forward": forward})()))
        plan = structrep.plan(model, X)
        assert len(plan.merges) == 1, forward
        assert not any(merge.edit == "rewrite" for merge in plan.merges)


def odd(self, x):
    if x.shape[2] % 2 == 0:
        return self.b(x)
    return self.a(x)


def odd_or_even(self, x):
    return self.a(x) if x.shape[2] % 2 else self.b(x)


def odd_twice(self, x):
    if x.shape[2] % 2:
        return self.run(x)
    return self.run(x) * 2


def odd_by_name(self, x):
    if x.shape[2] % 2:  # noqa: SIM108
        y = self.run(x)
    else:
        y = self.b(x)
    return y


@pytest.mark.parametrize("around", [Behind, Before])
@pytest.mark.parametrize("forward", [odd, odd_or_even, odd_twice, odd_by_name])
def test_the_size_of_the_input(forward, around):
    for example in ((), (X,)):
        torch.manual_seed(0)
        model = settled(around(type("Ways", (Inner,), {"forward": forward})()))
        deploy = structrep.plan(model, *example).apply()
        for size in (9, 8):
            x = X[..., :size, :size]
            assert relative_error(deploy(x), model(x)) < EXACT


class Scaled(nn.Conv2d):
    def forward(self, x):
        y = F.conv2d(x, self.weight, self.bias, padding=1)
        return y if x.shape[2] % 2 else y * 3


class Padded(nn.Conv2d):
    def forward(self, x):
        if x.shape[2] % 2:
            return F.conv2d(F.pad(x, [1] * 4), self.weight, self.bias)
        return F.conv2d(x, self.weight, self.bias, padding=1)[..., 1:, 1:]


class Doubled(nn.Conv2d):
    def forward(self, x):
        if x.shape[2] % 2 == 0:
            x = x * 2
        return F.conv2d(x, self.weight, self.bias, padding=1)


@pytest.mark.parametrize("around", [Behind, Before])
@pytest.mark.parametrize("layer", [Scaled, Padded, Doubled])
def test_a_layer_of_its_own(layer, around):
    """A layer whose forward asks what it is given is no plain one."""
    for example in ((), (X,)):
        torch.manual_seed(0)
        model = settled(around(layer(4, 4, 3)))
        deploy = structrep.plan(model, *example).apply()
        for size in (9, 8):
            x = X[..., :size, :size]
            assert relative_error(deploy(x), model(x)) < EXACT


class Called(nn.Module):
    """A convolution by methods, with a norm outside of them."""

    def __init__(self):
        super().__init__()
        self.inner, self.n = Inner(), nn.BatchNorm2d(4)
        self.a, self.b, self.flag = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), False

    def one(self, x):
        return self.two(x)

    def two(self, x):
        return self.a(x) + self.b(x)

    def other(self, x):
        return torch.relu(self.two(x))


def once_more(self, x):
    if self.flag:
        x = torch.relu(self.one(x))
    return self.n(self.one(x))


def from_within(self, x):
    if self.flag:
        x = torch.relu(self.two(x))
    return self.n(self.one(x))


def by_way_of_another(self, x):
    if self.flag:
        x = self.other(x)
    return self.n(self.one(x))


def of_a_part(self, x):
    if self.flag:
        x = torch.relu(self.inner.run(x))
    return self.n(self.inner.run(x))


def by_a_name(self, x):
    run = self.inner.run
    if self.flag:
        x = torch.relu(run(x))
    return self.n(run(x))


def in_rounds(self, x):
    for _ in range(1 + int(self.flag)):
        x = self.inner.run(x)
    return self.n(x)


@pytest.mark.parametrize("forward", [once_more, from_within, by_way_of_another, of_a_part, by_a_name, in_rounds])
def test_a_method_that_is_called_from_another_path(forward):
    for example in ((), (X,)):
        torch.manual_seed(0)
        model = settled(type("Calls", (Called,), {"forward": forward})())
        deploy = structrep.plan(model, *example).apply()
        assert relative_error(deploy(X), model(X)) < EXACT
        for one in (model, deploy):
            one.flag = True
        assert followed_or_told(model, deploy, X)
