"""A norm of some channels of what a layer gives, of which all else takes others: IBN-Net's, beside an instance norm."""

import pytest
import torch
from torch import nn

from tests.support.models import settled
from tests.support.truth import check

X = torch.randn(2, 4, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Half(nn.Module):
    def __init__(self, how, other):
        super().__init__()
        self.conv, self.norm, self.other, self.how = nn.Conv2d(4, 7, 3, bias=False), nn.BatchNorm2d(4), other, how

    def forward(self, x):
        return self.how(self, self.conv(x))


def split(self, y):
    a, b = torch.split(y, [3, 4], dim=1)
    return torch.cat([self.other(a), self.norm(b.contiguous())], 1)


def sliced(self, y):
    return torch.cat([self.other(y[:, :3]), self.norm(y[:, 3:])], 1)


def of_both(self, y):
    return torch.cat([self.other(y[:, :4]), self.norm(y[:, 3:])], 1)


def of_all(self, y):
    return torch.cat([self.other(y), self.norm(y[:, 3:])], 1)


def written_to(self, y):
    a, b = torch.split(y, [3, 4], dim=1)
    y.mul_(2)
    return torch.cat([self.other(a), self.norm(b)], 1)


def written_to_itself(self, y):
    a, b = torch.split(y, [3, 4], dim=1)
    b += 1
    return torch.cat([self.other(a), self.norm(b)], 1)


def of_rows(self, y):
    return self.norm(y.transpose(1, 2)[:, :4]).transpose(1, 2)


@pytest.mark.parametrize("other", [nn.InstanceNorm2d(3, affine=True), nn.ReLU(), nn.Softmax(1)])
@pytest.mark.parametrize("how", [split, sliced])
def test_the_layer_takes_the_scale_of_those(how, other):
    deploy = check(settled(Half(how, other)), X, merges=1)
    assert type(deploy.norm) is nn.Identity


@pytest.mark.parametrize(
    ("how", "refused"),
    [
        (of_both, "Isolated"),
        (of_all, "Isolated"),
        (written_to, "Isolated"),
        (of_rows, "Isolated"),
        (written_to_itself, "Mutated"),
    ],
)
def test_it_stays(how, refused):
    check(settled(Half(how, nn.ReLU())), X, merges=0, refused=refused, norm=1)
