"""Patterns match published structures in the dress of others' code, where it asks for more than the family does."""

import pytest
import torch
from torch import nn

import structrep
from tests.foreign import blocks
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


ONE, TWO = noise(2, 4, 6, 5), noise(2, 8, 6, 5)
PUBLISHED = {
    "edbb": (blocks.EDBB, ONE, 1, {"conv": 1, "add": 0}),
    "edbb, no skip": (lambda: blocks.EDBB(skip=False), ONE, 1, {"conv": 1, "add": 0}),
    "rrrb": (blocks.RRRB, ONE, 1, {"conv": 1, "add": 0}),
    "deconv": (blocks.DEConv, ONE, 1, {"conv": 1, "add": 0}),
    "csla": (blocks.LinearAdd, ONE, 1, {"conv": 1, "norm": 0, "add": 0}),
    "csla, wider": (lambda: blocks.LinearAdd(4, 6, 2), ONE, 1, {"conv": 1, "norm": 0, "add": 0}),
    "resrep": (blocks.Compacted, TWO, 2, {"conv": 2, "norm": 0}),
    "repadapter": (blocks.Adapted, TWO, 1, {"conv": 1, "add": 0}),
    "yolor": (blocks.Head, (ONE, TWO), 2, {"conv": 2, "add": 0}),
    "vanillanet": (blocks.Vanilla, ONE, 1, {"conv": 1, "norm": 0}),
    "conv_lora": (blocks.ConvLoRA, ONE, 1, {"conv": 1}),
    "dyrep": (blocks.Grown, ONE, 1, {"conv": 1, "norm": 0, "add": 0}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_block_has_the_name_of_its_family(name):
    make, given, merges, ran = PUBLISHED[name]
    model = make()
    check(model, given, merges=merges, **ran)
    assert [merge.rules for merge in structrep.plan(model).merges] == [(name.split(",")[0],)] * merges


def test_what_is_nearly_of_a_family_has_not_its_name():
    """Two 3x3 of which one is dilated are no MobileOne block, and dearer as one; while an activation is there, two
    layers are two; and a fixed number is none that PP-LCNetV3 learned."""
    check(blocks.RSBB(), ONE, merges=2, refused="Costlier", conv=2, norm=0)
    plan = structrep.plan(blocks.RSBB().eval())
    assert {refusal.rule for refusal in plan.refusals} == {"branches"}
    check(blocks.Vanilla(act_learn=0.5), ONE, merges=2, conv=2, norm=0)
    model = Learnable()
    del model.scale, model.bias
    model.scale, model.bias = 0.5, 0.25
    check(model, noise(1, 4, 3, 3), merges=1, within=CLOSE)
    assert "pplcnetv3" not in structrep.plan(model).merges[0].rules
