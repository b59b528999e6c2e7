"""A convolution, its norm and a head, in forwards that ask about them; and what a question may cost."""

import copy

import torch
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error

X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class One(nn.Module):
    """A convolution, its norm, and a head behind them."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.flag, self.fast, self.name, self.depth = False, None, "bn", 0
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)])

    def both(self, x):
        return self.bn(self.conv(x))


def one(forward, **more):
    """A model of a forward, with methods and properties beside it."""
    torch.manual_seed(0)
    return settled(type("M", (One,), {"forward": forward, **more})())


def norms(model):
    return sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())


def run(model, x):
    try:
        return model(x)
    except Exception as error:
        return error


def same_or_said(model, deploy, changes, x=X):
    """Both, changed alike, give the same; or what was merged raises an error that says that it was."""
    for change in changes:
        one, other = copy.deepcopy(model), copy.deepcopy(deploy)
        change(one), change(other)
        found = run(other, x)
        if isinstance(found, Exception):
            assert "reparameterized" in str(found), found
        else:
            assert relative_error(found, one(x)) < EXACT


def sets(**values):
    return lambda model: [setattr(model, name, value) for name, value in values.items()]


def merges(model, *changes, left=0, x=X):
    """All but some norms are gone; outputs are right, with an example and without one."""
    for inputs in ((), (x,)):
        deploy = structrep.reparameterize(model, *inputs)
        assert relative_error(deploy(x), model(x)) < EXACT
        assert norms(deploy) == left
        same_or_said(model, deploy, changes, x)


def stays(model, line, *changes, x=X):
    """The norm of `conv` stays, for a line that is shown."""
    for inputs in ((), (x,)):
        plan = structrep.plan(model, *inputs)
        said = [refusal.reason for refusal in plan.refusals]
        assert any(line in one and "test_asked.py:" in one for one in said), said
        deploy = plan.apply()
        assert isinstance(deploy.bn, nn.BatchNorm2d)
        assert relative_error(deploy(x), model(x)) < EXACT
        same_or_said(model, deploy, changes, x)


def walk(self):
    """Of a method that looks at all parts: nothing is asked, if nothing runs it."""
    for part in self.modules():
        part.requires_grad_(isinstance(part, nn.BatchNorm2d))
    return self


def train(self, mode=True):
    nn.Module.train(self, mode)
    for part in self.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    return self


DEVICE = property(lambda self: next(self.parameters()).device)
