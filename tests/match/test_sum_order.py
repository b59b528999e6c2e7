"""A sum is the same in every order of its addends, and so is what merges."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import structrep
from tests.support.models import conv, settled
from tests.support.truth import CLOSE, relative_error


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
    "another border": lambda: conv(padding_mode="reflect"),
    "of each value": lambda: nn.Sequential(conv(), nn.GroupNorm(1, 4)),
}


def merged(model: nn.Module) -> nn.Module:
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    deploy = structrep.reparameterize(model, x)
    assert relative_error(deploy(x), model(x)) < CLOSE
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
    branches = [conv(), conv(), conv(padding_mode="reflect"), conv(padding_mode="reflect")]
    model = settled(Sum([branches[index] for index in order]))
    assert convolutions(merged(model)) == 2


class Convs(nn.Module):
    """Convolutions by the letters of `names`."""

    names = ""

    def __init__(self) -> None:
        super().__init__()
        for name in self.names:
            setattr(self, name, conv())


class Skip(Convs):
    """A sum with the input of an earlier block."""

    names = "abc"

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.b(y) + x + self.c(y)


def test_a_skip_between_two_branches():
    assert convolutions(merged(settled(Skip()))) == 2


class InPlace(Sum):
    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (branch(x) for branch in self.branches)
        y = a + b
        y += c
        return y


def test_additions_in_place_keep_their_order():
    """What is written to keeps its dtype and shape, whatever is added."""
    model = settled(InPlace([conv(), OTHERS["not linear"](), conv()]))
    assert convolutions(merged(model)) == 3


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
        assert relative_error(found, expected) < CLOSE
    assert convolutions(deploy) == 3


def test_a_block_that_is_run_twice_merges_or_stays_for_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Sum([conv(), OTHERS["not linear"](), conv()])

        def forward(self, x: Tensor) -> Tensor:
            return self.block(torch.relu(self.block(x)))

    merged(settled(Twice()))


class Inner(Convs):
    names = "abc"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        partial = self.a(x) + self.b(x).relu()
        return partial + self.c(x), partial


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)[0]


def test_a_partial_sum_that_a_block_gives_back_stays_though_nobody_takes_it():
    model = settled(Outer())
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    for found, expected in zip(merged(model).block(x), model.block(x), strict=True):
        assert relative_error(found, expected) < CLOSE


class Passed(Convs):
    """A partial sum goes through a module that does nothing in eval mode."""

    names = "ac"

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.a(x) + x.relu()) + self.c(x)


def test_what_is_given_to_a_module_stays():
    assert convolutions(merged(settled(Passed()))) == 2


class Masks(Convs):
    names = "ac"

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + ((x > 0) + (x > -0.5)) + self.c(x)


class MasksFirst(Masks):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0) + ((x > -0.5) + self.a(x)) + self.c(x)


@pytest.mark.parametrize("kind", [Masks, MasksFirst])
def test_what_is_no_float_is_added_up_as_it_was(kind):
    """True + True is True."""
    assert convolutions(merged(settled(kind()))) == 1


class Ranks(Convs):
    names = "ab"

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2 - 1
        return (x + (self.a(x) + (x.relu() + self.b(x)))) * 1.5


def test_ranks_are_those_of_the_new_order():
    model = settled(Ranks())
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    assert relative_error(structrep.reparameterize(model)(x), model(x)) < CLOSE


class Repeated(Convs):
    """An addend that stands twice, and another sum that is better in another order."""

    names = "acd"

    def __init__(self):
        super().__init__()
        self.n = nn.Sequential(conv(), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x) + x + x + self.c(x)
        y = y.relu()
        return self.a(y) + self.n(y) + self.d(y)


def test_an_addend_that_stands_twice_is_added_twice():
    model = settled(Repeated())
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    assert relative_error(structrep.reparameterize(model)(x), model(x)) < CLOSE


class Late(Convs):
    """The first addition is made before what the others add is."""

    names = "pqac"

    def forward(self, x: Tensor) -> Tensor:
        result = x + x.relu()
        h = (self.p(x) + self.q(x)).relu()
        result = result + self.a(h)
        return result + self.c(h)


def test_additions_are_made_where_their_addends_are():
    assert convolutions(merged(settled(Late()))) == 2


def test_a_sum_of_all_that_merges_is_left_in_its_order():
    model = settled(Sum([conv(), conv(), conv()]))
    assert convolutions(merged(model)) == 1
