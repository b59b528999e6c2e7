"""Parts that code uses on a path that a trace has not taken, by whatever way it comes to them, and values that it picks
or loops over later: the deploy model does what the model does then, or an error names what the path hangs on."""

import functools
import operator
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support import models
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error, says

X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run(m, x):
    return m(x)


def some_of(m):
    yield from m.children()


def walk(x, parts):
    parts = list(parts)
    return walk(parts[0](x), parts[1:]) if parts else x


def switching(function):
    @functools.wraps(function)
    def wrapper(self, x):
        return self.c(x) if self.low else function(self, x)

    return wrapper


def handing_on(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Helper:
    def of_object(self, x):
        return self.c(x)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n, self.low = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), False
        self.reg, self.named, self.more, self.get_c = [], {}, nn.ModuleList(), operator.attrgetter("c")
        self.cfg = Config(self)

    def forward(self, x):
        return self.c(x)

    def lo(self, x):
        return self.c(x)

    @staticmethod
    def static(self, x):
        return self.c(x)

    @classmethod
    def of_class(cls, m, x):
        return m.c(x)

    def next(self, x):
        return self.c(x)

    def get(self, x):
        return self.c(x)

    def stages(self):
        yield self.c
        if not self.low:
            yield self.n

    def from_others(self):
        yield from [self.c] if self.low else [self.c, self.n]

    def given(self, x, *parts):
        y = self.c(x)
        for part in parts:
            y = part(y)
        return y

    def named_part(self, x, part=None):
        return x if part is None else part(x)


class Config:
    """An object that holds the model."""

    def __init__(self, model):
        self.model = [model]

    def first(self, x):
        return self.model[0].c(x)


HERE = globals()
WAYS = {
    "base": lambda self, x: Plain.forward(self, x) if self.low else self.n(self.c(x)),
    "base method": lambda self, x: Plain.lo(self, x) if self.low else self.n(self.c(x)),
    "type": lambda self, x: type(self).lo(self, x) if self.low else self.n(self.c(x)),
    "class": lambda self, x: self.__class__.lo(self, x) if self.low else self.n(self.c(x)),
    "function": lambda self, x: self.lo.__func__(self, x) if self.low else self.n(self.c(x)),
    "static": lambda self, x: Plain.static(self, x) if self.low else self.n(self.c(x)),
    "own static": lambda self, x: self.static(self, x) if self.low else self.n(self.c(x)),
    "class method": lambda self, x: self.of_class(self, x) if self.low else self.n(self.c(x)),
    "of another class": lambda self, x: Helper.of_object(self, x) if self.low else self.n(self.c(x)),
    "next": lambda self, x: self.next(x) if self.low else self.n(self.c(x)),
    "get": lambda self, x: self.get(x) if self.low else self.n(self.c(x)),
    "mapping": lambda self, x: run(**{"m": self.c, "x": x}) if self.low else self.n(self.c(x)),
    "parameter": lambda self, x: (
        F.conv2d(x, self.get_parameter("c.weight"), padding=1) if self.low else self.n(self.c(x))
    ),
    "state": lambda self, x: F.conv2d(x, self.state_dict()["c.weight"], padding=1) if self.low else self.n(self.c(x)),
    "partial": lambda self, x: functools.partial(run, self.c)(x) if self.low else self.n(self.c(x)),
    "partial method": lambda self, x: functools.partial(self.lo)(x) if self.low else self.n(self.c(x)),
    "getter": lambda self, x: operator.attrgetter("c")(self)(x) if self.low else self.n(self.c(x)),
    "kept getter": lambda self, x: self.get_c(self)(x) if self.low else self.n(self.c(x)),
    "dict": lambda self, x: self.__dict__["_modules"]["c"](x) if self.low else self.n(self.c(x)),
    "vars": lambda self, x: vars(self)["_modules"]["c"](x) if self.low else self.n(self.c(x)),
    "getattr of a class": lambda self, x: nn.Module.__getattr__(self, "c")(x) if self.low else self.n(self.c(x)),
    "evaluated": lambda self, x: eval("self.c(x)") if self.low else self.n(self.c(x)),
    "object": lambda self, x: self.cfg.first(x) if self.low else self.n(self.c(x)),
    "wrapped": switching(lambda self, x: self.n(self.c(x))),
    "twice wrapped": handing_on(switching(lambda self, x: self.n(self.c(x)))),
}


