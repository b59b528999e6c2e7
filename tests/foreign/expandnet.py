"""ExpandNets (arXiv:1811.10495) by other hands."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def expand_cl(c1, c2, k=3, stride=1, padding=1, rate=4, dims=2, bias=True, where="first", groups=1):
    """1x1, kxk, 1x1, with the padding on one of them."""
    conv, wide = CONV[dims], c1 * rate
    end = c2 if groups > 1 else wide
    pads = {"first": (padding, 0), "middle": (0, padding)}[where]
    return nn.Sequential(
        conv(c1, wide, 1, padding=pads[0], groups=groups, bias=bias),
        conv(wide, end if groups > 1 else wide, k, stride, pads[1], groups=groups, bias=bias),
        conv(end, c2, 1, groups=groups, bias=bias),
    )


def expand_ck(c1, c2, n=3, rate=4, padding=3, stride=1, bias=True):
    """A (2n+1)x(2n+1) as n 3x3 convs."""
    wide = c1 * rate
    widths = [c1, *[wide] * (n - 1), c2]
    return nn.Sequential(
        *(
            nn.Conv2d(a, b, 3, stride if i == n - 1 else 1, padding if i == 0 else 0, bias=bias)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
    )


class Named(nn.Module):
    """conv1_s_1 and so on, called one after another, then a norm and a pool."""

    def __init__(self, c1, c2):
        super().__init__()
        self.conv1_s_1 = nn.Conv2d(c1, c1 * 4, 1, padding=2)
        self.conv1_s_2 = nn.Conv2d(c1 * 4, c2 * 4, 5)
        self.conv1_s_3 = nn.Conv2d(c2 * 4, c2, 1)
        self.bn1 = nn.BatchNorm2d(c2)

    def forward(self, x):
        x = self.conv1_s_1(x)
        x = self.conv1_s_2(x)
        x = self.conv1_s_3(x)
        return F.relu(self.bn1(x))


class NonLinear(Named):
    """The variant with a ReLU between, which is no chain."""

    def forward(self, x):
        x = F.relu(self.conv1_s_1(x))
        x = F.relu(self.conv1_s_2(x))
        return F.relu(self.bn1(self.conv1_s_3(x)))


class HalfLinear(Named):
    """A ReLU after the first only: the last two still merge."""

    def forward(self, x):
        return self.bn1(self.conv1_s_3(self.conv1_s_2(torch.relu(self.conv1_s_1(x)))))


class Looped(nn.Module):
    """Layers in a ModuleList, called in a loop."""

    def __init__(self, c1, c2, n=3):
        super().__init__()
        self.layers = nn.ModuleList(expand_ck(c1, c2, n, padding=n))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Dense(nn.Module):
    """Three Linears for one, after flatten, with dropout between, which eval makes nothing."""

    def __init__(self, d=12, classes=5, rate=4):
        super().__init__()
        self.fc1 = nn.Linear(d, d * rate)
        self.fc2 = nn.Linear(d * rate, classes * rate)
        self.fc3 = nn.Linear(classes * rate, classes)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.fc3(self.drop(self.fc2(self.drop(self.fc1(torch.flatten(x, 1))))))


class TinyCifar(nn.Module):
    """The paper's small CIFAR net: three expanded convs with pools, an expanded classifier."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv1, self.conv2 = expand_cl(3, 4), expand_cl(4, 4, stride=2)
        self.conv3 = expand_ck(4, 6)
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.fc = nn.Sequential(nn.Linear(6, 24), nn.Linear(24, 40), nn.Linear(40, classes))

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(x))
        return self.fc(x.mean((2, 3)))
