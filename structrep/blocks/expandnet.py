"""ExpandNets: Linear Over-parameterization to Train Compact Convolutional Networks.

arXiv:1811.10495, section 3.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structrep.blocks._geometry import CONV, CONVOLVE, ConvBlock, Device, Pad, Size, require_at_least

CONVOLVE_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class _ExpandConv(ConvBlock):
    """A chain of convs, nothing between them, that one conv of the same arguments can express.

    ExpandNets, arXiv:1811.10495, section 3.

    (N, I, *spatial) -> (N, O, *out), as an `nn.Conv{n}d` of these arguments; also without N.

    mode="cl" expands a convolutional layer: a 1x1 to rate*in_channels, the kernel to rate*out_channels with
    the stride and the dilation, a 1x1 to out_channels.
    mode="ck" expands a convolutional kernel, odd and >= 5: (k - 1)/2 kernels of 3, to rate*in_channels, then
    rate*out_channels, at last out_channels, with the stride on the last and the dilation on all.

    All the padding is on the first conv, so that its bias is there in the border too and no later conv
    makes up a border of its own: this is what keeps the chain one conv exactly. Every conv is grouped, with
    a bias if `bias`.

    online=True composes the kernels on every pass, and runs one conv: the same function of the same
    parameters, at what the plain conv costs and a little more.

    Args:
        rate: channels inside the chain, relative to those outside.

    Raises:
        ValueError: arguments that `nn.Conv{n}d` could not work with; a rate below 1; an unknown mode; in mode "ck" a
            kernel that is not one odd number >= 5 in all dims.

    Example:
        >>> net = nn.Sequential(ExpandConv2d(8, 16, 3, rate=2), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Conv2d(8, 16, kernel_size=(3, 3), stride=(1, 1))
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: Device = None, dtype: torch.dtype | None = None,
        *, rate: int = 4, mode: str = "cl", online: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        require_at_least(1, rate=rate)
        self.rate, self.mode, self.online = rate, mode, online
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

    def start_as(self, weight: Tensor, bias: Tensor | None, norm: nn.Module | None = None) -> None:
        """See `ConvBlock.start_as`: the first channels inside are those of the plain conv, the others add nothing.

        Raises:
            ValueError: in mode "ck", whose chain cannot express every kernel.
        """
        if self.mode != "cl":
            raise ValueError("a chain of kernels of 3 cannot express every larger one: give init='paper', or mode='cl'")
        expand, dense, reduce = self._convs()
        ins, outs = self.in_channels // self.groups, self.out_channels // self.groups
        with torch.no_grad():
            parts = [conv.weight.reshape(self.groups, -1, *conv.weight.shape[1:]) for conv in (expand, dense, reduce)]
            for first, middle, last, own in zip(
                *parts, weight.reshape(self.groups, -1, *weight.shape[1:]), strict=True
            ):
                nn.init.dirac_(first[:ins])
                middle[:outs, ins:] = 0
                middle[:outs, :ins] = own
                nn.init.dirac_(last)
            for conv in (expand, dense, reduce):
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)
            if bias is not None and reduce.bias is not None:
                reduce.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.online:
            return self._composed(x)
        y: Tensor = self.chain(x)
        return y

    def _convs(self) -> list[Any]:
        return [layer for layer in self.chain if not isinstance(layer, Pad)]

    def _composed(self, x: Tensor) -> Tensor:
        first, *rest = self._convs()
        kernel, bias = first.weight, first.bias
        for conv in rest:
            kernel, bias = _compose(kernel, conv.weight, self.groups), _shift(bias, conv)
        if isinstance(self.chain[0], Pad):
            x = self.chain[0](x)
        if first.padding_mode != "zeros":
            x = F.pad(x, first._reversed_padding_repeated_twice, first.padding_mode)
        padding = first.padding if first.padding_mode == "zeros" else 0
        y: Tensor = CONVOLVE[self.dims](x, kernel, bias, self.stride, padding, self.dilation, self.groups)
        return y


def _compose(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """The kernel of two convs in a row: (M, I/g, *K1), (O, M/g, *K2) -> (O, I/g, *K1 + K2 - 1)."""
    images = second.reshape(groups, -1, *second.shape[1:]).transpose(0, 1).flatten(1, 2)  # (O/g, M, *K2)
    kernel: Tensor = CONVOLVE_TRANSPOSED[second.ndim - 2](images, first, groups=groups)  # (O/g, I, *K)
    whole: Tensor = kernel.reshape(len(kernel), groups, -1, *kernel.shape[2:]).transpose(0, 1).flatten(0, 1)
    return whole


def _shift(bias: Tensor | None, conv: Any) -> Tensor | None:
    """The bias of a conv behind one with a bias, which it sees at every tap."""
    if bias is None:
        return conv.bias  # type: ignore[no-any-return]
    taps = conv.weight.flatten(2).sum(-1).reshape(conv.groups, -1, conv.weight.shape[1])  # (g, O/g, M/g)
    seen: Tensor = (taps * bias.reshape(conv.groups, 1, -1)).sum(-1).flatten()
    return seen if conv.bias is None else seen + conv.bias


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

    ExpandNets, arXiv:1811.10495, section 3.3.

    (..., in_features) -> (..., out_features), by way of rate*in_features and rate*out_features.

    Args:
        rate: features inside the chain, relative to those outside.

    Raises:
        ValueError: feature counts or a rate below 1.

    Example:
        >>> net = nn.Sequential(ExpandLinear(8, 16), nn.ReLU()).eval()
        >>> structrep.reparameterize(net)[0]
        Linear(in_features=8, out_features=16, bias=True)
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

    def _linears(self) -> list[Any]:
        return list(self.chain)

    def start_as(self, weight: Tensor, bias: Tensor | None, norm: nn.Module | None = None) -> None:
        """Take parameters with which the chain computes what a Linear of this weight (O, I) and bias does."""
        expand, dense, reduce = linears = self._linears()
        ins, outs = self.in_features, self.out_features
        with torch.no_grad():
            nn.init.eye_(expand.weight[:ins])
            dense.weight[:outs, ins:] = 0
            dense.weight[:outs, :ins] = weight
            nn.init.eye_(reduce.weight)
            for linear in linears:
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
            if bias is not None:
                reduce.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.chain(x)
        return y
