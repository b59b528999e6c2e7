"""What decides which parts run beside plain conditions: what picks within a loop, names outside that it goes through,
decorators, contexts that swallow what is raised, attributes that a method sets itself."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, followed_or_told, relative_error

X = torch.randn(2, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ORDER, ROUNDS = ["c", "n"], 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n, self.m = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.layers = nn.ModuleList([self.c, self.n])
        self.mask, self.current = [True, True], self.n


def expression(self, x):
    for layer, keep in zip(self.layers, self.mask, strict=True):
        x = layer(x) if keep else x
    return x


def afterwards(self, x):
    for i, layer in enumerate(self.layers):
        y = layer(x)
        x = y if self.mask[i] else x
    return x


def matched(self, x):
    for i, layer in enumerate(self.layers):
        match self.mask[i]:
            case True:
                x = layer(x)
    return x


def tried(self, x):
    for i, layer in enumerate(self.layers):
        try:
            x = layer(x) if self.mask[i] else x
        finally:
            pass
    return x


def by_names(self, x):
    for name in ORDER:
        x = getattr(self, name)(x)
    return x


def by_count(self, x):
    for i in range(ROUNDS):
        x = self.layers[i](x)
    return x


@pytest.mark.parametrize("forward", [expression, afterwards, matched, tried, by_names, by_count])
def test_rounds_that_are_left_out_later(forward, monkeypatch):
    for example in ((), (X,)):
        torch.manual_seed(0)
        model = settled(type("Rounds", (Net,), {"forward": forward})())
        deploy = structrep.plan(model, *example).apply()
        assert relative_error(deploy(X), model(X)) < EXACT
        for one in (model, deploy):
            one.mask = [True, False]
        with monkeypatch.context() as later:
            later.setitem(forward.__globals__, "ORDER", ["c"])
            later.setitem(forward.__globals__, "ROUNDS", 1)
            assert followed_or_told(model, deploy, X)


def otherwise(function):
    @functools.wraps(function)
    def run(self, x):
        y = function(self, x)
        return F.relu(y) if x.shape[-1] < 9 else y

    return run


def handing_on(function):
    @functools.wraps(function)
    def run(self, x):
        if torch.is_grad_enabled():
            return function(self, x)
        return function(self, x)

    return run


class Decorated(Net):
    @otherwise
    def inner(self, x):
        return self.c(x)

    def forward(self, x):
        return self.n(self.inner(x))


class DecoratedAlike(Net):
    @handing_on
    def inner(self, x):
        return self.c(x)

    def forward(self, x):
        return self.n(self.inner(x))


class Swallowed(Net):
    def forward(self, x):
        y = self.c(x)
        with contextlib.suppress(IndexError):
            if x.shape[-1] < 9:
                raise IndexError
            y = self.n(y)
        return y


class SetsItself(Net):
    def forward(self, x):
        if x.shape[-1] < 9:
            self.current = self.m
        return self.current(self.c(x))


class OfRounds(Net):
    def forward(self, x):
        small = x.shape[-1] < 9
        for i, layer in enumerate(self.layers):
            x = x if small and i else layer(x)
        return x


@pytest.mark.parametrize("net", [Decorated, DecoratedAlike, Swallowed, SetsItself, OfRounds])
def test_a_smaller_input(net):
    for example in ((), (X,)):
        torch.manual_seed(0)
        model = settled(net())
        plan = structrep.plan(model, *example)
        assert len(plan.merges) == (net is DecoratedAlike)
        deploy = plan.apply()
        for size in (9, 7):
            x = X[..., :size, :size]
            assert relative_error(deploy(x), model(x)) < EXACT


class AsksHowItRuns(nn.Conv2d):
    def forward(self, x):
        y = F.conv2d(x, self.weight, self.bias)
        return y * 2 if torch.is_grad_enabled() else y


def test_a_layer_of_its_own_that_asks_how_it_runs():
    torch.manual_seed(0)
    model = settled(nn.Sequential(AsksHowItRuns(4, 4, 1), nn.BatchNorm2d(4)))
    deploy = structrep.plan(model, X).apply()
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            assert relative_error(deploy(X), model(X)) < EXACT
