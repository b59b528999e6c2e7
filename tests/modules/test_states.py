"""What changes at every call is no constant, wherever it is kept: in cells, defaults, functions, classes, modules."""

import collections
import functools
import inspect
import itertools
import types

import pytest
import torch
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error

# torch 2.6 sets no proxy as a buffer: a forward that does is refused there
SETS_PROXIES = "__torch_function__" in inspect.getsource(nn.Module.__setattr__)
X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
START = 3.0  # what counters hold; a factor of 1 would hide them
LIST, DICT, DEQUE = [START], {"k": START}, collections.deque([START])
SPACE = types.ModuleType("space")
SPACE.k = START
NUMBER = START
ITERATOR = itertools.count(4)


class Counts:
    k = START

    def __call__(self):
        self.k += 1
        return self.k

    @classmethod
    def of_class(cls):
        cls.k += 1
        return cls.k

    @staticmethod
    def of_nothing():
        Counts.k += 1
        return Counts.k


OBJECT = Counts()


def of_list():
    LIST[0] += 1
    return LIST[0]


def of_dict():
    DICT["k"] += 1
    return DICT["k"]


def of_deque():
    DEQUE[0] += 1
    return DEQUE[0]


def of_module():
    SPACE.k += 1
    return SPACE.k


def of_iterator():
    return float(next(ITERATOR))


def of_object():
    return OBJECT()


def of_function():
    of_function.k += 1
    return of_function.k


of_function.k = START


def of_default(_count=[START]):  # noqa: B006
    _count[0] += 1
    return _count[0]


def of_keyword(*, _count=[START]):  # noqa: B006
    _count[0] += 1
    return _count[0]


def of_global():
    global NUMBER
    NUMBER += 1
    return NUMBER


def of_name():
    return of_list()


@functools.wraps(of_list)
def of_wrapped():
    return of_list()


def counting():
    number = START

    def step():
        nonlocal number
        number += 1
        return number

    return step


of_cell = counting()


def yielding():
    number = START
    while True:
        number += 1
        yield number


GENERATOR = yielding()


def of_generator():
    return next(GENERATOR)


def reset():
    global NUMBER, ITERATOR, GENERATOR
    NUMBER, ITERATOR, GENERATOR = START, itertools.count(4), yielding()
    LIST[0] = DICT["k"] = DEQUE[0] = SPACE.k = OBJECT.k = Counts.k = of_function.k = START
    Base.k = START
    Base.many[0] = of_default.__defaults__[0][0] = of_keyword.__kwdefaults__["_count"][0] = START
    Base.by_default.__defaults__[0][0] = START
    of_cell.__closure__[0].cell_contents = START


class Base(nn.Module):
    k, many = START, [START]

    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.step, self.object, self.steps = None, Counts(), [of_list]

    def both(self, x):
        return self.n(self.c(x))

    @staticmethod
    def of_static():
        return of_list()

    @classmethod
    def of_class(cls):
        Base.k += 1
        return Base.k

    @property
    def of_property(self):
        return of_list()

    def by_default(self, x, _count=[START]):  # noqa: B006
        _count[0] += 1
        return self.both(x) * _count[0]

    def by_class(self, x):
        Base.k += 1
        return self.both(x) * Base.k

    def by_entry(self, x):
        self.many[0] += 1
        return self.both(x) * self.many[0]

    def by_global(self, x):
        global NUMBER
        NUMBER += 1
        return self.both(x) * NUMBER

    def by_nested(self, x):
        def scaled(y):
            return y * of_list()

        return scaled(self.both(x))


FUNCTIONS = (of_list, of_dict, of_deque, of_module, of_iterator, of_object, of_function, of_default, of_keyword,
             of_global, of_name, of_wrapped, of_cell, of_generator, Counts.of_class, Counts.of_nothing,
             functools.partial(of_default), OBJECT, lambda: of_list())  # fmt: skip
BY_NAME = {
    "static": lambda self, x: self.both(x) * self.of_static(),
    "class": lambda self, x: self.both(x) * self.of_class(),
    "property": lambda self, x: self.both(x) * self.of_property,
    "named class": lambda self, x: self.both(x) * Counts.of_class(),
    "listed": lambda self, x: self.both(x) * self.steps[0](),
    **{name: value for name, value in vars(Base).items() if name.startswith("by_")},
}


def counted(model):
    reset()
    with torch.no_grad():
        return torch.stack([model(X) for _ in range(3)])


def judge(cls, change, inputs):
    torch.manual_seed(0)
    model = settled(type("Made", (Base,), cls)())
    change(model)
    reset()
    deploy = structrep.reparameterize(model, *inputs)
    assert isinstance(deploy.n, nn.Identity)  # the merge of modules stands
    assert relative_error(counted(deploy), counted(model)) < EXACT


@pytest.mark.parametrize("forward", BY_NAME.values(), ids=BY_NAME)
def test_what_code_changes(forward):
    for inputs in ((), (X,)):
        judge({"forward": forward}, lambda model: None, inputs)


@pytest.mark.parametrize("step", FUNCTIONS, ids=lambda one: getattr(one, "__qualname__", type(one).__name__))
def test_what_a_function_among_the_attributes_changes(step):
    for inputs in ((), (X,)):
        forward = {"forward": lambda self, x: self.both(x) * self.step()}
        judge(forward, lambda model: setattr(model, "step", step), inputs)


def test_a_counter_that_does_not_move_is_a_constant():
    torch.manual_seed(0)
    model = settled(type("Made", (Base,), {"forward": lambda self, x: self.both(x) * LIST[0] * self.object.k})())
    reset()
    deploy = structrep.reparameterize(model)
    assert type(deploy) is not type(model)  # written anew, with the factor in the layer
    assert "LIST" in inspect.getsource(type(deploy).forward)
    assert relative_error(deploy(X), model(X)) < EXACT


def test_a_buffer_that_adds_up():
    for inputs in ((), (X,)):

        class Sums(Base):
            def __init__(self):
                super().__init__()
                self.register_buffer("total", torch.zeros(1, 8, 1, 1))

            def forward(self, x):
                y = self.both(x)
                self.total += y.mean((0, 2, 3), keepdim=True)
                return y + self.total

        torch.manual_seed(0)
        model = settled(Sums())
        plan = structrep.plan(model, *inputs)
        assert len(plan.merges) == SETS_PROXIES
        deploy = plan.apply()
        assert isinstance(deploy.n, nn.Identity) == SETS_PROXIES
        assert relative_error(counted(deploy), counted(model)) < EXACT
        assert relative_error(deploy.total, model.total) < EXACT


def set_between(self, x):
    y = self.c(x)
    self.last = y
    return self.n(y)


def added_between(self, x):
    y = self.c(x)
    self.last += y
    return self.n(y)


def set_behind(self, x):
    y, old = self.both(x), self.last
    self.last = y
    return y + old


@pytest.mark.parametrize("forward", [set_between, added_between, set_behind])
def test_a_buffer_that_is_given_a_value(forward):
    torch.manual_seed(0)
    model = type("Made", (Base,), {"forward": forward})()
    model.register_buffer("last", torch.zeros(2, 8, 7, 6))
    settled(model)
    plan = structrep.plan(model)
    assert len(plan.merges) == (forward is set_behind and SETS_PROXIES)
    deploy = plan.apply()
    assert relative_error(counted(deploy), counted(model)) < EXACT
    assert relative_error(deploy.last, model.last) < EXACT
