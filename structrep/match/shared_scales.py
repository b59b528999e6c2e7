"""Scales that no single neighbour can take, but one behind a permute can, or all of several can.

* A norm that several convolutions read (queries, keys and values of one norm) goes into each of them.
* A norm behind a concatenation goes into the branches, each taking its own channels; one behind a sum of layers of
  several inputs goes into each of these.
* What is done with pieces of a fixed size (`pieces`) goes into a matrix on all their numbers: a norm of their channels
  behind it, convolutions beside it.
* What a layer norm, an RMS norm or a group norm ends with, its weight and bias, goes into what reads it.
* Between a scale and a layer that takes it, dims may be moved (Linear -> permute -> batch norm; layer norm -> window
  partition -> Linear), as long as the channels are those of the layer; or numbers moved and averaged, as long as each
  is of one channel still (norm -> flatten -> Linear, norm -> global average -> Linear, convolution -> shuffle -> norm).

It is all of them or none: the scale itself becomes an identity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeGuard

import torch
from torch import fx

from structrep.algebra import ConvMap
from structrep.errors import Isolated, Mutated, Refusal
from structrep.graph.aliases import aliases, writers
from structrep.graph.axes import axis_after, swaps_unknown_dims
from structrep.graph.facts import INDEX, STORED
from structrep.graph.operations import does
from structrep.graph.queries import asks_shape
from structrep.graph.table import Is
from structrep.match.absorption import Absorption, axis_of, is_alone, layer_behind, maker_of, users_of, where_moved
from structrep.match.channels import Moved, channels_behind, passes
from structrep.match.pieces import Pieces, frame, is_matrix, pieces, spread, takes_together, tiled
from structrep.match.summands import by_summands
from structrep.terms.layer import Concat, Layer, Reading, Readings, Sum
from structrep.terms.layers import diagonal_layer
from structrep.terms.term import signed, sum_terms


def absorptions(readings: Readings, endings: Mapping[fx.Node, Layer]) -> Iterator[Absorption | tuple[fx.Node, Refusal]]:
    """All scales of a graph that other layers can take between them, and those that they cannot, with the reason.

    Args:
        endings: scales that nodes end with which do more than that.
    """
    found: dict[fx.Node, Absorption] = {}
    parts = _parts(readings)
    for node, reading in (*readings.items(), *endings.items()):
        if node in parts:
            continue
        if isinstance(reading, Sum) and (one := _by_sum(node, reading, readings, found)) is not None:
            found[node] = one
            yield one
        if isinstance(reading, Layer) and reading.scales and not _seen_elsewhere(node, reading):
            try:
                one = (
                    _takers(node, reading, readings, found)
                    if node in readings
                    else _by_readers(node, reading, readings)
                )
            except Refusal as reason:
                yield node, reason
                continue
            if one is not None:
                found[node] = one
                yield one


def _parts(readings: Readings) -> set[fx.Node]:
    """What scales are made of that vanish with them, another scale perhaps, which is not to be given away once more."""
    return {
        part
        for node, reading in readings.items()
        if isinstance(reading, Layer) and not _seen_elsewhere(node, reading)
        for part in reading.through
    }


def _seen_elsewhere(node: fx.Node, scale: Layer) -> bool:
    """Whether what a scale is made of, or what it gives, is of use to what a graph does not show, or it not all."""
    inside = {*scale.through, node}
    return any(STORED.get(part) for part in inside) or any(
        user not in inside for part in scale.through for user in part.users
    )


def _takers(node: fx.Node, scale: Layer, readings: Readings, found: Mapping[fx.Node, Absorption]) -> Absorption | None:
    """Who takes a scale that is a node of its own."""
    assert scale.source is not None
    one = (
        _by_branches(node, scale, readings)
        or by_summands(node, scale, readings, found)
        or _by_some_channels(node, scale, readings)
        or _by_maker(node, scale, readings, found)
        or _by_matrix(node, scale, readings)
    )
    if one is not None:
        return one
    feeding = maker_of(scale.source, readings)
    known = readings.get(feeding)
    if isinstance(known, Layer) and known.weight is not None and is_alone(feeding, node, scale, readings):
        return None  # that layer takes it by itself
    return _by_readers(node, scale, readings)


def _by_readers(node: fx.Node, scale: Layer, readings: Readings) -> Absorption | None:
    """All that reads the scale, perhaps with its dims moved, is a layer that may do it first."""
    takers: dict[fx.Node, Layer] = {}
    goes: dict[fx.Node, Moved] = {}  # where its channels come to, by what takes it there
    count, first = scale.in_channels, axis_of(node, scale)
    pending: list[tuple[fx.Node, int | None, tuple[fx.Node, ...]]]
    pending = [(user, first, ()) for user in users_of(node, readings)]
    apart = scale.source is None  # whether no term holds the scale and a layer that reads it
    while pending:
        user, axis, chain = pending.pop()
        layer = readings.get(user)
        if isinstance(layer, Layer) and layer.weight is not None:
            if layer.in_channels is None or layer.dims is None or user in takers:
                return None
            if axis != -(layer.dims + 1) and (axis is not None or chain or (scale.kind == "norm" and not layer.dims)):
                moved = where_moved(channels_behind, chain, node, scale, first, -(layer.dims + 1), layer.in_channels)
                if moved is None:
                    return None
                goes[user] = moved
            takers[user] = layer
            continue
        new = axis_after(user, axis, count) if axis is not None and count is not None else None
        if axis is not None and new is None and swaps_unknown_dims(user):
            raise Isolated(
                f"{user.name} swaps dims of a value of which only example inputs tell how many it has: "
                f"structrep.plan(model, example_inputs) knows whether what reads it takes the scale"
            )
        if new is None and not (first is not None and passes(user)):
            return None
        pending += [(other, new, (*chain, user)) for other in users_of(user, readings)]
        apart = True
    if len(takers) < 2 - apart:
        return None
    # As an identity the scale would give what it is given itself, which must not be written to until all have read it.
    last = max(INDEX.of(taker) for taker in takers)
    for writer in writers(aliases(scale.source or node)):
        if INDEX.of(node) < INDEX.of(writer) < last:
            raise Mutated(f"{writer.name} may overwrite what {node.name} is given before all have read it")
    before: dict[fx.Node, Layer] = {}
    for taker, layer in takers.items():
        assert layer.in_channels is not None
        assert layer.dims is not None
        before[taker] = spread(scale, layer.in_channels, layer.dims, goes[taker].of if taker in goes else None)
        scaled = before[taker].load(layer.in_channels, layer.dims)
        scaled >> layer.load(layer.in_channels, layer.dims)  # raises if inexact
    shapes = tuple(dict.fromkeys(shape for moved in goes.values() for shape in moved.shapes))
    turns = any(moved.of != tuple(range(len(moved.of))) for moved in goes.values())
    return Absorption(
        node, scale.source or node, scale.through, before, {},
        ends=scale.source is None, shapes=shapes, turns=turns, moves=bool(goes),
    )  # fmt: skip


def _by_branches(node: fx.Node, scale: Layer, readings: Readings) -> Absorption | None:
    """What is scaled are the channels of layers, stacked, and of use to nothing else."""
    assert scale.source is not None
    concat = maker_of(scale.source, readings)
    stacked = readings.get(concat)
    if scale.in_channels is None:
        return None  # one number for all
    if not isinstance(stacked, Concat) or stacked.dim != 1 or users_of(concat, readings) != [node]:
        return None
    behind: dict[fx.Node, Layer] = {}
    first = 0
    for part in (maker_of(part, readings) for part in stacked.parts):
        layer = readings.get(part)
        if not isinstance(layer, Layer) or not layer.dims or layer.out_channels is None or part in behind:
            return None
        if layer.kind not in ("conv", "norm", "affine") or users_of(part, readings) != [concat]:
            return None
        behind[part] = _channels(scale, first, layer.out_channels)
        first += layer.out_channels
    return Absorption(node, scale.source, scale.through, {}, behind) if first == scale.in_channels else None


def _by_some_channels(node: fx.Node, scale: Layer, readings: Readings) -> Absorption | None:
    """What is scaled are some channels of a layer, of which all else takes others."""
    assert scale.source is not None
    mine = maker_of(scale.source, readings)
    piece = readings.get(mine)
    if not _is_slice(piece) or piece.source is None or not is_alone(mine, node, scale, readings):
        return None
    whole = maker_of(piece.source, readings)
    layer = readings.get(whole)
    if not isinstance(layer, Layer) or layer.weight is None or layer.out_channels is None or not layer.dims:
        return None
    count, dims = layer.out_channels, layer.dims
    pieces_: dict[fx.Node, tuple[int, ...]] = {}
    pending = users_of(whole, readings)
    for user in pending:
        reading = readings.get(user)
        if _is_slice(reading):
            pieces_[user] = _kept(reading, count, dims)
        elif does(user, Is.PIECES):
            pending += users_of(user, readings)
        else:
            return None
    kept = pieces_.pop(mine, ())
    taken = {channel for others in pieces_.values() for channel in others}
    if not kept or scale.in_channels != len(kept) or axis_of(node, scale) != -(dims + 1) or not taken.isdisjoint(kept):
        return None

    def load(c: int, d: int) -> ConvMap:
        map_ = scale.load(len(kept), d)
        factors, shifts = torch.ones(c, dtype=torch.float64), torch.zeros(c, dtype=torch.float64)
        factors[[*kept]], shifts[[*kept]] = map_.kernel.flatten(), map_.bias
        return ConvMap.scale(factors, shifts, dims=d)

    wide = replace(diagonal_layer("affine", load, count, dims, scale.parameters), node=node, shifts=scale.shifts)
    return Absorption(node, scale.source, scale.through, {}, {whole: wide}, apart=tuple(pieces_))


def _is_slice(reading: Reading | None) -> TypeGuard[Layer]:
    return isinstance(reading, Layer) and reading.kind == "slice"


def _kept(piece: Layer, channels: int, dims: int) -> tuple[int, ...]:
    """Which channels a slice is of; all of them where that is not known."""
    try:
        return tuple(piece.load(channels, dims).kernel.reshape(-1, channels).argmax(1).tolist())
    except Refusal:
        return tuple(range(channels))


def _by_maker(
    node: fx.Node, scale: Layer, readings: Readings, found: Mapping[fx.Node, Absorption]
) -> Absorption | None:
    """What is scaled are the channels of one layer with their dims moved, perhaps scaled by others that it takes."""
    assert scale.source is not None
    maker = maker_of(scale.source, readings)
    layer = readings.get(maker)
    if not is_alone(maker, node, scale, readings) or (isinstance(layer, Layer) and layer.weight is not None):
        return None
    taken = layer_behind(maker, scale, axis_of(node, scale), readings, found)
    if taken is None:
        return None
    maker, (behind, of) = taken
    turns = of not in (None, tuple(range(len(of or ()))))
    return Absorption(node, scale.source, scale.through, {}, {maker: behind}, turns=turns, moves=of is not None)


def _by_matrix(node: fx.Node, scale: Layer, readings: Readings) -> Absorption | None:
    """What is scaled are the channels of pieces, all of whose numbers one matrix makes."""
    assert scale.source is not None
    view = maker_of(scale.source, readings)
    found = pieces(view)
    if not found or found[0] != scale.in_channels or scale.dims not in (None, len(found) - 1):
        return None
    maker = maker_of(view.all_input_nodes[0], readings)
    layer = readings.get(maker)
    alone = is_alone(view, node, scale, readings) and users_of(maker, readings) == [view]
    if not isinstance(layer, Layer) or not alone or not is_matrix(maker, readings):
        return None
    if layer.out_channels != math.prod(found) or layer.dims is None:
        return None
    behind = {maker: spread(scale, layer.out_channels, layer.dims, tiled(found))}
    return Absorption(node, scale.source, scale.through, {}, behind)


def _by_sum(node: fx.Node, sum_: Sum, readings: Readings, found: Mapping[fx.Node, Absorption]) -> Absorption | None:
    """What is added to what a matrix makes of all numbers of pieces is made of the same pieces by convolutions."""
    for main, sign in sum_.parts:
        maker, view = _matrix_behind(main, node, readings, found) or (None, None)
        if maker is None or view is None or sign != 1.0:
            continue
        layer = readings[maker]
        assert isinstance(layer, Layer)
        assert layer.source is not None
        assert layer.dims is not None
        rest = tuple(part for part in sum_.parts if part[0] is not main)
        others = [Pieces(part, layer.dims, readings) for part, _ in rest]
        through = dict.fromkeys(one for other in others for one in other.nodes)
        inside = {*through, node}
        base = layer.source.all_input_nodes[0]
        for (part, _), other in zip(rest, others, strict=True):
            if other.entry is None or other.term is None or other.term.op == "one":
                return None
            size = pieces(other.entry)
            views = [one for one in (main, part) if one not in readings]
            alike = len(views) != 1 and len({view.args[1:] for view in views}) < 2
            if other.entry.all_input_nodes[0] is not base or math.prod(size) != layer.in_channels or not alike:
                return None
            if (other.channels, *size[1:]) != pieces(view) or math.prod(pieces(view)) != layer.out_channels:
                return None
        if any(user not in inside and not asks_shape(user) for one in through for user in one.users):
            return None
        if any(STORED.get(one) for one in inside) or writers(aliases(base)) - {node, *through}:
            return None
        added = zip((other.term for other in others), rest, strict=True)
        terms = [signed(term, sign) for term, (_, sign) in added if term is not None]
        made = (layer.source, *(other.entry for other in others if other.entry is not None))
        return Absorption(node, main, tuple(through), {}, {}, beside={maker: sum_terms(terms)}, views=made)
    return None


def _matrix_behind(
    node: fx.Node, user: fx.Node, readings: Readings, found: Mapping[fx.Node, Absorption]
) -> tuple[fx.Node, fx.Node] | None:
    """The matrix that makes a value, but for reshapes and for what it takes itself, and the first reshape behind it."""
    passed: list[fx.Node] = []
    while users_of(node := maker_of(node, readings), readings) == [user]:
        layer = readings.get(node)
        if is_matrix(node, readings):
            assert isinstance(layer, Layer)
            taken = any(node in one.before for one in found.values())
            whole = layer.out_channels is not None and all(takes_together(one, layer.out_channels) for one in passed)
            return (node, passed[-1]) if passed and whole and not taken else None
        user = node
        if node in found and not found[node].before:
            node = found[node].source
        elif layer is None and frame(node):
            passed.append(node)
            node = node.all_input_nodes[0]
        else:
            return None
    return None


def _channels(scale: Layer, first: int, count: int) -> Layer:
    """Some neighbouring channels of a scale."""
    whole = scale.in_channels
    assert whole is not None

    def load(c: int, d: int) -> ConvMap:
        map_ = scale.load(whole, d)
        return ConvMap.scale(map_.kernel[first : first + c].flatten(), map_.bias[first : first + c], dims=d)

    some = diagonal_layer(scale.kind, load, count, scale.dims, scale.parameters * count // whole)
    return replace(some, shifts=scale.shifts)
