"""Scales that no single neighbour can take, but one behind a permute can, or all of several can.

* A norm that several convolutions read (queries, keys and values of one norm) goes into each of them.
* A norm behind a concatenation goes into the branches, each taking its own channels.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from structrep.algebra import ConvMap
from structrep.errors import Isolated, Mutated, Refusal
from structrep.graph.aliases import aliases, writers
from structrep.graph.axes import axis_after, axis_before, swaps_unknown_dims
from structrep.graph.facts import INDEX, STORED, VALUE
from structrep.graph.queries import asks_shape, counts_sizes, only_asserted
from structrep.graph.shapes import rank
from structrep.match.channels import Moved, channels_before, channels_behind, compares, passes
from structrep.match.pieces import Pieces, frame, is_matrix, pieces, spread, takes_together, tiled
from structrep.terms.layer import Concat, Identity, Layer, Readings, Sum
from structrep.terms.layers import diagonal_layer
from structrep.terms.term import Term, signed, sum_terms


@dataclass(frozen=True, eq=False)
class Absorption:
    """A scale, and what it becomes for each of the layers that share in it: something before or behind that layer."""

    node: fx.Node
    source: fx.Node
    through: tuple[fx.Node, ...]  # nodes between the two that the scale is made of
    before: Mapping[fx.Node, Layer]
    behind: Mapping[fx.Node, Layer]
    ends: bool = False  # whether the node does more, and only ends with the scale
    beside: Mapping[fx.Node, Term] = field(default_factory=dict)  # what is added to what a layer gives
    views: tuple[fx.Node, ...] = ()  # the reshapes of one value that such a layer, and what is added, are made of
    shapes: tuple[tuple[int, ...], ...] = ()  # of what it scales, for which it was seen where the channels go
    turns: bool = False  # whether they come to another order, or number, there
    moves: bool = False  # whether that was seen, and no dim was counted

    @property
    def takers(self) -> frozenset[fx.Node]:
        return frozenset((*self.before, *self.behind, *self.beside))

    @property
    def changed(self) -> set[fx.Node]:
        """Values that are not what they were: from the scale to what takes it, or from there to the scale."""
        return {*self.through, *([self.node] if self.before else self.takers), *self.between}

    @property
    def between(self) -> set[fx.Node]:
        """What stands between the scale and the layers that take it: dims are moved, values stacked."""
        pending: list[fx.Node] = [self.node] if self.before else [*self.takers]
        stops = {*self.takers, self.node}
        found = set[fx.Node]()
        while pending:
            users = [user for user in pending.pop().users if not (user in stops or user in found)]
            new = [user for user in users if not (asks_shape(user) or only_asserted(user))]
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
        or _by_maker(node, scale, readings, found)
        or _by_matrix(node, scale, readings)
    )
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
    goes: dict[fx.Node, Moved] = {}  # where its channels come to, by what takes it there
    count, first = scale.in_channels, _axis(node, scale)
    pending: list[tuple[fx.Node, int | None, tuple[fx.Node, ...]]]
    pending = [(user, first, ()) for user in _users(node, readings)]
    apart = scale.source is None  # whether no term holds the scale and a layer that reads it
    while pending:
        user, axis, chain = pending.pop()
        layer = readings.get(user)
        if isinstance(layer, Layer) and layer.weight is not None:
            if layer.in_channels is None or layer.dims is None or user in takers:
                return None
            if axis != -(layer.dims + 1) and (axis is not None or chain or (scale.kind == "norm" and not layer.dims)):
                moved = _moved(channels_behind, chain, node, scale, first, -(layer.dims + 1), layer.in_channels)
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
        pending += [(other, new, (*chain, user)) for other in _users(user, readings)]
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
    concat = _maker(scale.source, readings)
    stacked = readings.get(concat)
    if scale.in_channels is None:
        return None  # one number for all
    if not isinstance(stacked, Concat) or stacked.dim != 1 or _users(concat, readings) != [node]:
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
    axis = first = _axis(node, scale)
    maker, count, chain = _maker(scale.source, readings), scale.in_channels, list[fx.Node]()
    alone = _alone(maker, node, scale, readings)
    while first is not None and alone:
        layer = readings.get(maker)
        if isinstance(layer, Layer) and layer.weight is not None:
            if not chain or layer.dims is None or layer.out_channels is None:
                return None
            of = None
            if axis != -(layer.dims + 1) or count not in (None, layer.out_channels):
                held = _moved(channels_before, chain, maker, scale, first, -(layer.dims + 1), layer.out_channels)
                if held is None:
                    return None
                of = held.of
            behind = {maker: spread(scale, layer.out_channels, layer.dims, of)}
            turns = of not in (None, tuple(range(layer.out_channels)))
            return Absorption(node, scale.source, scale.through, {}, behind, turns=turns, moves=of is not None)
        if maker in found:
            if found[maker].behind.keys() != found[maker].takers or len(found[maker].takers) > 1:
                return None
            source = found[maker].source  # stands and falls with the same layer
        elif count is not None and (layer is None or (isinstance(layer, Layer) and layer.kind == "pool")):
            axis = axis_before(maker, axis, count) if axis is not None else None
            if axis is None and not passes(maker):
                return None
            source = next(one for one in maker.all_input_nodes if not VALUE.known(one) and not counts_sizes(one))
            chain.insert(0, maker)
        else:
            return None
        user, maker = maker, _maker(source, readings)
        alone = _users(maker, readings) == [user]
    return None


def _by_matrix(node: fx.Node, scale: Layer, readings: Readings) -> Absorption | None:
    """What is scaled are the channels of pieces, all of whose numbers one matrix makes."""
    assert scale.source is not None
    view = _maker(scale.source, readings)
    found = pieces(view)
    if not found or found[0] != scale.in_channels or scale.dims not in (None, len(found) - 1):
        return None
    maker = _maker(view.all_input_nodes[0], readings)
    layer = readings.get(maker)
    alone = _alone(view, node, scale, readings) and _users(maker, readings) == [view]
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
    while _users(node := _maker(node, readings), readings) == [user]:
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


def _moved(
    look: Callable[..., Moved | None],
    chain: Sequence[fx.Node],
    source: fx.Node,
    scale: Layer,
    scaled: int | None,
    axis: int,
    channels: int,
) -> Moved | None:
    """Where the channels of a scale are in what a layer is given, or those of a layer in what is scaled.

    Args:
        look: `channels_behind` a scale, or `channels_before` it.
        chain: what stands between.
        scaled, axis, channels: the dims of the scale's channels and of the layer's, and how many of these there are.
    """
    count = scale.in_channels
    if count is None or scaled is None or not chain or not all(map(passes, chain)):
        return None
    if any(map(compares, chain)):
        kernel = scale.load(count, scale.dims if scale.dims is not None else -scaled - 1).kernel
        if not bool((kernel > 0).all()):
            return None
    ahead = look is channels_behind
    here, there = ((scaled, count), (axis, channels)) if ahead else ((axis, channels), (scaled, count))
    return look(chain, source, *here, *there)


def _alone(maker: fx.Node, node: fx.Node, scale: Layer, readings: Readings) -> bool:
    """Whether a value is of use to a scale and nothing else."""
    return {node, *scale.through}.issuperset(_users(maker, readings))


def _axis(node: fx.Node, scale: Layer) -> int | None:
    """The dim that a scale's channels are on, from the end; None if it is not known."""
    if scale.dims is not None:
        return -(scale.dims + 1)
    known = rank(node)
    return 1 - known if scale.kind == "norm" and known is not None and known > 2 else None


