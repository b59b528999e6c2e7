"""What a forward knows by names of its module, closure or process is asked again, guarded, or keeps the forward."""

import collections
import copy
import datetime
import functools
import os
import random
import secrets
import sys
import time
import types
import uuid

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.rewrite.asking import Asked, X, both, converted, differs, made, written
from tests.support.truth import EXACT, relative_error

SETTINGS = {"t": 0.5, "u": 2.0}
LOW = 0.25
HERE = sys.modules[__name__]


class Limited(Asked):
    def limit(self):
        return LOW * self.other


ALIAS = F.relu


@pytest.mark.parametrize(
    ("forward", "name", "value", "named"),
    [
        (
            lambda self, x: (self.n(self.a(x)) + self.b(x)).clamp(min=SETTINGS["t"]),
            "SETTINGS",
            {"t": 1.0, "u": 2.0},
            "SETTINGS['t']",
        ),
        (
            lambda self, x: (self.n(self.a(x)) + self.b(x)).clamp(min=SETTINGS["t"]),
            "SETTINGS",
            {"t": 0.5, "u": 9.0},
            None,
        ),
        (lambda self, x: (self.n(self.a(x)) + self.b(x)).clamp(min=LOW), "LOW", 1.0, "LOW"),
        (lambda self, x: (self.n(self.a(x)) + self.b(x)) * self.limit(), "LOW", 1.0, "LOW"),
        (lambda self, x: (self.n(self.a(x)) + self.b(x)) * HERE.LOW, "LOW", 1.0, "HERE.LOW"),
        (lambda self, x: ALIAS(self.n(self.a(x)) + self.b(x)), "ALIAS", F.silu, "ALIAS"),
    ],
)
def test_names_of_a_module(forward, name, value, named, monkeypatch):
    model, deploy = converted(forward, base=Limited)
    monkeypatch.setattr(HERE, name, value)
    error = differs(model, deploy, X)
    assert (error is None) if named is None else (error is not None and named in error)


def test_cells_of_a_closure():
    bounds, low = [0.1, 0.2], 0.0

    def scaled(factor):
        def decorate(function):
            @functools.wraps(function)
            def wrapped(self, x):
                return function(self, x) * factor[0]

            return wrapped

        return decorate

    factor = [2.0]

    def forward(self, x):
        return (self.n(self.a(x)) + self.b(x)).clamp(min=low, max=bounds[1])

    model, deploy = converted(forward)
    bounds[0] = 5.0
    assert differs(model, deploy, X) is None
    bounds[1] = 0.3
    assert differs(model, deploy, X) is None
    bounds[1] = 0.2
    assert differs(model, deploy, X) is None
    low = 0.15
    assert differs(model, deploy, X) is None
    model, deploy = converted(scaled(factor)(lambda self, x: (self.n(self.a(x)) + self.b(x)).relu()))
    factor[0] = 3.0
    assert "factor[0]" in differs(model, deploy, X)


def test_a_forward_of_an_instance():
    low = [0.0]
    model = made(both)
    model.forward = types.MethodType(lambda self, x: (self.n(self.a(x)) + self.b(x)).clamp(min=low[0]), model)
    deploy = structrep.reparameterize(model)
    assert differs(model, deploy, X) is None
    low[0] = 1.0
    assert "low[0]" in differs(model, deploy, X)


def test_code_without_source():
    """What was asked for is noted as the code runs, so no source is needed to guard it."""
    space = {"torch": torch, "LIMIT": [0.25]}
    exec(
        "def forward(self, x):\n    y = self.n(self.a(x)) + self.b(x)\n"
        "    return y.clamp(min=LIMIT[0]) * self.cfg['t']",
        space,
    )
    model, deploy = converted(space["forward"])
    for at in (copy.deepcopy(deploy), deploy):
        space["LIMIT"][0] = 1.0
        assert "LIMIT[0]" in differs(model, at, X)
        space["LIMIT"][0] = 0.25
    model.cfg["t"] = deploy.cfg["t"] = 3.0
    assert "self.cfg['t']" in differs(model, deploy, X)


