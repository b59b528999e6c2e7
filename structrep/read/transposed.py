"""Norms and scales between two transpositions: a scale of the last dim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from structrep.algebra import ConvMap
from structrep.errors import Unreadable
from structrep.graph.facts import CALL
from structrep.graph.operations import does, torch_name
from structrep.graph.table import Is
from structrep.read.arguments import Arguments, reads
from structrep.terms.layer import Identity, Layer, Sum
from structrep.terms.layers import diagonal_layer

MOST_SWAPPED = 32  # nodes between two transpositions
_Scale = tuple[Callable[[int], ConvMap], fx.Node | None, dict[fx.Node, None], bool]


@reads(torch.transpose, torch.permute, torch.swapaxes, "transpose", "permute", "swapaxes")
def _(a: Arguments) -> Layer | None:
    """Norms and scales on dim 1 between two transpositions are a scale of the last dim, as RepBN's is of a token."""
    if not _swaps_last_two(a.node):
        return None
    inner = _swapped(a, a.node.args[0], {})
    if inner is None:
        return None
    load, first, through, shows_rank = inner
    if first is None or not (shows_rank or _is_permute(first)) or len(through) == 1:
        return None
    (source,) = first.all_input_nodes
    known = (a.read(node) for node in through if not does(node, Is.PERMUTES))
    count = next((r.in_channels for r in known if isinstance(r, Layer) and r.in_channels is not None), None)
    return replace(scale_of_last_dim(load, count), source=source, through=tuple(through))


def scale_of_last_dim(load: Callable[[int], ConvMap], channels: int | None) -> Layer:
    """A scale of the last dim, by the map of so many channels that `load` gives."""

    def scale(c: int, d: int) -> ConvMap:
        if d:
            raise Unreadable("a scale of the last dim, of values whose channels are on dim 1")
        map_ = load(c)
        return ConvMap.scale(map_.kernel.flatten(), map_.bias, dims=0)

    return diagonal_layer("affine", scale, channels, 0, 0)


def _swapped(a: Arguments, node: Any, known: dict[fx.Node, _Scale | None]) -> _Scale | None:
    """A value as a scale per channel of a transposed one: that scale, the transposition, the nodes on the way from it,
    and whether something on the way takes values of three dims only."""
    if not isinstance(node, fx.Node) or len(known) == MOST_SWAPPED:
        return None
    if node not in known:
        known[node] = None  # a value that is made of itself is none
        known[node] = _swapped_step(a, node, known)
    return known[node]


def _swapped_step(a: Arguments, node: fx.Node, known: dict[fx.Node, _Scale | None]) -> _Scale | None:
    if _swaps_last_two(node):
        return (lambda c: ConvMap.identity(c, 1)), node, {node: None}, False
    if does(node, Is.PERMUTES):
        return None
    reading = a.read(node)
    if isinstance(reading, Identity):
        return _behind(_swapped(a, reading.source, known), node, lambda map_, c: map_, False)
    if isinstance(reading, Layer) and reading.scales and not reading.through:
        layer = reading
        if layer.dims == 0:
            return None  # a scale of the last dim, not of dim 1
        three = node.op == "call_module" and isinstance(CALL.of(node).module, nn.BatchNorm1d)
        inner = _swapped(a, reading.source, known)
        return _behind(inner, node, lambda map_, c: map_ >> layer.load(c, 1), three)
    if isinstance(reading, Sum) and not reading.through:
        parts = [(_swapped(a, part, known), sign) for part, sign in reading.parts]
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
