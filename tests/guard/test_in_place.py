"""Values that are written to, beside a merge and inside of one: by name, by a view, and in what the caller gave."""

import functools
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.models import Two, Written, bn, conv, made, noise
from tests.support.truth import SAME, check

X = noise(2, 4, 6, 7)


def plus(a, b):
    a += b
    return a


def augmented(m, x):
    """y += b in a forward that is rewritten for another merge beside it."""
    y = torch.tanh(m.c(x))
    z = y
    y += torch.sigmoid(x)
    return z * (m.d(x) + m.e(x))


def augmented_product(m, x):
    y = torch.tanh(m.c(x))
    z = y
    y *= torch.sigmoid(x)
    return z + torch.relu(m.d(x) + m.e(x))


def augmented_input(m, x):
    """The caller's tensor changes too."""
    x += 1
    return m.d(x) + m.e(x)


def augmented_slice(m, x):
    y = torch.tanh(m.c(x))
    y[:, 1:] += torch.sigmoid(x[:, 1:])
    y[:, :1] *= 2
    return y * (m.d(x) + m.e(x))


# How many merges there are, for what others are refused, and the model.
IN_PLACE = {
    "+= beside a merge": (1, "", lambda: Written(augmented, c=conv(), d=conv(), e=conv(k=1))),
    "*= beside a merge": (1, "", lambda: Written(augmented_product, c=conv(), d=conv(), e=conv(k=1))),
    "+= on the input beside a merge": (1, "Inexact", lambda: Written(augmented_input, d=conv(), e=conv(k=1))),
    "+= on a slice beside a merge": (1, "", lambda: Written(augmented_slice, c=conv(), d=conv(), e=conv(k=1))),
    "addend read later": (1, "",
        lambda: Written(lambda m, x: (y := m.c(x), plus(y, m.d(x)), y * 2)[-1], c=conv(), d=conv(k=1))),
    "addend read before": (0, "", lambda: Written(
        lambda m, x: (y := m.c(x), z := y * 2, plus(y, m.d(x)) + F.relu(z))[-1], c=conv(), d=conv(k=1))),
    "alias of the addend read later": (0, "", lambda: Written(
        lambda m, x: (y := m.c(x), z := y.view(y.shape), plus(y, m.d(x)), z)[-1], c=conv(), d=conv(k=1))),
    "flattened alias read later": (0, "", lambda: Written(
        lambda m, x: (y := m.c(x), z := y.flatten(1), plus(y, m.d(x)), z)[-1], c=conv(), d=conv(k=1))),
    "detached alias read later": (0, "", lambda: Written(
        lambda m, x: (y := m.c(x), z := y.detach(), plus(y, m.d(x)), z)[-1], c=conv(), d=conv(k=1))),
    "identity alias read later": (0, "", lambda: Written(
        lambda m, x: (y := m.c(x), z := m.i(y), plus(y, m.d(x)), z)[-1], c=conv(), d=conv(k=1), i=nn.Identity())),
    "relu on the input between branches": (0, "Mutated", lambda: Written(
        lambda m, x: (t := torch.tanh(x), a := m.c(t), F.relu(t, inplace=True), a + m.d(t))[-1],
        c=conv(), d=conv(k=1))),
    "relu on the input after all branches": (0, "Mutated", lambda: Written(
        lambda m, x: (t := torch.tanh(x), a := m.c(t), b := m.d(t), F.relu_(t), a + b)[-1], c=conv(), d=conv(k=1))),
    "relu module on the input between branches": (0, "", lambda: Written(
        lambda m, x: (t := torch.tanh(x), a := m.c(t), r := m.r(t), a + m.d(r))[-1],
        c=conv(), d=conv(k=1), r=nn.ReLU(inplace=True))),
    "relu on an alias of the input between branches": (0, "Mutated", lambda: Written(
        lambda m, x: (t := torch.tanh(x), v := t.view(t.shape), a := m.c(t), v.relu_(), a + m.d(t))[-1],
        c=conv(), d=conv(k=1))),
    "slice of the input written between branches": (0, "Mutated", lambda: Written(
        lambda m, x: (t := torch.tanh(x), a := m.c(t), operator.setitem(t, (slice(None), 0), 0.0), a + m.d(t))[-1],
        c=conv(), d=conv(k=1))),
    "skip added into the input": (0, "Mutated", lambda: Written(
        lambda m, x: (t := torch.tanh(x), plus(t, m.c(t)), t)[-1], c=conv())),
    "skip added into the input, which is read later": (0, "Mutated", lambda: Written(
        lambda m, x: (t := torch.tanh(x), y := m.d(t), plus(t, m.c(t)), y * t)[-1], c=conv(), d=conv(k=1))),
    "relu on the conv's output, which the norm reads": (0, "Isolated", lambda: Written(
        lambda m, x: (y := m.c(x), y.relu_(), m.n(y))[-1], c=conv(), n=bn(4))),
    "relu whose result is thrown away": (0, "Isolated", lambda: Written(
        lambda m, x: (y := m.c(x), F.relu(y), m.n(y))[-1], c=conv(), n=bn(4))),
    "norm's output written, conv's output read": (1, "", lambda: Written(
        lambda m, x: (y := m.n(m.c(x)), z := y.relu_(), y + z)[-1], c=conv(), n=bn(4))),
    "mul_ by a constant": (0, "Isolated",
        lambda: Written(lambda m, x: (y := m.c(x), y.mul_(2.0), m.n(y))[-1], c=conv(), n=bn(4))),
    "add_ with alpha": (1, "", lambda: Written(lambda m, x: m.c(x).add_(m.d(x), alpha=-0.5), c=conv(), d=conv(k=1))),
    "out= argument": (0, "", lambda: Written(
        lambda m, x: (y := m.c(x), torch.add(y, m.d(x), out=y), y)[-1], c=conv(), d=conv(k=1))),
    "copy_ into the conv's output": (0, "Isolated", lambda: Written(
        lambda m, x: (y := m.c(x), y.copy_(m.d(x)), m.n(y))[-1], c=conv(), d=conv(k=1), n=bn(4))),
    "the model's own input": (0, "Mutated", lambda: Written(
        lambda m, x: (a := m.c(x), x.relu_(), a + m.d(x))[-1], c=conv(), d=conv(k=1))),
    "accumulated from 0": (1, "", lambda: Written(
        lambda m, x: functools.reduce(plus, [m.c(x), m.d(x)], 0), c=conv(), d=conv(k=1))),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name):
    merges, refused, make = IN_PLACE[name]
    check(make(), X, merges=merges, refused=refused)


