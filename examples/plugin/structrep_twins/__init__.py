"""Training-time modules of an invented family, for the example of a plugin."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Twins(nn.Module):
    """The mean of two convolutions, each with a norm."""

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        pad = kernel_size // 2
        self.left, self.right = (nn.Conv2d(channels, channels, kernel_size, padding=pad) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (self.norms[0](self.left(x)) + self.norms[1](self.right(x))) / 2
        return y


class Gained(nn.Module):
    """A convolution with a gain for each filter, in code that looks at values and so cannot be followed."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3) / 3)
        self.gain = nn.Parameter(torch.ones(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.isnan().any()):
            raise ValueError("the input holds NaN")
        return F.conv2d(x, self.weight * self.gain.reshape(-1, 1, 1, 1), padding=1)
