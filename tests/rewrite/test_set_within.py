"""What a forward goes by may be set in its middle, and a guard at its start would ask too early: such merges are left,
with what is set as the reason. Names that no guard could see, imported, closed over, or looked up as text, too."""

import copy
import functools
import operator
import sys
import types

import pytest
import torch
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, check, followed_or_told, relative_error

INPUTS = {size: torch.randn(2, 4, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
          for size in (8, 6, 12)}  # fmt: skip
SETTINGS = types.ModuleType("settings_of_a_test")
SETTINGS.on = True
sys.modules[SETTINGS.__name__] = SETTINGS
FLAGS = {"on": True}


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.size, self.raw, self.count, self.use = 8, False, 0, 2
        self.cfg = types.SimpleNamespace(raw=False)
        self.register_buffer("k", torch.ones(4, 1, 1))

    def tick(self):
        self.count += 1

    def enlarge(self):
        self.k.mul_(2)

    def end(self, y, raw):
        return y if raw else self.n(y)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        return x


def by_size(self, x):
    if x.shape[-1] != self.size:
        self.size, self.raw = x.shape[-1], True
    y = self.c(x)
    if self.raw:
        return y
    return self.n(y)


def by_count(self, x):
    self.count += 1
    y = self.c(x)
    if self.count > 3:
        return y
    return self.n(y)


def by_method(self, x):
    self.tick()
    y = self.c(x)
    if self.count > 3:
        return y
    return self.n(y)


def by_part(self, x):
    x = self.counts(x)
    y = self.c(x)
    if self.counts.count > 3:
        return y
    return self.n(y)


def by_object(self, x):
    if x.shape[-1] > 8:
        self.cfg.raw = True
    y = self.c(x)
    if self.cfg.raw:
        return y
    return self.n(y)


def by_name(self, x):
    if x.shape[-1] > 8:
        setattr(self, "raw", True)  # noqa: B010
    y = self.c(x)
    if self.raw:
        return y
    return self.n(y)


def fills(self, x):
    if x.shape[-1] > 8:
        self.k.fill_(2.0)
    return self.n(self.c(x) * self.k)


def fills_entry(self, x):
    if x.shape[-1] > 8:
        self.k[0] = 3
    return self.n(self.c(x) * self.k)


def fills_alias(self, x):
    k = self.k
    if x.shape[-1] > 8:
        k *= 2
    return self.n(self.c(x) * self.k)


def fills_out(self, x):
    if x.shape[-1] > 8:
        torch.mul(self.k, 2.0, out=self.k)
    return self.n(self.c(x) * self.k)


def fills_by_method(self, x):
    if x.shape[-1] > 8:
        self.enlarge()
    return self.n(self.c(x) * self.k)


def fills_by_helper(self, x):
    if x.shape[-1] > 8:
        twice(self.k)
    return self.n(self.c(x) * self.k)


def twice(tensor):
    tensor.mul_(2)


def assigns(self, x):
    if x.shape[-1] > 8:
        self.k = self.k * 2
    return self.n(self.c(x) * self.k)


def returns_finally(self, x):
    y = self.c(x)
    try:
        if x.shape[-1] > 8:
            raise ValueError
        y = self.n(y)
    finally:
        return y  # noqa: B012


SETS = [by_size, by_count, by_method, by_part, by_object, by_name, fills, fills_entry, fills_alias, fills_out,
        fills_by_method, fills_by_helper, assigns, returns_finally]  # fmt: skip


def made(forward):
    model = type("Model", (Base,), {"forward": forward})()
    model.counts = Counts()
    return settled(model)


@pytest.mark.filterwarnings("ignore::structrep.NothingMerged")
@pytest.mark.parametrize("forward", SETS)
def test_what_a_forward_sets_as_it_runs_is_no_ground_for_a_merge(forward):
    for example in (False, True):
        model = made(forward)
        twin = copy.deepcopy(model)
        inputs = [INPUTS[8]] if example else []
        plan = structrep.plan(copy.deepcopy(model), *inputs)
        deploy = structrep.reparameterize(copy.deepcopy(model), *inputs)
        for size in (8, 6, 12, 8, 6, 12):
            assert relative_error(deploy(INPUTS[size]), twin(INPUTS[size])) < EXACT
        assert not plan.merges
        assert forward is returns_finally or any("may set" in one.reason for one in plan.refusals)


@pytest.mark.parametrize("forward", [fills, by_object])
def test_what_is_not_set_as_it_runs_merges(forward):
    """The same text without the line that sets."""
    model = made({fills: lambda self, x: self.n(self.c(x) * self.k), by_object: unset}[forward])
    deploy = structrep.reparameterize(copy.deepcopy(model))
    assert isinstance(deploy.n, nn.Identity)
    assert relative_error(deploy(INPUTS[8]), model(INPUTS[8])) < EXACT


def unset(self, x):
    y = self.c(x)
    if self.cfg.raw:
        return y
    return self.n(y)


def handed(self, x):
    y = shown(self.c(x), self.use)
    if self.use > 2:
        return y
    return self.n(y)


def shown(x, use):
    return x


def test_a_number_that_a_helper_is_given_cannot_be_set_there():
    model = made(handed)
    deploy = structrep.reparameterize(copy.deepcopy(model))
    assert isinstance(deploy.n, nn.Identity)
    deploy.use = model.use = 3
    assert followed_or_told(model, deploy, INPUTS[8])


def closed_over():
    names = ["c", "n"]

    def forward(self, x):
        for name in names:
            x = getattr(self, name)(x)
        return x

    return forward, names


def closed_over_within():
    names = ["c", "n"]

    def forward(self, x):
        def all_of(y):
            return functools.reduce(lambda value, name: getattr(self, name)(value), names, y)

        return all_of(x)

    return forward, names


@pytest.mark.parametrize("make", [closed_over, closed_over_within])
def test_a_list_that_a_forward_is_closed_over(make):
    forward, names = make()
    model = made(forward)
    deploy = structrep.reparameterize(copy.deepcopy(model))
    assert isinstance(deploy.n, nn.Identity)
    assert relative_error(deploy(INPUTS[8]), model(INPUTS[8])) < EXACT
    del names[1]
    assert followed_or_told(model, deploy, INPUTS[8])


def imports(self, x):
    import settings_of_a_test

    y = self.c(x)
    return self.n(y) if settings_of_a_test.on else y


def imports_as(self, x):
    import settings_of_a_test as settings

    y = self.c(x)
    if settings.on:
        y = self.n(y)
    return y


def imports_from(self, x):
    from settings_of_a_test import on

    y = self.c(x)
    return self.n(y) if on else y


@pytest.mark.parametrize("forward", [imports, imports_as, imports_from])
def test_a_name_that_a_forward_imports(forward, monkeypatch):
    model = made(forward)
    deploy = structrep.reparameterize(copy.deepcopy(model), INPUTS[8])
    assert isinstance(deploy.n, nn.Identity)
    assert relative_error(deploy(INPUTS[8]), model(INPUTS[8])) < EXACT
    monkeypatch.setattr(SETTINGS, "on", False)
    assert followed_or_told(model, deploy, INPUTS[8])


def looks_up(self, x):
    y = self.c(x)
    return self.n(y) if globals()["FLAGS"]["on"] else y


def test_a_name_that_is_looked_up_as_text_is_refused():
    model = made(looks_up)
    plan = structrep.plan(model, INPUTS[8])
    assert not plan.merges
    assert any("globals()" in one.reason for one in plan.refusals)


class Named(nn.Module):
    """Two norms, of which a computed name says which one runs."""

    def __init__(self):
        super().__init__()
        self.c, self.which = nn.Conv2d(4, 4, 3, padding=1), 0
        self.norm0, self.norm1 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def run_0(self, x):
        return self.norm0(self.c(x))

    def run_1(self, x):
        return self.norm1(self.c(x))


@pytest.mark.parametrize("forward", [
    lambda self, x: getattr(self, "norm%d" % self.which)(self.c(x)).relu(),  # noqa: UP031
    lambda self, x: getattr(self, f"norm{self.which}")(self.c(x)).relu(),
    lambda self, x: getattr(self, "norm" + str(self.which))(self.c(x)).relu(),
    lambda self, x: getattr(self, "norm{}".format(self.which))(self.c(x)).relu(),  # noqa: UP032
    lambda self, x: getattr(self, "run_%d" % self.which)(x).relu(),  # noqa: UP031
])  # fmt: skip
def test_a_part_of_a_name_that_is_computed(forward):
    for inputs in ((), (INPUTS[8],)):
        model = settled(type("Model", (Named,), {"forward": forward})())
        deploy = structrep.reparameterize(copy.deepcopy(model), *inputs)
        assert relative_error(deploy(INPUTS[8]), model(INPUTS[8])) < EXACT
        deploy.which = model.which = 1
        assert followed_or_told(model, deploy, INPUTS[8])


def doubled(tensor):
    tensor.mul_(2)


def doubled_by_another(tensor):
    doubled(tensor)


class Writes(nn.Module):
    """Branches that read what a method, on another path, writes to as they are added."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def deeper(self, x):
        x.mul_(2)

    def forward(self, x, flip=False):
        y = self.n(self.a(x))
        if flip:
            self.write(x)
        return (y + self.b(x)).relu()


@pytest.mark.parametrize("write", [
    lambda self, x: x.mul_(2),
    lambda self, x: self.deeper(x),
    lambda self, x: doubled_by_another(x),
    lambda self, x: doubled(tensor=x),
    lambda self, x: x.__imul__(2),
    lambda self, x: operator.imul(x, 2),
    lambda self, x: getattr(x, "mul_")(2),  # noqa: B009
    lambda self, x: torch.add(x, x, out=x),
])  # fmt: skip
def test_what_a_method_writes_to_on_another_path(write):
    model = settled(type("Model", (Writes,), {"write": write})())
    deploy = structrep.reparameterize(copy.deepcopy(model), INPUTS[8])
    for flip in (False, True):
        truth = model(INPUTS[8].clone(), flip)
        try:
            assert relative_error(deploy(INPUTS[8].clone(), flip), truth) < EXACT
        except ValueError as error:
            assert flip
            assert "convert the model again" in str(error)  # noqa: PT017


def test_a_method_that_writes_to_nothing_is_in_no_ones_way():
    def write(self, x):
        return x.mean()

    model = settled(type("Model", (Writes,), {"write": write})())
    deploy = structrep.reparameterize(copy.deepcopy(model), INPUTS[8])
    assert sum(isinstance(one, nn.Conv2d) for one in deploy.modules()) == 1
    for flip in (False, True):
        assert relative_error(deploy(INPUTS[8], flip), model(INPUTS[8], flip)) < EXACT


def dropped(x, probability, training):
    if probability == 0.0 or not training:
        return x
    kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - probability)
    return x * kept


def dropped_more_often(x, probability, training):
    probability.mul_(2)
    return dropped(x, float(probability), training)


class DropsAPath(nn.Module):
    """What a part goes by is handed to a function: one that writes to what it has made itself, or to that."""

    def __init__(self, drop, probability):
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.skip, self.path = nn.Identity(), drop(probability)

    def forward(self, x):
        skip = self.skip(x)
        return self.n(self.path(self.a(x) + self.b(x)) + skip).relu()


class DropPath(nn.Module):
    def __init__(self, probability):
        super().__init__()
        self.probability = probability

    def forward(self, x):
        return dropped(x, self.probability, self.training)


class DropsMoreOften(DropPath):
    def forward(self, x):
        return dropped_more_often(x, probability=self.probability, training=self.training)


def test_a_part_that_hands_what_it_goes_by_to_a_function():
    check(DropsAPath(DropPath, 0.1), INPUTS[8], merges=1)
    check(DropsAPath(DropsMoreOften, torch.ones(1)), INPUTS[8], merges=0, refused="Unreadable")


def by_a_name_of_two_parts(self, x):
    if x.shape[0] > 2:
        return getattr(self, "ta" + "il")(x)
    return self.n(self.c(x))


@pytest.mark.filterwarnings("ignore::structrep.NothingMerged")
def test_a_method_whose_name_is_put_together():
    model = made(by_a_name_of_two_parts)
    type(model).tail = lambda self, x: self.n(x)
    deploy = structrep.reparameterize(copy.deepcopy(model), INPUTS[8])
    for x in (INPUTS[8], INPUTS[8].repeat(2, 1, 1, 1)):
        assert relative_error(deploy(x), model(x)) < EXACT