def _maker(node: fx.Node, readings: Readings) -> fx.Node:
    """What made a value, identities seen through."""
    while isinstance(same := readings.get(node), Identity):
        node = same.source
    return node


def readers_of(node: fx.Node, readings: Readings) -> list[fx.Node]:
    """What reads a value, identities seen through."""
    found, pending = [], [*reversed(node.users)]
    while pending:
        user = pending.pop()
        if isinstance(readings.get(user), Identity):
            pending += reversed(user.users)
        else:
            found.append(user)
    return found


def _users(node: fx.Node, readings: Readings) -> list[fx.Node]:
    """What reads a value, but for what asks for its shape; the value itself, if its module keeps it."""
    stored = [node] if STORED.get(node) else []
    return stored + [user for user in readers_of(node, readings) if not only_asserted(user) and not asks_shape(user)]


def _channels(scale: Layer, first: int, count: int) -> Layer:
    """Some neighbouring channels of a scale."""
    whole = scale.in_channels
    assert whole is not None

    def load(c: int, d: int) -> ConvMap:
        map_ = scale.load(whole, d)
        return ConvMap.scale(map_.kernel[first : first + c].flatten(), map_.bias[first : first + c], dims=d)

    some = diagonal_layer(scale.kind, load, count, scale.dims, scale.parameters * count // whole)
    return replace(some, shifts=scale.shifts)
