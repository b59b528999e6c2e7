"""A model with settings of all kinds, which forwards of two branches ask, and what is seen when they change."""

import enum
import inspect
import types

import numpy
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support import models
from tests.support.truth import EXACT, relative_error

X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Kind(enum.Enum):
    SOFT = 1
    HARD = 2


class Config:
    def __init__(self):
        self.eps, self.other, self.inner = 0.5, 1.0, types.SimpleNamespace(k=2.0)


def both(model, x):
    return model.n(model.a(x)) + model.b(x)


class Part(nn.Module):
    def forward(self, x, factor):
        return x.relu() * factor


class Asked(nn.Module):
    """Two branches, a head, and settings of all kinds."""

    of_class = 0.5

    def __init__(self):
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.n, self.idle = nn.BatchNorm2d(4), nn.Identity()
        self.low, self.other, self.factor, self.none, self.name = 0.0, 1.0, 0.5, None, "relu"
        self.part, self.zero_grad = Part(), 0.5
        self.flag, self.export, self.inplace = False, False, False
        self.cfg, self.sizes, self.config = {"t": 0.1, "u": 2.0, "deep": {"k": 1.5}}, [1.0, 2.0], Config()
        self.space, self.act, self.kind = types.SimpleNamespace(k=0.5), F.relu, Kind.SOFT
        self.plain, self.kept_dtype = torch.ones(1, dtype=torch.float64), torch.float64
        self.held = {"t": torch.ones(1, dtype=torch.float64), 3: [torch.ones(1, dtype=torch.float64)]}
        self.config.scale = torch.ones(1, dtype=torch.float64)
        self.drop, self.act_layer, self.tail = nn.Dropout(0.0), nn.Tanh(), nn.ModuleList([nn.Tanh(), nn.Tanh()])
        self.low_tensor = torch.tensor(1.0, dtype=torch.float64)
        self.register_buffer("on", torch.tensor(False))
        self.many, self.array, self.scalar = (
            torch.ones(40, dtype=torch.float64),
            numpy.array([1.0, 2.0]),
            numpy.float32(0.5),
        )
        self.idle.on, self.tail.k, self.named = False, 1.0, nn.ModuleDict({"y": nn.Tanh()})

    @property
    def of_property(self):
        return self.low + 1


def made(forward, base=Asked):
    return models.made(forward, base)


def converted(forward, merges=1, base=Asked):
    model = made(forward, base)
    plan = structrep.plan(model)
    assert len(plan.merges) == merges, plan.refusals
    deploy = plan.apply()
    assert relative_error(deploy(X), model(X)) < EXACT
    return model, deploy


def written(deploy):
    return inspect.getsource(type(deploy).forward)


def differs(model, deploy, *inputs):
    """The error that a deploy model raises; it gives what its model gives, if it raises none."""
    truth = model(*inputs)
    try:
        found = deploy(*inputs)
    except (ValueError, AssertionError) as error:
        if "reparameterized for" not in str(error):
            raise
        return str(error)
    assert found.dtype == truth.dtype
    assert relative_error(found, truth) < (1e-12 if truth.dtype == torch.float64 else 2e-2)
    return None
