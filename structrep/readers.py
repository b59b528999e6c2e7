"""How one operation is read as a map, and how a map is written back as a layer.

A reader turns a module, or a call in a torch.fx graph, into one of

* `Layer`: a map of one input. Its channel count or spatial dims may be open (a scalar factor, an average pool, an
  identity); they are filled in from the layers around it.
* `Total`: a signed sum of its inputs.
* `Stack`: its inputs concatenated.
* `Same`: its input, unchanged (dropout in eval mode, an identity, a cast-free copy).

A module type is read only if its forward is the very one the reader was written for; what a reader knows, the tracer
keeps whole. Everything is read in float64.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from structrep import precision
from structrep.algebra import Border, ConvMap, Geometry, Ints, Pads, swapped
from structrep.errors import InvalidReader, Unreadable
from structrep.layers import Shift
from structrep.operations import shares, writes
from structrep.parametrized import by_properties, hooks, plain
from structrep.precision import doubled
from structrep.ranks import argument, rank, spatial_size, torch_name, written_in

# --- what reading gives ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Formula:
    """How a kernel is computed: the torch functions called, and the parameters and constants they were called on."""

    calls: frozenset[str]
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, formulas: Iterable[Formula]) -> Formula:
        """One for what several tensors are computed of."""
        parts = list(formulas)
        tensors = {id(tensor): tensor for part in parts for tensor in part.tensors}
        return cls(frozenset().union(*(part.calls for part in parts)), tuple(tensors.values()))

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self.tensors if isinstance(tensor, nn.Parameter))


@dataclass(frozen=True, eq=False)
class Computed:
    """A tensor that a layer computes before every call: as it is in the layer's dtype, how, and in float64."""

    value: Tensor
    formula: Formula
    exact: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """A map of one input.

    Args:
        kind: "conv", "linear", "norm", "affine", "pool", "pad", "slice" or "view".
        load: the map itself, given the channel count of its input and the number of spatial dims.
        shape: its geometry, given the same; touches no weight.
        in_channels, out_channels, dims: None where open.
        parameters: how many numbers the layer stores.
        shifts: whether it can add a constant.
        weight: the kernel tensor of a convolution or Linear.
        formula: how that kernel was computed, if it is no parameter itself.
        source, node: in a graph, the node that feeds it and the node that it is.
        through: nodes between the two.
        sized: whether it is that map for inputs of any size, for those that differ from the example by multiples of its
            stride, or for the example's alone.
        probed: whether it was found out by what it does, not read.
        dead: counts channels of a norm whose variance is lost in its eps, whose scale says nothing of the data.
    """

    kind: str
    load: Callable[[int, int], ConvMap]
    shape: Callable[[int, int], Geometry]
    in_channels: int | None = None
    out_channels: int | None = None
    dims: int | None = None
    parameters: int = 0
    shifts: bool = False
    weight: Tensor | None = None
    formula: Formula | None = None
    source: fx.Node | None = None
    node: fx.Node | None = None
    through: tuple[fx.Node, ...] = ()
    sized: Literal["any", "period", "size"] = "any"
    probed: bool = False
    dead: Callable[[], int] = lambda: 0

    def __str__(self) -> str:
        if self.weight is None:
            return self.kind
        taps = "x".join(map(str, self.weight.shape[2:]))
        return f"{self.kind} {taps}" if taps else self.kind


@dataclass(frozen=True)
class Total:
    """A signed sum: ((input, coefficient), ...), perhaps by way of other nodes."""

    parts: tuple[tuple[fx.Node, float], ...]
    through: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Stack:
    """Inputs concatenated along dimension `dim`."""

    parts: tuple[fx.Node, ...]
    dim: int


@dataclass(frozen=True)
class Same:
    """The input itself."""

    source: fx.Node


Reading = Layer | Total | Stack | Same

# --- modules --------------------------------------------------------------------------------------

_MODULES: dict[type[nn.Module], Callable[[Any], Layer | None]] = {}
PROBED = "structrep_probed"  # where a traced module keeps the map that it was found to be
_IDENTITIES: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip


def _reads(*types: type[nn.Module]) -> Callable[[Callable[[Any], Layer | None]], Callable[[Any], Layer | None]]:
    def register(reader: Callable[[Any], Layer | None]) -> Callable[[Any], Layer | None]:
        for type_ in types:
            _MODULES[type_] = reader
        return reader

    return register


def _reader(module: nn.Module) -> Callable[[Any], Layer | None] | None:
    """The reader written for the forward that this module really runs."""
    if PROBED in module.__dict__:
        return lambda probed: replace(map_layer(probed, probed.__dict__[PROBED]), probed=True)
    if "forward" in module.__dict__:
        return None
    for base in type(module).__mro__:
        if base in _MODULES or base in _IDENTITIES:
            runs_it = all(
                getattr(type(module), name, None) is getattr(base, name, None)
                for name in ("forward", "_conv_forward", "__call__")
            )
            return _MODULES.get(base, lambda _: None) if runs_it else None
    return None