def copy_then_write(self, x):
    y = x * 1
    y += 1.0
    return (self.a(x) + self.b(x)).relu() + y


def write_a_sum_with_zero(self, x):
    t = torch.tanh(x)
    y = t + 0
    y.add_(1.0)
    return (self.a(t) + self.b(t)) * y


def power(self, x):
    h = x.tanh()
    k = h
    h **= 2
    return self.a(k) + self.b(k)


def floor(self, x):
    h = x.tanh() * 9
    k = h
    h //= 2
    return torch.relu(self.a(k) + self.b(k))


def write_a_copy_of_a_view(self, x):
    t = torch.tanh(x)
    y = t.chunk(2, 1)[0] + 0
    y[:, 0] = 1.0
    return (self.a(t) + self.b(t)).relu() * y.sum()


@pytest.mark.parametrize("forward", [write_a_copy_of_a_view, copy_then_write, write_a_sum_with_zero, power, floor])
def test_values_written_in_place(forward):
    check(made(forward), X, merges=1)


class WritesToItsInput(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.conv, self.part = nn.Conv2d(4, 4, 1), part

    def forward(self, x):
        y = x[:, :4] if self.part else x
        y += y
        return self.conv(y)


@pytest.mark.parametrize("part", [False, True])
def test_what_is_written_to_the_input_goes_on_being_written(part):
    check(WritesToItsInput(part), X, merges=0, refused="Mutated", within=SAME)


# --- views and what they are of -----------------------------------------------------------------------------


def first(x):
    if x.max() > 1e6:
        return x.relu()
    return x[:, :2]


VIEWS = {
    "type_as": lambda x: x.type_as(x),
    "dropout2d": lambda x: F.dropout2d(x, 0.5, False),
    "tensor_split": lambda x: x.tensor_split(2, 1)[0],
    "kept whole": first,
}


BASES = {
    "view": lambda x: x.view(2, 4, 6, 7),
    "detach": lambda x: x.detach(),
    "slice": lambda x: x[:, :],
    "contiguous": lambda x: x.contiguous(),
}


class WritesToAView(Two):
    def __init__(self, view):
        super().__init__()
        self.view = VIEWS[view]

    def forward(self, x):
        x = x * 1.5
        view = self.view(x)
        p = self.a(x)
        view.mul_(2)
        return p + self.b(x)


class WritesToWhatAViewIsOf(Two):
    def __init__(self, view):
        super().__init__()
        self.view = BASES[view]

    def forward(self, x):
        x = x * 1.5
        z = self.view(x)
        p = self.a(z)
        x.mul_(2)
        return p + self.b(z)


@pytest.mark.parametrize(
    ("cls", "view"), [*((WritesToAView, v) for v in VIEWS), *((WritesToWhatAViewIsOf, v) for v in BASES)]
)
def test_writes_by_way_of_views(cls, view):
    check(cls(view), X, merges=0, refused="Mutated Untraceable" if view == "kept whole" else "Mutated", ways=("alone",))


class WritesToItsList(nn.Module):
    """As heads of detectors do, with the list of maps that they are given; and it cannot be followed."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), DoublesInPlace()

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.head([x, x + 1])


class DoublesInPlace(nn.Module):
    def forward(self, maps):
        for index in range(len(maps)):
            maps[index] = maps[index] * 2
        return maps if maps[0].sum() > 0 else maps[::-1]


def test_a_part_that_cannot_be_followed_may_write_to_a_list_that_it_is_given():
    deploy = check(WritesToItsList(), noise(1, 3, 8, 8), merges=1, refused="Costlier", ways=("with an example",))
    assert isinstance(deploy.norm, nn.Identity)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


class WrittenBesideASum(nn.Module):
    """A sum with 0 is a value of its own, and what it is made of is written to afterwards."""

    def __init__(self, way):
        super().__init__()
        self.first, self.second, self.third = Pair(), Pair(), Pair()
        self.drop, self.act, self.way = nn.Identity(), nn.ReLU(inplace=True), way

    def forward(self, x):
        if self.way == "branches":  # for which the forward is written anew
            x = self.second(x) + self.third(x)
        a = self.first(x)
        if self.way == "view":
            z = 0 + a.view(a.shape)
        elif self.way == "dropout":
            z = 0 + F.dropout(a, 0.5, self.training)
        else:
            z = 0 + self.drop(a)
        self.act(a)
        return z


@pytest.mark.parametrize(("way", "merges"), [("branches", 2), ("view", 5), ("dropout", 5), ("identity", 5)])
def test_a_sum_with_zero_stays_where_its_source_is_written_to(way, merges):
    branches = WrittenBesideASum("branches")
    model = branches if way == "branches" else nn.Sequential(branches, WrittenBesideASum(way))
    check(model, X, merges=merges)
