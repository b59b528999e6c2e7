"""What is said of the blocks of a model in training."""

import copy

import pytest
import torch
from matplotlib import pyplot
from torch import nn

import structrep
from structrep.blocks import DiverseBranchBlock2d, DOConv2d, RepVGGBlock2d
from tests.support.models import settled, small


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x):
        return self.wide(x) + self.narrow(x) + x


@pytest.fixture(scope="module")
def expanded():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    return settled(structrep.expand(model, "dbb"))


def test_shares_are_those_of_the_kernels_that_are_added():
    model = Branches().double()
    with torch.no_grad():
        model.narrow.weight.copy_(-0.5 * torch.eye(4)[..., None, None])
    record = structrep.monitor(model)
    (kernel,) = record.kernels
    merged = torch.zeros(4, 4, 3, 3, dtype=torch.float64) + model.wide.weight
    merged[..., 1, 1] += 0.5 * torch.eye(4)
    alone = {"wide": model.wide.weight, "narrow": model.narrow.weight, "x": torch.eye(4)[..., None, None]}
    assert kernel.norm == pytest.approx(float(merged.norm()))
    assert (kernel.low, kernel.high) == (float(merged.min()), float(merged.max()))
    assert [branch.name for branch in kernel.branches] == list(alone)
    for branch in kernel.branches:
        own = alone[branch.name].detach()
        centre = merged if own.shape[-1] == 3 else merged[..., 1:2, 1:2]
        assert branch.norm == pytest.approx(float(own.norm() / merged.norm()))
        assert branch.share == pytest.approx(float((own * centre).sum() / merged.square().sum()))
    assert sum(branch.share for branch in kernel.branches) == pytest.approx(1)
    assert kernel.branches[1].share < 0, "it works against the others"


@pytest.mark.parametrize(
    ("name", "sums"), [("repvgg_a0", 6), ("mobileone_s0", 6), ("fastvit_t8", 8), ("repghostnet_050", 6)]
)
def test_the_shares_of_each_sum_add_up(name, sums):
    model = settled(small(name))
    kernels = [kernel for kernel in structrep.monitor(model).kernels if kernel.branches]
    assert len(kernels) == sums
    for kernel in kernels:
        total = sum(branch.share for branch in kernel.branches)
        assert total == pytest.approx(round(total), abs=1e-9)
        assert total >= 0.99


def test_a_branch_dies():
    block = settled(RepVGGBlock2d(4, 4, 3, padding=1))
    assert structrep.monitor(block).dead == ()
    with torch.no_grad():
        block.get_submodule("point.norm").weight.zero_()
    record = structrep.monitor(block)
    assert [branch for _, branch in record.dead] == ["point"]
    assert record.scalars()["structrep/dead_branches"] == 1
    assert structrep.monitor(block, dead=0.0).dead == ()


def test_ranges_in_eight_bits():
    conv = nn.Conv2d(2, 2, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[127.0, 63.4], [1.27, 0.634]])[..., None, None])
    (kernel,) = structrep.monitor(nn.Sequential(conv, Times())).kernels
    weight = torch.tensor([[127.0, 63.4], [1.27, 0.634]], dtype=torch.float64)
    whole = torch.tensor([[127.0, 63.0], [1.0, 1.0]], dtype=torch.float64)
    channels = torch.tensor([[127.0, 63.0], [1.27, 0.63]], dtype=torch.float64)
    assert kernel.int8_error == pytest.approx(float((whole - weight).norm() / weight.norm()), rel=1e-5)
    assert kernel.int8_error_per_channel == pytest.approx(float((channels - weight).norm() / weight.norm()), rel=1e-5)


class Times(nn.Module):
    def forward(self, x):
        return x * 2


def test_a_model_in_training_is_left_alone(expanded):
    model = copy.deepcopy(expanded).train()
    state, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    record = structrep.monitor(model)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert record == structrep.monitor(expanded)
    names = [branch.name for kernel in record.kernels for branch in kernel.branches]
    assert names == ["dense", "point", "average", "chain"]


def test_what_a_logger_and_a_reader_get(expanded):
    record = structrep.monitor(expanded)
    numbers = record.scalars("train/")
    assert all(type(value) is float for value in numbers.values())
    assert {"train/1/share/chain", "train/1/int8_error", "train/dead_branches"} <= numbers.keys()
    assert "chain" in str(record)
    shares, errors = record.plot()
    assert [tick.get_text() for tick in shares.get_yticklabels()] == [kernel.where for kernel in record.kernels]
    assert len(errors.lines) == 2
    pyplot.close()


@pytest.mark.parametrize("block", [DOConv2d(4, 4, 3), DiverseBranchBlock2d(4, 4, 1)])
def test_blocks_without_branches_of_their_own(block):
    (kernel,) = structrep.monitor(nn.Sequential(settled(block))).kernels
    assert kernel.norm > 0
