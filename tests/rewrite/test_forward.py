"""Arguments and outputs of a forward that is written anew: those that it had, of the types that they had."""

import array
import copy
from collections import namedtuple
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structrep
from tests.support.models import Written, bn, conv, made, noise, randomised, settled
from tests.support.truth import EXACT, SAME, call, check, distance, equal, relative_error, says

X, TINY = noise(2, 4, 5, 6), noise(1, 4, 1, 1)


# --- outputs -------------------------------------------------------------------------------------------------


Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    logits: Tensor
    extra: Any = None


class NamedTupleOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.d, self.n = conv(), conv(k=1), bn(4)

    def forward(self, x):
        y = self.n(self.c(x) + self.d(x))
        return Pair(y, F.relu(y))


class DataclassOut(NamedTupleOut):
    def forward(self, x):
        y = self.n(self.c(x) + self.d(x))
        return Output(y, extra={"x": x, "list": [y, (y,)]})


class DictOut(NamedTupleOut):
    def forward(self, x):
        y = self.n(self.c(x) + self.d(x))
        return {"y": y, 3: (x, y.sum()), "none": None, "name": "y"}


class InputOut(NamedTupleOut):
    """Gives its input back beside its output."""

    def forward(self, x):
        return x, self.n(self.c(x) + self.d(x))


class MidOut(NamedTupleOut):
    """Gives an intermediate value back, which no merge may swallow."""

    def forward(self, x):
        a = self.c(x)
        return self.n(a + self.d(x)), a


OUTPUTS = [(NamedTupleOut, 1, ""), (DataclassOut, 1, ""), (DictOut, 1, ""), (InputOut, 1, ""), (MidOut, 0, "Isolated")]


@pytest.mark.parametrize(("make", "merges", "refused"), OUTPUTS)
def test_structured_outputs(make, merges, refused):
    for nested in (False, True):
        model = nn.Sequential(conv(), nn.ReLU(), make()) if nested else make()
        deploy = check(model, X, TINY, merges=merges, refused=refused, conv=nested + 2 - merges)
        ours, theirs = call(deploy, X), call(model, X)
        if isinstance(ours, dict):
            assert list(ours) == list(theirs)
            assert ours["name"] == "y"


def used(m, x):
    pair, out, rest = m.a(x), m.b(x), m.c(x)
    first, _ = pair
    return first * pair.second + out.logits.relu() + rest["y"].abs() + out.extra["list"][1][0]


def test_structured_outputs_used_by_the_parent():
    model = Written(used, a=NamedTupleOut(), b=DataclassOut(), c=DictOut())
    check(model, X, TINY, merges=3, conv=3)


@dataclass
class Doubles:
    y: torch.Tensor

    def __post_init__(self):
        self.y = self.y * 2


@dataclass
class Counts:
    y: torch.Tensor
    n: int = field(init=False, default=3)


class Own(tuple):
    __slots__ = ()


@pytest.mark.parametrize(
    ("make", "refused"),
    [(Doubles, "Unreadable"), (Counts, ""), (lambda y: Own((y,)), "")],
    ids=["post_init", "no_init", "tuple"],
)
def test_results_with_code_of_their_own(make, refused):
    check(made(lambda self, x: make(self.both(x))), X, merges=1, refused=refused)


# --- arguments -----------------------------------------------------------------------------------------------


class Optional(nn.Module):
    """A block whose forward takes an optional mask and a flag."""

    def __init__(self):
        super().__init__()
        self.c, self.d, self.n = conv(), conv(k=1), bn(4)

    def forward(self, x, mask=None, flip=False):
        y = self.n(self.c(x) + self.d(x))
        if mask is not None:
            y = y * mask
        return -y if flip else y


class CallsOptional(nn.Module):
    """Calls it without, with, and with another value."""

    def __init__(self):
        super().__init__()
        self.block = Optional()

    def forward(self, x):
        return self.block(x) + torch.tanh(self.block(x, torch.sigmoid(x))) + torch.tanh(self.block(x, flip=True))


class StarArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.d, self.n = conv(), conv(k=1), bn(4)

    def forward(self, *xs, **more):
        y = self.n(self.c(xs[0]) + self.d(xs[0]))
        return y + xs[1] + more["z"]


class InnerStar(nn.Module):
    """A wrapper that hands everything on."""

    def __init__(self):
        super().__init__()
        self.inner = Optional()

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class KeywordOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.d, self.n = conv(), conv(k=1), bn(4)

    def forward(self, *, image, scale: float = 1.0):
        return self.n(self.c(image) + self.d(image)) / 2


class ListArgument(nn.Module):
    """Takes a list of tensors."""

    def __init__(self):
        super().__init__()
        self.inner = NestedArgument()

    def forward(self, x):
        return self.inner([x, torch.relu(x)], {"k": x * 2})


class NestedArgument(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.d = conv(), conv(k=1)

    def forward(self, pair, named):
        a, b = pair
        return self.c(a) + self.d(a) + b * named["k"]


class Closures(nn.Module):
    """Activations that are lambdas, partials and functions in attributes."""

    def __init__(self):
        super().__init__()
        self.c, self.d, self.n = conv(), conv(k=1), bn(4)
        slope = 0.1
        self.act, self.act2, self.act3 = lambda y: torch.where(y > 0, y, slope * y), partial(F.gelu), torch.tanh

    def forward(self, x):
        return self.act3(self.act2(self.act(self.n(self.c(x) + self.d(x)))))


class DeviceOfInput(nn.Module):
    """Makes constants on the device and in the dtype of its input."""

    def __init__(self):
        super().__init__()
        self.c, self.d = conv(), conv(k=1)

    def forward(self, x):
        one = torch.ones(1, 4, 1, 1, device=x.device, dtype=x.dtype)
        return self.c(x) * one + self.d(x) * 2


def equal_or_says_so(deploy, model, given):
    """A forward that was rewritten for one value of an argument gives an error for another, never wrong numbers."""
    try:
        ours = call(deploy, given)
    except ValueError as error:
        assert "reparameterized for" in str(error)  # noqa: PT017
    else:
        assert distance(ours, call(model, given)) <= EXACT


def test_optional_arguments_stay_optional():
    for example in (None, X):
        model = randomised(Optional())
        deploy = says(structrep.plan(model, example), 1).reparameterize(example)
        assert equal(deploy, model, X)
        for more in ({"mask": X.sigmoid()}, {"flip": True}):
            equal_or_says_so(deploy, model, {"x": X, **more})


def test_optional_arguments_given_inside():
    check(CallsOptional(), X, TINY, merges=0, refused="Shared")


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(k=1), bn(4)

    def forward(self, x, mask=None):
        x = self.conv(x)
        if mask is not None:
            x = x * mask
        return self.norm(x)


def test_an_argument_that_is_none_by_default_may_be_a_tensor():
    """Between a layer and its norm."""
    check(Masked(), X, (X, noise(2, 1, 5, 6)), merges=0, refused="Shared", ways=("alone", "in place"), within=SAME)


@pytest.mark.parametrize("make", [ListArgument, Closures, DeviceOfInput])
def test_written_oddly(make):
    check(make(), X, TINY, merges=1, conv=1)


class Named(StarArguments):
    def forward(self, a, b, c):
        return super().forward(a, b, z=c)


def test_star_arguments():
    inputs = noise(2, 4, 5, 6), noise(2, 4, 5, 6, seed=2), noise(2, 4, 5, 6, seed=3)
    check(Named(), inputs, merges=1, conv=1)
    model = randomised(InnerStar())
    for example in (None, X, {"x": X}, {"x": X, "mask": X.sigmoid()}):
        deploy = says(structrep.plan(model, example), 1).reparameterize(example)
        assert equal(deploy, model, X if example is None else example)
        for given in (X, {"x": X}, {"x": X, "mask": X.sigmoid()}, {"x": X, "flip": True}):
            equal_or_says_so(deploy, model, given)
    alone = randomised(StarArguments())
    deploy = says(structrep.plan(alone), 0, "Untraceable").reparameterize()  # there is no telling how many there are
    assert distance(*(m(*inputs[:2], z=inputs[2]) for m in (deploy, alone))) <= EXACT


def test_keyword_only_arguments():
    given = {"image": X}, {"image": TINY}, {"image": X, "scale": 1.0}
    check(KeywordOnly(), *given, merges=1, conv=1)


def scales(self, x, scales=(1.0, 2.0)):
    return self.a(x) * scales[0] + self.b(x) * scales[1]


def more(self, x, *more):
    y = self.a(x) + self.b(x)
    for z in more:
        y = y * z
    return y


def named(self, x, **named):
    return (self.a(x) + self.b(x)) * named.get("scale", 1.0)


@pytest.mark.parametrize(
    ("forward", "given"),
    [(scales, {"x": X, "scales": (3.0, 4.0)}), (more, (X, X)), (named, {"x": X, "scale": 3.0})],
)
def test_arguments_that_were_constants(forward, given):
    model = made(forward)
    deploy = says(structrep.plan(model), 1).reparameterize()
    assert equal(deploy, model, X)
    equal_or_says_so(deploy, model, given)


def with_tensor_default(self, x, t=torch.ones(1)):  # noqa: B008
    return self.a(x) + self.b(x)


def with_function_default(self, x, act=torch.relu):
    return act(self.a(x) + self.b(x))


@pytest.mark.parametrize("forward", [with_tensor_default, with_function_default])
def test_defaults_that_cannot_be_written_as_text_stay(forward):
    check(made(forward), X, merges=1)


# --- values that no text says ------------------------------------------------------------------------------------


class Shown(float):
    def __repr__(self):
        return f"<{float(self)}>"


class Text(str):
    def __repr__(self):
        return "a text"


ARRAY = np.linspace(0.5, 2.0, 4).reshape(4, 1, 1)
KERNEL = np.ones((4, 4, 1, 1)) / 7
SHOWN, EQUATION = Shown(2.5), Text("bchw,bchw->bchw")
VALUES = {
    "a number of numpy": lambda self, y: y / np.sqrt(8),
    "of another width": lambda self, y: torch.full_like(y, np.float32(2.5)) * y,
    "an integer of numpy": lambda self, y: y.sum(int(np.int64(1))) * np.int64(3),
    "an array": lambda self, y: y * torch.as_tensor(ARRAY),
    "an array of the module": lambda self, y: y * torch.tensor(self.own),
    "an array of Python's": lambda self, y: y * torch.tensor(array.array("d", [1.5])),
    "a kernel": lambda self, y: F.conv2d(y, torch.from_numpy(KERNEL)) + F.conv2d(y, torch.tensor(KERNEL)),
    "a number that is shown otherwise": lambda self, y: y * SHOWN,
    "a text that is shown otherwise": lambda self, y: torch.einsum(EQUATION, y, y),
    "a size in a slice": lambda self, y: y[:, : np.int64(2)],
}


class Holding(nn.Module):
    """Branches in a loop, for which the forward is written anew."""

    def __init__(self):
        super().__init__()
        self.branches, self.n = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)]), nn.BatchNorm2d(4)
        self.own = np.linspace(1.0, 2.0, 5)

    def forward(self, x):
        y = 0
        for branch in self.branches:
            y = y + branch(x)
        return self.last(torch.relu(self.n(y)))


@pytest.mark.parametrize("last", VALUES.values(), ids=VALUES)
def test_values_that_no_text_says(last):
    model = settled(type("Holds", (Holding,), {"last": last})())
    x = noise(2, 4, 6, 5)
    plan = structrep.plan(model, x)
    assert [merge.edit for merge in plan.merges] == ["rewrite"]
    deploy = plan.reparameterize(x)
    assert relative_error(deploy(x), model(x)) < EXACT
    assert relative_error(copy.deepcopy(deploy)(x), model(x)) < EXACT


def test_an_array_that_is_another_later():
    model = settled(type("Holds", (Holding,), {"last": VALUES["an array of the module"]})())
    x = noise(2, 4, 6, 5)
    deploy = structrep.reparameterize(model, x)
    deploy.own = deploy.own * 2
    with pytest.raises(ValueError, match=r"self\.own"):
        deploy(x)