def test_the_environment(monkeypatch):
    monkeypatch.delenv("STRUCTREP_TEST", raising=False)
    model, deploy = converted(
        lambda self, x: (self.n(self.a(x)) + self.b(x)) * (2 if os.environ.get("STRUCTREP_TEST") else 1)
    )
    monkeypatch.setenv("STRUCTREP_TEST", "1")
    assert "os.environ.get('STRUCTREP_TEST')" in differs(model, deploy, X)


@pytest.mark.parametrize(("ask", "rules"), [(time.time, [("fold_norm",)]), (time.monotonic, [("fold_norm",)]),
                                            (random.random, [])])  # fmt: skip
def test_what_is_another_at_every_call_keeps_the_forward(ask, rules):
    model = made(lambda self, x: (self.n(self.a(x)) + self.b(x)) * ask())
    plan = structrep.plan(model)
    assert [merge.rules for merge in plan.merges] == rules  # of modules alone; one that draws numbers is not followed


class Counter:
    def __init__(self):
        self.n = 0

    def draw(self):
        self.n += 1
        return self.n


COUNTER, NUMBERS = Counter(), random.Random(0)


def counted(model, x):
    model.held.n += 1
    return model.held.n


@pytest.mark.parametrize(("held", "ask"), [
    (lambda: numpy.random.default_rng(0), lambda m, x: m.held.random()),
    (lambda: numpy.random.RandomState(0), lambda m, x: m.held.rand()),
    (lambda: random.Random(0), lambda m, x: m.held.random()),
    (lambda: {"of": [random.Random(0)]}, lambda m, x: m.held["of"][0].random()),
    (lambda: iter([0.5, 1.5, 2.5, 3.5, 4.5, 5.5]), lambda m, x: next(m.held)),
    (lambda: types.SimpleNamespace(n=0), counted),
    (Counter, lambda m, x: m.held.draw()),
    (collections.deque, lambda m, x: m.held.append(1) or len(m.held)),
], ids=["numpy", "old numpy", "random", "in a dict", "iterator", "namespace", "object", "deque"])  # fmt: skip
def test_what_an_object_gives_that_it_changes_is_no_constant(held, ask):
    for inputs in ((), (X,)):
        model = made(lambda self, x: (self.n(self.a(x)) + self.b(x)) * ask(self, x))
        model.held = held()
        deploy = structrep.reparameterize(model, *inputs)
        assert isinstance(deploy.n, nn.Identity)
        for _ in range(3):
            assert relative_error(deploy(X), model(X)) < EXACT


@pytest.mark.parametrize("ask", [
    COUNTER.draw, lambda: COUNTER.draw(), lambda: NUMBERS.random(), lambda: os.urandom(1)[0], lambda: uuid.uuid4().int,
    lambda: random.SystemRandom().random(), lambda: secrets.randbelow(9), time.monotonic_ns, time.process_time,
    lambda: datetime.datetime.now().microsecond, lambda: datetime.date.today().day,
])  # fmt: skip
def test_what_the_process_gives_otherwise_at_every_call_keeps_the_forward(ask):
    plan = structrep.plan(made(lambda self, x: (self.n(self.a(x)) + self.b(x)) * ask()))
    assert [merge.rules for merge in plan.merges] == [("fold_norm",)]
    assert any(
        "at every call" in one.reason or "changes its arguments or itself" in one.reason for one in plan.refusals
    )


def test_only_the_forward_that_changes_an_object_is_kept():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.numbers = random.Random(0)

        def forward(self, x):
            return x * self.numbers.random()

    def forward(self, x):
        return self.part(self.n(self.a(x)) + self.b(x))

    model = made(forward)
    model.part = Draws()
    deploy = structrep.reparameterize(model)
    assert "reparam_conv" in written(deploy)
    for _ in range(3):
        assert relative_error(deploy(X), model(X)) < EXACT
