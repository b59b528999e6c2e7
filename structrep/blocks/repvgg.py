"""RepVGG: Making VGG-style ConvNets Great Again, arXiv:2101.03697, section 3.2 and figure 4."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import Device, Pad, Size
from structrep.blocks.normed import NormedBlock


class _RepVGGBlock(NormedBlock):
    """norm(conv_k(x)) + norm(conv_1(x)) + norm(x), each with a norm of its own.

    RepVGG, arXiv:2101.03697, section 3.2 and figure 4.

    (N, I, *spatial) -> (N, O, *out), as an `nn.Conv{n}d` of these arguments; the norms need N.

    The 1x1 and the identity sit on the kernel's centre tap, k//2, whatever the padding: where it is more
    than `dilation*(k//2)` they read a padded input, where it is less a cropped one. The identity is there
    where it fits (`in_channels == out_channels` and stride 1), the 1x1 unless the kernel is itself 1x1.

    The convs have no bias: `bias` is accepted so that the block drops in, and the norms supply one either
    way.

    Args:
        online: whether the branches are merged before they are run, while they train: the same outputs, gradients and
            running statistics, from the moments of the input. None where that takes less time, by count; True wherever
            it can be done; False never.

    Raises:
        ValueError: arguments that `nn.Conv{n}d` could not work with; a complex dtype.

    Example:
        >>> net = nn.Sequential(RepVGGBlock2d(8, 8, 3, padding=1), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
        *, online: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self.online = online
        ones = (1,) * self.dims
        self.dense = self.branch(self.kernel_size, device=device, dtype=dtype)
        self.point: nn.Module | None = None
        self.identity: nn.Module | None = None
        if self.kernel_size != ones:
            self.point = self.branch(ones, device=device, dtype=dtype)
        if in_channels == out_channels and self.stride == ones:
            self.identity = self.norm(device=device, dtype=dtype)
            if any(map(any, self.centre_pads)):
                pad = Pad(self.centre_pads, padding_mode)
                self.identity = nn.Sequential(OrderedDict(pad=pad, norm=self.identity))

    @property
    def main(self) -> nn.Sequential:
        return self.dense

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            composed = self.composed(x)
            if composed is not None:
                return composed
        y: Tensor = self.dense(x)
        if self.point is not None:
            y = y + self.point(x)
        if self.identity is not None:
            y = y + self.identity(x)
        return y


class RepVGGBlock1d(_RepVGGBlock):
    __doc__ = _RepVGGBlock.__doc__
    dims = 1


class RepVGGBlock2d(_RepVGGBlock):
    __doc__ = _RepVGGBlock.__doc__
    dims = 2


class RepVGGBlock3d(_RepVGGBlock):
    __doc__ = _RepVGGBlock.__doc__
    dims = 3
