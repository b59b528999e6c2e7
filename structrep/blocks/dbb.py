"""Diverse Branch Block: Building a Convolution as an Inception-like Unit, arXiv:2103.13425, section 3.3."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structrep.blocks._geometry import CONV, POOL, Device, Pads, Size
from structrep.blocks.normed import NormedBlock


class NormPad(nn.Module):
    """A norm, then a pad with what the norm makes of 0.

    So a pointwise convolution before it and a larger one behind it are one: a pad of 0 would be none of the input
    (arXiv:2103.13425, transform III).
    """

    def __init__(self, norm: nn.Module, pads: Pads) -> None:
        super().__init__()
        self.norm = norm
        self.dims = len(pads)
        self.sides = [side for pad in reversed(pads) for side in pad]

    def border(self) -> Tensor:
        """What the norm makes of 0 with its running statistics, (C,)."""
        norm: Any = self.norm
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        mean = norm.running_mean.clone()  # of this pass: a later one writes over it, before the gradient is asked for
        border: Tensor = norm.bias - mean * scale
        return border

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        border = self.border().reshape(-1, *[1] * self.dims)
        return F.pad(y - border, self.sides) + border


class _DiverseBranchBlock(NormedBlock):
    """norm(conv_k(x)) + norm(conv_1(x)) + norm(avg_k(norm(conv_1(x)))) + norm(conv_k(norm(conv_1(x)))).

    DBB, arXiv:2103.13425, section 3.3.

    (N, I, *spatial) -> (N, O, *out), as an `nn.Conv{n}d` of these arguments; the norms need N.

    Each norm is one of its own, and between the two steps of the last two branches the value is padded with what the
    norm makes of 0. The 1x1 before the k×k keeps the input's channels and starts as the identity. The 1x1 branch is
    there unless the kernel is itself 1x1, and then the block is its first branch alone.

    The convs have no bias: `bias` is accepted so that the block drops in, and the norms supply one either way.

    Raises:
        ValueError: arguments that `nn.Conv{n}d` could not work with; a padding mode other than "zeros" or a dilation
            other than 1, for the paper has none, and an average has no dilation; a complex dtype.

    Example:
        >>> net = nn.Sequential(DiverseBranchBlock2d(8, 8, 3, padding=1), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        ones = (1,) * self.dims
        if padding_mode != "zeros" or self.dilation != ones:
            raise ValueError(
                f"padding_mode={padding_mode!r} and dilation={self.dilation}: a diverse branch block has 'zeros' and 1"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dense = self.branch(self.kernel_size, **factory)
        self.point: nn.Module | None = None
        self.average: nn.Module | None = None
        self.chain: nn.Module | None = None
        if self.kernel_size == ones:
            return
        conv = CONV[self.dims]
        self.point = self.branch(ones, **factory)
        self.average = nn.Sequential(
            OrderedDict(
                conv=conv(in_channels, out_channels, 1, groups=groups, bias=False, **factory),
                norm=NormPad(self.norm(**factory), self.pads),
                pool=POOL[self.dims](self.kernel_size, self.stride),
                norm2=self.norm(**factory),
            )
        )
        first: Any = conv(in_channels, in_channels, 1, groups=groups, bias=False, **factory)
        if device is None or torch.device(device).type != "meta":
            nn.init.dirac_(first.weight, groups)
        last = conv(in_channels, out_channels, self.kernel_size, self.stride, groups=groups, bias=False, **factory)
        self.chain = nn.Sequential(
            OrderedDict(
                conv=first,
                norm=NormPad(self.norm(in_channels, **factory), self.pads),
                conv2=last,
                norm2=self.norm(**factory),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dense(x)
        for branch in (self.point, self.average, self.chain):
            if branch is not None:
                y = y + branch(x)
        return y

    @property
    def main(self) -> nn.Sequential:
        return self.dense


class DiverseBranchBlock1d(_DiverseBranchBlock):
    __doc__ = _DiverseBranchBlock.__doc__
    dims = 1


class DiverseBranchBlock2d(_DiverseBranchBlock):
    __doc__ = _DiverseBranchBlock.__doc__
    dims = 2


class DiverseBranchBlock3d(_DiverseBranchBlock):
    __doc__ = _DiverseBranchBlock.__doc__
    dims = 3
