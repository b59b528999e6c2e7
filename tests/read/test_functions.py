"""Functions of torch, and operators: those that are affine maps, read as such, and those that only look so."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.models import bn, conv, made, noise
from tests.support.truth import CLOSE, check

X = noise(2, 4, 6, 7)


def third(self, x):
    return (self.a(x) * 0.3 + 0.1 - self.b(x) / 3).relu()


def stacked(self, x):
    return torch.stack([self.a(x), self.b(x)]).sum(0)


def sizes(self, x):
    return F.avg_pool2d(self.a(x) + self.b(x), x.shape[2:])


def out_argument(self, x):
    a = torch.empty_like(x)
    torch.add(self.a(x), self.b(x), out=a)
    return a


def from_zeros(self, x):
    total = torch.zeros_like(x)
    total = total + self.a(x)
    return total + self.b(x)


def from_zeros_in_place(self, x):
    total = torch.zeros_like(x)
    for branch in (self.a, self.b):
        total += branch(x)
    return total


def zeros_read_again(self, x):
    zeros = torch.zeros_like(x)
    return (zeros + self.a(x)) * 2 + self.b(x) * (zeros + 1)


FORWARDS = {
    third: 1,  # by numbers that float32 cannot hold
    stacked: 1,
    sizes: 1,
    out_argument: 0,
    from_zeros: 1,
    from_zeros_in_place: 1,
    zeros_read_again: 0,
}


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_sums(forward):
    check(made(forward), X, merges=FORWARDS[forward])


class Spreads(nn.Module):
    """One channel, scaled by a number for each of two: what a scale per channel looks like, and is not."""

    def __init__(self):
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.randn(2, 1, 1)), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.conv(x[:, :1] * self.scale)


def test_a_scale_that_spreads_one_channel_over_several():
    check(Spreads(), noise(2, 2, 3, 3), merges=0, refused="Incompatible", within=0.0)


@pytest.mark.parametrize(("slope", "merges", "convs"), [(1.0, 1, 1), (0.5, 1, 2)])
def test_a_leaky_curve_of_slope_1_is_none(slope, merges, convs):
    model = nn.Sequential(conv(k=1), bn(4), nn.LeakyReLU(slope), conv(k=1))
    check(model, noise(1, 4, 3, 3), merges=merges, within=CLOSE, conv=convs)
