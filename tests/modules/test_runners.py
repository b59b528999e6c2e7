"""A part that is handed to a function which only calls it is asked for nothing: checkpointing, and what wraps it."""

import pytest
import torch
import torch.utils.checkpoint as cp
from torch import nn
from torch.utils.checkpoint import checkpoint

from structrep.modules.runners import only_calls
from tests.support.models import settled
from tests.support.truth import check

X = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def saving(run, *inputs):
    return checkpoint(run, *inputs, use_reentrant=False)


def twice(run, x):
    return saving(run, run(x))


def keeping(seen, run, x):
    seen.append(run)
    return run(x)


def of_a_class(run, x):
    return run(x) if isinstance(run, nn.Conv2d) else -run(x)


def first_of(runs, x):
    return runs[0](x)


def around(run, x):
    return around(run, x) if x.ndim == 3 else run(x)


@pytest.mark.parametrize(
    ("function", "place", "only"),
    [
        (checkpoint, 0, True),
        (checkpoint, 1, False),
        (saving, 0, True),
        (twice, 0, True),
        (around, 0, True),
        (keeping, 0, False),
        (keeping, 1, False),
        (of_a_class, 0, False),
        (first_of, 0, False),
        (len, 0, False),
        (None, 0, False),
        (twice, 7, False),
        (twice, -1, False),
    ],
)
def test_functions_that_only_call(function, place, only):
    assert only_calls(function, place) is only


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)


class ByName(Net):
    def forward(self, x):
        return self.n(checkpoint(self.c, x, use_reentrant=False))


class ByModule(Net):
    def forward(self, x):
        return cp.checkpoint(self.n, self.c(x), use_reentrant=False)


class ByWrapper(Net):
    def forward(self, x):
        return self.n(saving(self.c, x))


@pytest.mark.parametrize("net", [ByName, ByModule, ByWrapper])
def test_a_part_that_is_checkpointed_merges(net):
    torch.manual_seed(0)
    check(settled(net()), X, merges=1)
