"""A forward that asks its own module what it holds, beside what merges in it: how much, or a part by its name."""

from functools import cached_property

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import made, settled
from tests.support.truth import EXACT, relative_error, says

X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Asked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def merged(self, x):
        return F.relu(self.n(self.a(x)) + self.b(x))

    def count(self):
        return len(list(self.parameters()))

    @property
    def size(self):
        return sum(one.numel() for one in self.parameters())

    @property
    def device(self):
        return self.a.weight.device

    @property
    def dtype(self):
        return next(self.buffers()).dtype

    @cached_property
    def width(self):
        return self.a.out_channels


def helper(module):
    return len(list(module.parameters()))


def parameters(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y / len(list(self.parameters()))


def modules(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y / sum(isinstance(one, nn.Conv2d) for one in self.modules())


def state(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y / len(self.state_dict())


def table(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y / len(self._modules)


def table_of_the_dict(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y / len(self.__dict__["_modules"])


def shown(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y / len(str(self))


def last_child(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y / list(self.children())[-1].num_features


def first_child(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y / next(self.children()).in_channels


def by_a_method(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y / self.count()


def by_a_property(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y / self.size


def by_a_function(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y / helper(self)


def setting(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y / self.a.out_channels


def setting_by_name(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y / self.get_submodule("a").kernel_size[0]


def setting_of_a_cached_property(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y / self.width


def device(self, x):
    x = x.to(self.device)
    y = self.n(self.a(x)) + self.b(x)
    return F.relu(y)


def dtype(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y.to(self.dtype)


def in_the_table(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    return y.to(self._modules["a"].weight.device)


def in_an_error(self, x):
    y = F.relu(self.n(self.a(x)) + self.b(x))
    if self.size == 0:
        raise ValueError(f"{self} has nothing")
    return y


WAYS = {
    parameters: "rewrite", modules: "rewrite", state: "rewrite", table: "rewrite", table_of_the_dict: "rewrite",
    shown: "rewrite", last_child: "rewrite", first_child: "rewrite", by_a_method: "rewrite", by_a_property: "rewrite",
    by_a_function: "rewrite", setting: "edit", setting_by_name: "edit", setting_of_a_cached_property: "edit",
    device: "edit", dtype: "edit", in_the_table: "edit", in_an_error: "rewrite",
}  # fmt: skip


@pytest.mark.parametrize("forward", WAYS)
def test_the_answer_is_the_models_own(forward):
    for example in (False, True):
        model = made(forward, Asked)
        plan = says(structrep.plan(model, X if example else None), 1)
        assert [merge.edit for merge in plan.merges] == [WAYS[forward]], plan._selection.draft.unedited
        assert relative_error(plan.apply()(X), model(X)) < EXACT


class Listed(nn.Module):
    """Branches in a dict, of which the forward asks how many there are, and gives them in one line."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 1)})

    def forward(self, x): return sum(one(x) for one in self.branches.values()).relu() / len(self.branches)  # fmt: skip


def test_how_many_there_were_of_what_is_merged():
    model = settled(Listed())
    plan = says(structrep.plan(model), 1)
    assert relative_error(plan.apply()(X), model(X)) < EXACT
