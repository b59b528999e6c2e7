"""MobileOne: An Improved One millisecond Mobile Backbone, arXiv:2206.04040, section 3.2 and figure 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import Device, Size, require_at_least
from structrep.blocks.normed import NormedBlock


class _MobileOneBlock(NormedBlock):
    """norm(conv_k(x)), `branches` times, + norm(conv_1(x)) + norm(x), each with a norm of its own.

    MobileOne, arXiv:2206.04040, section 3.2 and figure 3.

    (N, I, *spatial) -> (N, O, *out), as an `nn.Conv{n}d` of these arguments; the norms need N.

    The 1x1 is there unless the kernel is itself 1x1, the last norm where the block keeps its shape: stride 1, as many
    channels, and a padding that keeps the size. The convs have no bias: `bias` is accepted so that the block drops in,
    and the norms supply one either way.

    Args:
        branches: how many there are of all taps.
        online: whether the branches are merged before they are run, while they train: the same outputs, gradients and
            running statistics, from the moments of the input. None where that takes less time, by count; True wherever
            it can be done; False never.

    Raises:
        ValueError: arguments that `nn.Conv{n}d` could not work with; fewer than one branch; a complex dtype.

    Example:
        >>> net = nn.Sequential(MobileOneBlock2d(8, 8, 3, padding=1, groups=8, branches=2), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=8)
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
        *, branches: int = 4, online: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        require_at_least(1, branches=branches)
        self.online = online
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dense = nn.ModuleList(self.branch(self.kernel_size, **factory) for _ in range(branches))
        self.point: nn.Module | None = None
        self.skip: nn.Module | None = None
        if max(self.kernel_size) > 1:
            self.point = self.branch((1,) * self.dims, **factory)
        if self.keeps_shape:
            self.skip = self.norm(**factory)

    @property
    def main(self) -> nn.Sequential:
        main: Any = self.dense[0]
        return main  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            composed = self.composed(x)
            if composed is not None:
                return composed
        y: Tensor = sum(branch(x) for branch in self.dense)
        if self.point is not None:
            y = y + self.point(x)
        if self.skip is not None:
            y = y + self.skip(x)
        return y


class MobileOneBlock1d(_MobileOneBlock):
    __doc__ = _MobileOneBlock.__doc__
    dims = 1


class MobileOneBlock2d(_MobileOneBlock):
    __doc__ = _MobileOneBlock.__doc__
    dims = 2


class MobileOneBlock3d(_MobileOneBlock):
    __doc__ = _MobileOneBlock.__doc__
    dims = 3
