"""Scales that no single neighbour can take, but one behind a permute can, or all of several can.

* A norm that several convolutions read (queries, keys and values of one norm) goes into each of them.
* A norm behind a concatenation goes into the branches, each taking its own channels.
* What a layer norm, an RMS norm or a group norm ends with, its weight and bias, goes into what reads it.
* Between a scale and a layer that takes it, dims may be moved (Linear -> permute -> batch norm; layer norm -> window
  partition -> Linear), as long as the channels are those of the layer.

It is all of them or none: the scale itself becomes an identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx

from structrep.algebra import ConvMap
from structrep.errors import Mutated, Refusal
from structrep.moves import axis_after, axis_before
from structrep.ranks import rank
from structrep.readers import Layer, Reading, Same, Stack, aliases, asks_shape, diagonal_layer, only_asserted, writers

Readings = Mapping[fx.Node, Reading]


@dataclass(frozen=True, eq=False)
class Absorption:
    """A scale, and what it becomes for each of the layers that share in it: something before or behind that layer."""

    node: fx.Node
    source: fx.Node
    through: tuple[fx.Node, ...]  # nodes between the two that the scale is made of
    before: Mapping[fx.Node, Layer]
    behind: Mapping[fx.Node, Layer]
    ends: bool = False  # whether the node does more, and only ends with the scale

    @property
    def takers(self) -> frozenset[fx.Node]:
        return frozenset((*self.before, *self.behind))

    @property
    def changed(self) -> set[fx.Node]:
        """Values that are not what they were: from the scale to what takes it, or from there to the scale."""
        stops = {self.node} if self.behind else self.takers
        pending: list[fx.Node] = [*self.behind] or [self.node]
        found = {*self.through, *pending}
        while pending:
            new = [user for user in pending.pop().users if user not in stops and user not in found]
            found.update(new)
            pending += new
        return found

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return *self.through, self.node


def absorptions(readings: Readings, endings: Mapping[fx.Node, Layer]) -> Iterator[Absorption | tuple[fx.Node, Refusal]]:
    """All scales of a graph that other layers can take between them, and those that they cannot, with the reason.

    Args:
        endings: scales that nodes end with which do more than that.
    """
    found: dict[fx.Node, Absorption] = {}
    for node, reading in (*readings.items(), *endings.items()):
        if isinstance(reading, Layer) and reading.kind in ("norm", "affine") and not _seen_elsewhere(node, reading):
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


def _seen_elsewhere(node: fx.Node, scale: Layer) -> bool:
    """Whether what a scale is made of, or what it gives, is of use to what a graph does not show, or it not all."""
    inside = {*scale.through, node}
    return any(part.meta.get("kept") for part in inside) or any(
        user not in inside for part in scale.through for user in part.users
    )


def _takers(node: fx.Node, scale: Layer, readings: Readings, found: Mapping[fx.Node, Absorption]) -> Absorption | None:
    """Who takes a scale that is a node of its own."""
    assert scale.source is not None
    one = _by_branches(node, scale, readings) or _by_maker(node, scale, readings, found)
    if one is not None:
        return one
    feeding = _maker(scale.source, readings)
    known = readings.get(feeding)
    if isinstance(known, Layer) and known.weight is not None and _alone(feeding, node, scale, readings):
        return None  # that layer takes it by itself
    return _by_readers(node, scale, readings)


def _by_readers(node: fx.Node, scale: Layer, readings: Readings) -> Absorption | None:
    """All that reads the scale, perhaps with its dims moved, is a layer that may do it first."""
    takers: dict[fx.Node, Layer] = {}
    pending = [(user, _axis(node, scale)) for user in _users(node, readings)]
    apart = scale.source is None  # whether no term holds the scale and a layer that reads it
    while pending:
        user, axis = pending.pop()
        layer = readings.get(user)
        if isinstance(layer, Layer) and layer.weight is not None:
            if layer.in_channels is None or layer.dims is None or user in takers:
                return None
            if axis != -(layer.dims + 1) and (axis is not None or (scale.kind == "norm" and not layer.dims)):
                return None
            takers[user] = layer
        elif axis is not None and (new := axis_after(user, axis)) is not None:
            pending += [(other, new) for other in _users(user, readings)]
            apart = True
        else:
            return None
    if len(takers) < 2 - apart:
        return None
    # As an identity the scale would give what it is given itself, which must not be written to until all have read it.
    last = max(taker.meta["index"] for taker in takers)
    for writer in writers(aliases(scale.source or node)):
        if node.meta["index"] < writer.meta["index"] < last:
            raise Mutated(f"{writer.name} may overwrite what {node.name} is given before all have read it")
    before: dict[fx.Node, Layer] = {}
    for taker, layer in takers.items():
        assert layer.in_channels is not None
        assert layer.dims is not None
        before[taker] = _of_dims(scale, layer.in_channels, layer.dims)
        scaled = before[taker].load(layer.in_channels, layer.dims)
        scaled >> layer.load(layer.in_channels, layer.dims)  # raises if inexact
    return Absorption(node, scale.source or node, scale.through, before, {}, ends=scale.source is None)


def _by_branches(node: fx.Node, scale: Layer, readings: Readings) -> Absorption | None:
    """What is scaled are the channels of layers, stacked, and of use to nothing else."""
    assert scale.source is not None
    concat = _maker(scale.source, readings)
    stacked = readings.get(concat)
    if scale.in_channels is None:
        return None  # one number for all
    if not isinstance(stacked, Stack) or stacked.dim != 1 or _users(concat, readings) != [node]:
        return None
    behind: dict[fx.Node, Layer] = {}
    first = 0
    for part in (_maker(part, readings) for part in stacked.parts):
        layer = readings.get(part)
        if not isinstance(layer, Layer) or not layer.dims or layer.out_channels is None or part in behind:
            return None
        if layer.kind not in ("conv", "norm", "affine") or _users(part, readings) != [concat]:
            return None
        behind[part] = _channels(scale, first, layer.out_channels)
        first += layer.out_channels
    return Absorption(node, scale.source, scale.through, {}, behind) if first == scale.in_channels else None


def _by_maker(
    node: fx.Node, scale: Layer, readings: Readings, found: Mapping[fx.Node, Absorption]
) -> Absorption | None:
    """What is scaled are the channels of one layer with their dims moved, perhaps scaled by others that it takes."""
    assert scale.source is not None
    axis, maker, moved = _axis(node, scale), _maker(scale.source, readings), False
    alone = _alone(maker, node, scale, readings)
    while axis is not None and alone:
        layer = readings.get(maker)
        if isinstance(layer, Layer) and layer.weight is not None:
            if not moved or layer.dims is None or axis != -(layer.dims + 1) or layer.out_channels is None:
                return None
            if scale.in_channels not in (None, layer.out_channels):
                return None
            behind = {maker: _of_dims(scale, layer.out_channels, layer.dims)}
            return Absorption(node, scale.source, scale.through, {}, behind)
        if maker in found:
            if found[maker].behind.keys() != found[maker].takers or len(found[maker].takers) > 1:
                return None
            source = found[maker].source  # stands and falls with the same layer
        elif layer is None and (axis := axis_before(maker, axis)) is not None:
            source, moved = maker.all_input_nodes[0], True
        else:
            return None
        user, maker = maker, _maker(source, readings)
        alone = _users(maker, readings) == [user]
    return None


def _alone(maker: fx.Node, node: fx.Node, scale: Layer, readings: Readings) -> bool:
    """Whether a value is of use to a scale and nothing else."""
    return {node, *scale.through}.issuperset(_users(maker, readings))


def _axis(node: fx.Node, scale: Layer) -> int | None:
    """The dim that a scale's channels are on, from the end; None if it is not known."""
    if scale.dims is not None:
        return -(scale.dims + 1)
    known = rank(node)
    return 1 - known if scale.kind == "norm" and known is not None and known > 2 else None


