"""Borders that a forward writes slice by slice, as DBB, ECBSR and others pad with a bias."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import CLOSE, relative_error, says

X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class NormAndPad(nn.Module):
    """A norm whose output is padded with what it makes of 0."""

    def __init__(self, channels, pad, spoil=None):
        super().__init__()
        self.norm, self.pad, self.spoil = nn.BatchNorm2d(channels), pad, spoil

    def forward(self, x):
        y = F.pad(self.norm(x), [self.pad] * 4)
        if self.spoil == "read before":
            y = y + 0 * y.mean()
        value = self.norm.bias - self.norm.running_mean * self.norm.weight / torch.sqrt(
            self.norm.running_var + self.norm.eps
        )
        if self.spoil == "value":
            value = value + 1
        value = value.view(1, -1, 1, 1)
        y[:, :, 0 : self.pad, :] = value
        y[:, :, -self.pad :, :] = value * 2 if self.spoil == "one side" else value
        y[:, :, :, 0 : self.pad] = value
        if self.spoil != "three sides":
            y[:, :, :, -self.pad :] = value
        if self.spoil == "inside":
            y[:, :, self.pad + 1 : self.pad + 2, :] = value
        return y


class Branch(nn.Module):
    def __init__(self, pad=1, spoil=None):
        super().__init__()
        self.first, self.pad = nn.Conv2d(4, 4, 1, bias=False), NormAndPad(4, pad, spoil)
        self.second, self.norm = nn.Conv2d(4, 4, 2 * pad + 1, bias=False), nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.norm(self.second(self.pad(self.first(x)))) + self.other(x)
        return y.relu() + x  # x is read again


@pytest.mark.parametrize("pad", [1, 2])
def test_a_border_of_the_bias_makes_the_branch_one_convolution(pad):
    for inplace in (False, True):
        torch.manual_seed(0)
        model = settled(Branch(pad))
        truth = model(X)
        deploy = structrep.reparameterize(model, inplace=inplace)
        assert relative_error(deploy(X), truth) < CLOSE
        assert sum(isinstance(m, nn.Conv2d) for m in deploy.modules()) == 1


@pytest.mark.parametrize("spoil", ["value", "one side", "three sides", "inside", "read before"])
def test_other_borders_stay_as_they_are(spoil):
    torch.manual_seed(0)
    model = settled(Branch(spoil=spoil))
    deploy = says(structrep.plan(model, X), 1, "Inexact" if spoil == "value" else "Shared").reparameterize(X)
    assert relative_error(deploy(X), model(X)) < CLOSE


class StackedBorder(nn.Module):
    """A norm whose border is stacked around its output, as DyRep pads."""

    def __init__(self, channels, pad, spoil=None):
        super().__init__()
        self.norm, self.pad, self.spoil = nn.BatchNorm2d(channels), pad, spoil

    def forward(self, x):
        y = self.norm(x)
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        value = (self.norm.bias - self.norm.running_mean * scale).reshape(1, -1, 1, 1)
        n, c, h, w = y.shape
        p = self.pad
        c = -1 if self.spoil == "a size that nothing goes by" else c
        rows = value.expand(n, c, p, w)
        y = torch.cat([rows, y, rows * 2 if self.spoil == "another value" else rows], 2)
        columns = value.expand(n, c, h + 2 * p, p)
        y = torch.cat([columns, y] if self.spoil == "one side" else [columns, y, columns], 3)
        return y * h if self.spoil == "sizes used elsewhere" else y


class StackedBranches(nn.Module):
    def __init__(self, pad=1, spoil=None):
        super().__init__()
        self.first, self.border = nn.Conv2d(4, 4, 1, bias=False), StackedBorder(4, pad, spoil)
        self.second, self.norm = nn.Conv2d(4, 4, 2 * pad + 1, bias=False), nn.BatchNorm2d(4)
        self.beside, self.point = nn.Conv2d(4, 4, 2 * pad + 1, padding=pad), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        branches = [self.norm(self.second(self.border(self.first(x)))), self.beside(x), self.point(x)]
        if self.border.spoil == "one side":
            branches = branches[:1]
        return torch.stack(branches).sum(0).relu()


@pytest.mark.parametrize("pad", [1, 2])
@pytest.mark.parametrize("spoil", [None, "a size that nothing goes by"])
def test_a_border_that_is_stacked_around(pad, spoil):
    for example in (False, True):
        torch.manual_seed(0)
        model = settled(StackedBranches(pad, spoil))
        deploy = structrep.reparameterize(model, X if example else None)
        assert relative_error(deploy(X), model(X)) < CLOSE
        assert sum(isinstance(m, nn.Conv2d) for m in deploy.modules()) == 1


@pytest.mark.parametrize("spoil", ["another value", "one side", "sizes used elsewhere"])
def test_other_stacks_stay_right(spoil):
    torch.manual_seed(0)
    model = settled(StackedBranches(spoil=spoil))
    deploy = says(structrep.plan(model, X), 1, "" if spoil == "one side" else "Shared").reparameterize(X)
    assert relative_error(deploy(X), model(X)) < CLOSE
