"""RepOptimizer: Re-parameterizing Your Optimizers rather than Architectures, arXiv:2205.15242, the CSLA block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import CONV, ConvBlock, Device, Size
from structrep.blocks.normed import take_over


class _CSLABlock(ConvBlock):
    """norm(s * conv_k(x) + t * conv_1(x) + u * x): constant scales, linear addition; s, t and u scale each channel.

    RepOptimizer, arXiv:2205.15242.

    (N, I, *spatial) -> (N, O, *out), as an `nn.Conv{n}d` of these arguments; the norm needs N. u * x is there where the
    block keeps its shape, the 1x1 unless the kernel is itself 1x1. The convs have no bias: `bias` is accepted so that
    the block drops in, and the norm supplies one either way.

    With trained scales it is the block of the paper's search; with scales that are left as they are
    (`requires_grad_(False)`), the one that its optimizer imitates.

    Parameters: `scales`, (O, 1, ...) for each of the branches that are there, in this order.

    Raises:
        ValueError: arguments that `nn.Conv{n}d` could not work with; a complex dtype.

    Example:
        >>> net = nn.Sequential(CSLABlock2d(8, 8, 3, padding=1), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    own_norms = True

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        ones = (1,) * self.dims
        self.dense = self._unnormed(self.kernel_size, **factory)
        self.point = None if self.kernel_size == ones else self._unnormed(ones, **factory)
        branches = 1 + (self.point is not None) + self.keeps_shape
        self.scales = nn.ParameterList(
            nn.Parameter(torch.empty(out_channels, *ones, **factory)) for _ in range(branches)
        )
        self.after: Any = self.norm(**factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for scale in self.scales:
            nn.init.ones_(scale)

    def _unnormed(self, kernel: tuple[int, ...], **factory: Any) -> nn.Sequential:
        """A conv of all taps, or of the centre one."""
        pad, padding = self.padded(self.pads if kernel == self.kernel_size else self.centre_pads)
        conv = CONV[self.dims](
            self.in_channels, self.out_channels, kernel, self.stride, padding, self.dilation, self.groups,
            bias=False, padding_mode=self.padding_mode, **factory,
        )  # fmt: skip
        return nn.Sequential(*pad.values(), conv)

    def start_as(self, weight: Tensor, bias: Tensor | None, norm: nn.Module | None = None) -> None:
        """See `ConvBlock.start_as`: the scales of all but the branch with all taps start at zero.

        Raises:
            ValueError: no norm is given.
        """
        if norm is None:
            raise ValueError("a norm ends this block, and no norm stands behind the conv")
        dense: Any = self.dense[-1]
        with torch.no_grad():
            dense.weight.copy_(weight)
            for scale in self.scales[1:]:
                nn.init.zeros_(scale)
            take_over(self.after, norm, bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.scales[0] * self.dense(x)
        if self.point is not None:
            y = y + self.scales[1] * self.point(x)
        if self.keeps_shape:
            y = y + self.scales[-1] * x
        return self.after(y)  # type: ignore[no-any-return]


class CSLABlock1d(_CSLABlock):
    __doc__ = _CSLABlock.__doc__
    dims = 1


class CSLABlock2d(_CSLABlock):
    __doc__ = _CSLABlock.__doc__
    dims = 2


class CSLABlock3d(_CSLABlock):
    __doc__ = _CSLABlock.__doc__
    dims = 3
