"""A model of which forwards ask what they are given, and how it is judged on inputs of all kinds."""

import torch
from torch import nn

import structrep
from tests.support import models
from tests.support.models import noise
from tests.support.truth import relative_error

X = noise(2, 4, 8, 8)
LARGE = noise(2, 4, 12, 12)
SMALL = noise(2, 4, 3, 3)
INPUTS = {
    "as the example": X,
    "large": LARGE,
    "small": SMALL,
    "odd": noise(2, 4, 7, 9),
    "another batch": noise(3, 4, 8, 8),
    "one image": noise(1, 4, 8, 8),
    "no batch": noise(4, 8, 8),
    "empty": noise(0, 4, 8, 8),
    "with gradients": noise(2, 4, 8, 8).requires_grad_(),
    "great": X + 1e7,
    "not contiguous": noise(2, 4, 8, 8).transpose(2, 3),
}


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b, self.m = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), None
        self.m = nn.BatchNorm2d(4)
        self.rows = nn.ModuleList([nn.Conv2d(4, 4, 1, bias=False) for _ in range(4)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(4)])
        self.low = False


def made(forward, base=Base):
    return models.made(forward, base)


def given(x):
    return x.detach().clone().requires_grad_(x.requires_grad)


def judged(model, deploy):
    """The names of inputs on which a deploy model raises, and says what it was made for; it is right on all others."""
    told = []
    for name, x in INPUTS.items():
        try:
            truth = model(given(x))
        except Exception:
            continue
        try:
            found = deploy(given(x))
        except Exception as error:
            if not any(said in str(error) for said in ("reparameterized for", "raises for this input")):
                raise AssertionError(name) from error
            told.append(name)
            continue
        alike = relative_error(found, truth) < 1e-9 if isinstance(truth, torch.Tensor) else found == truth
        assert alike, name
    return told


def converted(model, example=X, merges=None):
    plan = structrep.plan(model, example)
    assert merges is None or len(plan.merges) == merges, plan.refusals
    return plan, plan.apply()
