"""What a forward goes by may be set to something else after a conversion: it is asked again, or an error names it."""

import collections
import datetime
import decimal
import functools
import itertools
import operator
import os
import re
import types

import pytest
import torch
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import CLOSE, followed_or_told, relative_error, says

X = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def branches(self, x):
        return self.n(self.a(x)) + self.b(x)


class Config:
    kind = 2.0

    def __init__(self, gain):
        self.gain = gain

    def scale(self):
        return self.gain

    def get(self, key):
        return getattr(self, key)

    @classmethod
    def of_kind(cls):
        return cls.kind

    def __call__(self, y):
        return y * self.gain


CONFIG, SPACE, CONFIGS = Config(2.0), types.SimpleNamespace(gain=2.0), [Config(2.0)]


def by(config, y):
    return y * config.gain


def is_on():
    return CONFIG.scale() > 3


def asks(value, how):
    """A model that holds a value and multiplies by what is asked of it."""
    holding = {"__init__": lambda self: (Base.__init__(self), setattr(self, "held", value))[0]}
    made = type("Holds", (Base,), {**holding, "forward": lambda self, x: self.branches(x) * how(self)})
    return made()


HELD = {
    "a list of objects": ([Config(2.0), Config(3.0)], lambda self: self.held[0].gain * self.held[1].gain),
    "a loop over objects": ([Config(2.0)], lambda self: sum(one.gain for one in self.held)),
    "Decimal": (decimal.Decimal("1.5"), lambda self: float(self.held)),
    "timedelta": (datetime.timedelta(seconds=2), lambda self: self.held.total_seconds()),
    "Pattern": (re.compile("a"), lambda self: 2.0 if self.held.match("a") else 1.0),
    "ChainMap": (collections.ChainMap({"k": 2.0}), lambda self: self.held["k"]),
    "deque": (collections.deque([2.0]), lambda self: self.held[0]),
    "missing by default": (Config(2.0), lambda self: getattr(self.held, "more", 2.0)),
    "missing": (Config(2.0), lambda self: 5.0 if hasattr(self.held, "more") else 2.0),
    "functions": ([functools.partial(operator.mul, 2.0)], lambda self: self.held[0](1.0)),
}
SET = {
    "a list of objects": lambda held: setattr(held[0], "gain", 5.0),
    "a loop over objects": lambda held: held.append(Config(7.0)),
    "Decimal": lambda held: decimal.Decimal(4),
    "timedelta": lambda held: datetime.timedelta(seconds=5),
    "Pattern": lambda held: re.compile("b"),
    "ChainMap": lambda held: held.maps[0].update(k=5.0),
    "deque": lambda held: held.append(held.popleft() + 1),
    "missing by default": lambda held: setattr(held, "more", 5.0),
    "missing": lambda held: setattr(held, "more", 5.0),
    "functions": lambda held: [functools.partial(operator.mul, 7.0)],
}


@pytest.mark.parametrize("name", HELD)
def test_what_no_literal_tells_is_known_by_what_it_holds(name):
    torch.manual_seed(0)
    model = settled(asks(*HELD[name]))
    plan = structrep.plan(model, X)
    assert len(plan.merges) == 1
    deploy = plan.apply()
    assert relative_error(deploy(X), model(X)) < CLOSE
    before = model(X)
    for one in (model, deploy):
        changed = SET[name](one.held)
        one.held = one.held if changed is None else changed
    assert relative_error(model(X), before) > 1e-3  # or nothing hangs on it
    assert followed_or_told(model, deploy, X)