def _of_dims(scale: Layer, channels: int, dims: int) -> Layer:
    """The same scale, of the channels of values with that many spatial dims."""

    def load(c: int, d: int) -> ConvMap:
        map_ = scale.load(c, scale.dims if scale.dims is not None else d)
        return ConvMap.scale(map_.kernel.flatten(), map_.bias, dims=d)

    same = diagonal_layer("affine", load, channels, dims, scale.parameters)
    return replace(same, node=scale.node, shifts=scale.shifts, dead=scale.dead)


def _maker(node: fx.Node, readings: Readings) -> fx.Node:
    """What made a value, identities seen through."""
    while isinstance(same := readings.get(node), Same):
        node = same.source
    return node


def readers_of(node: fx.Node, readings: Readings) -> list[fx.Node]:
    """What reads a value, identities seen through."""
    found = []
    for user in node.users:
        found += readers_of(user, readings) if isinstance(readings.get(user), Same) else [user]
    return found


def _users(node: fx.Node, readings: Readings) -> list[fx.Node]:
    """What reads a value, but for what asks for its shape; the value itself, if its module keeps it."""
    kept = [node] if node.meta.get("kept") else []
    return kept + [user for user in readers_of(node, readings) if not only_asserted(user) and not asks_shape(user)]


def _channels(scale: Layer, first: int, count: int) -> Layer:
    """Some neighbouring channels of a scale."""
    whole = scale.in_channels
    assert whole is not None

    def load(c: int, d: int) -> ConvMap:
        map_ = scale.load(whole, d)
        return ConvMap.scale(map_.kernel[first : first + c].flatten(), map_.bias[first : first + c], dims=d)

    some = diagonal_layer(scale.kind, load, count, scale.dims, scale.parameters * count // whole)
    return replace(some, shifts=scale.shifts)
