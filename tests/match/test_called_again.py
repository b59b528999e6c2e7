"""A norm that is called several times, each time behind another layer: it goes into all of these, or stays."""

import pytest
from torch import nn

import structrep
from tests.support.models import Written, bn, conv, noise, randomised
from tests.support.truth import EXACT, call, check, distance, says

X = noise(2, 4, 6, 7)


def model(run, **more):
    return Written(run, a=conv(4, 6), b=conv(4, 6, k=1), n=bn(6), **more)


MERGED = {
    "two outputs": (2, lambda m, x: m.n(m.a(x)).relu() - m.n(m.b(x)).sigmoid()),
    "one behind another": (2, lambda m, x: m.n(m.c(m.n(m.a(x)).relu())), dict(c=conv(6, 6))),
    "three": (3, lambda m, x: m.n(m.a(x)).relu() * m.n(m.b(x)).relu() * m.n(m.c(x)), dict(c=conv(4, 6))),
    "one sum": (1, lambda m, x: m.n(m.a(x)) + m.n(m.b(x))),
    "a sum, and a layer": (2, lambda m, x: m.n(m.a(x) + m.b(x)).relu() + m.n(m.c(x)), dict(c=conv(4, 6))),
}


@pytest.mark.parametrize(("merges", "run", "more"), [(*one, {})[:3] for one in MERGED.values()], ids=MERGED)
def test_it_goes_into_each(merges, run, more):
    deploy = check(model(run, **more), X, merges=merges, norm=0)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in deploy.modules())


def test_it_stays_where_two_blocks_hold_it():
    class Tower(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.conv, self.norm = conv(4, 4), norm

        def forward(self, x):
            return self.norm(self.conv(x)).relu()

    norm = bn(4)
    check(nn.Sequential(Tower(norm), Tower(norm)), X, merges=0, refused="Shared")


STAYS = {
    "behind an activation": lambda m, x: m.n(m.a(x)) * m.n(m.b(x).relu()),
    "of a value that is seen": lambda m, x: (y := m.b(x)).relu() + m.n(m.a(x)).relu() * m.n(y),
    "in a block that is called twice": lambda m, x: m.n(m.a(x)) * m.n(m.a(x + 1)) * m.n(m.b(x)),
}


@pytest.mark.parametrize("run", STAYS.values(), ids=STAYS)
def test_it_stays_where_one_does_not_take_it(run):
    deploy = check(model(run), X, merges=0, refused="Shared", ways=("alone", "in place"))
    assert isinstance(deploy.n, nn.BatchNorm2d)


def test_it_stays_where_its_weight_is_asked_for():
    net = model(lambda m, x: m.n(m.a(x)).relu() * m.n(m.b(x)) * m.n.weight.sum())
    check(net, X, merges=0, refused="Shared")


def test_it_stays_where_it_is_called_in_two_graphs():
    class Method(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n = conv(), conv(k=1), bn(4)

        def forward(self, x):
            return self.n(self.a(x)).relu() * self.n(self.b(x))

        def forward_features(self, x):
            return self.n(x)

    check(Method(), X, merges=0, refused="Shared")

    class Alike(Method):
        def forward_features(self, x):
            return self.n(self.b(x)) + self.n(self.a(x))

    deploy = check(Alike(), X, merges=2, norm=0)
    model = randomised(Alike())
    assert distance(call(deploy, X, "forward_features"), call(model, X, "forward_features")) < EXACT

    class Crossed(Method):
        def forward_features(self, x):
            return self.n(self.b(self.a(x)))

    check(Crossed(), X, merges=0, refused="Shared")


def test_a_block_called_twice_whose_norm_is_run_apart():
    """The second call is no ground for what another forward gives to the norm."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n = conv(), bn(4)

        def forward(self, x):
            return self.n(self.a(x)).relu()

        def forward_norm(self, x):
            return self.n(x)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(self.block(x))

    check(Twice(), X, merges=0, refused="Shared")


def test_all_stay_where_one_may_not_be_merged():
    """A layer that someone watches keeps its own values, and the other then has no norm to give away."""
    net = randomised(model(lambda m, x: m.n(m.a(x)).relu() * m.n(m.b(x))))
    net.b.register_forward_hook(lambda *_: None)
    says(structrep.plan(net), 0, "Hooked Shared")
