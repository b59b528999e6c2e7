"""Branches of one input, added: what most published blocks are, whatever is in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import Device
from structrep.blocks.online import common_reading, merged_first, sum_of


class Branches(nn.Module):
    """The sum of what some modules make of one input, whatever its shape: all have to give one shape.

    Where each is a norm, or a convolution and a norm, as in RepGhost or a block of a network of one's own, they can be
    merged before they are run, while they train.

    Args:
        online: whether they are: None where that takes less time, True wherever it can be done, False never.

    Raises:
        ValueError: there are no branches.

    Example:
        >>> Branches(nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(8, 16, 1))(torch.randn(1, 8, 6, 6)).shape
        torch.Size([1, 16, 6, 6])
    """

    def __init__(self, *branches: nn.Module, online: bool | None = None) -> None:
        super().__init__()
        if not branches:
            raise ValueError("there are no branches to add: give at least one module")
        self.branches = nn.ModuleList(branches)
        self.online = online

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            composed = self.composed(x)
            if composed is not None:
                return composed
        y: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            y = y + branch(x)
        return y

    def composed(self, x: Tensor) -> Tensor | None:
        """See `NormedBlock.composed`."""
        modules = list(self.branches)
        reading = None if self.online is False else common_reading(modules)
        branches = None if reading is None else merged_first(modules, reading, x, self.online)
        return None if reading is None or branches is None else sum_of(branches, reading, x)


class LearnableAffine(nn.Module):
    """scale * x + shift, both one learned number, (1,), for all channels; x is of any shape.

    PP-LCNetV3 of PaddleOCR, learnable affine block, which stands behind a block.

    Args:
        scale, shift: what the numbers start from.

    Raises:
        RuntimeError: `dtype` is one of integers.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(8, 16, 3), LearnableAffine(2.0), nn.ReLU()).eval()
        >>> sum(parameter.numel() for parameter in structrep.reparameterize(net).parameters())
        1168
    """

    def __init__(self, scale: float = 1.0, shift: float = 0.0, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), scale, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.full((1,), shift, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.shift
