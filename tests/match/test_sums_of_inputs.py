"""A norm behind a sum of layers of several inputs: it goes into each of them, its shift into one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.models import Written, settled
from tests.support.truth import check

X = torch.randn(2, 4, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def net(run):
    return settled(
        Written(
            run,
            a=nn.Conv2d(4, 5, 3, padding=1), b=nn.Conv2d(4, 5, 1, bias=False), c=nn.Conv2d(4, 5, 1),
            n=nn.BatchNorm2d(5), m=nn.BatchNorm2d(5), late=nn.Conv2d(5, 3, 1),
        )
    )  # fmt: skip


def other(x):
    return torch.tanh(x)


def half(x):
    return torch.tanh(F.avg_pool2d(x, 2))


RUNS = {
    "two": lambda s, x: s.n(s.a(x) + s.b(other(x))).relu(),
    "difference": lambda s, x: s.n(s.b(other(x)) - s.a(x)).relu(),
    "shift into the second": lambda s, x: s.n(-s.b(other(x)) + s.a(x)).relu(),
    "three": lambda s, x: s.n(s.a(x) + s.b(other(x)) + s.c(x.sigmoid())).relu(),
    "upsampled": lambda s, x: s.n(s.a(x) + F.interpolate(s.b(half(x)), scale_factor=2)).relu(),
    "norm of a part": lambda s, x: s.n(s.m(s.a(x)) + s.b(other(x))).relu(),
    "bicubic": lambda s, x: s.n(s.a(x) + F.interpolate(s.b(half(x)), scale_factor=2, mode="bicubic")).relu(),
    "negative": lambda s, x: s.n(-s.a(x) - s.b(other(x))).relu(),
    "dropout": lambda s, x: s.n(F.dropout(s.a(x) + s.b(other(x)), training=False)).relu(),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_each_layer_takes_the_scale(run):
    check(net(run), X, merges=3 if run is RUNS["three"] else 2, norm=0)


STAY = {
    "an activation of a part": lambda s, x: s.n(s.a(x).relu() + s.b(other(x))).relu(),
    "a part that is used elsewhere": lambda s, x: (lambda y: s.n(y + s.b(other(x))).relu() + y.tanh())(s.a(x)),
    "the sum is used elsewhere": lambda s, x: (lambda y: s.n(y).relu() + y.tanh())(s.a(x) + s.b(other(x))),
    "an input": lambda s, x: s.n(s.a(x) + F.pad(other(x), (0, 0, 0, 0, 0, 1))).relu(),
    "one layer twice": lambda s, x: s.n(s.a(x) + s.a(other(x))).relu(),
    "twice a part": lambda s, x: s.n(torch.sub(s.a(x) - s.c(x.sigmoid()), s.b(other(x)), alpha=2) - s.a(x)).relu(),
}


@pytest.mark.parametrize("run", STAY.values(), ids=STAY)
def test_the_norm_stays(run):
    refused = "Shared" if "twice" in next(name for name, one in STAY.items() if one is run) else "Isolated"
    check(net(run), X, merges=0, refused=refused, norm=1)


def test_of_one_input_they_are_one_layer():
    check(net(lambda s, x: s.n(s.a(x) + s.b(x)).relu()), X, merges=1, conv=1, norm=0)


def test_those_of_one_input_are_one_layer_beside_another():
    check(net(lambda s, x: s.n(s.a(x) + s.c(x) + s.b(other(x))).relu()), X, merges=2, conv=2, norm=0)
