"""What holds parts beside the tree of modules, and what a class's own way to copy itself leaves of them."""

import collections
import copy
import functools
import types
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error

X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run(norm, y):
    return norm(y)


class Plain:
    def __init__(self, c, n):
        self.c, self.n = c, n

    def both(self, x):
        return self.n(self.c(x))


@dataclass
class Fields:
    n: nn.Module


class Slots:
    __slots__ = ("n",)

    def __init__(self, n):
        self.n = n


Named = collections.namedtuple("Named", "n")

HOLDERS = {
    "list": (lambda m: [m.n], lambda h, y: h[0](y)),
    "deque": (lambda m: collections.deque([m.n]), lambda h, y: h[0](y)),
    "set": (lambda m: {m.n}, lambda h, y: next(iter(h))(y)),
    "namedtuple": (lambda m: Named(m.n), lambda h, y: h.n(y)),
    "namespace": (lambda m: types.SimpleNamespace(n=m.n), lambda h, y: h.n(y)),
    "deep": (lambda m: {"a": [types.SimpleNamespace(n=m.n)]}, lambda h, y: h["a"][0].n(y)),
    "object": (lambda m: Plain(m.c, m.n), lambda h, y: h.n(y)),
    "dataclass": (lambda m: Fields(m.n), lambda h, y: h.n(y)),
    "slots": (lambda m: Slots(m.n), lambda h, y: h.n(y)),
    "listed": (lambda m: [m.c, Fields(m.n)], lambda h, y: h[1].n(y)),
    "partial": (lambda m: functools.partial(run, m.n), lambda h, y: h(y)),
    "named": (lambda m: functools.partial(run, norm=m.n), lambda h, y: h(y=y)),
    "default": (lambda m: lambda y, part=m.n: part(y), lambda h, y: h(y)),
    "keyword": (lambda m: lambda y, *, part=m.n: part(y), lambda h, y: h(y)),
    "cell": (lambda m: (lambda n: lambda y: n(y))(m.n), lambda h, y: h(y)),
}


class Holding(nn.Module):
    make = use = None

    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.h = type(self).make(self)

    def forward(self, x):
        return type(self).use(self.h, self.c(x))


@pytest.mark.parametrize(("make", "use"), HOLDERS.values(), ids=HOLDERS)
def test_a_part_that_is_held_elsewhere_stays(make, use):
    for inputs in ((), (X,)):
        torch.manual_seed(0)
        model = settled(type("Made", (Holding,), {"make": staticmethod(make), "use": staticmethod(use)})())
        with pytest.warns(structrep.NothingMerged):
            deploy = structrep.reparameterize(model, *inputs)
        assert relative_error(deploy(X), model(X)) < EXACT


def test_a_method_of_a_part_is_code_that_is_merged():
    class Model(Holding):
        make, use = staticmethod(lambda m: m.n.forward), staticmethod(lambda h, y: h(y))

    model = settled(Model())
    plan = structrep.plan(model)
    assert len(plan.merges) == 1
    assert relative_error(plan.apply()(X), model(X)) < EXACT


def test_an_object_whose_method_runs_parts():
    class Model(Holding):
        make = staticmethod(lambda m: Plain(m.c, m.n))

        def forward(self, x):
            return self.h.both(x)

    model = settled(Model())
    (refusal,) = structrep.plan(model).refusals
    assert "is also held in h, which is none of torch's" in str(refusal)


def test_what_holds_other_parts_or_the_model_itself_is_no_matter():
    class Model(Holding):
        make = staticmethod(lambda m: types.SimpleNamespace(me=m, run=m.both, other=[]))

        def both(self, x):
            return self.n(self.c(x))

        def forward(self, x):
            return self.h.run(x)

    model = settled(Model())
    plan = structrep.plan(model)
    assert len(plan.merges) == 1
    assert relative_error(plan.apply()(X), model(X)) < EXACT


class CopiesItself(nn.Sequential):
    """As torchvision's feature extractors do, which make their copies anew: they come in training mode."""

    graph = "train"

    def train(self, mode=True):
        self.graph = "train" if mode else "eval"
        return super().train(mode)

    def __deepcopy__(self, memo):
        return type(self)(*(copy.deepcopy(part, memo) for part in self)).train()


def test_a_copy_is_in_the_modes_of_its_original():
    for inputs in ((), (X,)):
        torch.manual_seed(0)
        model = settled(CopiesItself(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        model[2].train()
        deploy = structrep.reparameterize(model, *inputs)
        assert isinstance(deploy[1], nn.Identity)
        assert [part.training for part in deploy.modules()] == [False, False, False, True]
        assert deploy.graph == "eval"
        assert relative_error(deploy(X), model(X)) < EXACT