def reader(*types: type[nn.Module]) -> Callable[[Callable[[Any], ConvMap]], Callable[[Any], ConvMap]]:
    """Decorator: a function that says which map a layer of these types is.

    The layer's code is not looked at any more: the tracer keeps it whole. A subclass with a forward of its own is not
    read so.

    Examples:
        >>> @structrep.reader(MyConv)
        ... def my_conv(layer):
        ...     return ConvMap(layer.weight * layer.gain, layer.bias, pad=layer.padding)

    Raises:
        InvalidReader: there are no types, something is no module type, or a type is read already.
    """
    for type_ in types:
        if not (isinstance(type_, type) and issubclass(type_, nn.Module)):  # type: ignore[redundant-expr]
            raise InvalidReader(f"{type_!r} is no module type: give classes, as in @structrep.reader(MyConv)")
        if type_ in _MODULES or type_ in _IDENTITIES:
            raise InvalidReader(f"{written_in(type_)}.{type_.__qualname__} is read already: one type, one reader")
    if not types:
        raise InvalidReader("a reader of nothing: give the module types that it reads, @structrep.reader(MyConv)")

    def register(read: Callable[[Any], ConvMap]) -> Callable[[Any], ConvMap]:
        _reads(*types)(lambda module: map_layer(module, read))
        return read

    return register


def map_layer(module: nn.Module, read: Callable[[Any], ConvMap] | ConvMap) -> Layer:
    """A layer that is a given map, or one that a function makes of it.

    Raises:
        Unreadable: the function gave something else.
    """

    def found() -> ConvMap:
        map_ = read if isinstance(read, ConvMap) else read(_doubled(module))
        if not isinstance(map_, ConvMap):
            raise Unreadable(f"the reader of {type(module).__name__} gave a {type(map_).__name__}, not a ConvMap")
        return map_

    map_ = found()
    g = map_.geometry
    stored = sum(p.numel() for p in module.parameters())
    if g.diagonal:
        return diagonal_layer("affine", lambda c, d: found(), g.in_channels, g.dims, stored)
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    weight = map_.kernel.to(like.device, like.dtype)
    layer = _kernel_layer("conv" if g.dims else "linear", g, lambda c, d: found(), weight, map_.bias)
    return replace(layer, parameters=stored)


def _doubled(module: nn.Module) -> nn.Module:
    """A copy of a layer in float64, in which what is computed of its numbers is the truth that merges are proved by."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return copy.deepcopy(module).to(precision.exact(like.device), torch.float64)


def knows(module: nn.Module) -> bool:
    """Whether a module is read as a whole."""
    return _reader(module) is not None


def settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a layer: its mode, sizes, eps."""
    return {k: v for k, v in module.__dict__.items() if isinstance(v, (bool, int, float, str))}


def generated(module: nn.Module) -> bool:
    """Whether a module's forward was written by an earlier `reparameterize`."""
    return hasattr(type(module), "__structrep_methods__")


def read_module(module: nn.Module) -> Layer | None:
    """A module as a map; None if it is none.

    Raises:
        Unreadable: a norm that has no fixed scale.
    """
    reader = _reader(module)
    return reader(module) if reader else None