@functools.partial(WAYS.__setitem__, "generator")
def _(self, x):
    for m in self.stages():
        x = m(x)
    return x


@functools.partial(WAYS.__setitem__, "generator of others")
def _(self, x):
    for m in self.from_others():
        x = m(x)
    return x


@functools.partial(WAYS.__setitem__, "generator inside")
def _(self, x):
    def stages():
        yield self.c
        if not self.low:
            yield self.n

    for m in stages():
        x = m(x)
    return x


@functools.partial(WAYS.__setitem__, "starred")
def _(self, x):
    return self.given(x, *([] if self.low else [self.n]))


@functools.partial(WAYS.__setitem__, "some of")
def _(self, x):
    if self.low:
        for m in some_of(self):
            return m(x)
    return self.n(self.c(x))


def made(forward):
    return models.made(forward, Plain)


def later(model, deploy, *inputs):
    """The error that a deploy model raises, after it was seen to do what its model does."""
    truth = model(*inputs)
    try:
        found = deploy(*inputs)
    except ValueError as error:
        if "reparameterized for" not in str(error):
            raise
        return str(error)
    assert relative_error(found, truth) < EXACT
    return None


@pytest.mark.parametrize("forward", WAYS.values(), ids=WAYS)
def test_a_part_on_another_path(forward):
    model = made(forward)
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert relative_error(deploy(X), model(X)) < EXACT
    model.low = deploy.low = True
    assert "self.low" in (later(model, deploy, X) or "self.low")


def test_decorators_that_only_hand_on_are_no_matter():
    model = made(handing_on(handing_on(lambda self, x: self.n(self.c(x)))))
    deploy = structrep.reparameterize(model)
    assert type(deploy) is type(model)
    assert isinstance(deploy.n, nn.Identity)


def test_code_that_calls_itself_with_ever_other_lists():
    class Walking(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)])

        def forward(self, x):
            return walk(x, self.parts)

    model = settled(Walking())
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert relative_error(deploy(X), model(X)) < EXACT


# --- values that are picked or looped over later ----------------------------------------------------------------------


def over_list(self, x):
    y = self.c(x)
    for f in self.reg:
        y = f(y)
    return self.n(y)


def over_items(self, x):
    y = self.c(x)
    for _, f in self.named.items():
        y = f(y)
    return self.n(y)


def over_parts(self, x):
    y = self.c(x)
    for f in self.more:
        y = f(y)
    return self.n(y)


def over_observers(self, x):
    y = self.c(x)
    for f in self.reg:
        f(y)
    return self.n(y)


LOOPS = {
    over_list: lambda model: model.reg.append(F.relu),
    over_items: lambda model: model.named.update(a=F.relu),
    over_parts: lambda model: model.more.append(nn.ReLU()),
    over_observers: lambda model: model.reg.append(lambda y: y.mul_(2)),
}


@pytest.mark.parametrize(("forward", "change"), LOOPS.items(), ids=[one.__name__ for one in LOOPS])
def test_a_loop_over_what_is_empty_up_to_now(forward, change):
    model = made(forward)
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert relative_error(deploy(X), model(X)) < EXACT
    change(model)
    change(deploy)
    assert "self." in (later(model, deploy, X) or "self.")


def by_key(self, x, which="out"):
    y = self.c(x)
    return {"mid": y, "out": self.n(y)}[which]


def by_get(self, x, which="out"):
    y = self.c(x)
    return {"mid": y, "out": self.n(y)}.get(which)


def by_place(self, x, which=1):
    y = self.c(x)
    found = [y, self.n(y)]
    return found[which]


PICKS = {by_key: "mid", by_get: "mid", by_place: 0}


