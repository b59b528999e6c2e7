"""A sum is the same in every order of its addends, and so is what merges."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import structrep
from tests.models import relative_error, settled


def conv(padding_mode="zeros", stride=1):
    return nn.Conv2d(4, 4, 3, stride, 1, padding_mode=padding_mode)


class Sum(nn.Module):
    """Branches on one input, added from left to right."""

    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = [branch(x) for branch in self.branches]
        for other in others:
            first = first + other
        return first


OTHERS = {
    "not linear": lambda: nn.Sequential(conv(), nn.ReLU()),
    "another border": lambda: conv("reflect"),
    "of each value": lambda: nn.Sequential(conv(), nn.GroupNorm(1, 4)),
}


def merged(model: nn.Module) -> nn.Module:
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    deploy = structrep.reparameterize(model, x)
    assert relative_error(deploy(x), model(x)) < 1e-13
    return deploy


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_the_order_of_three_does_not_matter(order, other):
    branches = [conv(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), OTHERS[other]()]
    model = settled(Sum([branches[index] for index in order]))
    assert convolutions(merged(model)) == 2


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_two_groups_merge_each_for_itself(order):
    branches = [conv(), conv(), conv("reflect"), conv("reflect")]
    model = settled(Sum([branches[index] for index in order]))
    assert convolutions(merged(model)) == 2


class Skip(nn.Module):
    """A sum with the input of an earlier block."""

    def __init__(self):
        super().__init__()
        self.before, self.one, self.two = conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.before(x))
        return self.one(y) + x + self.two(y)


def test_a_skip_between_two_branches():
    assert convolutions(merged(settled(Skip()))) == 2


class InPlace(Sum):
    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (branch(x) for branch in self.branches)
        y = a + b
        y += c
        return y


def test_additions_in_place_to_a_sum_of_its_own():
    model = settled(InPlace([conv(), OTHERS["not linear"](), conv()]))
    assert convolutions(merged(model)) == 2


class Overwritten(Sum):
    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (branch(x) for branch in self.branches)
        y = a + b
        b.mul_(2)
        return y + c


class LookedAt(Sum):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = (branch(x) for branch in self.branches)
        y = a + b
        return y + c, y.mean()


class InPlaceToABranch(Sum):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = (branch(x) for branch in self.branches)
        a += b
        return a + c, a


class Doubled(Sum):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = (branch(x) for branch in self.branches)
        y = a + b
        return (y + y) + c, c


@pytest.mark.parametrize("kind", [Overwritten, LookedAt, InPlaceToABranch, Doubled])
def test_a_sum_that_is_looked_at_stays(kind):
    model = settled(kind([conv(), OTHERS["not linear"](), conv()]))
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    deploy = structrep.reparameterize(model, x)
    for found, expected in zip(deploy(x), model(x), strict=True):
        assert relative_error(found, expected) < 1e-13
    assert convolutions(deploy) == 3


def test_a_block_that_is_run_twice_merges_or_stays_for_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Sum([conv(), OTHERS["not linear"](), conv()])

        def forward(self, x: Tensor) -> Tensor:
            return self.block(torch.relu(self.block(x)))

    merged(settled(Twice()))


def test_a_sum_of_all_that_merges_is_left_in_its_order():
    model = settled(Sum([conv(), conv(), conv()]))
    assert convolutions(merged(model)) == 1
