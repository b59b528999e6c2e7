"""Convolutions of one tap over transposed tokens: Linears of these."""

import pytest
from torch import nn

from tests.support.models import Written, noise
from tests.support.truth import check

X, Y = noise(2, 7, 16), noise(3, 5, 16)


def tokens(run, **more):
    layers = dict(a=nn.Conv1d(16, 4, 1), b=nn.Conv1d(4, 16, 1), l=nn.Linear(16, 12), n=nn.BatchNorm1d(16))
    return Written(run, **{**layers, **more})


def _adapter(m, x):
    y = x.transpose(1, 2)
    return (m.b(m.a(y)) + y).transpose(1, 2)


MERGED = {
    "RepAdapter, before a Linear": lambda m, x: m.l(_adapter(m, x)),
    "behind one": lambda m, x: _adapter(m, m.wide(x)),
    "a sum with a Linear": lambda m, x: m.wide(x) + 0.5 * m.c(x.transpose(1, 2)).transpose(1, 2),
    "with a norm": lambda m, x: m.l(m.n(m.c(x.permute(0, 2, 1))).permute(0, 2, 1)),
    "in groups": lambda m, x: m.l(m.g(x.transpose(1, 2)).transpose(1, 2)),
    "two in a row": lambda m, x: m.l(_adapter(m, m.c(x.transpose(1, 2)).transpose(1, 2))),
}


@pytest.mark.parametrize("run", MERGED.values(), ids=MERGED)
def test_one_linear(run):
    more = dict(wide=nn.Linear(16, 16), c=nn.Conv1d(16, 16, 1), g=nn.Conv1d(16, 16, 1, groups=4))
    check(tokens(run, **more), X, Y, merges=1, conv=0, linear=1, norm=0)


STAYS = {
    "more taps": ("", lambda m, x: m.l(m.wide(x.transpose(1, 2)).transpose(1, 2))),
    "a stride": ("", lambda m, x: m.l(m.slow(x.transpose(1, 2)).transpose(1, 2))),
    "an activation within": ("", lambda m, x: m.l(m.c(x.transpose(1, 2)).relu().transpose(1, 2))),
    "the adapter alone": ("Costlier", lambda m, x: _adapter(m, x).relu()),
    "a value that is read": (
        "",
        lambda m, x: (z := m.c(x.transpose(1, 2))).relu() * m.l(z.transpose(1, 2)).transpose(1, 2),
    ),
}


@pytest.mark.parametrize(("kind", "run"), STAYS.values(), ids=STAYS)
def test_convolutions_stay(kind, run):
    more = dict(
        wide=nn.Conv1d(16, 16, 3, padding=1), slow=nn.Conv1d(16, 16, 1, stride=2), c=nn.Conv1d(16, 16, 1),
        l=nn.Linear(16, 16),
    )  # fmt: skip
    check(tokens(run, **more), X, merges=0, refused=kind, linear=kind == "")