@pytest.mark.parametrize(("forward", "which"), PICKS.items(), ids=[one.__name__ for one in PICKS])
def test_a_value_that_an_argument_picks(forward, which):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = type("Inner", (Plain,), {"forward": forward})()
            self.which = forward.__defaults__[0]

        def forward(self, x):
            return self.inner(x, self.which)

    model = made(forward)
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert relative_error(deploy(X), model(X)) < EXACT
    assert "which" in (later(model, deploy, X, which) or "which")
    model = settled(Around())
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert relative_error(deploy(X), model(X)) < EXACT
    model.which = deploy.which = which
    assert "which" in (later(model, deploy, X) or "which")


# --- tensors that are set later ---------------------------------------------------------------------------------------


class Masked(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", None)
        self.register_parameter("shift", None)
        self.register_buffer("scale", torch.full((1, 8, 1, 1), 2.0))
        self.gain = nn.Parameter(torch.full((1, 8, 1, 1), 2.0))


def with_mask(self, x):
    y = self.c(x)
    if self.mask is not None:
        y = y * self.mask
    return self.n(y)


def with_shift(self, x):
    y = self.c(x)
    return self.n(y if self.shift is None else y + self.shift)


def scaled(self, x):
    return self.n(self.c(x)) * self.scale


def gained(self, x):
    return self.n(self.c(x)) * self.gain


TENSORS = {with_mask: "mask", with_shift: "shift", scaled: "scale", gained: "gain"}


@pytest.mark.parametrize(("forward", "name"), TENSORS.items(), ids=[one.__name__ for one in TENSORS])
def test_a_tensor_that_is_set_later(forward, name):
    torch.manual_seed(0)
    model = models.made(forward, Masked)
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert relative_error(deploy(X), model(X)) < EXACT
    for one in (model, deploy):
        value = torch.full((1, 8, 1, 1), 7.0, dtype=torch.float64)
        setattr(one, name, nn.Parameter(value) if name in model._parameters else value)
    assert f"self.{name}" in (later(model, deploy, X) or f"self.{name}")


# --- other forwards ---------------------------------------------------------------------------------------------------


class Chopping(nn.Module):
    """A wrapper as those of super-resolution are, whose other forward cannot be followed."""

    def __init__(self):
        super().__init__()
        self.model, self.chop = type("Inner", (Plain,), {"forward": lambda self, x: self.n(self.c(x)).relu()})(), False

    def forward(self, x):
        return self.forward_chop(x) if self.chop else self.model(x)

    def forward_chop(self, x):
        return torch.cat([self.model(piece) for piece in x.chunk(2, -1)], -1)


def test_another_forward_that_runs_a_part_as_a_whole():
    model = settled(Chopping())
    plan = structrep.plan(model)
    assert len(plan.merges) == 1
    deploy = plan.apply()
    for chop in (False, True):
        model.chop = deploy.chop = chop
        assert relative_error(deploy(X), model(X)) < EXACT


def test_another_forward_that_runs_some_of_a_part():
    class Inside(Chopping):
        def forward_chop(self, x):
            return torch.cat([self.model.c(piece) for piece in x.chunk(2, -1)], -1)

    plan = structrep.plan(settled(Inside()))
    assert not plan.merges
    assert "Inside.forward_chop may look at what" in str(plan.refusals[0])


# --- ordered dicts ----------------------------------------------------------------------------------------------------


class Layers(nn.ModuleDict):
    """As torchvision's `IntermediateLayerGetter`."""

    def __init__(self):
        parts = {"c": nn.Conv2d(4, 8, 3), "n": nn.BatchNorm2d(8), "r": nn.ReLU()}
        super().__init__(parts)
        self.keep = {"r": "out"}

    def forward(self, x):
        out = OrderedDict()
        for name, part in self.items():
            x = part(x)
            if name in self.keep:
                out[self.keep[name]] = x
        return out


def test_an_ordered_dict_is_given_back():
    torch.manual_seed(0)
    model = settled(Layers())
    plan = structrep.plan(model, X)
    assert len(plan.merges) == 1
    deploy = pickle.loads(pickle.dumps(plan.apply()))
    truth, found = model(X), deploy(X)
    assert type(found) is OrderedDict
    assert list(found) == list(truth)
    assert relative_error(found["out"], truth["out"]) < EXACT
    for one in (model, deploy):
        one.keep["c"] = "early"
    with pytest.raises(ValueError, match=r"self\.keep"):
        deploy(X)