OUTSIDE = {
    "another name": (lambda self, x: (lambda config: self.branches(x) * config.gain)(CONFIG), CONFIG),
    "a helper": (lambda self, x: by(CONFIG, self.branches(x)), CONFIG),
    "a namespace": (lambda self, x: by(SPACE, self.branches(x)), SPACE),
    "a method": (lambda self, x: self.branches(x) * CONFIG.scale(), CONFIG),
    "a method by name": (lambda self, x: self.branches(x) * CONFIG.get("gain"), CONFIG),
    "an object that is called": (lambda self, x: CONFIG(self.branches(x)), CONFIG),
    "a loop": (lambda self, x: functools.reduce(lambda y, one: y * one.gain, CONFIGS, self.branches(x)), CONFIGS[0]),
    "a condition": (lambda self, x: self.a(x) if CONFIG.scale() > 3 else self.n(self.a(x)), CONFIG),
    "a condition in a helper": (lambda self, x: self.a(x) if is_on() else self.n(self.a(x)), CONFIG),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_objects_of_a_file_are_known_by_what_they_hold(name, monkeypatch):
    forward, held = OUTSIDE[name]
    torch.manual_seed(0)
    model = settled(type("Asks", (Base,), {"forward": forward})())
    deploy = says(structrep.plan(model, X), 1).apply()
    assert relative_error(deploy(X), model(X)) < CLOSE
    before = model(X)
    monkeypatch.setattr(held, "gain", 5.0)
    assert relative_error(model(X), before) > 1e-3
    assert followed_or_told(model, deploy, X)


class AsksALibrary(Base):
    def forward(self, x):
        y = self.a(x)
        if torch.is_anomaly_enabled():
            return y
        return self.n(y)


class AsksForAFactor(Base):
    def forward(self, x):
        k = 0.5 if torch.is_anomaly_enabled() else 2.0
        return self.n(self.a(x) * k) + self.b(x)


class AsksTheSystem(Base):
    def forward(self, x):
        y = self.a(x)
        return y if os.path.exists("raw") else self.n(y)


@pytest.mark.parametrize("cls", [AsksALibrary, AsksForAFactor])
def test_how_things_stand_in_a_library_is_guarded(cls):
    torch.manual_seed(0)
    model = settled(cls())
    plan = structrep.plan(model, X)
    assert len(plan.merges) == 1
    deploy = plan.apply()
    assert relative_error(deploy(X), model(X)) < CLOSE
    with torch.autograd.set_detect_anomaly(True), pytest.raises(ValueError, match="is_anomaly_enabled"):
        deploy(X)


def test_how_things_stand_in_the_system_is_guarded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = settled(AsksTheSystem())
    plan = structrep.plan(model, X)
    assert len(plan.merges) == 1
    deploy = plan.apply()
    assert relative_error(deploy(X), model(X)) < 1e-13
    (tmp_path / "raw").touch()
    with pytest.raises(ValueError, match="exists"):
        deploy(X)


def choose(raw, normed, export):
    return raw if export else normed


def taps(raw, normed, export):
    if export:
        yield raw
    yield normed


class Picks(Base):
    def __init__(self):
        super().__init__()
        self.export, self.layers, self.depth = False, ("a", "n"), 2
        self.both = nn.Sequential(self.a, self.n)


PICKS = {
    "a helper": (lambda self, x, y: choose(y, self.n(y), self.export), "export", True),
    "a generator": (lambda self, x, y: next(taps(y, self.n(y), self.export)), "export", True),
    "getitem": (lambda self, x, y: operator.getitem((self.n(y), y), int(self.export)), "export", True),
    "min": (
        lambda self, x, y: min([(int(self.export), 1, self.n(y)), (0.5, 2, y)], key=lambda one: one[0])[2],
        "export",
        True,
    ),
    "reduce": (
        lambda self, x, y: functools.reduce(lambda x, name: getattr(self, name)(x), self.layers, x),
        "layers",
        ("a",),
    ),
}


@pytest.mark.parametrize("name", PICKS)
def test_a_value_that_is_handed_to_what_may_pick_is_given_away(name):
    pick, attribute, value = PICKS[name]
    torch.manual_seed(0)
    model = settled(type("Made", (Picks,), {"forward": lambda self, x: pick(self, x, self.a(x))})())
    deploy = says(structrep.plan(model, X), *((0, "Shared") if name == "reduce" else (1,))).apply()
    assert relative_error(deploy(X), model(X)) < CLOSE
    for one in (model, deploy):
        setattr(one, attribute, value)
    assert followed_or_told(model, deploy, X)


class Some(Picks):
    def forward(self, x):
        for layer in self.some():
            x = layer(x)
        return x


class Islice(Some):
    def forward(self, x):
        for layer in itertools.islice(self.both, self.depth):
            x = layer(x)
        return x


class Mapped(Some):
    def forward(self, x):
        for layer in map(self.get_submodule, self.layers):
            x = layer(x)
        return x


class Deleted(Some):
    def forward(self, x):
        layers = list(self.both)
        if self.export:
            del layers[1]
        for layer in layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("cls", "attribute", "value"), [(Islice, "depth", 1), (Mapped, "layers", ("a",)), (Deleted, "export", True)]
)
def test_a_loop_over_what_may_be_fewer_parts(cls, attribute, value):
    torch.manual_seed(0)
    model = settled(cls())
    deploy = says(structrep.plan(model, X), 1).apply()
    assert relative_error(deploy(X), model(X)) < CLOSE
    for one in (model, deploy):
        setattr(one, attribute, value)
    assert followed_or_told(model, deploy, X)


class TwoInputs(Base):
    def forward(self, x, y):
        z = self.a(x)
        y.add_(1)
        return self.n(z) + self.b(x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = TwoInputs()

    def forward(self, x):
        x = x * 1
        len(str(x))  # cannot be followed
        return self.part(x, x)


def test_arguments_may_be_one_tensor():
    torch.manual_seed(0)
    for model, given in (
        (settled(TwoInputs()), lambda: (lambda x: (x, x))(X.clone())),
        (settled(Twice()), lambda: (X,)),
    ):
        plan = structrep.plan(model)
        assert [(refusal.what, refusal.kind) for refusal in plan.refusals if refusal.kind == "Mutated"]
        assert relative_error(plan.apply()(*given()), model(*given())) < CLOSE


def test_an_attribute_of_a_type_whose_attributes_are_fixed():
    class First(Base):
        def __init__(self):
            super().__init__()
            self.pick = operator.itemgetter(0)

        def forward(self, x):
            return self.pick([self.branches(x)])

    model = settled(First())
    plan = structrep.plan(model, X)
    assert len(plan.merges) == 1
    assert relative_error(plan.apply()(X), model(X)) < CLOSE
