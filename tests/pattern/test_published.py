"""Patterns match published structures in the dress of others' code, where it asks for more than the family does."""

import pytest
import torch
from torch import nn

import structrep
from tests.support.models import noise
from tests.support.truth import CLOSE, check


class Adapted(nn.Module):
    """A Linear with adapters, kept in dicts by name, that minds the dtypes of its weights."""

    def __init__(self, names):
        super().__init__()
        self.base = nn.Linear(8, 6)
        self.down = nn.ModuleDict({name: nn.Linear(8, 2, bias=False) for name in names})
        self.up = nn.ModuleDict({name: nn.Linear(2, 6, bias=False) for name in names})
        self.dropout = nn.ModuleDict({name: nn.Dropout(0.1) for name in names})
        self.scaling = dict.fromkeys(names, 2.0)

    def cast(self, x, dtype):
        return x if x.dtype == dtype else x.to(dtype=dtype)

    def forward(self, x):
        result = self.base(x)
        dtype = result.dtype
        for name in self.down:
            x = self.cast(x, self.down[name].weight.dtype)
            result = result + self.up[name](self.down[name](self.dropout[name](x))) * self.scaling[name]
        return result.to(dtype)


@pytest.mark.parametrize("names", [["default"], ["one", "two"]])
@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8)])
def test_adapters_by_name(names, shape):
    model, x = nn.Sequential(Adapted(names)), noise(*shape)
    deploy = check(model, x, merges=1, within=CLOSE)
    assert structrep.plan(model).merges[0].rules == ("lora",)
    assert sum(isinstance(m, nn.Linear) for m in deploy.modules()) == 1
    half = deploy.to(torch.bfloat16)
    assert half(x.to(torch.bfloat16)).dtype == torch.bfloat16


class Learnable(nn.Module):
    """PP-LCNetV3's block with another number of channels behind than before: its one-number affine is of the latter."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 6, 1, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        self.scale, self.bias = nn.Parameter(torch.tensor([1.5])), nn.Parameter(torch.tensor([0.25]))

    def forward(self, x):
        out = 0
        for conv, norm in zip(self.convs, self.norms, strict=True):
            out = out + norm(conv(x))
        return self.scale * out + self.bias


def test_a_part_that_leaves_its_channels_open_has_those_of_its_place():
    model = Learnable()
    check(model, noise(1, 4, 3, 3), merges=1, within=CLOSE)
    assert structrep.plan(model).merges[0].rules == ("pplcnetv3",)
