"""QARepVGG: Make RepVGG Greater Again: A Quantization-aware Approach, arXiv:2212.01593, section 4 and figure 3; and the
depthwise form of RepViT, arXiv:2307.09283, section 3.2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import CONV, POOL, ConvBlock, Device, Size
from structrep.blocks.online import Composition, full_precision, merged_first, watched


class _QARepVGGBlock(ConvBlock):
    """norm(norm(conv_k(x)) + conv_1(x) + x): only the large kernel has a norm of its own, and one follows the sum.

    QARepVGG, arXiv:2212.01593, section 4 and figure 3.

    (N, I, *spatial) -> (N, O, *out), as an `nn.Conv{n}d` of these arguments; the norms need N.

    With groups=in_channels this is RepViT's depthwise block. x is there where the block keeps its shape. The convs have
    no bias: `bias` is accepted so that the block drops in, and the norms supply one either way.

    Args:
        pool: add an average pool of the kernel's size, undilated, as YOLOv6 does (arXiv:2209.02976).
        online: whether the branches are merged before they are run, while they train: the same outputs, gradients and
            running statistics, from the moments of the input. None where that takes less time, by count; True wherever
            it can be done; False never.

    Raises:
        ValueError: arguments that `nn.Conv{n}d` could not work with; with `pool`, channels that differ, a stride, or a
            padding that is not zeros in numbers and keeps the shape; a complex dtype.

    Example:
        >>> net = nn.Sequential(QARepVGGBlock2d(8, 8, 3, padding=1), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
        *, pool: bool = False, online: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self.online = online
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dense = self.branch(self.kernel_size, **factory)
        pad, padding_ = self.padded(self.centre_pads)
        conv = CONV[self.dims](
            in_channels,
            out_channels,
            1,
            self.stride,
            padding_,
            1,
            groups,
            bias=False,
            padding_mode=padding_mode,
            **factory,
        )
        self.point = nn.Sequential(*pad.values(), conv)
        self.pool: nn.Module | None = None
        if pool:
            if not self.keeps_shape or self.padding_mode != "zeros" or isinstance(self.padding, str):
                raise ValueError("an average beside the kernel needs equal channels, stride 1 and padding in numbers")
            self.pool = POOL[self.dims](self.kernel_size, 1, self.padding)
        self.after = self.norm(**factory)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            composed = self.composed(x)
            if composed is not None:
                return composed
        y: Tensor = self.dense(x) + self.point(x)
        if self.keeps_shape:
            y = y + x
        if self.pool is not None:
            y = y + self.pool(x)
        return self.after(y)  # type: ignore[no-any-return]

    def composed(self, x: Tensor) -> Tensor | None:
        """See `NormedBlock.composed`."""
        branches = merged_first((self.dense, self.point), self.reading, x, self.online, [self.after])
        if branches is None or (self.pool is not None and watched(self.pool)):
            return None
        dense, point = branches
        with full_precision(x):
            made = Composition(x, self.reading, [dense.norm, self.after])
            beside = made.kernel(point)
            if self.keeps_shape:
                beside = beside + made.identity()
            if self.pool is not None:
                beside = beside + made.average()
            kernels, biases = made.normed_branches([dense])
            kernels, biases = made.normed(kernels + beside, biases + made.of_shift(beside.unsqueeze(0)), [self.after])
            kernel, bias = kernels[0], biases[0]
        return made.convolved(kernel, bias)


class QARepVGGBlock1d(_QARepVGGBlock):
    __doc__ = _QARepVGGBlock.__doc__
    dims = 1


class QARepVGGBlock2d(_QARepVGGBlock):
    __doc__ = _QARepVGGBlock.__doc__
    dims = 2


class QARepVGGBlock3d(_QARepVGGBlock):
    __doc__ = _QARepVGGBlock.__doc__
    dims = 3
