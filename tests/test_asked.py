"""A question about a layer keeps a merge away if a line that ran has asked it, and not for what code might ask.

Each program says in words what it asks. Either all merges, or the layer that is asked about stays, and the refusal shows
the line that asked. In any case the outputs are those of the model, and stay so, or an error says why, when the model
and what it became are changed in the same way later.
"""

import copy

import pytest
import torch
from torch import nn

import structrep
from tests.models import relative_error, settled

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
            assert relative_error(found, one(x)) < 1e-12


def sets(**values):
    return lambda model: [setattr(model, name, value) for name, value in values.items()]


def merges(model, *changes, left=0, x=X):
    """All but some norms are gone; outputs are right, with an example and without one."""
    for inputs in ((), (x,)):
        deploy = structrep.reparameterize(model, *inputs)
        assert relative_error(deploy(x), model(x)) < 1e-12
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
        assert relative_error(deploy(x), model(x)) < 1e-12
        same_or_said(model, deploy, changes, x)


# --- what asks nothing ------------------------------------------------------------------------------------------------


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


class BeforeConv(nn.Module):
    """A norm and nothing else, which is merged into a convolution of somebody else's."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(x.to(next(self.parameters()).device))


QUIET = {
    "a method that is never called": one(lambda self, x: getattr(self, "bn")(self.conv(x)), freeze=walk),  # noqa: B009
    "a computed name": one(lambda self, x: getattr(self, self.name)(self.conv(x)), init_weights=walk),
    "train": one(lambda self, x: getattr(self, self.name)(self.conv(x)), train=train),
    "a property that hands out a part": one(
        lambda self, x: self.norm(self.conv(x)), norm=property(lambda self: getattr(self, self.name)), freeze=walk
    ),
    "a method that hands out a part": one(lambda self, x: self.norm()(self.conv(x)), norm=lambda self: self.bn),
    "parts by number": one(lambda self, x: self.both(x) + 0 * self.layers[1](self.layers[0](x))[:, :, 1:-1, 1:-1]),
}


def loop_over_children(self, x):
    for part in self.layers.children():
        x = part(x)
    return self.both(x)


def loop_over_named_children(self, x):
    for _, part in self.layers.named_children():
        x = part(x)
    return self.both(x)


def loop_and_ask_of_others(self, x):
    for part in self.layers:
        if isinstance(part, nn.Upsample):
            x = x + 1
        x = part(x)
    return self.both(x)


QUIET["a loop that calls"] = one(loop_over_children)
QUIET["a loop over names and parts"] = one(loop_over_named_children)
QUIET["a class that no merge gives or takes"] = one(loop_and_ask_of_others)


@pytest.mark.parametrize("program", QUIET)
def test_what_is_not_asked_keeps_nothing_away(program):
    merges(QUIET[program], left=0 if "loop" in program or "parts" in program or "class" in program else 1)
