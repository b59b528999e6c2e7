"""What functions and tensor methods do."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from structrep.algebra.precision import doubled
from structrep.graph.constants import constant, exact
from structrep.graph.facts import INDEX, VALUE
from structrep.graph.operations import torch_name
from structrep.graph.shapes import rank
from structrep.graph.table import spatial_dims
from structrep.read.arguments import Arguments, reads
from structrep.read.repeated import spread_out
from structrep.terms.layer import Concat, Identity, Layer, Reading, Sum
from structrep.terms.layers import (
    adaptive_pool_layer,
    conv_layer,
    conv_transpose_layer,
    crop_layer,
    is_number,
    norm_layer,
    pad_layer,
    pool_layer,
    scale_layer,
    slice_layer,
    table_layer,
    view_layer,
)


@reads(F.conv1d, F.conv2d, F.conv3d)
def _(a: Arguments) -> Layer | None:
    weight = a.tensor(1, "weight")
    if weight is None:
        return None
    bias = a.tensor(2, "bias")
    return conv_layer(weight, bias, a(3, "stride", 1), a(4, "padding", 0), a(5, "dilation", 1), a(6, "groups", 1))


@reads(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _(a: Arguments) -> Layer | None:
    weight = a.tensor(1, "weight")
    if weight is None:
        return None
    bias, padding, more = a.tensor(2, "bias"), a(4, "padding", 0), a(5, "output_padding", 0)
    return conv_transpose_layer(weight, bias, a(3, "stride", 1), padding, more, a(6, "groups", 1), a(7, "dilation", 1))


@reads(F.embedding)
def _(a: Arguments) -> Layer | None:
    weight = a.tensor(1, "weight")
    if weight is None or weight.ndim != 2 or a(3, "max_norm") is not None:
        return None
    return table_layer(weight)


@reads(F.batch_norm)
def _(a: Arguments) -> Layer:
    mean, var = a.tensor(1, "running_mean"), a.tensor(2, "running_var")
    weight, bias = a.tensor(3, "weight"), a.tensor(4, "bias")
    return norm_layer(mean, var, weight, bias, a(7, "eps", 1e-5), bool(a(5, "training", False)))


@reads(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
def _(a: Arguments) -> Layer | None:
    dims = spatial_dims(torch_name(a.node))
    assert dims is not None
    stride, padding = a(2, "stride"), a(3, "padding", 0)
    ceil, counted, divisor = a(4, "ceil_mode", False), a(5, "count_include_pad", True), a(6, "divisor_override")
    return pool_layer(dims, a(1, "kernel_size"), stride, padding, ceil, counted, divisor, a.size)


@reads(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
def _(a: Arguments) -> Layer | None:
    dims = spatial_dims(torch_name(a.node))
    assert dims is not None
    return adaptive_pool_layer(dims, a(1, "output_size"), a.size)


@reads(F.pad)
def _(a: Arguments) -> Layer | None:
    sides, mode, value = a(1, "pad"), a(2, "mode", "constant"), a(3, "value")
    if not _are_ints(sides) or isinstance(value, fx.Node):
        return None
    written = _written_border(a.node, sides)
    if written is None:
        return pad_layer(sides, mode, value or 0.0)
    border, writes = written
    source = a(0, "input")
    return replace(pad_layer(sides, "constant", border), source=source, through=writes) if writes else None


def _written_border(pad: fx.Node, sides: Sequence[int]) -> tuple[Tensor | float, tuple[fx.Node, ...]] | None:
    """The constant that is written to the border of a padded value before anything reads it, one slice after another,
    and the nodes that write it; none of them if they write anything else. None if nothing is written to it."""
    writes = tuple(user for user in pad.users if user.target is operator.setitem and user.args[0] is pad)
    if not writes:
        return None
    dims = len(sides) // 2
    values = [exact(write.args[2]) for write in writes]
    first = values[0]
    same = all(v is not None and torch.equal(torch.as_tensor(v), torch.as_tensor(first)) for v in values)
    last = max(INDEX.of(write) for write in writes)
    earlier = any(INDEX.of(user) < last for user in pad.users if user not in writes)
    covered = {_border_slice(write.args[1], dims) for write in writes}
    wanted = {(dim, end, sides[2 * (dims - 1 - dim) + end]) for dim in range(dims) for end in (0, 1)}
    if first is None or not same or earlier or min(sides) < 0 or covered != {one for one in wanted if one[2]}:
        return 0.0, ()
    if isinstance(first, Tensor):
        wide = [axis - first.ndim for axis, size in enumerate(first.shape) if size != 1]
        if wide not in ([], [-dims - 1]):
            return 0.0, ()
        first = doubled(first).flatten()
    return first, writes


def _stacked_border(parts: Sequence[fx.Node], dim: int) -> Layer | None:
    """A value between constants that are the same for all pixels, `cat([v.expand(...), y, v.expand(...)], 2)`."""
    spread = {part: found for part in parts if (found := _spread(part, dim)) is not None}
    inner = [part for part in parts if part not in spread]
    if len(inner) != 1 or not spread:
        return None
    (value, _, dims), *others = spread.values()
    if any(not torch.equal(value, other) or dims != more for other, _, more in others):
        return None
    at = parts.index(inner[0])
    widths = [sum(spread[part][1] for part in some) for some in (parts[:at], parts[at + 1 :])]
    sides = [0] * (2 * dims)
    last = 2 * (dims + 1 - dim % (dims + 2))  # as F.pad has it, last dim first
    sides[last : last + 2] = widths
    return replace(pad_layer(sides, "constant", value), source=inner[0], through=tuple(spread))


def _spread(node: fx.Node, dim: int) -> tuple[Tensor, int, int] | None:
    """A constant per channel that is repeated over all pixels, (C,), over how many along a dim, and spatial dims."""
    value = exact(node.args[0]) if torch_name(node) == "expand" else None
    sizes = node.args[1:] if len(node.args) != 2 or isinstance(node.args[1], (int, fx.Node)) else node.args[1]
    if not isinstance(value, Tensor) or not isinstance(sizes, (list, tuple)) or not 3 <= len(sizes) <= 5:
        return None
    width, wide = sizes[dim], [axis - value.ndim for axis, size in enumerate(value.shape) if size != 1]
    spatial = dim % len(sizes) >= 2
    if not spatial or not isinstance(width, int) or width < 1 or wide not in ([], [1 - len(sizes)]):
        return None
    return doubled(value).flatten(), width, len(sizes) - 2


def _border_slice(index: Any, dims: int) -> tuple[int, int, int] | None:
    """Spatial dim, side (0 low, 1 high) and width of an index that takes a border along one dim; None for others."""
    parts = (index if isinstance(index, tuple) else (index,))[2:]
    taken = [(dim, part) for dim, part in enumerate(parts) if part != slice(None)]
    if len(taken) != 1 or not isinstance(taken[0][1], slice) or any(p != slice(None) for p in index[:2]):
        return None
    dim, part = taken[0]
    start, stop = part.start, part.stop
    if part.step not in (None, 1) or not all(isinstance(end, (int, type(None))) for end in (start, stop)):
        return None
    if stop is not None and stop > 0 and not start:
        return dim, 0, stop
    return (dim, 1, -start) if start is not None and start < 0 and stop is None else None


@reads(operator.getitem)
def _(a: Arguments) -> Layer | None:
    source, index = a.node.args
    if isinstance(index, int) and not isinstance(index, bool) and isinstance(source, fx.Node):
        return _piece(a, source, index)
    if not isinstance(index, tuple):
        return None
    channels = index[1] if len(index) > 1 and index[0] == slice(None) else None
    if not isinstance(channels, slice) or channels == slice(None):
        return crop_layer(index)
    part = slice(channels.start, channels.stop)  # a copy, of known type
    plain = channels.step in (None, 1) and all(isinstance(end, (int, type(None))) for end in (part.start, part.stop))
    return slice_layer(1, lambda _: part) if plain and all(rest == slice(None) for rest in index[2:]) else None


def _piece(item: Arguments, pieces: fx.Node, index: int) -> Layer | None:
    """One of the parts that `chunk` or `split` made."""
    name = torch_name(pieces)
    a = Arguments(pieces, item.read)
    value = a(0, "input", a.node.kwargs.get("tensor"))
    if name not in ("chunk", "split") or not isinstance(value, fx.Node):
        return None
    size = a(1, "chunks" if name == "chunk" else "split_size_or_sections", a.node.kwargs.get("split_size"))
    dim = a(2, "dim", 0)
    if not isinstance(dim, int) or not (isinstance(size, int) or (name == "split" and _are_ints(size))):
        return None

    def select(channels: int) -> slice:
        parts = torch.empty(channels).chunk(size) if name == "chunk" else torch.empty(channels).split(size)
        first = sum(len(part) for part in parts[: range(len(parts))[index]])
        return slice(first, first + len(parts[index]))

    layer = slice_layer(dim, select, sum(size) if isinstance(size, (list, tuple)) else None)
    return replace(layer, source=value, through=(pieces,))


def _are_ints(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value)


@reads(operator.add, operator.iadd, torch.add, "add", "iadd", "radd")
def _(a: Arguments) -> Reading | None:
    return _signed_sum(a, 1.0)


@reads(operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "isub", "subtract")
def _(a: Arguments) -> Reading | None:
    return _signed_sum(a, -1.0)


@reads(torch.rsub, "rsub")
def _(a: Arguments) -> Reading | None:
    value, other, through = spread_out(*a.pair())
    known = exact(other)
    if "alpha" in a.node.kwargs or constant(value) is not None:
        return None
    return Sum(((value, -1.0), (other, 1.0))) if known is None else _by_way_of(scale_layer(-1.0, known), value, through)


@reads(torch.addcmul, "addcmul")
def _(a: Arguments) -> Layer | None:
    """A constant and a value times one: `torch.addcmul(shift, x, scale)`."""
    shift, (left, right) = exact(a(0, "input")), (a(1, "tensor1"), a(2, "tensor2"))
    factor, value = (exact(right), left) if constant(left) is None else (exact(left), right)
    if shift is None or factor is None or constant(value) is not None or "value" in a.node.kwargs:
        return None
    layer = scale_layer(factor, shift)
    return None if layer is None else replace(layer, source=value)


def _signed_sum(a: Arguments, sign: float) -> Reading | None:
    """left + sign * alpha * right."""
    left, right, through = spread_out(*a.pair())
    alpha = a.node.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        return None
    known_left, known_right = exact(left), exact(right)
    if known_left is None and known_right is None:
        both = isinstance(left, fx.Node) and isinstance(right, fx.Node)
        return Sum(((left, 1.0), (right, sign * alpha))) if both else None
    if known_right is not None:
        if is_number(known_right, 0) and not through:
            return Identity(left)
        return _by_way_of(scale_layer(1.0, sign * alpha * known_right), left, through)
    assert known_left is not None
    if is_number(known_left, 0) and sign * alpha == 1 and not through:
        return Identity(right)
    return _by_way_of(scale_layer(sign * alpha, known_left), right, through)


@reads(operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "imul", "rmul", "multiply")
def _(a: Arguments) -> Layer | Identity | None:
    left, right, through = spread_out(*a.pair())
    factor, value = (exact(right), left) if constant(left) is None else (exact(left), right)
    if factor is None:
        return None
    return Identity(value) if is_number(factor, 1) and not through else _by_way_of(scale_layer(factor), value, through)


def _by_way_of(layer: Layer | None, source: fx.Node, through: tuple[fx.Node, ...]) -> Layer | None:
    """A layer whose constant other nodes spread out."""
    return replace(layer, source=source, through=through) if layer and through else layer


@reads(
    operator.truediv,
    operator.itruediv,
    torch.div,
    torch.divide,
    torch.true_divide,
    "div",
    "truediv",
    "itruediv",
    "divide",
)
def _(a: Arguments) -> Layer | None:
    left, right = a.pair()
    divisor = exact(right)
    if divisor is None or constant(left) is not None or a.node.kwargs.get("rounding_mode") is not None:
        return None
    return scale_layer(1.0 / torch.as_tensor(divisor, dtype=torch.float64))


@reads(operator.neg, torch.neg, torch.negative, "neg", "negative")
def _(a: Arguments) -> Layer | None:
    return scale_layer(-1.0)


@reads(torch.cat, torch.concat, torch.concatenate)
def _(a: Arguments) -> Concat | Identity | Layer | None:
    parts, dim = a(0, "tensors"), a(1, "dim", 0)
    if not isinstance(parts, (list, tuple)) or not all(isinstance(p, fx.Node) and not VALUE.known(p) for p in parts):
        return None
    if isinstance(dim, int) and (padded := _stacked_border(parts, dim)) is not None:
        return padded
    if len(parts) == 1:
        return Identity(parts[0])
    return Concat(tuple(parts), dim) if isinstance(dim, int) else None


@reads(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
def _(a: Arguments) -> Identity | None:
    return Identity(a(0, "input")) if a(2, "training", True) is False else None


@reads(torch.stack)
def _(a: Arguments) -> None:
    return None  # of itself nothing; its sum over the new dim is a sum of its parts


@reads(torch.sum, "sum", torch.mean, "mean")
def _(a: Arguments) -> Sum | None:
    """`stack([...]).sum(0)`, and `(stack([...]) * w).sum(0)` with a number for each."""
    value, factors = a(0, "input"), None
    weighed = value if isinstance(value, fx.Node) and torch_name(value) in ("mul", "imul", "rmul", "multiply") else None
    if weighed is not None and len(weighed.args) == 2:
        left, right = weighed.args
        value, factors = (left, exact(right)) if constant(left) is None else (right, exact(left))
    if (stack := stacked(value, a)) is None or set(a.node.kwargs) - {"dim", "axis"} or len(a.node.args) > 2:
        return None
    parts, dim = stack
    assert isinstance(value, fx.Node)
    over = a(1, "dim", a.node.kwargs.get("axis"))
    share = 1.0 / len(parts) if a.node.target in (torch.mean, "mean") else 1.0
    numbers = [1.0] * len(parts) if weighed is None else _along(factors, dim, len(parts), value)
    if over not in (dim, [dim], (dim,)) or numbers is None:
        return None
    through = (value,) if weighed is None else (value, weighed)
    return Sum(tuple((part, share * number) for part, number in zip(parts, numbers, strict=True)), through)


def stacked(value: Any, a: Arguments) -> tuple[Sequence[fx.Node], int] | None:
    """The values that are stacked, and along which dim; None if it is no stack of such."""
    if not isinstance(value, fx.Node) or value.target is not torch.stack:
        return None
    inner = Arguments(value, a.read)
    parts, dim = inner(0, "tensors"), inner(1, "dim", 0)
    plain = isinstance(parts, (list, tuple)) and all(isinstance(p, fx.Node) and not VALUE.known(p) for p in parts)
    return (parts, dim) if plain and isinstance(dim, int) else None


def _along(factors: Any, dim: int, count: int, stacked: fx.Node) -> list[float] | None:
    """The number that a factor has for each of the values that are stacked; None if it has other ones too."""
    if factors is None:
        return None
    known, dims = torch.as_tensor(factors, dtype=torch.float64).detach(), rank(stacked)
    if known.numel() == 1:
        return [float(known)] * count if known.ndim <= (dims or 0) else None
    at = dim if dim < 0 else dim - dims if dims is not None else None
    if at is None or known.ndim > (dims or known.ndim) or known.ndim < -at:
        return None
    return known.flatten().tolist() if known.numel() == known.shape[at] == count else None


@reads(torch.flatten, "flatten")
def _(a: Arguments) -> Layer | None:
    source, ends = a(0, "input"), (a(1, "start_dim", 0), a(2, "end_dim", -1))
    return view_layer() if ends == (0, 1) and isinstance(source, fx.Node) and (rank(source) or 0) > 2 else None


@reads("reshape_as", "view_as")
def _(a: Arguments) -> Layer | None:
    return view_layer()


@reads(torch.zeros_like)
def _(a: Arguments) -> Layer | None:
    return scale_layer(0.0) if len(a.node.args) == 1 and not a.node.kwargs else None  # what sums often start from


@reads(F.leaky_relu, torch._C._nn.leaky_relu)  # which exported programs call
def _(a: Arguments) -> Identity | None:
    return Identity(a(0, "input")) if a(1, "negative_slope", 0.01) == 1 else None


@reads(F.prelu, torch.prelu, "prelu")
def _(a: Arguments) -> Identity | None:
    slopes = a.tensor(1, "weight")
    return Identity(a(0, "input")) if slopes is not None and bool((slopes == 1).all()) else None


@reads(torch.clone, torch.detach, "contiguous", "clone", "detach")
def _(a: Arguments) -> Identity:
    return Identity(a(0, "input"))
