"""Why not: for any two layers that the user names, what stands between them, and what would help."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from structrep.errors import BadInput
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.wide, self.c, self.d = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
        self.e, self.f = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.g, self.h = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.i, self.j = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.act = nn.ReLU()
        self.spare = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.act(self.a(x))
        x = self.act(self.b(x))
        x = self.d(self.c(self.wide(x)).tanh())
        y = self.e(x)
        x = self.f(y).relu() + y  # y is used twice
        x = self.norm(self.g(x)).relu()
        x = self.left(x) * self.right(x)
        return self.i(x).relu() + self.j(x).tanh()


PAIRS = {
    ("a", "b"): ("act stands between them", "no linear map"),
    ("wide", "c"): ("Inexact", "reads 0", "without that bias"),
    ("e", "f"): ("e would vanish, but add uses what it gives too",),
    ("left", "right"): ("meet in mul", "neither adds nor stacks"),
    ("i", "j"): ("relu, tanh stand between them and add",),
    ("a", "spare"): ("spare is not called in the forward",),
    ("c", "d"): ("tanh stands between",),
}


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_the_answer_says_what_stands_between(pair):
    model = settled(Net())
    for one, other in (pair, pair[::-1]):
        found = structrep.explain(model, one, other)
        for words in PAIRS[pair]:
            assert words in str(found)
        assert not found.merged


def test_merged_layers_are_told_where():
    found = structrep.explain(settled(Net()), "g", "norm")
    assert found.merged == "g"
    assert "by fold_norm" in str(found)


class Almost(nn.Module):
    """Two branches of RepVGG, and a third that no family has."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, stride=1)
        self.pool = nn.AvgPool2d(2, 1)

    def forward(self, x):
        return self.a(x) + self.b(x) + F.pad(self.pool(x), (0, 1, 0, 1))


def test_the_nearest_miss_of_each_rule():
    found = structrep.explain(settled(Almost()), "b", "pool")
    assert next(iter(found.misses)) == "repvgg"
    assert found.misses["repvgg"] == "branch (pool -> pad) is none of its"
    assert len(found.misses) == 3
    assert not [miss for miss in found.misses.values() if "is no sum" in miss]


def test_blocks_and_names_that_are_not_there():
    model = settled(timm.create_model("resnet18"))
    between = str(structrep.explain(model, "layer1.0", "layer1.1"))
    assert "stand between" in between or "stands between" in between
    assert "act1" in str(structrep.explain(model, "layer1.0.conv1", "layer1.0.conv2"))
    with pytest.raises(BadInput, match=r"no module named 'layer1.0.conv3'.*did you mean"):
        structrep.explain(model, "layer1.0.conv3", "layer1.0.conv1")


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        if x.sum() > 0:
            x = self.a(x)
        return self.b(x)


def test_parts_that_cannot_be_followed_are_told():
    found = structrep.explain(nn.Sequential(nn.Conv2d(4, 4, 1), Untraceable()).eval(), "0", "1.a")
    assert "1.a is not called" in str(found)
    assert "is followed where this does not hold" in " ".join(str(found).split())


def test_it_is_a_record():
    found = structrep.explain(settled(Net()), "a", "b")
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_example_inputs_without_a_batch():
    """Channels are then where the batch would be: a merge is refused by that name, and done without inputs."""
    model = settled(Sums(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)))
    x = torch.randn(4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = structrep.plan(model, x)
    assert not plan.merges
    assert [one.reason for one in plan.refusals if "no batch ((4, 8, 8) is given" in one.reason]
    deploy = structrep.reparameterize(model)
    assert sum(isinstance(one, nn.Conv2d) for one in deploy.modules()) == 1
    assert relative_error(deploy(x), model(x)) < EXACT
    assert relative_error(deploy(x[None]), model(x[None])) < EXACT


class Sums(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.a, self.b = parts

    def forward(self, x):
        return self.a(x) + self.b(x)
