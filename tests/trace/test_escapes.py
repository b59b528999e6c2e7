"""What a forward gives to something that is not its module's is looked at later: it stays what the model gives, and a
trace leaves nothing there."""

import collections
import gc
import queue
import sys

import pytest
import torch
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import CLOSE, relative_error

X = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SEEN, BY_NAME, QUEUE, LATEST = [], {}, queue.Queue(), collections.deque(maxlen=2)
LAST = None


class Store:
    last = None


STORE = Store()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.callback = SEEN.append

    def forward(self, x):
        y = self.a(x)
        self.give(y, x)
        return self.act(self.n(y))


def to_a_name(self, y, x):
    global LAST
    LAST = y


def to_a_list(self, y, x):
    global SEEN
    SEEN += [y]


GIVES = {
    "append": (lambda self, y, x: SEEN.append(y), lambda: SEEN[-1]),
    "a list that grows": (to_a_list, lambda: SEEN[-1]),
    "a tuple in a list": (lambda self, y, x: SEEN.append((x, y)), lambda: SEEN[-1][1]),
    "a name of the file": (to_a_name, lambda: LAST),
    "a dict": (lambda self, y, x: BY_NAME.__setitem__("y", y), lambda: BY_NAME["y"]),
    "update": (lambda self, y, x: BY_NAME.update(y=y), lambda: BY_NAME["y"]),
    "a queue": (lambda self, y, x: QUEUE.put(y), lambda: QUEUE.queue[-1]),
    "a deque": (lambda self, y, x: LATEST.append(y), lambda: LATEST[-1]),
    "an object": (lambda self, y, x: setattr(STORE, "last", y), lambda: STORE.last),
    "a class": (lambda self, y, x: setattr(Store, "last", y), lambda: Store.last),
    "another module": (lambda self, y, x: setattr(self.act, "seen", y), lambda: None),
    "a callback": (lambda self, y, x: self.callback(y), lambda: SEEN[-1]),
    "by way of a module": (lambda self, y, x: sys.modules[__name__].SEEN.append(y), lambda: SEEN[-1]),
}


@pytest.mark.parametrize("name", GIVES)
def test_what_is_given_away_stays(name):
    for example in ((), (X,)):
        torch.manual_seed(0)
        give, got = GIVES[name]
        model = settled(type("Gives", (Net,), {"give": give})())
        gc.unfreeze()  # what is frozen is not found, and has to stay right all the same
        plan = structrep.plan(model, *example)
        assert not any(
            isinstance(one, torch.fx.Proxy) for one in (*SEEN, *BY_NAME.values(), *LATEST, *QUEUE.queue, LAST)
        )
        assert not plan.merges
        assert "outlives the forward" in plan.refusals[0].reason
        deploy = plan.apply()
        with torch.no_grad():
            assert relative_error(deploy(X), model(X)) < CLOSE
            given = getattr(deploy.act, "seen", None) if name == "another module" else (deploy(X), got())[1]
            assert relative_error(given, model.a(X)) < CLOSE


def test_what_the_collector_does_not_see():
    torch.manual_seed(0)
    model = settled(type("Gives", (Net,), {"give": GIVES["append"][0]})())
    gc.freeze()
    try:
        assert not structrep.plan(model).merges
    finally:
        gc.unfreeze()


class Inside(Net):
    def forward(self, x):
        y = self.act(self.n(self.a(x)))
        SEEN.append(y)
        return y


def test_what_a_merge_gives_may_be_given_away():
    torch.manual_seed(0)
    model = settled(Inside())
    plan = structrep.plan(model, X)
    assert len(plan.merges) == 1
    deploy = plan.apply()
    with torch.no_grad():
        assert relative_error(deploy(X), model(X)) < CLOSE
        SEEN.clear()
        deploy(X)
        assert relative_error(SEEN[-1], model(X)) < CLOSE


class ToAnArgument(Net):
    def forward(self, x, out=None):
        y = self.a(x)
        if out is not None:
            out.append(y)
        return self.act(self.n(y))


def test_an_argument_that_is_given_later():
    torch.manual_seed(0)
    model = settled(ToAnArgument())
    deploy = structrep.plan(model, X).apply()
    assert relative_error(deploy(X), model(X)) < CLOSE
    with pytest.raises(ValueError, match="reparameterized for out=None"):
        deploy(X, [])


class Remembers(Net):
    """A value that only the frames of a generator hold when all is done is held by nobody."""

    def forward(self, x):
        first, second = (one for one in x.chunk(2, 1))
        y = self.a(torch.cat([first, second], 1))
        return self.act(self.n(y))


def test_what_nobody_holds_any_more_merges():
    torch.manual_seed(0)
    model = settled(Remembers())
    plan = structrep.plan(model, X)
    assert len(plan.merges) == 1
    assert relative_error(plan.apply()(X), model(X)) < CLOSE
