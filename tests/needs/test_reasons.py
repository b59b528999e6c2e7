"""What a refusal names is what keeps a merge from being made: without it the merge is made (benchmarks/reasons.py)."""

import pytest
import torch
from torch import nn

from benchmarks import reasons
from tests.foreign.cases import NETWORKS
from tests.support.models import settled

SMALL = {
    "Isolated": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()),
    "Costlier": lambda: nn.Sequential(nn.Conv2d(16, 2, 1, bias=False), nn.Conv2d(2, 16, 1)),
    "Inexact": lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()),
}


@pytest.mark.parametrize("kind", SMALL)
def test_without_the_obstacle_it_merges(kind):
    lines = [line for line in reasons.tried(settled(SMALL[kind]())) if line["kind"] == kind]
    assert lines
    assert all(line["taken away"] == "merges" and line["names a place"] for line in lines)


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_published_networks(case):
    torch.manual_seed(0)
    assert all(line["taken away"] != "stays" and line["names a place"] for line in reasons.tried(settled(case.make())))
