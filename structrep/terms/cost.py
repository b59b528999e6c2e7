"""What a term and a map cost, from shapes alone.

Costs are counted per output pixel of the whole term, so that no input size is needed: a layer before a stride of 2
in two dims works on four pixels for each of the term's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from structrep.algebra import ConvMap, Geometry
from structrep.terms.layer import Layer
from structrep.terms.term import Term, dims_of, geometry


@dataclass(frozen=True)
class Cost:
    """Multiply-adds per output pixel (of all channels), stored numbers, operations launched, and numbers of kernels
    that are multiplied out at every call."""

    multiply_adds: float
    parameters: int
    operations: int
    composed: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.multiply_adds + other.multiply_adds,
            self.parameters + other.parameters,
            self.operations + other.operations,
            self.composed + other.composed,
        )

    @property
    def held(self) -> int:
        """How many numbers are there as it runs."""
        return self.parameters + self.composed


def of_layer(g: Geometry) -> float:
    """Multiply-adds of a map per output pixel."""
    return numbers(g) / math.prod(g.stride) if g.transposed else numbers(g)


def numbers(g: Geometry) -> int:
    """How many numbers a kernel has."""
    return g.out_channels * (g.in_channels // g.groups) * math.prod(g.kernel)


def of_map(g: Geometry, bias: bool = True) -> Cost:
    """A term's cost after it became one layer."""
    return Cost(of_layer(g), numbers(g) + bias * g.out_channels, 1)


def of_table(g: Geometry) -> Cost:
    """A term's cost after it became a table, each of whose rows holds a bias too."""
    return Cost(0, numbers(g), 1)


def of_border(map_: ConvMap) -> Cost:
    """What a pad before a map takes that stays a layer of its own; a shift, where channels read different constants."""
    g = map_.geometry
    shifts = g.in_channels * bool((map_.fill != map_.fill[0]).any())
    return Cost(shifts * math.prod(g.stride), shifts, 1)


def of_term(term: Term, *, kernels_alone: bool = False) -> Cost:
    """A term's cost as it is written; a layer used on two paths counts once.

    Args:
        kernels_alone: count no multiply-adds of scales and additions, which is what convolutions and pools take.
    """
    dims = dims_of(term, None)
    counted: dict[int, Cost] = {}
    whole = geometry(term)

    def price(part: Term, channels: int, density: float) -> None:
        if part.op == "leaf":
            assert part.layer is not None
            shape = part.layer.shape(channels, dims)
            computed = part.layer.formula is not None  # a kernel that is made again on every pass
            launched = int(part.layer.kind != "view") + computed
            work = 0 if kernels_alone and part.layer.scales else _work(part.layer, shape)
            made = numbers(shape) if part.layer.composes else 0
            counted.setdefault(id(part.layer), Cost(density * work, part.layer.parameters, launched, made))
        elif part.op == "seq":
            shapes, inner = [], channels
            for item in part.parts:
                shapes.append(geometry(item, inner, dims))
                inner = shapes[-1].out_channels
            for item, shape in zip(reversed(part.parts), reversed(shapes), strict=True):
                price(item, shape.in_channels, density)
                pixels = math.prod(shape.stride)
                density = density / pixels if shape.transposed else density * pixels
        elif part.op in ("sum", "concat"):
            for branch in part.parts:
                price(branch, channels, density)
            added = part.op == "sum" and not kernels_alone
            adds = (len(part.parts) - 1) * geometry(part, channels, dims).out_channels if added else 0
            counted.setdefault(id(part), Cost(density * adds, 0, len(part.parts) - 1 if part.op == "sum" else 1))

    price(term, whole.in_channels, 1.0)
    return sum(counted.values(), Cost(0, 0, 0))


def _work(layer: Layer, shape: Geometry) -> float:
    if layer.kind == "unrolled" and layer.weight is not None:
        return layer.weight.numel() * (shape.out_channels // len(layer.weight))  # what the convolution takes
    if layer.work is not None:
        return layer.work
    return 0 if layer.moves or layer.kind == "table" else of_layer(shape)
