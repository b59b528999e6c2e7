"""Stretches of a graph, as terms: what lies between two values, where all that leads to the second comes through the
first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from structrep.graph.facts import IDLE, STORED
from structrep.graph.queries import asks_dtype, asks_shape, asserts_rank, counts_sizes, only_asserted
from structrep.match.absorption import Absorption
from structrep.terms.term import Term, seq


@dataclass(frozen=True, eq=False)
class Segment:
    """The stretch from one node to the nearest that all its linear paths come through."""

    base: fx.Node
    root: fx.Node
    term: Term
    nodes: tuple[fx.Node, ...]  # all between, root included, base not
    absorbed: tuple[Absorption, ...] = ()  # scales that the term does a part of

    @property
    def keeps_shape(self) -> bool:
        """Whether a value is of the same shape behind it as before, on every input."""
        layer = self.term.layer
        return self.term.op == "one" or (layer is not None and layer.scales)


@dataclass(frozen=True, eq=False)
class Stretch:
    """Segments one behind another, from a base to a root."""

    segments: tuple[Segment, ...]

    @property
    def base(self) -> fx.Node:
        return self.segments[0].base

    @property
    def root(self) -> fx.Node:
        return self.segments[-1].root

    @cached_property
    def term(self) -> Term:
        return seq([segment.term for segment in self.segments])

    @cached_property
    def nodes(self) -> tuple[fx.Node, ...]:
        return tuple(node for segment in self.segments for node in segment.nodes)

    @property
    def absorbed(self) -> set[Absorption]:
        """Scales that it does a part of."""
        return {one for segment in self.segments for one in segment.absorbed}

    @property
    def scales(self) -> set[fx.Node]:
        """The nodes of those scales."""
        return {node for one in self.absorbed for node in one.nodes}

    def _shape_stays(self, index: int) -> bool:
        """Whether what a segment gives has the shape of the merged layer's input, which will stand before it, or of its
        output, which will stand behind."""
        before, behind = self.segments[: index + 1], self.segments[index + 1 :]
        return all(one.keeps_shape for one in before) or all(one.keeps_shape for one in behind)

    def reshaped(self) -> Iterator[fx.Node]:
        """The values inside that have a shape which none will have any more."""
        for index, segment in enumerate(self.segments):
            if len(segment.nodes) > 1 or not self._shape_stays(index):
                yield from (node for node in segment.nodes if node is not self.root)

    def leak(self) -> fx.Node | None:
        """A node that would vanish but is used elsewhere; None if there is none."""
        inside = set(self.nodes)
        for index, segment in enumerate(self.segments):
            for node in segment.nodes:
                if node is self.root:
                    continue
                if STORED.get(node):
                    return node
                users = [user for user in node.users if user not in inside and not _vanishes(user, inside)]
                asked = all(asks_shape(user) or only_asserted(user) for user in users)
                if users and not (len(segment.nodes) == 1 and self._shape_stays(index) and asked):
                    return node
        return None


def _vanishes(user: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether what uses a value vanishes too, or is a question that has its answer elsewhere, or is of no use."""
    return bool(IDLE.get(user)) or asserts_rank(user) or asks_dtype(user) or _sizes_inside(user, inside)


def _sizes_inside(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a node is a size that only what vanishes goes by, if anything."""
    pending, seen = [node], {node}
    for one in pending:
        if not counts_sizes(one) or STORED.get(one):
            return False
        pending += [user for user in one.users if user not in inside and user not in seen]
        seen.update(one.users)
    return True
