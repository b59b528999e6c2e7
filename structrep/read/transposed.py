"""Norms, scales and convolutions of one tap between two transpositions: layers of the last dim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from structrep.algebra import ConvMap, Geometry
from structrep.algebra.kernels import regroup
from structrep.errors import Unreadable
from structrep.graph.facts import CALL
from structrep.graph.operations import does, torch_name
from structrep.graph.table import Is
from structrep.read.arguments import Arguments, reads
from structrep.terms.cost import of_term
from structrep.terms.layer import Identity, Layer, Sum
from structrep.terms.layers import diagonal_layer, kernel_layer
from structrep.terms.term import ONE, Term, geometry, leaf, seq, signed, sum_terms
from structrep.terms.value import value

MOST_SWAPPED = 32  # nodes between two transpositions


@dataclass(frozen=True)
class _Inner:
    """What is done to a transposed value.

    Args:
        term: of values with one spatial dim.
        first: the transposition.
        through: the nodes from there on.
        shows_rank: whether something on the way takes values of three dims only.
    """

    term: Term
    first: fx.Node
    through: dict[fx.Node, None]
    shows_rank: bool

    def then(self, node: fx.Node, term: Term = ONE, shows_rank: bool = False) -> _Inner:
        term = seq([self.term, term])
        return _Inner(term, self.first, {**self.through, node: None}, self.shows_rank or shows_rank)


@reads(torch.transpose, torch.permute, torch.swapaxes, "transpose", "permute", "swapaxes")
def _(a: Arguments) -> Layer | None:
    """What is done on dim 1 between two transpositions is done on the last dim: norms and scales (RepBN's) and
    convolutions of one tap (RepAdapter's)."""
    if not _swaps_last_two(a.node):
        return None
    inner = _swapped(a, a.node.args[0], {})
    if inner is None or len(inner.through) == 1 or not (inner.shows_rank or _is_permute(inner.first)):
        return None
    (source,) = inner.first.all_input_nodes
    return replace(_of_last_dim(inner.term), source=source, through=tuple(inner.through))


def _of_last_dim(term: Term) -> Layer:
    """The layer of the last dim that a term is of dim 1."""
    kernels = [layer for layer in term.leaves() if layer.weight is not None]
    if not kernels:
        count = next((layer.in_channels for layer in term.leaves() if layer.in_channels is not None), None)
        return scale_of_last_dim(lambda c: value(term, c, 1), count)
    shape, taken = geometry(term, None, 1), of_term(term)

    def load(c: int, d: int) -> ConvMap:
        map_ = value(term, c, 1)
        return ConvMap(regroup(map_.kernel, map_.geometry.groups, 1).flatten(1), map_.bias)

    linear = Geometry(shape.in_channels, shape.out_channels)
    layer = kernel_layer("linear", linear, load, kernels[0].weight, None)  # type: ignore[arg-type]
    return replace(layer, parameters=taken.parameters, shifts=True, work=taken.multiply_adds)


def scale_of_last_dim(load: Callable[[int], ConvMap], channels: int | None) -> Layer:
    """A scale of the last dim, by the map of so many channels that `load` gives."""

    def scale(c: int, d: int) -> ConvMap:
        if d:
            raise Unreadable("a scale of the last dim, of values whose channels are on dim 1")
        map_ = load(c)
        return ConvMap.scale(map_.kernel.flatten(), map_.bias, dims=0)

    return diagonal_layer("affine", scale, channels, 0, 0)


def _swapped(a: Arguments, node: Any, known: dict[fx.Node, _Inner | None]) -> _Inner | None:
    """A value as what is done to a transposed one."""
    if not isinstance(node, fx.Node) or len(known) == MOST_SWAPPED:
        return None
    if node not in known:
        known[node] = None  # a value that is made of itself is none
        known[node] = _swapped_step(a, node, known)
    return known[node]


def _swapped_step(a: Arguments, node: fx.Node, known: dict[fx.Node, _Inner | None]) -> _Inner | None:
    if _swaps_last_two(node):
        return _Inner(ONE, node, {node: None}, False)
    if does(node, Is.PERMUTES):
        return None
    reading = a.read(node)
    if isinstance(reading, Identity):
        inner = _swapped(a, reading.source, known)
        return inner.then(node) if inner else None
    if isinstance(reading, Layer) and not reading.through and (reading.scales or _is_pointwise(reading)):
        if reading.dims == 0:
            return None  # a scale of the last dim, not of dim 1
        three = not reading.scales or isinstance(CALL.of(node).module, nn.BatchNorm1d)
        inner = _swapped(a, reading.source, known)
        return inner.then(node, leaf(reading), three) if inner else None
    if isinstance(reading, Sum) and not reading.through:
        parts = [(_swapped(a, part, known), sign) for part, sign in reading.parts]
        found = [part for part, _ in parts if part is not None]
        if len(found) < len(parts) or len({part.first for part in found}) != 1:
            return None
        term = sum_terms([signed(part.term, sign) for part, sign in parts if part is not None], node)
        through = dict.fromkeys((*(one for part in found for one in part.through), node))
        return _Inner(term, found[0].first, through, any(part.shows_rank for part in found))
    return None


def _is_pointwise(layer: Layer) -> bool:
    """Whether a layer is a convolution of one tap of values with one spatial dim, whose kernel is stored."""
    if layer.kind != "conv" or layer.dims != 1 or layer.formula is not None:
        return False
    shape = layer.shape(layer.in_channels or 1, 1)
    return shape == Geometry(shape.in_channels, shape.out_channels, (1,), groups=shape.groups)


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
