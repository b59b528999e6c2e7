"""The value of a map at an input: what y[o, p] = bias[o] + sum kernel[o, i, t] * x[i, ...] is, by torch's functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structrep.algebra.geometry import CONV, CONV_TRANSPOSE, Border, Geometry
from structrep.algebra.kernels import regroup, swapped


def evaluate(x: Tensor, g: Geometry, kernel: Tensor, bias: Tensor, border: Border, fill: Tensor) -> Tensor:
    """What the map of these coefficients makes of x.

    Raises:
        RuntimeError: there is no output pixel, or a reflect or circular pad is wider than x.
    """
    if not g.dims:
        return F.linear(x, regroup(kernel, g.groups, 1), bias)
    pads = [max(0, side) for sides in reversed(g.pad) for side in sides]
    crops = [min(0, side) for sides in reversed(g.pad) for side in sides]
    if g.transposed:
        weight = swapped(kernel, g.groups)
        full = CONV_TRANSPOSE[g.dims](x, weight, None, g.stride, 0, 0, g.groups, g.dilation)  # type: ignore[misc]
        inside = F.pad(F.pad(full, [-side for side in crops]), [-side for side in pads])
        return inside + bias.reshape(-1, *[1] * g.dims)
    if border == "constant":
        own = F.pad(torch.ones_like(x, dtype=torch.bool), pads)
        x = torch.where(own, F.pad(x, pads), fill.reshape(-1, *[1] * g.dims))
    else:
        x = F.pad(x, pads, mode=border)
    x = F.pad(x, crops)  # last: what is read outside is made of all of x, cropped pixels too
    return CONV[g.dims](x, kernel, bias, g.stride, 0, g.dilation, g.groups)  # type: ignore[misc]
