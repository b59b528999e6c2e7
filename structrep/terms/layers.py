"""Layers from their numbers: convolutions, norms, pools, pads, slices, scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from structrep.algebra import Border, ConvMap, Geometry, Ints, Pads, swapped
from structrep.algebra.precision import doubled
from structrep.errors import Unreadable
from structrep.terms.layer import Layer


def conv_layer(
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    border: Border = "constant",
) -> Layer:
    """A convolution as torch defines it; "same" puts the odd pixel of padding on the high side."""
    dims = weight.ndim - 2
    taps = tuple(weight.shape[2:])
    steps = _each(dilation, dims)
    pads: Pads
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(steps, taps, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    elif padding == "valid":
        pads = ((0, 0),) * dims
    else:
        pads = tuple((p, p) for p in _each(padding, dims))  # type: ignore[arg-type]
    geometry = Geometry(weight.shape[1] * groups, weight.shape[0], taps, _each(stride, dims), steps, pads, groups)

    def load(channels: int, dims: int) -> ConvMap:
        g = geometry
        return ConvMap(
            weight.detach(), bias, stride=g.stride, pad=g.pad, dilation=g.dilation, groups=g.groups, border=border,
        )  # fmt: skip

    return kernel_layer("conv", geometry, load, weight, bias)


def conv_transpose_layer(
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
) -> Layer:
    """A transposed convolution; one of stride 1 is a convolution with the flipped kernel."""
    dims = weight.ndim - 2
    taps, steps, strides = tuple(weight.shape[2:]), _each(dilation, dims), _each(stride, dims)
    pads = tuple((p, p - more) for p, more in zip(_each(padding, dims), _each(output_padding, dims), strict=True))  # type: ignore[arg-type]
    plain = set(strides) == {1}
    if plain:
        reach = [d * (k - 1) for d, k in zip(steps, taps, strict=True)]
        pads = tuple((r - lo, r - hi) for r, (lo, hi) in zip(reach, pads, strict=True))
    geometry = Geometry(weight.shape[0], weight.shape[1] * groups, taps, strides, steps, pads, groups, not plain)

    def load(channels: int, dims: int) -> ConvMap:
        kernel = swapped(weight.detach(), groups)
        return ConvMap.of(geometry, kernel.flip(*range(2, kernel.ndim)) if plain else kernel, bias)

    return kernel_layer("conv", geometry, load, weight, bias)


def linear_layer(weight: Tensor, bias: Tensor | None) -> Layer:
    """y = W x + b on the last dimension."""
    geometry = Geometry(weight.shape[1], weight.shape[0])
    return kernel_layer("linear", geometry, lambda c, d: ConvMap(weight.detach(), bias), weight, bias)


def table_layer(weight: Tensor) -> Layer:
    """Rows of a table, by their numbers: a Linear of vectors with a 1 in one place, of which there are as many."""
    geometry = Geometry(*weight.shape)
    return kernel_layer("table", geometry, lambda c, d: ConvMap(weight.detach().t(), None), weight, None)


def channel_mix_layer(weight: Tensor, matrix: Tensor, dims: int, bias: Tensor | None = None) -> Layer:
    """A matrix (O, I), made of a weight, on the channels of a value with that many spatial dims."""
    geometry = Geometry(matrix.shape[1], matrix.shape[0], (1,) * dims)
    kernel = matrix.detach().reshape(*matrix.shape, *[1] * dims)
    return kernel_layer("conv" if dims else "linear", geometry, lambda c, d: ConvMap(kernel, bias), weight, bias)


def kernel_layer(
    kind: str, geometry: Geometry, load: Callable[[int, int], ConvMap], weight: Tensor, bias: Tensor | None
) -> Layer:
    """A layer of which a kernel says all that is open in others."""
    return Layer(
        kind,
        load,
        lambda c, d: geometry,
        geometry.in_channels,
        geometry.out_channels,
        geometry.dims,
        numbers_in(weight, bias),
        bias is not None,
        weight,
    )


def norm_layer(
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    training: bool,
    dims: int | None = None,
) -> Layer:
    """A batch norm with fixed statistics: scale = weight / sqrt(var + eps), shift = bias - mean * scale.

    Raises:
        Unreadable: the statistics are those of the batch.
    """
    if training or mean is None or var is None:
        raise Unreadable(
            "the norm takes its statistics from each batch "
            + (
                "(training mode): call model.eval() first"
                if training
                else "(track_running_stats=False): it is no fixed map"
            )
        )

    def load(channels: int, dims: int) -> ConvMap:
        scale = (doubled(var) + eps).rsqrt()
        scale = scale if weight is None else doubled(weight) * scale
        shift = -doubled(mean) * scale
        return ConvMap.scale(scale, shift if bias is None else doubled(bias) + shift, dims=dims)

    layer = diagonal_layer("norm", load, mean.numel(), dims, numbers_in(mean, var, weight, bias))
    return replace(layer, dead=lambda: int((var < eps).sum()))


def diagonal_layer(
    kind: str, load: Callable[[int, int], ConvMap], channels: int | None, dims: int | None, parameters: int
) -> Layer:
    """A scale and shift per channel."""

    def shape(c: int, d: int) -> Geometry:
        return Geometry(c, c, (1,) * d, groups=c)

    return Layer(kind, load, shape, channels, channels, dims, parameters, shifts=True)


def pool_layer(
    dims: int,
    kernel: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
    size: Sequence[int] | None = None,
) -> Layer | None:
    """An average pool, where each window divides by the same number.

    Args:
        size: spatial size of an example; `ceil_mode` is nothing where windows fit that size exactly.
    """
    taps, pads = _each(kernel, dims), _each(padding, dims)
    if any(pads) and not count_include_pad:
        return None
    steps = _each(taps if stride in (None, ()) else stride, dims)
    if ceil_mode and (
        size is None
        or len(size) != dims
        or any((n + 2 * p - k) % s for n, p, k, s in zip(size, pads, taps, steps, strict=True))
    ):
        return None

    def shape(c: int, d: int) -> Geometry:
        return Geometry(c, c, taps, steps, (), tuple((p, p) for p in pads), c)

    def load(c: int, d: int) -> ConvMap:
        kernel = torch.full((c, 1, *taps), 1.0 / (divisor or math.prod(taps)), dtype=torch.float64)
        return ConvMap.of(shape(c, d), kernel)

    return Layer("pool", load, shape, None, None, dims, sized="period" if ceil_mode else "any")


def adaptive_pool_layer(
    dims: int, output: int | Sequence[int | None] | None, size: Sequence[int] | None
) -> Layer | None:
    """An adaptive average pool of an input whose size is known and divides into that of the output."""
    if size is None or len(size) != dims:
        return None
    wanted: Sequence[int | None] = output if isinstance(output, (list, tuple)) else (output,) * dims  # type: ignore[assignment]
    outputs = [n if out is None else out for n, out in zip(size, wanted, strict=True)]
    if any(n % out for n, out in zip(size, outputs, strict=True)) or list(size) == outputs:
        return None
    pool = pool_layer(dims, [n // out for n, out in zip(size, outputs, strict=True)], None, 0)
    return replace(pool, sized="size") if pool else None


def pad_layer(sides: Sequence[int], border: Border, value: Tensor | float = 0.0) -> Layer:
    """An explicit pad or crop; `sides` as in `torch.nn.functional.pad`, last dim first; `value` for all or (C,).

    Raises:
        Unreadable: it copies pixels on one side and crops another, which torch does in the other order than a map.
    """
    if border != "constant" and min(sides) < 0 < max(sides):
        raise Unreadable(f"a {border} pad of {tuple(sides)} crops before it copies pixels, a map copies first")
    pairs = tuple((sides[i], sides[i + 1]) for i in range(len(sides) - 2, -1, -2))

    def shape(c: int, d: int) -> Geometry:
        if len(pairs) > d:
            raise Unreadable(f"a pad of {len(pairs)} dims reaches beyond the {d} spatial ones")
        return Geometry(c, c, (1,) * d, pad=((0, 0),) * (d - len(pairs)) + pairs, groups=c)

    return _tap_layer("pad", shape, border, value)


def view_layer() -> Layer:
    """Batch dims folded together or apart again: nothing to a map on the last dim."""

    def shape(c: int, d: int) -> Geometry:
        if d:
            raise Unreadable(f"a view that folds the dims before the last, of values with {d} spatial ones")
        return Geometry(c, c, groups=c)

    return Layer("view", lambda c, d: ConvMap.identity(c, 0), shape, dims=0, moves=True)


def crop_layer(index: tuple[Any, ...]) -> Layer | None:
    """x[:, :, a:b, c:d] or x[..., a:b, c:d] with constant starts and stops counted from the ends."""
    if index[0] is Ellipsis:
        spatial, last = index[1:], True
    elif len(index) > 2 and index[:2] == (slice(None), slice(None)):
        spatial, last = index[2:], False
    else:
        return None
    pads = []
    for part in spatial:
        if not isinstance(part, slice) or part.step not in (None, 1):
            return None
        start, stop = part.start or 0, part.stop or 0
        if not isinstance(start, int) or not isinstance(stop, int) or start < 0 or stop > 0 or part.stop == 0:
            return None
        pads.append((-start, stop))

    def shape(c: int, d: int) -> Geometry:
        if len(pads) > d:
            raise Unreadable(f"an index into {len(pads)} dims of values that have {d} spatial ones")
        rest = [(0, 0)] * (d - len(pads))
        return Geometry(c, c, (1,) * d, pad=(*rest, *pads) if last else (*pads, *rest), groups=c)

    return _tap_layer("pad", shape, "constant", 0.0)


def slice_layer(dim: int, select: Callable[[int], slice], channels: int | None = None) -> Layer:
    """Some of the `channels` of a value, next to one another; `select` is given how many there are.

    Args:
        dim: of the slice. Channels are dim 1 of a batch, features the last.
    """

    def kept(c: int, d: int) -> range:
        if dim != (1 if dim >= 0 and d else -(d + 1)):
            raise Unreadable(f"a slice of dim {dim}, where channels are on dim {1 if d else -1}")
        if not range(c)[select(c)]:
            raise Unreadable(f"a slice of {c} channels that holds none")
        return range(c)[select(c)]

    def load(c: int, d: int) -> ConvMap:
        rows = torch.eye(c, dtype=torch.float64)[list(kept(c, d))]
        return ConvMap(rows.reshape(-1, c, *[1] * d))

    def shape(c: int, d: int) -> Geometry:
        return Geometry(c, len(kept(c, d)), (1,) * d)

    return Layer("slice", load, shape, channels, moves=True, keeps_channels=False)


def _tap_layer(kind: str, shape: Callable[[int, int], Geometry], border: Border, value: Tensor | float) -> Layer:
    def load(c: int, d: int) -> ConvMap:
        g = shape(c, d)
        fill = value.expand(c) if isinstance(value, Tensor) else value
        return ConvMap(torch.ones(c, 1, *g.kernel, dtype=torch.float64), pad=g.pad, groups=c, fill=fill, border=border)

    return Layer(kind, load, shape, moves=True)


def scale_layer(scale: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> Layer | None:
    """scale * x + shift by numbers or per-channel constants that broadcast against x; None for any other constants."""
    constants = [v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in (scale, shift)]
    channels, dims = None, None
    for constant in constants:
        wide = [axis for axis, size in enumerate(constant.shape) if size != 1]
        if not wide:
            continue
        if len(wide) > 1 or not constant.is_floating_point():
            return None
        size, after = constant.shape[wide[0]], constant.ndim - 1 - wide[0]
        if (channels, dims) not in ((None, None), (size, after)):
            return None
        channels, dims = size, after

    def load(c: int, d: int) -> ConvMap:
        s, t = (doubled(constant).flatten().expand(c) for constant in constants)
        return ConvMap.scale(s, t, dims=d)

    stored = numbers_in(*(v for v in (scale, shift) if isinstance(v, Tensor)))
    made = diagonal_layer("affine", load, channels, dims, stored)
    return replace(made, shifts=not is_number(shift, 0), adds=is_number(scale, 1))


def _each(value: int | Sequence[int], dims: int) -> Ints:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) if len(value) == dims else (value[0],) * dims


def numbers_in(*tensors: Tensor | None) -> int:
    return sum(t.numel() for t in tensors if t is not None)


def is_number(value: Tensor | float, number: float) -> bool:
    return not isinstance(value, Tensor) and value == number
