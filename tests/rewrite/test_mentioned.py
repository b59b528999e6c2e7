"""What no path of an edited forward asks for is stored no more; what some path asks for stays, and computes what it
did."""

import pytest
import torch
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error

X = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.n(self.a(x)) + self.b(x))


class Net(nn.Module):
    """Two blocks, and two branches whose merge changes the forward around them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.block0, self.block1 = Block(), Block()
        self.c, self.d = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.early, self.names = False, ["block0", "block1"]


class Loop(Net):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.block1(self.block0(x))
        return self.c(x) + self.d(x)


class Index(Net):
    def forward(self, x):
        for i in range(len(self.blocks)):
            x = self.blocks[i](x)
        x = self.block1(self.block0(x))
        return self.c(x) + self.d(x)


class ComputedName(Net):
    def forward(self, x):
        for i in range(2):
            x = getattr(self, f"block{i}")(x)
        for block in self.blocks:
            x = block(x)
        return self.c(x) + self.d(x)


class Method(Net):
    def run(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        x = self.run(self.block1(self.block0(x)))
        return self.c(x) + self.d(x)


class EditedMethod(Net):
    def heads(self, x):
        return self.c(x) + self.d(x)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.heads(self.block1(self.block0(x))) * 1.0


@pytest.mark.parametrize("net", [Loop, Index, ComputedName, Method, EditedMethod])
def test_what_no_path_asks_for_is_stored_no_more(net):
    torch.manual_seed(0)
    model = settled(net())
    plan = structrep.plan(model, X)
    assert len(plan.merges) == 5
    deploy = plan.apply()
    assert relative_error(deploy(X), model(X)) < EXACT
    assert sum(p.numel() for p in deploy.parameters()) == 5 * (4 * 4 * 9 + 4)


class ByName(Net):
    def forward(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return self.c(x) + self.d(x)


def test_a_part_of_a_name_that_is_set_stays():
    torch.manual_seed(0)
    model = settled(ByName())
    deploy = structrep.plan(model, X).apply()
    for one in (model, deploy):
        one.names = ["block1", "c"]
    assert relative_error(deploy(X), model(X)) < EXACT
    assert {name for name, _ in deploy.block0.named_children()} == {"reparam_conv"}


def first(blocks, x):
    return blocks[0].a(x)


class OfAnItem(Net):
    def otherwise(self, x):
        return self.blocks[0].a(x)


class OfEachItem(Net):
    def otherwise(self, x):
        for block in self.blocks:
            x = block.a(x)
        return x


class ByAName(Net):
    def otherwise(self, x):
        return getattr(self.blocks[1], "b")(x)  # noqa: B009


class ByAComputedName(Net):
    def otherwise(self, x):
        for name in ("a", "n"):
            x = getattr(self.blocks[1], name)(x)
        return x


class Handed(Net):
    def otherwise(self, x):
        return first(self.blocks, x)


class Alias(Net):
    def otherwise(self, x):
        block = self.block0
        return block.b(x)


@pytest.mark.parametrize("net", [OfAnItem, OfEachItem, ByAName, ByAComputedName, Handed, Alias])
def test_what_another_path_asks_for_stays(net):
    def forward(self, x):
        if self.early:
            return self.otherwise(x)
        for block in self.blocks:
            x = block(x)
        x = self.block1(self.block0(x))
        return self.c(x) + self.d(x)

    torch.manual_seed(0)
    model = settled(type(net.__name__, (net,), {"forward": forward})())
    plan = structrep.plan(model, X)
    deploy = plan.apply()
    assert plan.merges
    assert relative_error(deploy(X), model(X)) < EXACT
    for one in (model, deploy):
        one.early = True
    assert relative_error(deploy(X), model(X)) < EXACT
