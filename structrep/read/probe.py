"""A layer whose code cannot be read, as a map: found out by what it does.

In float64 the layer is asked whether it is affine, on random inputs; its kernel is read by impulses; and the map that
comes of this has to give what the layer gives, on inputs of several sizes. All this shows what the layer does to these
inputs and no more: so it is done only where the user asks for it, and of layers that are made to be linear, peft's with
adapters; and a plan marks what came of it as probed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

import torch
from torch import Tensor, nn

from structrep.algebra import Border, ConvMap, Geometry, Ints
from structrep.algebra.shadows import Shadows
from structrep.errors import Inexact, Unreadable
from structrep.modules.copies import shallow_copy

EXACT = 1e-9  # of the largest value: what a layer that computes in float64 rounds, and no more
SMALL = 13  # pixels a side of the inputs that kernels are read with, if the layer takes them
BATCH = 64


def probe(module: nn.Module, example_input: Tensor) -> ConvMap:
    """The map that a layer computes.

    Example:
        >>> structrep.probe(nn.Conv2d(3, 8, 3, padding=1), torch.randn(1, 3, 9, 9))
        ConvMap(3 -> 8, 3x3, pad ((1, 1), (1, 1)))

    Args:
        module: a layer of one input and one output, in eval mode; it is not changed.
        example_input: (N, C, *spatial) with one to three spatial dims, or (N, C).

    Raises:
        Unreadable: it is not affine, not the same everywhere, or not one tensor of one tensor.
        Inexact: it is, but not at its border.
    """
    layer = _Layer(module, example_input)
    small = layer.shrunk(example_input)
    offset = layer.demand_affine(small)
    kernel, geometry = _kernel(layer, small)
    for border in get_args(Border) if geometry.pads else ("constant",):
        found = ConvMap(
            kernel, offset, stride=geometry.stride, pad=geometry.pad, dilation=geometry.dilation,
            groups=geometry.groups, border=border,
        )  # fmt: skip
        off = layer.distance(found, small, example_input)
        if off <= EXACT:
            return found
    if geometry.pads and layer.distance(found, small, example_input, inside=True) <= EXACT:
        raise Inexact(f"{layer.name} is one map inside, but pads its input with nothing that is known: by {off:.1e}")
    raise Unreadable(f"{layer.name} is not the same everywhere: the kernel read at its middle is off by {off:.1e}")


class _Layer:
    """A layer in float64, or in its own dtype and in float64 beside it, if that is what it insists on: runs on the
    device of an example, and takes and gives what is float64 and on the CPU."""

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        if not (isinstance(example, Tensor) and 2 <= example.ndim <= 5):  # type: ignore[redundant-expr]
            raise Unreadable("an example input of shape (N, C) or (N, C, *spatial) is needed to probe a layer")
        self.name = type(module).__name__
        self.module = shallow_copy(module)
        self.module.double()
        self.device, self.dtype = example.device, torch.float64
        self.generator = torch.Generator().manual_seed(0)
        try:
            self(self.random(tuple(example.shape)))
        except (RuntimeError, AssertionError):
            self.module, self.dtype = shallow_copy(module), example.dtype

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad(), Shadows() as shadows:
            y = self.module(x.to(self.device, self.dtype))
        if not isinstance(y, Tensor) or y.ndim != x.ndim or len(y) != len(x):
            raise Unreadable(f"{self.name} gives no tensor of as many dims as it is given, batch first")
        return shadows.of(y).cpu()

    def random(self, shape: Ints) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator, device="cpu")

    def shrunk(self, example: Tensor) -> Ints:
        """The shape of a small input that it takes."""
        shape: Ints = (1, example.shape[1], *(min(n, SMALL) for n in example.shape[2:]))
        try:
            self(self.random(shape))
        except (RuntimeError, ValueError):
            shape = (1, *example.shape[1:])
        return shape

    def demand_affine(self, shape: Ints) -> Tensor:
        """Its value at 0, (O,).

        Raises:
            Unreadable: it is not affine, or adds something else to each pixel.
        """
        zero = self(torch.zeros(shape, dtype=torch.float64, device="cpu"))
        for _ in range(4):
            x, y, factor = self.random(shape), self.random(shape), float(self.random((1,)))
            both = self(factor * x + y) - zero
            each = factor * (self(x) - zero) + (self(y) - zero)
            gap = float((both - each).abs().max() / each.abs().max().clamp(min=1e-300))
            if not gap <= EXACT:
                raise Unreadable(f"{self.name} is not affine: f(a x + y) and a f(x) + f(y) differ by {gap:.1e}")
        offset = zero.flatten(2)[0, :, :1] if zero.ndim > 2 else zero[0, :, None]
        if zero.ndim > 2 and not bool((zero.flatten(2)[0] - offset).abs().max() <= EXACT * (1 + zero.abs().max())):
            raise Unreadable(f"{self.name} adds another constant to each pixel, so it is not the same everywhere")
        return offset[:, 0]

    def distance(self, map_: ConvMap, small: Ints, example: Tensor, inside: bool = False) -> float:
        """How far a map is off, relative to the largest value, on random inputs of several sizes."""
        worst = 0.0
        for shape in (small, (2, *(n + (d > 0) for d, n in enumerate(small[1:]))), tuple(example.shape)):
            x = self.random(shape)
            try:
                truth, mine = self(x), map_(x)
            except (RuntimeError, ValueError, Unreadable):
                continue
            if truth.shape != mine.shape:
                return math.inf
            if inside:
                truth, mine = (map_.geometry.inside(value, x.shape[2:]) for value in (truth, mine))
            if truth.numel():
                worst = max(worst, float((truth - mine).abs().max() / truth.abs().max().clamp(min=1e-300)))
        return worst


def _kernel(layer: _Layer, shape: Ints) -> tuple[Tensor, Geometry]:
    """The kernel that makes the middle output pixel, and where it lies."""
    dims = len(shape) - 2
    zero = layer(torch.zeros(shape, dtype=torch.float64, device="cpu"))
    outputs, size = zero.shape[1], tuple(zero.shape[2:])
    middle = tuple(n // 2 for n in size)
    response = zero.new_zeros(outputs, shape[1], *shape[2:])
    for places, impulses in _impulses(shape):
        values = layer(impulses) - zero
        for place in middle:
            values = values[:, :, place]
        for at, value in zip(places, values, strict=True):  # (O,)
            response.view(outputs, -1)[:, at] = value
    peak = response.abs().max()
    taken = (response.abs() > EXACT * peak).flatten(0, 1).any(0) if dims else zero.new_zeros(())
    kernel = response
    strides, dilations, pads = [], [], []
    for dim in range(dims):
        others = [d for d in range(dims) if d != dim]
        along = taken.amax(dim=others) if others else taken
        places_ = along.nonzero().flatten().tolist() or [middle[dim]]
        stride, overhang = _stride(layer, shape, dim)
        first, last = places_[0], places_[-1]
        step = math.gcd(*(p - first for p in places_)) or 1
        kernel = kernel.index_select(dim + 2, torch.arange(first, last + 1, step, device="cpu"))
        lo = stride * middle[dim] - first
        strides.append(stride)
        dilations.append(step)
        pads.append((lo, overhang + (last - first) - lo))
    groups = _groups(kernel)
    if groups > 1:
        blocks = kernel.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
        kernel = torch.cat([blocks[g, :, g] for g in range(groups)])
    inside = kernel.shape[1] * groups
    taps = tuple(kernel.shape[2:])
    return kernel, Geometry(inside, outputs, taps, tuple(strides), tuple(dilations), tuple(pads), groups)


def _impulses(shape: Ints) -> Iterator[tuple[range, Tensor]]:
    """Inputs with a one in one place each, in batches, and those places, counted through."""
    count = math.prod(shape[1:])
    for start in range(0, count, BATCH):
        places = range(start, min(start + BATCH, count))
        x = torch.zeros(len(places), count, dtype=torch.float64, device="cpu")
        x[range(len(places)), places] = 1
        yield places, x.reshape(-1, *shape[1:])


def _stride(layer: _Layer, shape: Ints, dim: int) -> tuple[int, int]:
    """Stride and overhang along a dim, from the output sizes of inputs of several sizes."""
    found: dict[int, int] = {}
    for more in range(8):
        longer = list(shape)
        longer[dim + 2] += more
        try:
            found[longer[dim + 2]] = layer(layer.random(tuple(longer))).shape[dim + 2]
        except (RuntimeError, ValueError):
            continue
    for stride in range(1, 8):
        least = max((out - 1) * stride + 1 - n for n, out in found.items())
        most = min(out * stride - n for n, out in found.items())
        if least <= most:
            return stride, least
    raise Unreadable(f"{layer.name} gives outputs of sizes {sorted(found.items())}, which are those of no stride")


def _groups(kernel: Tensor) -> int:
    """The largest number of groups of which a dense kernel (O, I, *K) has no coefficient between two."""
    outputs, inputs = kernel.shape[:2]
    used = kernel.reshape(outputs, inputs, -1).abs().amax(2) > EXACT * kernel.abs().max()
    most = math.gcd(outputs, inputs)
    for groups in (g for g in range(most, 1, -1) if most % g == 0):
        blocks = used.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).any(1).any(2)  # (G, G)
        if not bool((blocks & ~torch.eye(groups, dtype=torch.bool, device="cpu")).any()):
            return groups
    return 1
