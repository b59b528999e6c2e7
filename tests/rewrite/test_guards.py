"""Paths that hang on what a call gives: a method, a function, a configuration, a default. What is set later is an error
that names it, never silently another path."""

import copy
import functools
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, SAME, relative_error

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LOW = False
TABLE = {"low": False}


class Config:
    low, scale = False, 1.0


class Single:
    low = False
    one = None

    def __new__(cls):
        if cls.one is None:
            cls.one = super().__new__(cls)
        return cls.one

    @classmethod
    def get(cls):
        return cls()


def config():
    return Config


@functools.lru_cache
def cached():
    return Config


def is_low():
    return LOW


def by_default(low=False):
    return low


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def low(self):
        return LOW

    def forward(self, x):
        y = self.c(x)
        return y if self.low() else self.n(y)


class Static(Model):
    @staticmethod
    def low():
        return TABLE["low"]


class ByMethods(Model):
    def low(self):
        return self.lower()

    def lower(self):
        return is_low()


class Gives(Model):
    def low(self):
        return bool(config().low)


class Inline(Model):
    def forward(self, x):
        y = self.c(x)
        return y if config().low else self.n(y)


class Scaled(Model):
    def forward(self, x):
        return self.n(self.c(x) * config().scale)


class Cached(Model):
    def forward(self, x):
        y = self.c(x)
        return y if cached().low else self.n(y)


class Singles(Model):
    def forward(self, x):
        y = self.c(x)
        return y if Single().low else self.n(y)


class OfClass(Model):
    def forward(self, x):
        y = self.c(x)
        return y if Single.get().low else self.n(y)


class OfItself(Model):
    def settings(self):
        return Config

    def forward(self, x):
        y = self.c(x)
        return y if self.settings().low else self.n(y)


class Default(Model):
    def forward(self, x):
        y = self.c(x)
        return y if by_default() else self.n(y)


class OfItsClass(Model):
    def forward(self, x):
        y = self.c(x)
        return y if hasattr(type(self), "lowered") else self.n(y)


HERE = sys.modules[__name__]
CASES = [
    (Model, HERE, "LOW", True),
    (Static, TABLE, "low", True),
    (ByMethods, HERE, "LOW", True),
    (Gives, Config, "low", True),
    (Inline, Config, "low", True),
    (Scaled, Config, "scale", 2.0),
    (Cached, Config, "low", True),
    (Singles, Single, "low", True),
    (OfClass, Single, "low", True),
    (OfItself, Config, "low", True),
    (Default, by_default, "__defaults__", (True,)),
    (OfItsClass, OfItsClass, "lowered", True),
]


@pytest.mark.parametrize(("cls", "holder", "name", "value"), CASES, ids=[cls.__name__ for cls, *_ in CASES])
def test_what_a_call_gives_is_guarded(cls, holder, name, value, monkeypatch):
    for given in (False, True):
        torch.manual_seed(0)
        model, inputs = settled(cls()), (X,) if given else ()
        plan = structrep.plan(model, *inputs)
        assert len(plan.merges) == 1
        deploy = plan.reparameterize(*inputs)
        assert relative_error(deploy(X), model(X)) < EXACT
        with monkeypatch.context() as later:
            change = later.setitem if isinstance(holder, dict) else later.setattr
            change(holder, name, value, **({} if isinstance(holder, dict) else {"raising": False}))
            with pytest.raises(ValueError, match=rf"{name}.* now: convert the model again"):
                deploy(X)


