"""Models in which merging naively gives wrong numbers, by what makes them wrong."""

import math
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Written(nn.Module):
    """A module whose layers and forward are given where it is used: `forward(self, x, ...)` as a function."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def conv(c1=4, c2=4, k=3, **more):
    return nn.Conv2d(c1, c2, k, **{"padding": k // 2 if isinstance(k, int) else 0, **more})


bn = nn.BatchNorm2d


# --- sharing -----------------------------------------------------------------------------------------------


def tied_weights():
    model = Written(lambda m, x: m.n1(m.a(x)) + F.relu(m.n2(m.b(x))), a=conv(), b=conv(), n1=bn(4), n2=bn(4))
    model.b.weight = model.a.weight
    return model


def tied_bias():
    model = Written(lambda m, x: m.n1(m.a(x)) + F.relu(m.n2(m.b(x))), a=conv(), b=conv(), n1=bn(4), n2=bn(4))
    model.b.bias = model.a.bias
    return model


def tied_norms():
    """Two norms that share their statistics and affines."""
    model = Written(lambda m, x: F.relu(m.n2(m.b(F.relu(m.n1(m.a(x)))))), a=conv(), b=conv(), n1=bn(4), n2=bn(4))
    model.n2.weight, model.n2.bias = model.n1.weight, model.n1.bias
    model.n2.running_mean, model.n2.running_var = model.n1.running_mean, model.n1.running_var
    return model


def weight_read_elsewhere():
    """The weight of a conv that merges is also a regulariser's input."""
    return Written(lambda m, x: (m.n(m.c(x)), m.c.weight.pow(2).sum()), c=conv(), n=bn(4))


def weight_scales_elsewhere():
    return Written(lambda m, x: m.n(m.c(x)) * m.c.weight.mean(), c=conv(), n=bn(4))


def two_names():
    """One conv and one norm, registered twice, called once."""
    model = Written(lambda m, x: F.relu(m.n(m.c(x))), c=conv(), n=bn(4))
    model.again, model.norm_again = model.c, model.n
    return model


def two_names_both_called():
    model = Written(lambda m, x: m.n(m.c(x)) + F.relu(m.again(x)), c=conv(), n=bn(4))
    model.again = model.c
    return model


class Siamese(nn.Module):
    """One backbone on two inputs."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 4), bn(4), nn.ReLU(), conv(4, 4), bn(4))
        self.head = nn.Linear(8, 2)

    def forward(self, a, b):
        a, b = self.backbone(a).mean((2, 3)), self.backbone(b).mean((2, 3))
        return self.head(torch.cat([a, b], 1))


class SiameseHalf(Siamese):
    """The backbone on one input, its first conv alone on the other."""

    def forward(self, a, b):
        return self.backbone(a).mean(), self.backbone[0](b)


class Recurrent(nn.Module):
    """One block, three times in a row, in its own forward's sum."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.na, self.nb = conv(), conv(k=1), bn(4), bn(4)

        def forward(self, x):
            return self.na(self.a(x)) + self.nb(self.b(x)) + x

    def __init__(self, times=3):
        super().__init__()
        self.block, self.times = Recurrent.Block(), times

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.block(x))
        return x


class RecurrentLinear(Recurrent):
    """The same without the tanh: three blocks in a row are one linear map, but share their weights."""

    def forward(self, x):
        for _ in range(self.times):
            x = self.block(x)
        return x


class NestedShare(nn.Module):
    """A block inside two different containers, each called twice."""

    def __init__(self):
        super().__init__()
        block = nn.Sequential(conv(), bn(4))
        self.one = nn.Sequential(block, nn.ReLU())
        self.two = nn.Sequential(block, nn.Sigmoid())

    def forward(self, x):
        return self.two(self.one(x)) + self.one(self.two(x))


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


# --- forwards with effects or control flow --------------------------------------------------------------


class WritesAttributes(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.d, self.n = conv(), conv(k=1), bn(4)
        self.last, self.calls, self.cache = None, 0, {}

    def forward(self, x):
        self.calls += 1
        y = self.n(self.c(x) + self.d(x))
        self.last = y
        self.cache["y"] = y
        return y


class WritesData(nn.Module):
    """Recomputes a conv's weight into .data on each call, as some SR nets do."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, 4, 3, 3))
        self.c, self.n = conv(), bn(4)

    def forward(self, x):
        self.c.weight.data = self.w * 2
        return self.n(self.c(x))


class WritesBuffer(nn.Module):
    """Counts its calls in a buffer and keeps a running statistic of its input."""

    def __init__(self):
        super().__init__()
        self.c, self.n = conv(), bn(4)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.count += 1
        return self.n(self.c(x))


class Branching(nn.Module):
    """Data-dependent control flow in one submodule, plain blocks around it."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Sequential(conv(), bn(4)), nn.Sequential(conv(), bn(4))

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.b(x)

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = nn.Sequential(conv(), bn(4)), Branching.Gate(), nn.Sequential(conv(), bn(4))

    def forward(self, x):
        return self.last(torch.tanh(self.gate(torch.tanh(self.first(x)))))


class Unregistered(nn.Module):
    """Layers in a plain list, which no state dict sees."""

    def __init__(self):
        super().__init__()
        self.hidden = [conv(), bn(4)]
        self.c, self.n = conv(), bn(4)

    def forward(self, x):
        for layer in self.hidden:
            x = layer.to(x.dtype).eval()(x)
        return self.n(self.c(torch.relu(x)))


class ListOfRegistered(nn.Module):
    """Registered layers called through a plain list that holds them too."""

    def __init__(self):
        super().__init__()
        self.c, self.n, self.d = conv(), bn(4), conv(k=1)
        self.order = [self.c, self.n]

    def forward(self, x):
        y = x
        for layer in self.order:
            y = layer(y)
        return y + self.d(x)


class Closures(nn.Module):
    """Activations that are lambdas, partials and functions in attributes."""

    def __init__(self):
        super().__init__()
        self.c, self.d, self.n = conv(), conv(k=1), bn(4)
        slope = 0.1
        self.act, self.act2, self.act3 = lambda y: torch.where(y > 0, y, slope * y), partial(F.gelu), torch.tanh

    def forward(self, x):
        return self.act3(self.act2(self.act(self.n(self.c(x) + self.d(x)))))


class ReachesIn(nn.Module):
    """A parent that uses its block's inner layers on its own."""

    def __init__(self):
        super().__init__()
        self.block = Recurrent.Block()

    def forward(self, x):
        return torch.tanh(self.block(x)) + self.block.a(x)


class ReadsShapes(nn.Module):
    """Asks a child of its block for the size of its weight, and its input for device, dtype and shape."""

    def __init__(self):
        super().__init__()
        self.block = Recurrent.Block()

    def forward(self, x):
        assert x.dim() == 4 and x.shape[1] == self.block.a.in_channels  # noqa: PT018
        n, c, h, w = x.shape
        scale = 1.0 / math.sqrt(self.block.a.weight.shape[1])
        return (self.block(x) * scale).reshape(n, c, h * w).to(x.dtype)


class DeviceOfInput(nn.Module):
    """Makes constants on the device and in the dtype of its input."""

    def __init__(self):
        super().__init__()
        self.c, self.d = conv(), conv(k=1)

    def forward(self, x):
        one = torch.ones(1, 4, 1, 1, device=x.device, dtype=x.dtype)
        return self.c(x) * one + self.d(x) * 2
