"""Values of which each channel is taken from one or another, or is a mean of both: `where` with a mask per channel,
`masked_fill`, `lerp`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from structrep.graph.constants import constant, exact
from structrep.read.arguments import Arguments, reads
from structrep.terms.layer import Blend, Layer, Sum
from structrep.terms.layers import scale_layer


@reads(torch.where)
def _(a: Arguments) -> Blend | Layer | None:
    return _chosen(a(0, "condition"), a(1, "input"), a(2, "other"))


@reads("where")
def _(a: Arguments) -> Blend | Layer | None:
    return _chosen(a(1, "condition"), a(0, "self"), a(2, "other"))


@reads(torch.masked_fill, "masked_fill")
def _(a: Arguments) -> Blend | Layer | None:
    return _chosen(a(1, "mask"), a(2, "value"), a(0, "input"))


@reads(torch.lerp, "lerp")
def _(a: Arguments) -> Sum | Blend | Layer | None:
    (start, end), share = a.pair("end"), exact(a(2, "weight"))
    if share is None:
        return None
    known = torch.as_tensor(share, dtype=torch.float64).detach()
    if known.ndim or constant(start) is not None or constant(end) is not None:
        return _mixed(known, end, start)
    return Sum(((start, 1.0 - float(known)), (end, float(known))))


def _chosen(condition: Any, chosen: Any, other: Any) -> Blend | Layer | None:
    mask = exact(condition)
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        return None  # it depends on the input
    return _mixed(mask.double(), chosen, other)


def _mixed(share: Tensor, one: Any, other: Any) -> Blend | Layer | None:
    """share * one + (1 - share) * other, where one of these at least is no constant."""
    if (held := exact(one)) is not None:
        return _filled(1.0 - share, other, held) if exact(other) is None else None
    if (held := exact(other)) is not None:
        return _filled(share, one, held)
    scales = scale_layer(share), scale_layer(1.0 - share)
    return Blend(((one, scales[0]), (other, scales[1]))) if scales[0] and scales[1] else None


def _filled(share: Tensor, value: fx.Node, constant: Tensor | float) -> Layer | None:
    """share * value + (1 - share) * constant."""
    fill = torch.as_tensor(constant, dtype=torch.float64).detach()
    layer = scale_layer(share, (1.0 - share) * fill) if bool(torch.isfinite(fill).all()) else None
    return replace(layer, source=value) if layer else None
