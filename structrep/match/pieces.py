"""Values of a fixed size, and what is done with all their numbers at once.

RepMLP (arXiv:2105.01883) cuts an image into pieces of h x w pixels, gives all numbers of a piece to one Linear, and has
convolutions of the same pieces beside it. A reshape to (..., C, h, w), with sizes that are written down, takes the same
C h w numbers together as one to (..., C h w) does; so the convolution is a matrix on those too, `ConvMap.unrolled`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import fx

from structrep.algebra import ConvMap, Geometry, Ints
from structrep.graph.shapes import sizes_told
from structrep.terms.layer import Identity, Layer, Readings, Sum
from structrep.terms.layers import diagonal_layer
from structrep.terms.term import ONE, Term, leaf, seq, signed, sum_terms

MOST = 64  # nodes between the reshapes that make pieces and fold them together


def frame(node: fx.Node) -> Ints:
    """The last sizes of a reshape, as far as they are written down; () for any other node."""
    known: list[int] = []
    for size in reversed(sizes_told(node)):
        if not isinstance(size, int) or size < 1:
            break
        known.insert(0, size)
    return tuple(known)


def takes_together(node: fx.Node, numbers: int) -> bool:
    """Whether a reshape keeps so many neighbouring numbers together, as its last dims."""
    sizes = frame(node)
    return any(math.prod(sizes[first:]) == numbers for first in range(len(sizes)))


def pieces(node: fx.Node) -> Ints:
    """(C, *size) of a reshape to (..., C, *size) with one dim before; () for any other node."""
    sizes, count = frame(node), len(sizes_told(node))
    return sizes[-(count - 1) :] if sizes and len(sizes) >= count - 1 > 1 else ()


def is_matrix(node: fx.Node, readings: Readings) -> bool:
    """Whether a layer is given all numbers of a piece at once, as channels."""
    layer = readings.get(node)
    if not isinstance(layer, Layer) or layer.weight is None or layer.source is None or layer.dims is None:
        return False
    channels, dims = layer.in_channels, layer.dims
    if channels is None or not layer.shape(channels, dims).pointwise:
        return False
    return frame(layer.source)[-(dims + 1) :] == (channels, *[1] * dims)


def tiled(size: Ints) -> Ints:
    """The channel of each number of pieces (C, *size)."""
    return tuple(channel for channel in range(size[0]) for _ in range(math.prod(size[1:])))


def spread(scale: Layer, channels: int, dims: int, of: Ints | None = None) -> Layer:
    """A scale as one of values with so many channels and spatial dims.

    Args:
        of: which of the scale's own channels each is of; as they are by default.
    """

    def load(c: int, d: int) -> ConvMap:
        own = scale.in_channels or (channels if of is None else max(of) + 1)
        map_ = scale.load(own, scale.dims if scale.dims is not None else d)
        kernel, bias = map_.kernel.flatten(), map_.bias
        return ConvMap.scale(kernel if of is None else kernel[[*of]], bias if of is None else bias[[*of]], dims=d)

    same = diagonal_layer("affine", load, channels, dims, scale.parameters)
    return replace(same, node=scale.node, shifts=scale.shifts, dead=scale.dead)


def unrolled(layer: Layer, channels: int, size: Ints, dims: int) -> Layer:
    """A convolution of pieces, on all their numbers."""
    before = layer.shape(channels, len(size))
    shape = Geometry(
        channels * math.prod(size),
        before.out_channels * math.prod(before.output_size(size)),
        (1,) * dims,
        groups=before.groups,
    )

    def load(c: int, d: int) -> ConvMap:
        map_ = layer.load(channels, len(size)).unrolled(size)
        return ConvMap.of(shape, map_.kernel.reshape(*map_.kernel.shape, *[1] * d), map_.bias)

    return replace(
        layer, kind="unrolled", load=load, shape=lambda c, d: shape, in_channels=shape.in_channels,
        out_channels=shape.out_channels, dims=dims,
    )  # fmt: skip


class Pieces:
    """What is done with pieces of a value, read from one of its results back to the reshape that makes them.

    Args:
        dims: spatial dims of the layer that it is to be merged into.
    """

    def __init__(self, result: fx.Node, dims: int, readings: Readings) -> None:
        self.readings, self.dims = readings, dims
        self.nodes: dict[fx.Node, None] = {}
        self.entry: fx.Node | None = None  # the reshape
        if frame(result) and result not in readings:  # folded together again
            self.nodes[result] = None
            result = result.all_input_nodes[0]
        self.term: Term | None = None
        self.channels = 0
        if (found := self._read(result)) is not None:
            self.term, self.channels = found

    def _read(self, node: fx.Node) -> tuple[Term, int] | None:
        """A value as a term, and its channels; None if it is not made of pieces by layers that keep their size."""
        reading = self.readings.get(node)
        if len(self.nodes) > MOST:
            return None
        if reading is None:
            found = pieces(node)
            if not found or (self.entry is not None and found != pieces(self.entry)):
                return None
            if self.entry is not None and self.entry.all_input_nodes[0] is not node.all_input_nodes[0]:
                return None
            self.entry = self.entry or node
            return ONE, found[0]
        self.nodes[node] = None
        if isinstance(reading, Identity):
            return self._read(reading.source)
        if isinstance(reading, Sum):
            return self._sum(reading)
        if not isinstance(reading, Layer) or reading.source is None or reading.through:
            return None
        inner = self._read(reading.source)
        return self._then(*inner, reading) if inner else None

    def _sum(self, reading: Sum) -> tuple[Term, int] | None:
        self.nodes.update(dict.fromkeys(reading.through))
        found = [(self._read(part), sign) for part, sign in reading.parts]
        known = [(one[0], one[1], sign) for one, sign in found if one is not None]
        if len(known) < len(found) or len({channels for _, channels, _ in known}) > 1:
            return None
        return sum_terms([signed(term, sign) for term, _, sign in known]), known[0][1]

    def _then(self, term: Term, channels: int, layer: Layer) -> tuple[Term, int] | None:
        assert self.entry is not None
        size = pieces(self.entry)[1:]
        if layer.dims not in (None, len(size)) or layer.in_channels not in (None, channels):
            return None
        if layer.scales:
            return seq(
                [term, leaf(spread(layer, channels * math.prod(size), self.dims, tiled((channels, *size))))]
            ), channels
        shape = layer.shape(channels, len(size))
        if layer.kind != "conv" or shape.output_size(size) != size:
            return None
        return seq([term, leaf(unrolled(layer, channels, size, self.dims))]), shape.out_channels
