"""Scales that no single neighbour can take, but all of several can.

* A norm that several convolutions read (queries, keys and values of one norm) goes into each of them.
* A norm behind a concatenation goes into the branches, each taking its own channels.

It is all of them or none: the norm itself becomes an identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from structrep.algebra import ConvMap
from structrep.errors import Mutated, Refusal
from structrep.readers import Layer, Reading, Same, Stack, aliases, asks_shape, diagonal_layer, only_asserted, writers

Readings = Mapping[fx.Node, Reading]


@dataclass(frozen=True, eq=False)
class Absorption:
    """A scale, and what it becomes for each of the layers that share in it: something before or behind that layer."""

    node: fx.Node
    source: fx.Node
    before: Mapping[fx.Node, Layer]
    behind: Mapping[fx.Node, Layer]

    @property
    def takers(self) -> frozenset[fx.Node]:
        return frozenset((*self.before, *self.behind))


def absorptions(readings: Readings) -> Iterator[Absorption | tuple[fx.Node, Refusal]]:
    """All scales of a graph that several layers can take between them, and those that they cannot, with the reason."""
    for node, reading in readings.items():
        if isinstance(reading, Layer) and reading.kind in ("norm", "affine") and reading.source is not None:
            try:
                found = _by_branches(node, reading, readings) or _by_readers(node, reading, readings)
            except Refusal as reason:
                yield node, reason
            else:
                if found is not None:
                    yield found


def _by_readers(node: fx.Node, scale: Layer, readings: Readings) -> Absorption | None:
    """All that reads the scale is a convolution that may do it first."""
    assert scale.source is not None
    feeding = _maker(scale.source, readings)
    known = readings.get(feeding)
    if isinstance(known, Layer) and known.weight is not None and _users(feeding, readings) == [node]:
        return None  # that layer takes it alone
    takers = {user: layer for user in _users(node, readings) if isinstance(layer := readings.get(user), Layer)}
    if len(takers) < 2 or len(takers) < len(_users(node, readings)):
        return None
    if any(layer.weight is None or not layer.dims or layer.in_channels is None for layer in takers.values()):
        return None
    # As an identity the scale would give what it is given itself, which must not be written to until all have read it.
    last = max(taker.meta["index"] for taker in takers)
    for writer in writers(aliases(scale.source)):
        if node.meta["index"] < writer.meta["index"] < last:
            raise Mutated(f"{writer.name} may overwrite what {node.name} is given before all have read it")
    for layer in takers.values():
        assert layer.in_channels is not None
        assert layer.dims is not None
        scale.load(layer.in_channels, layer.dims) >> layer.load(layer.in_channels, layer.dims)  # raises if inexact
    return Absorption(node, scale.source, dict.fromkeys(takers, scale), {})


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
    return Absorption(node, scale.source, {}, behind) if first == scale.in_channels else None


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
    """What reads a value, but for what asks for its shape."""
    return [user for user in readers_of(node, readings) if not only_asserted(user) and not asks_shape(user)]


def _channels(scale: Layer, first: int, count: int) -> Layer:
    """Some neighbouring channels of a scale."""
    whole = scale.in_channels
    assert whole is not None

    def load(c: int, d: int) -> ConvMap:
        map_ = scale.load(whole, d)
        return ConvMap.scale(map_.kernel[first : first + c].flatten(), map_.bias[first : first + c], dims=d)

    return diagonal_layer(scale.kind, load, count, scale.dims, scale.parameters * count // whole)
