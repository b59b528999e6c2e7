"""The same traps through torch's own two fusions: what each gives, without a warning, against the float64 original.

torch.fx.experimental.optimization.fuse and torch.ao.quantization.quantize_fx.fuse_fx fold batch norms into convolutions
and Linears. Here is where they are silently wrong; structrep is right on all of it.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.ao.quantization.quantize_fx import fuse_fx
from torch.fx.experimental.optimization import fuse

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error

IMAGE = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)


class WithAndWithoutItsNorm(Layers):
    """A convolution is called twice, once with a norm."""

    def forward(self, x):
        return self.a(self.conv(x)).relu() + self.conv(x * 2)


class TwoCallsTwoNorms(Layers):
    """A convolution is called twice, with another norm each time."""

    def forward(self, x):
        return self.a(self.conv(x)).relu() + self.b(self.conv(x * 2)).relu()


class TwoNormsOfOneValue(Layers):
    """What a convolution gives is read by two norms."""

    def forward(self, x):
        y = self.conv(x)
        return self.a(y).relu() - self.b(y).sigmoid()


class OneNormTwice(Layers):
    """A norm is called on two values."""

    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.a(self.conv(x)).relu() + self.a(self.other(x)).relu()


class Hooked(Layers):
    """A hook changes what a convolution gives."""

    def __init__(self):
        super().__init__()
        self.conv.register_forward_hook(lambda module, args, output: output.relu())

    def forward(self, x):
        return self.a(self.conv(x))


class NormOfTokens(nn.Module):
    """A Linear acts on the last dim of (N, L, C), a BatchNorm1d behind it on L."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(self.linear(x))


TRAPS = [  # model, input, who is wrong
    (WithAndWithoutItsNorm, IMAGE, {fuse, fuse_fx}),
    (TwoCallsTwoNorms, IMAGE, {fuse, fuse_fx}),
    (TwoNormsOfOneValue, IMAGE, set()),
    (OneNormTwice, IMAGE, set()),
    (Hooked, IMAGE, {fuse, fuse_fx}),
    (NormOfTokens, TOKENS, {fuse, fuse_fx}),
]


@pytest.mark.parametrize("tool", [structrep.reparameterize, fuse, fuse_fx], ids=["structrep", "fx.fuse", "fuse_fx"])
@pytest.mark.parametrize(("make", "x", "wrong"), TRAPS, ids=[make.__name__ for make, *_ in TRAPS])
def test_who_is_silently_wrong(make, x, wrong, tool):
    model = settled(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*deprecated.*", category=DeprecationWarning)
        warnings.simplefilter("ignore", structrep.NothingMerged)  # which is as it should be
        deploy = tool(copy.deepcopy(model))
    error = relative_error(deploy(x), model(x))
    assert error > 0.1 if tool in wrong else error < EXACT
