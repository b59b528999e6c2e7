"""A map as a layer: the plainest module that computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structrep.algebra import ConvMap, swapped
from structrep.deployed.layers import Shift
from structrep.errors import Unreadable
from structrep.read.modules import padding_of

CONVS: tuple[Any, ...] = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSES: tuple[Any, ...] = (None, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PADS: dict[str, tuple[Any, ...]] = {
    "constant": (None, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "reflect": (None, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (None, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (None, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


def lower(map_: ConvMap, like: Tensor, *, bias: bool = True, requires_grad: bool = True) -> nn.Module:
    """A map as a plain layer with the device, dtype and memory format of `like`; cast once, here.

    Args:
        bias: whether to keep a bias that is zero everywhere.

    Returns:
        A Linear, a convolution, or a pad or shift and a convolution where no convolution pads so itself.

    Raises:
        Unreadable: no layer pads as the map does.
    """
    g = map_.geometry
    if not _uniform(map_.fill):
        shift = Shift(-map_.fill.to(like.device, like.dtype), g.dims)
        rest = lower(map_.shifted(map_.fill), like, requires_grad=requires_grad)
        return nn.Sequential(shift, *(rest if isinstance(rest, nn.Sequential) else [rest]))
    has_bias = bias or bool(map_.bias.any())
    factory: dict[str, Any] = {"device": "meta", "dtype": like.dtype}
    padding = padding_of(map_)
    layer: nn.Module
    if not g.dims:
        layer = nn.Linear(g.in_channels, g.out_channels, has_bias, **factory)
    elif g.transposed:
        if padding is None:
            pad_module(map_)  # says so
        more = tuple(lo - hi for lo, hi in g.pad)
        layer = CONV_TRANSPOSES[g.dims](
            g.in_channels, g.out_channels, g.kernel, g.stride, padding, more, g.groups, has_bias, g.dilation, **factory
        )
    else:
        mode = "zeros" if map_.border == "constant" or padding is None else map_.border
        layer = CONVS[g.dims](
            g.in_channels,
            g.out_channels,
            g.kernel,
            g.stride,
            padding or 0,
            g.dilation,
            g.groups,
            has_bias,
            mode,
            **factory,
        )
    kernel = swapped(map_.kernel, g.groups) if g.transposed else map_.kernel
    layer.weight = nn.Parameter(_cast(kernel, like), requires_grad=requires_grad)
    if has_bias:
        layer.bias = nn.Parameter(map_.bias.to(like.device, like.dtype), requires_grad=requires_grad)
    layer.eval()
    return layer if padding is not None else nn.Sequential(pad_module(map_), layer)


def lower_table(map_: ConvMap, like: Tensor, *, requires_grad: bool = True) -> nn.Embedding:
    """A map of vectors with a 1 in one place as the table of what it gives, in the device and dtype of `like`."""
    g = map_.geometry
    table = nn.Embedding(g.in_channels, g.out_channels, device="meta", dtype=like.dtype)
    rows = (map_.kernel.t() + map_.bias).to(like.device, like.dtype)
    table.weight = nn.Parameter(rows.contiguous(), requires_grad=requires_grad)
    return table.eval()


def _uniform(values: Tensor) -> bool:
    return bool((values == values[0]).all())


def remedy(map_: ConvMap) -> str:
    """What a layer of its own does for a map's border, where no convolution does that itself; "" where one does.

    Raises:
        Unreadable: no layer does.
    """
    if not _uniform(map_.fill):
        remedy(map_.shifted(map_.fill))
        low, high = float(map_.fill.min()), float(map_.fill.max())
        return f"its input less {low:.3g} to {high:.3g} per channel, for the border"
    if padding_of(map_) is not None:
        return ""
    pad_module(map_)
    value = f" with {float(map_.fill[0]):.3g}" if map_.fill.any() else ""
    kind = "" if map_.border == "constant" else f" ({map_.border})"
    return f"a pad of {map_.geometry.pad}{value}{kind} of its own"


def pad_module(map_: ConvMap) -> nn.Module:
    """The pad of a map that no convolution does, as a layer of its own.

    Raises:
        Unreadable: no layer pads so.
    """
    if map_.geometry.transposed:
        raise Unreadable(
            f"no transposed convolution crops its output by {map_.geometry.pad}, and no pad does it before"
        )
    if map_.border != "constant" and any(side < 0 for sides in map_.geometry.pad for side in sides):
        raise Unreadable(f"the merged layer would pad ({map_.border}) and then crop, and torch's pads crop first")
    sides = tuple(side for sides in reversed(map_.geometry.pad) for side in sides)
    module: nn.Module = _PADS[map_.border][map_.geometry.dims](
        sides, *([map_.fill[0].item()] if map_.border == "constant" else [])
    )
    return module


def _cast(kernel: Tensor, like: Tensor) -> Tensor:
    memory = torch.contiguous_format
    if (
        kernel.ndim == 4
        and like.ndim == 4
        and like.is_contiguous(memory_format=torch.channels_last)
        and not like.is_contiguous()
    ):
        memory = torch.channels_last
    return kernel.to(like.device, like.dtype).contiguous(memory_format=memory)
