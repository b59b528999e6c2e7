"""ExpandNets: Linear Over-parameterization to Train Compact Convolutional Networks.

arXiv:1811.10495, section 3.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn

from structrep.blocks._geometry import CONV, ConvBlock, Device, Size, require_at_least


class _ExpandConv(ConvBlock):
    """A chain of convs, nothing between them, that one conv of the same arguments can express.

    mode="cl" expands a convolutional layer: a 1x1 to rate*in_channels, the kernel to rate*out_channels with
    the stride and the dilation, a 1x1 to out_channels.
    mode="ck" expands a convolutional kernel, odd and >= 5: (k - 1)/2 kernels of 3, to rate*in_channels, then
    rate*out_channels, at last out_channels, with the stride on the last and the dilation on all.

    All the padding is on the first conv, so that its bias is there in the border too and no later conv
    makes up a border of its own: this is what keeps the chain one conv exactly. Every conv is grouped, with
    a bias if `bias`.

    Raises ValueError for arguments that `nn.Conv{n}d` could not work with, for a rate below 1, an unknown
    mode, and in mode "ck" for a kernel that is not one odd number >= 5 in all dims.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
        *, rate: int = 4, mode: str = "cl",
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        require_at_least(1, rate=rate)
        self.rate, self.mode = rate, mode
        wide_in, wide_out = rate * in_channels, rate * out_channels
        ones, threes = (1,) * self.dims, (3,) * self.dims
        if mode == "cl":
            widths = [in_channels, wide_in, wide_out, out_channels]
            kernels, strided = [ones, self.kernel_size, ones], 1
        elif mode == "ck":
            k = self.kernel_size[0]
            if k < 5 or k % 2 == 0 or set(self.kernel_size) != {k}:
                raise ValueError(
                    f"mode='ck' makes kernels of 3 into one odd kernel >= 5, the same in all dims, and "
                    f"kernel_size={self.kernel_size}: choose such a kernel, or mode='cl'"
                )
            depth = (k - 1) // 2
            widths = [in_channels, wide_in, *[wide_out] * (depth - 2), out_channels]
            kernels, strided = [threes] * depth, depth - 1
        else:
            raise ValueError(f"mode={mode!r} is unknown: choose 'cl' or 'ck'")
        pad, padding_of_first = self.padded(self.pads)
        layers = OrderedDict(pad)
        for i, kernel in enumerate(kernels):
            layers[f"conv{i + 1}"] = CONV[self.dims](
                widths[i], widths[i + 1], kernel, self.stride if i == strided else 1,
                padding_of_first if i == 0 else 0, self.dilation, groups, bias, padding_mode, device, dtype,
            )  # fmt: skip
        self.chain = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.chain(x)
        return y


class ExpandConv1d(_ExpandConv):
    __doc__ = _ExpandConv.__doc__
    dims = 1


class ExpandConv2d(_ExpandConv):
    __doc__ = _ExpandConv.__doc__
    dims = 2


class ExpandConv3d(_ExpandConv):
    __doc__ = _ExpandConv.__doc__
    dims = 3


class ExpandLinear(nn.Module):
    """A chain of three Linears, nothing between them, that one Linear can express.

    in_features -> rate*in_features -> rate*out_features -> out_features.

    Raises ValueError for feature counts or a rate below 1.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True,
        device: Device = None, dtype: torch.dtype | None = None, *, rate: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        require_at_least(1, in_features=in_features, out_features=out_features, rate=rate)
        self.in_features, self.out_features, self.rate = in_features, out_features, rate
        widths = (in_features, rate * in_features, rate * out_features, out_features)
        self.chain = nn.Sequential(*(nn.Linear(i, o, bias, device, dtype) for i, o in pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.chain(x)
        return y
