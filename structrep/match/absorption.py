"""Scales that are given away: what that makes of them, and what stands around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from structrep.graph.axes import axis_before
from structrep.graph.facts import STORED, VALUE
from structrep.graph.queries import asks_shape, counts_sizes, only_asserted
from structrep.graph.shapes import rank
from structrep.match.channels import Moved, channels_before, channels_behind, compares, passes
from structrep.match.pieces import spread
from structrep.terms.layer import Identity, Layer, Readings
from structrep.terms.term import Term


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
    apart: tuple[fx.Node, ...] = ()  # what takes other channels of such a layer
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
        return found if self.before else found & _before(self.node)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return *self.through, self.node


def _before(node: fx.Node) -> set[fx.Node]:
    """All that a node is made of."""
    pending, seen = [node], set[fx.Node]()
    while pending:
        new = [one for one in pending.pop().all_input_nodes if one not in seen]
        seen.update(new)
        pending += new
    return seen


def layer_behind(
    maker: fx.Node, scale: Layer, first: int | None, readings: Readings, found: Mapping[fx.Node, Absorption]
) -> tuple[fx.Node, tuple[Layer, tuple[int, ...] | None]] | None:
    """The layer that makes what is scaled, its dims moved, with the scale as one of what the layer gives, and where its
    channels are in what is scaled, None for where they were; None if no layer makes that and nothing else.

    Args:
        maker: of what is scaled.
        first: the dim that its channels are on, from the end.
    """
    axis, count, chain, alone = first, scale.in_channels, list[fx.Node](), True
    while first is not None and alone:
        layer = readings.get(maker)
        if isinstance(layer, Layer) and layer.weight is not None:
            if layer.dims is None or layer.out_channels is None:
                return None
            of = None
            if axis != -(layer.dims + 1) or count not in (None, layer.out_channels):
                held = where_moved(channels_before, chain, maker, scale, first, -(layer.dims + 1), layer.out_channels)
                if held is None:
                    return None
                of = held.of
            return maker, (spread(scale, layer.out_channels, layer.dims, of), of)
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
        user, maker = maker, maker_of(source, readings)
        alone = users_of(maker, readings) == [user]
    return None


def where_moved(
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


def is_alone(maker: fx.Node, node: fx.Node, scale: Layer, readings: Readings) -> bool:
    """Whether a value is of use to a scale and nothing else."""
    return {node, *scale.through}.issuperset(users_of(maker, readings))


def axis_of(node: fx.Node, scale: Layer) -> int | None:
    """The dim that a scale's channels are on, from the end; None if it is not known."""
    if scale.dims is not None:
        return -(scale.dims + 1)
    known = rank(node)
    return 1 - known if scale.kind == "norm" and known is not None and known > 2 else None


def maker_of(node: fx.Node, readings: Readings) -> fx.Node:
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


def users_of(node: fx.Node, readings: Readings) -> list[fx.Node]:
    """What reads a value, but for what asks for its shape; the value itself, if its module keeps it."""
    stored = [node] if STORED.get(node) else []
    return stored + [user for user in readers_of(node, readings) if not only_asserted(user) and not asks_shape(user)]