@_reads(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _(conv: nn.Conv2d) -> Layer:
    border: Border = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return conv_layer(conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups, border)


@_reads(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _(conv: nn.ConvTranspose2d) -> Layer:
    return conv_transpose_layer(
        conv.weight, conv.bias, conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
    )


@_reads(nn.Linear)
def _(linear: nn.Linear) -> Layer:
    return linear_layer(linear.weight, linear.bias)


@_reads(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def _(norm: nn.BatchNorm2d) -> Layer:
    dims = next((d for d, type_ in ((2, nn.BatchNorm2d), (3, nn.BatchNorm3d)) if isinstance(norm, type_)), None)
    return norm_layer(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, norm.training, dims)


_POOLS: dict[type[nn.Module], int] = {
    nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3,
    nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3,
}  # fmt: skip


@_reads(*_POOLS)
def _(pool: nn.Module) -> None:
    return None  # what it is may depend on its input's size: see `_read_pool`


@_reads(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
def _(pad: nn.ConstantPad2d) -> Layer:
    return pad_layer(pad.padding, "constant", pad.value)


@_reads(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d)
def _(pad: nn.ReflectionPad2d) -> Layer:
    return pad_layer(pad.padding, "reflect")


@_reads(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d)
def _(pad: nn.ReplicationPad2d) -> Layer:
    return pad_layer(pad.padding, "replicate")


@_reads(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)
def _(pad: nn.CircularPad2d) -> Layer:
    return pad_layer(pad.padding, "circular")


@_reads(nn.LeakyReLU)
def _(curve: nn.LeakyReLU) -> Layer | None:
    return scale_layer(1.0) if curve.negative_slope == 1 else None  # VanillaNet's, at the end of its training


@_reads(Shift)
def _(shift: Shift) -> Layer | None:
    return scale_layer(1.0, shift.get_buffer("shift"))


# --- layers from their numbers --------------------------------------------------------------------


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

    return _kernel_layer("conv", geometry, load, weight, bias)


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

    return _kernel_layer("conv", geometry, load, weight, bias)


def linear_layer(weight: Tensor, bias: Tensor | None) -> Layer:
    """y = W x + b on the last dimension."""
    geometry = Geometry(weight.shape[1], weight.shape[0])
    return _kernel_layer("linear", geometry, lambda c, d: ConvMap(weight.detach(), bias), weight, bias)


def channel_mix_layer(weight: Tensor, matrix: Tensor, dims: int) -> Layer:
    """A matrix (O, I), made of a weight, on the channels of a value with that many spatial dims."""
    geometry = Geometry(matrix.shape[1], matrix.shape[0], (1,) * dims)
    kernel = matrix.detach().reshape(*matrix.shape, *[1] * dims)
    return _kernel_layer("conv" if dims else "linear", geometry, lambda c, d: ConvMap(kernel), weight, None)


def _kernel_layer(
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
        _count(weight, bias),
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

    layer = diagonal_layer("norm", load, mean.numel(), dims, _count(mean, var, weight, bias))
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

    return Layer("view", lambda c, d: ConvMap.identity(c, 0), shape, dims=0)


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

    return Layer("slice", load, lambda c, d: Geometry(c, len(kept(c, d)), (1,) * d), channels)


def _tap_layer(kind: str, shape: Callable[[int, int], Geometry], border: Border, value: Tensor | float) -> Layer:
    def load(c: int, d: int) -> ConvMap:
        g = shape(c, d)
        fill = value.expand(c) if isinstance(value, Tensor) else value
        return ConvMap(torch.ones(c, 1, *g.kernel, dtype=torch.float64), pad=g.pad, groups=c, fill=fill, border=border)

    return Layer(kind, load, shape)


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

    stored = sum(c.numel() for c in constants if c.numel() > 1)
    return replace(diagonal_layer("affine", load, channels, dims, stored), shifts=not _is_number(shift, 0))


def _each(value: int | Sequence[int], dims: int) -> Ints:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) if len(value) == dims else (value[0],) * dims


def _count(*tensors: Tensor | None) -> int:
    return sum(t.numel() for t in tensors if t is not None)


# --- nodes of a graph -----------------------------------------------------------------------------


def read_node(node: fx.Node) -> Reading | None:
    """One node of a traced graph; None where it is no linear operation of its inputs.

    Raises:
        Unreadable: a known layer, but without fixed coefficients.
    """
    if node.op == "call_module":
        return _read_call(node)
    if node.op not in ("call_function", "call_method"):
        return None
    reader = _CALLS.get(node.target.strip("_") if isinstance(node.target, str) else node.target)
    if reader is None:
        return None
    if "out" in node.kwargs:
        return None
    try:
        reading = reader(_Arguments(node))
    except (_NotConstant, TypeError):  # a size that depends on the input
        return None
    if not isinstance(reading, Layer):
        return reading
    if reading.kind == "affine" and not reading.through:
        held = [n.meta["value"].ndim for n in node.all_input_nodes if isinstance(n.meta.get("value"), Tensor)]
        known, most = rank(reading.source or node.all_input_nodes[0]), max(held, default=0)
        if known is not None and most > known:
            return None  # it adds dims
        if known is None:
            reading = _within(reading, most)
    return _placed(reading, node)


def _within(scale: Layer, most: int) -> Layer:
    """A scale by constants of that many dims, of values that must have as many."""

    def load(c: int, d: int) -> ConvMap:
        if most > d + 2:
            raise Unreadable(f"a constant of {most} dims would add dims to a value with {d} spatial ones")
        return scale.load(c, d)

    return replace(scale, load=load)


def constant(value: Any) -> Tensor | float | None:
    """The number or tensor that an argument is, if it does not depend on the input, nor on how often it was asked."""
    if isinstance(value, fx.Node):
        value = value.meta.get("value") if not value.meta.get("unsteady") else None
        if isinstance(value, Tensor):
            return value
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def exact(value: Any) -> Tensor | float | None:
    """The same, computed in float64 if it is computed: what the model computes in its own dtype is off by rounding, and
    a border by so much is another one."""
    pending = [value] if isinstance(value, fx.Node) else []
    while pending:
        last = pending[-1]
        done = "recompute" not in last.meta or "exact" in last.meta
        inputs = () if done else last.all_input_nodes
        if left := [n for n in inputs if "recompute" in n.meta and "exact" not in n.meta]:
            pending += left
            continue
        if not done:
            last.meta["exact"] = last.meta["recompute"]()
        pending.pop()
    known = constant(value)
    return held(value) if known is not None and isinstance(value, fx.Node) and "exact" in value.meta else known


def held(node: fx.Node) -> Any:
    """The value of a constant, as merges have read it."""
    return node.meta.get("exact", node.meta["value"])


def _placed(layer: Layer, node: fx.Node) -> Layer | None:
    """The layer at its place in a graph: one input, and constants (a view may be shown another value's shape)."""
    if layer.source is not None:  # by way of other nodes
        return replace(layer, node=node) if "value" not in layer.source.meta else None
    inputs = [n for n in node.all_input_nodes if "value" not in n.meta]
    if len(inputs) != 1 and layer.kind != "view":
        return None
    formulas = [n.meta["formula"] for n in node.all_input_nodes if n.meta.get("formula")]
    if layer.weight is None or not formulas:
        return replace(layer, source=inputs[0], node=node)
    if not any(n.meta.get("value") is layer.weight and n.meta.get("formula") for n in node.all_input_nodes):
        formulas.append(Formula(frozenset(), (layer.weight,)))  # it is the bias that is computed
    plain = [n.meta["value"] for n in node.all_input_nodes if n.op == "get_attr" and not n.meta.get("formula")]
    learned = [p for formula in formulas for p in formula.parameters]
    stored = {id(p): p.numel() for p in (*learned, *(t for t in plain if isinstance(t, Tensor)))}
    return replace(layer, source=inputs[0], node=node, formula=Formula.of(formulas), parameters=sum(stored.values()))


def _read_call(node: fx.Node) -> Reading | None:
    module = node.meta["call"].module
    if node.meta["call"].settings != settings(module):
        return None  # changed while the forward ran
    if (
        hooks(module)
        or not knows(module)
        or len(node.args) != 1
        or node.kwargs
        or not isinstance(node.args[0], fx.Node)
    ):
        return None
    if isinstance(module, _IDENTITIES):
        inert = isinstance(module, nn.Identity) or not module.training or getattr(module, "p", 1) == 0
        return Same(node.args[0]) if inert else None
    layer = _read_pool(module, spatial_size(node.args[0])) or read_module(called(node, exactly=False))
    if layer and (numbers := node.meta["computed"]):
        layer = replace(
            layer,
            load=lambda c, d: _map_of(called(node), c, d),
            formula=Formula.of((*(one.formula for one in numbers.values()), *_stored(module, numbers))),
            parameters=sum(p.numel() for p in module.parameters()),
        )
    if layer and (formula := node.meta["assigned"]):
        layer = replace(layer, formula=formula, parameters=_count(*formula.parameters))
    return _placed(layer, node) if layer else None


def called(node: fx.Node, *, exactly: bool = True) -> nn.Module:
    """The layer that a node calls, plain: what it computes before every call stands in it as numbers.

    Args:
        exactly: with numbers in float64, as all that is computed of weights is; or as the layer has them.

    Raises:
        Unreadable: what it computes is not the same at every call.
    """
    module: nn.Module = node.meta["call"].module
    numbers = node.meta.get("computed")
    if isinstance(numbers, Unreadable):
        raise numbers
    return (
        plain(module, {name: one.exact() if exactly else one.value for name, one in numbers.items()})
        if numbers
        else module
    )


def _stored(module: nn.Module, numbers: Mapping[str, Computed]) -> Iterator[Formula]:
    """The kernel of a layer that computes another tensor, as a formula that computes nothing."""
    if "weight" not in numbers and (weight := module._parameters.get("weight")) is not None:
        yield Formula(frozenset(), (weight,))


def _map_of(module: nn.Module, c: int, d: int) -> ConvMap:
    layer = read_module(module)
    assert layer is not None
    return layer.load(c, d)


def _read_pool(pool: Any, size: Ints | None) -> Layer | None:
    dims = next((_POOLS[base] for base in type(pool).__mro__ if base in _POOLS), None)
    if dims is None:
        return None
    if isinstance(pool, nn.modules.pooling._AdaptiveAvgPoolNd):
        return adaptive_pool_layer(dims, pool.output_size, size)
    return pool_layer(
        dims, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad,
        getattr(pool, "divisor_override", None), size,
    )  # fmt: skip


class _NotConstant(Exception):
    """An argument that should be a constant depends on the input."""


class _Arguments:
    """Arguments of a call by name or place, as the function's own signature has them."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def __call__(self, place: int, name: str, default: Any = None) -> Any:
        return argument(self.node, place, name, default)

    def tensor(self, place: int, name: str) -> Tensor | None:
        value = self(place, name)
        if value is None:
            return None
        found = constant(value)
        if not isinstance(found, Tensor):
            raise _NotConstant
        return found

    @property
    def size(self) -> Ints | None:
        """Spatial size of the input, for the example."""
        return spatial_size(self.node.all_input_nodes[0])

    def pair(self, other: str = "other") -> tuple[Any, Any]:
        return self(0, "input"), self(1, other)


# Functions by themselves, tensor methods by name.
_CALLS: dict[Callable[..., Any] | str, Callable[[_Arguments], Reading | None]] = {}


def _called(*targets: Callable[..., Any] | str) -> Callable[[Any], Any]:
    def register(reader: Callable[[_Arguments], Reading | None]) -> Callable[[_Arguments], Reading | None]:
        _CALLS.update(dict.fromkeys(targets, reader))
        return reader

    return register


@_called(F.conv1d, F.conv2d, F.conv3d)
def _(a: _Arguments) -> Layer | None:
    weight = a.tensor(1, "weight")
    if weight is None:
        return None
    bias = a.tensor(2, "bias")
    return conv_layer(weight, bias, a(3, "stride", 1), a(4, "padding", 0), a(5, "dilation", 1), a(6, "groups", 1))


@_called(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _(a: _Arguments) -> Layer | None:
    weight = a.tensor(1, "weight")
    if weight is None:
        return None
    bias, padding, more = a.tensor(2, "bias"), a(4, "padding", 0), a(5, "output_padding", 0)
    return conv_transpose_layer(weight, bias, a(3, "stride", 1), padding, more, a(6, "groups", 1), a(7, "dilation", 1))


@_called(F.linear)
def _(a: _Arguments) -> Layer | None:
    weight = a.tensor(1, "weight")
    return None if weight is None or weight.ndim != 2 else linear_layer(weight, a.tensor(2, "bias"))


@_called(operator.matmul, torch.matmul, "matmul")
def _(a: _Arguments) -> Layer | None:
    left, right = a.pair()
    before, behind = constant(left), constant(right)
    if isinstance(behind, Tensor) and behind.ndim == 2:
        return channel_mix_layer(behind, behind.T, 0)
    batches = isinstance(before, Tensor) and before.ndim == 2 and isinstance(right, fx.Node) and rank(right) == 3
    return channel_mix_layer(before, before, 1) if batches else None  # type: ignore[arg-type]


@_called(torch.einsum)
def _(a: _Arguments) -> Layer | None:
    equation, *operands = a.node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    weights = [index for index, operand in enumerate(operands) if isinstance(constant(operand), Tensor)]
    if not isinstance(equation, str) or len(operands) != 2 or len(weights) != 1:
        return None
    weight = constant(operands[weights[0]])
    given, _, result = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    letters, value = terms[weights[0]], terms[1 - weights[0]]
    assert isinstance(weight, Tensor)
    mixed, made = set(letters) & set(value), set(letters) - set(value)
    if not len(letters) == weight.ndim == len(mixed | made) == 2 or len(mixed) != 1:
        return None
    (channel,), (out,) = mixed, made
    if value.replace(channel, out) != result or value.count(channel) != 1:
        return None
    matrix = weight if letters == out + channel else weight.T
    if value.endswith(channel):
        return channel_mix_layer(weight, matrix, 0)
    plain = value.find(channel) == 1 and value.isalpha() and len(set(value)) == len(value)
    return channel_mix_layer(weight, matrix, len(value) - 2) if plain and len(value) <= 5 else None


@_called(F.batch_norm)
def _(a: _Arguments) -> Layer:
    mean, var = a.tensor(1, "running_mean"), a.tensor(2, "running_var")
    weight, bias = a.tensor(3, "weight"), a.tensor(4, "bias")
    return norm_layer(mean, var, weight, bias, a(7, "eps", 1e-5), bool(a(5, "training", False)))


@_called(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
def _(a: _Arguments) -> Layer | None:
    dims = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}[a.node.target]  # type: ignore[index]
    stride, padding = a(2, "stride"), a(3, "padding", 0)
    ceil, counted, divisor = a(4, "ceil_mode", False), a(5, "count_include_pad", True), a(6, "divisor_override")
    return pool_layer(dims, a(1, "kernel_size"), stride, padding, ceil, counted, divisor, a.size)


@_called(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
def _(a: _Arguments) -> Layer | None:
    dims = next(d for d in (1, 2, 3) if torch_name(a.node) == f"adaptive_avg_pool{d}d")
    return adaptive_pool_layer(dims, a(1, "output_size"), a.size)


@_called(F.pad)
def _(a: _Arguments) -> Layer | None:
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
    last = max(write.meta["index"] for write in writes)
    earlier = any(user.meta["index"] < last for user in pad.users if user not in writes)
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


@_called(operator.getitem)
def _(a: _Arguments) -> Layer | None:
    source, index = a.node.args
    if isinstance(index, int) and not isinstance(index, bool) and isinstance(source, fx.Node):
        return _piece(source, index)
    if not isinstance(index, tuple):
        return None
    channels = index[1] if len(index) > 1 and index[0] == slice(None) else None
    if not isinstance(channels, slice) or channels == slice(None):
        return crop_layer(index)
    part = slice(channels.start, channels.stop)  # a copy, of known type
    plain = channels.step in (None, 1) and all(isinstance(end, (int, type(None))) for end in (part.start, part.stop))
    return slice_layer(1, lambda _: part) if plain and all(rest == slice(None) for rest in index[2:]) else None


def _piece(pieces: fx.Node, index: int) -> Layer | None:
    """One of the parts that `chunk` or `split` made."""
    name = torch_name(pieces)
    a = _Arguments(pieces)
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


@_called(operator.add, operator.iadd, torch.add, "add", "iadd", "radd")
def _(a: _Arguments) -> Reading | None:
    return _signed_sum(a, 1.0)


@_called(operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "isub", "subtract")
def _(a: _Arguments) -> Reading | None:
    return _signed_sum(a, -1.0)


@_called(torch.rsub, "rsub")
def _(a: _Arguments) -> Reading | None:
    value, other = a.pair()
    known = exact(other)
    if "alpha" in a.node.kwargs:
        return None
    return Total(((value, -1.0), (other, 1.0))) if known is None else scale_layer(-1.0, known)


def _signed_sum(a: _Arguments, sign: float) -> Reading | None:
    """left + sign * alpha * right."""
    left, right = a.pair()
    alpha = a.node.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        return None
    known_left, known_right = exact(left), exact(right)
    if known_left is None and known_right is None:
        both = isinstance(left, fx.Node) and isinstance(right, fx.Node)
        return Total(((left, 1.0), (right, sign * alpha))) if both else None
    if known_right is not None:
        return Same(left) if _is_number(known_right, 0) else scale_layer(1.0, sign * alpha * known_right)
    assert known_left is not None
    return Same(right) if _is_number(known_left, 0) and sign * alpha == 1 else scale_layer(sign * alpha, known_left)


def _is_number(value: Tensor | float, number: float) -> bool:
    return not isinstance(value, Tensor) and value == number


@_called(operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "imul", "rmul", "multiply")
def _(a: _Arguments) -> Layer | Same | None:
    left, right = a.pair()
    factor, value = (exact(right), left) if constant(left) is None else (exact(left), right)
    if factor is None:
        return None
    return Same(value) if _is_number(factor, 1) else scale_layer(factor)


@_called(
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
def _(a: _Arguments) -> Layer | None:
    left, right = a.pair()
    divisor = exact(right)
    if divisor is None or constant(left) is not None or a.node.kwargs.get("rounding_mode") is not None:
        return None
    return scale_layer(1.0 / torch.as_tensor(divisor, dtype=torch.float64))


@_called(operator.neg, torch.neg, torch.negative, "neg", "negative")
def _(a: _Arguments) -> Layer | None:
    return scale_layer(-1.0)


@_called(torch.cat, torch.concat, torch.concatenate)
def _(a: _Arguments) -> Stack | Same | Layer | None:
    parts, dim = a(0, "tensors"), a(1, "dim", 0)
    if not isinstance(parts, (list, tuple)) or not all(isinstance(p, fx.Node) and "value" not in p.meta for p in parts):
        return None
    if isinstance(dim, int) and (padded := _stacked_border(parts, dim)) is not None:
        return padded
    if len(parts) == 1:
        return Same(parts[0])
    return Stack(tuple(parts), dim) if isinstance(dim, int) else None


@_called(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
def _(a: _Arguments) -> Same | None:
    return Same(a(0, "input")) if a(2, "training", True) is False else None


@_called(torch.stack)
def _(a: _Arguments) -> None:
    return None  # of itself nothing; its sum over the new dim is a sum of its parts


@_called(torch.lerp, "lerp")
def _(a: _Arguments) -> Total | None:
    (start, end), weight = a.pair("end"), a(2, "weight")
    number = isinstance(weight, (int, float)) and constant(start) is None and constant(end) is None
    return Total(((start, 1.0 - weight), (end, float(weight)))) if number else None


@_called(torch.sum, "sum", torch.mean, "mean")
def _(a: _Arguments) -> Total | None:
    stacked = a(0, "input")
    if not isinstance(stacked, fx.Node) or stacked.target is not torch.stack or set(a.node.kwargs) - {"dim", "axis"}:
        return None
    inner = _Arguments(stacked)
    parts, dim = inner(0, "tensors"), inner(1, "dim", 0)
    over = a(1, "dim", a.node.kwargs.get("axis"))
    if not isinstance(parts, (list, tuple)) or over not in (dim, [dim], (dim,)) or len(a.node.args) > 2:
        return None
    plain = all(isinstance(p, fx.Node) and "value" not in p.meta for p in parts)
    share = 1.0 / len(parts) if a.node.target in (torch.mean, "mean") else 1.0
    return Total(tuple((p, share) for p in parts), (stacked,)) if plain else None


@_called(torch.flatten, "flatten")
def _(a: _Arguments) -> Layer | None:
    source, ends = a(0, "input"), (a(1, "start_dim", 0), a(2, "end_dim", -1))
    return view_layer() if ends == (0, 1) and isinstance(source, fx.Node) and (rank(source) or 0) > 2 else None


@_called("reshape_as", "view_as")
def _(a: _Arguments) -> Layer | None:
    return view_layer()


@_called(torch.transpose, torch.permute, torch.swapaxes, "transpose", "permute", "swapaxes")
def _(a: _Arguments) -> Layer | None:
    """Norms and scales on dim 1 between two transpositions are a scale of the last dim, as RepBN's is of a token."""
    if not _swaps_last_two(a.node):
        return None
    inner = _swapped(a.node.args[0], {})
    if inner is None:
        return None
    load, first, through, shows_rank = inner
    if first is None or not (shows_rank or _is_permute(first)) or len(through) == 1:
        return None
    (source,) = first.all_input_nodes

    def scale(c: int, d: int) -> ConvMap:
        if d:
            raise Unreadable("a scale of the last dim, of values whose channels are on dim 1")
        map_ = load(c)
        return ConvMap.scale(map_.kernel.flatten(), map_.bias, dims=0)

    known = (read_node(node) for node in through if torch_name(node) not in _TRANSPOSES)
    count = next((r.in_channels for r in known if isinstance(r, Layer) and r.in_channels is not None), None)
    layer = diagonal_layer("affine", scale, count, 0, 0)
    return replace(layer, source=source, through=tuple(through))


_TRANSPOSES = ("transpose", "permute", "swapaxes")
MOST_SWAPPED = 32  # nodes between two transpositions
_Scale = tuple[Callable[[int], ConvMap], fx.Node | None, dict[fx.Node, None], bool]


def _swapped(node: Any, known: dict[fx.Node, _Scale | None]) -> _Scale | None:
    """A value as a scale per channel of a transposed one: that scale, the transposition, the nodes on the way from it,
    and whether something on the way takes values of three dims only."""
    if not isinstance(node, fx.Node) or len(known) == MOST_SWAPPED:
        return None
    if node not in known:
        known[node] = None  # a value that is made of itself is none
        known[node] = _swapped_step(node, known)
    return known[node]


def _swapped_step(node: fx.Node, known: dict[fx.Node, _Scale | None]) -> _Scale | None:
    if _swaps_last_two(node):
        return (lambda c: ConvMap.identity(c, 1)), node, {node: None}, False
    if torch_name(node) in _TRANSPOSES:
        return None
    reading = read_node(node)
    if isinstance(reading, Same):
        return _behind(_swapped(reading.source, known), node, lambda map_, c: map_, False)
    if isinstance(reading, Layer) and reading.kind in ("norm", "affine") and not reading.through:
        layer = reading
        if layer.dims == 0:
            return None  # a scale of the last dim, not of dim 1
        three = node.op == "call_module" and isinstance(node.meta["call"].module, nn.BatchNorm1d)
        inner = _swapped(reading.source, known)
        return _behind(inner, node, lambda map_, c: map_ >> layer.load(c, 1), three)
    if isinstance(reading, Total) and not reading.through:
        parts = [(_swapped(part, known), sign) for part, sign in reading.parts]
        found = [part for part, _ in parts if part is not None]
        if len(found) < len(parts) or len({part[1] for part in found}) != 1:
            return None

        def load(c: int) -> ConvMap:
            maps = [part[0](c) * sign for part, sign in parts if part is not None]
            return sum(maps[1:], maps[0])

        through = dict.fromkeys((*(one for part in found for one in part[2]), node))
        return load, found[0][1], through, any(part[3] for part in found)
    return None


def _behind(inner: _Scale | None, node: fx.Node, then: Callable[[ConvMap, int], ConvMap], three: bool) -> _Scale | None:
    if inner is None:
        return None
    load, first, through, known = inner
    return (lambda c: then(load(c), c)), first, {**through, node: None}, known or three


def _is_permute(node: fx.Node) -> bool:
    return torch_name(node) == "permute"


def _swaps_last_two(node: fx.Node) -> bool:
    """Whether a node exchanges the last two of three dims."""
    name = torch_name(node)
    places: Any = node.args[1:]
    if name in ("transpose", "swapaxes"):
        return set(places) in ({1, 2}, {-1, -2}, {1, -1}, {-2, 2})
    places = places[0] if len(places) == 1 and isinstance(places[0], (list, tuple)) else places
    return name == "permute" and tuple(places) in ((0, 2, 1), (0, -1, -2), (0, -1, 1))


@_called(torch.zeros_like)
def _(a: _Arguments) -> Layer | None:
    return scale_layer(0.0) if len(a.node.args) == 1 and not a.node.kwargs else None  # what sums often start from


@_called(F.leaky_relu)
def _(a: _Arguments) -> Same | None:
    return Same(a(0, "input")) if a(1, "negative_slope", 0.01) == 1 else None


_CONVOLUTIONS = {*(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)}
_CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


def cast_to(node: fx.Node) -> torch.dtype | None:
    """The dtype that a cast gives, if it does no more."""
    if len(node.args) + len(node.kwargs) == 1:
        return _CASTS.get(str(node.target))
    if len(node.args) + len(node.kwargs) > 2 or node.target not in ("to", "type"):
        return None
    to = argument(node, 1, "dtype")
    to = to.meta.get("value") if isinstance(to, fx.Node) else to
    if isinstance(to, str):  # `x.type("torch.FloatTensor")`
        to = getattr(getattr(torch, to.removeprefix("torch."), None), "dtype", None)
    return to if isinstance(to, torch.dtype) else None


_KEEP_DTYPES = {
    *("permute", "transpose", "movedim", "swapaxes", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("contiguous", "expand", "batch_norm"),
}


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether a node gives floats in the dtype that it is given them in: a `view` may be one of the bits."""
    return torch_name(node) in _KEEP_DTYPES or (torch_name(node) == "view" and _are_ints(node.args[1:]))


def _dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of what a layer gives, whatever it is given; of what a norm does, which is taken to be given its own.
    None where that is not told."""
    own: torch.dtype | None = None
    while not node.meta.get("autocast"):
        module = node.meta["call"].module if node.op == "call_module" else None
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            return module.weight.dtype
        if node.target in _CONVOLUTIONS:
            weight = constant(argument(node, 1, "weight"))
            return weight.dtype if isinstance(weight, Tensor) else None
        if (to := cast_to(node)) is not None:
            return to
        sources = [n for n in node.all_input_nodes if "value" not in n.meta]
        norm = isinstance(module, (nn.modules.batchnorm._NormBase, *(one for one in _ENDINGS if isinstance(one, type))))
        if norm and module is not None:
            own = own or next((one.dtype for one in (*module.parameters(), *module.buffers())), None)
        elif node.target in _ENDINGS:
            given = (constant(one) for one in node.all_input_nodes)
            own = own or next((one.dtype for one in given if isinstance(one, Tensor)), None)
        elif not _keeps_dtype(node):
            return own
        if len(sources) != 1:
            return own
        node = sources[0]
    return own


@_called("to", "type_as", "type", *_CASTS)
def _(a: _Arguments) -> Same | None:
    """A value with the dtype or on the device of another one of the same model, or with a dtype that it has already."""
    to = cast_to(a.node)
    if to is not None and _dtype_of(a(0, "input")) is to:
        return Same(a(0, "input"))
    if a.node.target not in ("to", "type_as"):
        return None
    like = a(1, "other" if a.node.target == "type_as" else "dtype", a.node.kwargs.get("device"))
    if not isinstance(like, fx.Node) or len(a.node.args) + len(a.node.kwargs) > 2:
        return None
    told = asks_kind(like) and "value" in like.meta
    return Same(a(0, "input")) if told or a.node.meta.get("same_kind") else None


@_called(torch.clone, torch.detach, "contiguous", "clone", "detach")
def _(a: _Arguments) -> Same:
    return Same(a(0, "input"))


# --- what ends with a scale -----------------------------------------------------------------------

# Norms that take their statistics from each value, and the spatial dims of their weight and bias: 0 for the last dim of
# a value, None for dim 1 of a value of any rank.
_ENDINGS: dict[Any, int | None] = {
    nn.LayerNorm: 0, nn.RMSNorm: 0, nn.GroupNorm: None,
    nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3,
    F.layer_norm: 0, F.rms_norm: 0, F.group_norm: None,
}  # fmt: skip


def ends(module: nn.Module) -> bool:
    """Whether a module is a norm of each value, which may end with a scale."""
    type_: Any = next((base for base in type(module).__mro__ if base in _ENDINGS), None)
    return type_ is not None and type(module).forward is type_.forward and "forward" not in module.__dict__


def read_ending(node: fx.Node) -> Layer | None:
    """The scale and shift per channel that a norm of each value ends with; None where there is none."""
    if node.op == "call_module":
        module = node.meta["call"].module
        computes = by_properties(module) or isinstance(node.meta["computed"], Unreadable)
        if not ends(module) or hooks(module) or computes:
            return None
        dims = next(_ENDINGS[base] for base in type(module).__mro__ if base in _ENDINGS)
        numbers: dict[str, Any] = called(node)._parameters
        weight, bias = numbers.get("weight"), numbers.get("bias")
    elif node.op == "call_function" and node.target in _ENDINGS:
        a = _Arguments(node)
        try:
            weight, bias = a.tensor(2, "weight"), None if node.target is F.rms_norm else a.tensor(3, "bias")
        except _NotConstant:
            return None
        dims = _ENDINGS[node.target]
    else:
        return None
    given = weight if weight is not None else bias
    if given is None or given.ndim != 1:
        return None

    def load(c: int, d: int) -> ConvMap:
        return ConvMap.scale(doubled(torch.ones_like(given) if weight is None else weight), bias, dims=d)

    kind = "norm" if dims is None else "affine"
    scale = diagonal_layer(kind, load, len(given), dims, _count(weight, bias))
    return replace(scale, node=node, shifts=bias is not None)


# --- what reads without computing -----------------------------------------------------------------

_QUERIES = {"shape", "ndim", "dtype", "device", "is_cuda", "size", "dim", "numel", "is_floating_point"}


def aliases(node: fx.Node) -> set[fx.Node]:
    """A node and all values that may look at the same memory: those made of it, and those of what it was made of."""
    found, pending = {node}, [node]
    while pending:  # what it may look at
        sources = {one for one in shares(pending.pop()) if "value" not in one.meta} - found
        found |= sources
        pending += sources
    pending = list(found)
    while pending:
        one = pending.pop()
        views = {user for user in one.users if one in shares(user)} - found
        found |= views
        pending += views
    return found


def writers(same: set[fx.Node]) -> set[fx.Node]:
    """What overwrites one of some values, or may."""
    users = {user for alias in same for user in alias.users}
    return {user for user in users if not writes(user).isdisjoint(same)}


def asks_shape(node: fx.Node) -> bool:
    """Whether a node is a question about a value's shape or type."""
    return (node.target is getattr and node.args[1] in _QUERIES) or (
        node.op == "call_method" and node.target in _QUERIES
    )


def asks_kind(node: fx.Node) -> bool:
    """Whether a node is a question about a value's dtype or device, which all values of a model have in common."""
    return node.target is getattr and node.args[1] in ("dtype", "device")


def counts_sizes(node: fx.Node) -> bool:
    """Whether a node is a size of a value, or a number made of sizes."""
    pending = [node]
    while pending:  # no recursion, here and below: a chain of nodes may be longer than Python's stack
        last = pending[-1]
        if "counts_sizes" not in last.meta:
            made = last.all_input_nodes if torch_name(last) in _SIZE_ARITHMETIC else ()
            inputs = [n for n in made if "value" not in n.meta]
            if left := [n for n in inputs if "counts_sizes" not in n.meta]:
                pending += left
                continue
            sizes = bool(inputs) and all(n.meta["counts_sizes"] for n in inputs)
            last.meta["counts_sizes"] = asks_shape(last) or sizes
        pending.pop()
    found: bool = node.meta["counts_sizes"]
    return found


_SIZE_ARITHMETIC = {"getitem", "add", "sub", "mul", "floordiv", "mod", "neg"}


def asserts_rank(node: fx.Node) -> bool:
    """Whether a node is asked for an assertion only, on what no merge changes: how many dims a value has, its type."""
    return only_asserted(node) and not (node.target in ("size", "numel") or (asks_shape(node) and "shape" in node.args))


def only_asserted(node: fx.Node) -> bool:
    """Whether a node is a question about a shape or type, asked for nothing but an assertion."""
    pending, seen = [node], {node}
    for one in pending:
        name = one.target if isinstance(one.target, str) else getattr(one.target, "__name__", "")
        if name in ("_assert", "_assert_with_msg", "_assert_tensor_metadata"):
            if one.users:
                return False
            continue
        follows = name in (*_COMPARES, "len", "contains") and all(_asked(n) for n in one.all_input_nodes)
        if not (asks_shape(one) or follows):
            return False
        pending += [user for user in one.users if user not in seen]
        seen.update(one.users)
    return True


def _asked(node: fx.Node) -> bool:
    """Whether a node is part of a question about shapes or types."""
    pending, seen = [node], {node}
    for one in pending:
        if not asks_shape(one):
            if torch_name(one) not in _COMPARES or not one.all_input_nodes:
                return False
            pending += [n for n in one.all_input_nodes if n not in seen]
            seen.update(one.all_input_nodes)
    return True


_COMPARES = ("eq", "ne", "ge", "gt", "le", "lt", "not_", "getitem", "mod", "floordiv")


# --- writing back ---------------------------------------------------------------------------------

_CONVS: tuple[Any, ...] = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSES: tuple[Any, ...] = (None, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PADS: dict[str, tuple[Any, ...]] = {
    "constant": (None, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "reflect": (None, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (None, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (None, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


def padding_of(map_: ConvMap) -> tuple[int, ...] | str | None:
    """What a convolution's `padding` says of a map's pads; None if no convolution pads so."""
    g = map_.geometry
    if bool(map_.fill.any()):
        return None
    if g.transposed:
        fits = all(
            lo >= 0 <= lo - hi < max(step, dilation)
            for (lo, hi), step, dilation in zip(g.pad, g.stride, g.dilation, strict=True)
        )
        return tuple(lo for lo, _ in g.pad) if fits else None
    if all(lo == hi >= 0 for lo, hi in g.pad):
        return tuple(lo for lo, _ in g.pad)
    same = tuple((r // 2, r - r // 2) for r in g.reach)
    return "same" if g.pad == same and set(g.stride) == {1} else None


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
        layer = _CONV_TRANSPOSES[g.dims](
            g.in_channels, g.out_channels, g.kernel, g.stride, padding, more, g.groups, has_bias, g.dilation, **factory
        )
    else:
        mode = "zeros" if map_.border == "constant" or padding is None else map_.border
        layer = _CONVS[g.dims](
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