class CalledOtherwise(nn.Module):
    """A method that calls its module by another name, and asks it something before a merge."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(me, x):
        if hasattr(me, "fused"):
            return me.fused(x)
        return me.n(me.a(x)) + me.b(x)


def test_guards_have_the_modules_own_name():
    torch.manual_seed(0)
    model = settled(CalledOtherwise())
    deploy = structrep.reparameterize(model, X)
    assert relative_error(deploy(X), model(X)) < EXACT
    deploy.fused = nn.Identity()
    with pytest.raises(ValueError, match="fused"):
        deploy(X)


class ReadsAComputedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.n(self.c(x)) * self.c.weight.norm()


def test_a_parametrized_weight_that_is_read_elsewhere():
    for inputs in ((), (X,)):
        torch.manual_seed(0)
        model = settled(ReadsAComputedWeight())
        plan = structrep.plan(model, *inputs)
        assert len(plan.merges) == 1
        assert relative_error(plan.reparameterize(*inputs)(X), model(X)) < EXACT


SCALE = torch.tensor(2.0, dtype=torch.float64)
SCALES = [torch.tensor(2.0, dtype=torch.float64)]


class OfAFile(Model):
    def forward(self, x):
        return self.n(self.c(x) * SCALE)


class InAList(Model):
    def forward(self, x):
        return self.n(self.c(x) * SCALES[0])


class OfAClass(Model):
    scale = torch.tensor(2.0, dtype=torch.float64)

    def forward(self, x):
        return self.n(self.c(x) * self.scale)


class OfTheModule(Model):
    def __init__(self):
        super().__init__()
        self.scale = torch.tensor(2.0, dtype=torch.float64)

    def forward(self, x):
        return self.n(self.c(x) * self.scale)


@pytest.mark.parametrize("cls", [OfAFile, InAList, OfAClass])
def test_a_tensor_that_no_module_holds_is_no_constant(cls, monkeypatch):
    for given in (False, True):
        torch.manual_seed(0)
        model, inputs = settled(cls()), (X,) if given else ()
        plan = structrep.plan(model, *inputs)
        assert not plan.merges
        deploy, other = plan.reparameterize(*inputs), torch.tensor(3.0, dtype=torch.float64)
        with monkeypatch.context() as later:
            later.setitem(globals(), "SCALE", other)
            later.setitem(globals(), "SCALES", [other])
            later.setattr(OfAClass, "scale", other)
            assert relative_error(deploy(X), model(X)) < EXACT


@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
def test_a_plain_tensor_of_a_module_that_is_written_to_is_guarded(copied):
    for given in (False, True):
        torch.manual_seed(0)
        model, inputs = settled(OfTheModule()), (X,) if given else ()
        plan = structrep.plan(model, *inputs)
        assert len(plan.merges) == 1
        deploy = plan.reparameterize(*inputs)
        deploy = copy.deepcopy(deploy) if copied else deploy
        assert relative_error(deploy(X), model(X)) < EXACT
        deploy.scale.mul_(3)
        with pytest.raises(ValueError, match=r"self\.scale that was merged"):
            deploy(X)


class ByAName(Model):
    def forward(self, x):
        settings = config()
        y = self.c(x)
        return y if settings.low else self.n(y)


def test_a_configuration_by_a_name_of_its_own_is_guarded(monkeypatch):
    deploy = structrep.reparameterize(settled(ByAName()), X)
    monkeypatch.setattr(Config, "low", True)
    with pytest.raises(ValueError, match=r"config\(\)\.low is True now"):
        deploy(X)


class Capped(nn.Module):
    """A Linear whose weight has a bound, as speechbrain's: with one it does more with the layer than to call it."""

    def __init__(self):
        super().__init__()
        self.w, self.bound = nn.Linear(4, 4), None

    def forward(self, x):
        if self.bound is not None:
            self.w.weight.data = torch.renorm(self.w.weight.data, p=2, dim=0, maxnorm=self.bound)
        return self.w(x)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(x)


class InTurn(nn.ModuleDict):
    def forward(self, x):
        for layer in self.values():
            x = layer(x)
            if isinstance(x, tuple):
                x = x[0]
        return x


def test_a_child_that_may_use_its_layer_otherwise_by_a_setting_is_guarded_itself():
    model = settled(InTurn({"linear": Capped(), "norm": Normed(), "act": nn.ReLU()}))
    x = torch.randn(3, 4, dtype=torch.float64)
    plan = structrep.plan(model, x)
    assert [merge.where for merge in plan.merges] == ["linear.w"]
    deploy = plan.apply()
    assert relative_error(deploy(x), model(x)) < SAME
    deploy.linear.bound = 0.1
    with pytest.raises(ValueError, match=r"self\.bound is not None"):
        deploy(x)
