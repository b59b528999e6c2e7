"""Merges: the stretch of a graph that becomes one layer, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
from torch import fx, nn

from structrep.algebra import ConvMap, Ints
from structrep.errors import Refusal
from structrep.graph.calls import Call, Trace
from structrep.graph.facts import IDLE, SHAPE
from structrep.match import sum_order
from structrep.match.absorption import Absorption
from structrep.match.fit import Fit
from structrep.match.stretch import Segment, Stretch
from structrep.match.sum_order import Reordered
from structrep.terms.term import Term, geometry
from structrep.terms.value import sized, value


@dataclass(frozen=True, eq=False)
class Carried:
    """A value whose channels widened layers take behind their own, until the last of them adds it."""

    base: fx.Node
    sum: fx.Node  # the addition that goes
    through: tuple[fx.Node, ...]  # what makes the value one that activations leave as it is


@dataclass(eq=False)
class Merge:
    """A stretch of the graph that becomes one layer."""

    rules: tuple[str, ...]
    sources: tuple[str, ...]
    term: Term
    stretch: Stretch
    owner: Call  # the innermost call that holds all of it
    trace: Trace
    fit: Fit
    carried: Carried | None = None
    # layers of it that have other calls too, each of them in a merge
    everywhere: frozenset[nn.Module] = frozenset()
    idle: bool = False  # whether it becomes nothing, and no layer
    cached: ConvMap | None = None  # its value, until that is placed

    @property
    def base(self) -> fx.Node:
        return self.stretch.base

    @property
    def root(self) -> fx.Node:
        return self.stretch.root

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return self.stretch.nodes

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.stretch.segments

    @property
    def absorbed(self) -> set[Absorption]:
        """Scales that this merge does a part of; all merges that do the rest stand and fall with it."""
        return self.stretch.absorbed

    @property
    def reordered(self) -> set[Reordered]:
        """The sums in another order that it adds up some of."""
        return {one for one in map(sum_order.reordered, self.nodes) if one is not None}

    @property
    def shared(self) -> set[object]:
        """What it has in common with others, with all of which it stands and falls: scales that it does a part of, sums
        in another order, a residual that is carried, a norm behind several layers, one that nobody reads and that reads
        what vanishes."""
        carried = [] if self.carried is None else [self.carried]
        unread = {user for node in self.nodes for user in (node, *node.users) if IDLE.get(user)}
        return {*self.absorbed, *self.reordered, *carried, *self.everywhere, *unread}

    def value(self) -> ConvMap:
        """The merged map; read from the weights as they are now, if it is not cached."""
        return self.cached or value(self.term, strictness=self.fit.strictness)

    @property
    def changed(self) -> set[fx.Node]:
        """The values that will be others: all but what it gives; what a norm gives that nobody reads, too."""
        return {node for node in self.nodes if node is not self.root or IDLE.get(node)}

    @property
    def is_table(self) -> bool:
        """Whether it is given numbers of rows, and becomes a table."""
        return any(layer.kind == "table" for layer in self.term.leaves())

    @property
    def sizes(self) -> tuple[Ints, Ints] | None:
        """A spatial size of the input that it holds for, and by what another may differ; None if it holds for all."""
        holds = "any" if self.idle else sized(self.term)
        if holds == "any":
            return None
        size: Ints = SHAPE.of(self.base)[2:]
        return size, tuple(step if holds == "period" else 0 for step in geometry(self.term).stride)


def together(merges: Sequence[Merge]) -> list[list[Merge]]:
    """Merges by what they share: each group can be done, or left, whatever becomes of the others."""
    graph = nx.Graph()
    graph.add_nodes_from(merges)
    graph.add_edges_from((merge, one) for merge in merges for one in merge.shared)
    groups = list(nx.connected_components(graph))
    return [[merge for merge in merges if merge in group] for group in groups]


@dataclass(eq=False)
class Missed:
    """A refusal, with its place."""

    where: str
    rule: str
    what: str
    reason: Refusal
    layers: tuple[str, ...] = ()  # paths of the layers that it is about
    of: Merge | None = None  # what was planned first
