"""Merges: the stretch of a graph that becomes one layer, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import networkx as nx
from torch import fx

from structrep.algebra import ConvMap, Ints, Rigour
from structrep.errors import Refusal, Unreadable
from structrep.graph.calls import Call, Trace
from structrep.graph.contexts import Context
from structrep.graph.facts import CONTEXTS, INDEX, SHAPE
from structrep.match import sum_order
from structrep.match.shared_scales import Absorption
from structrep.match.sum_order import Reordered
from structrep.terms.cost import Cost
from structrep.terms.term import Term, geometry
from structrep.terms.value import sized, value


@dataclass(frozen=True, eq=False)
class Segment:
    """The stretch from one node to the nearest that all its linear paths come through."""

    base: fx.Node
    root: fx.Node
    term: Term
    nodes: tuple[fx.Node, ...]  # all between, root included, base not
    absorbed: tuple[Absorption, ...] = ()  # scales that the term does a part of


@dataclass(frozen=True)
class Fit:
    """How a merged map fits into a layer of the dtype that it will have."""

    costs: tuple[Cost, Cost]  # before and after, but for what the border takes
    rigour: Rigour
    remedy: str  # what a layer of its own does for the border
    largest: tuple[float, float]  # largest coefficient of a kernel before, of any after
    notes: tuple[str, ...]  # what is to be told of the numbers


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
    segments: tuple[Segment, ...]  # from base to root
    owner: Call  # the innermost call that holds all of it
    trace: Trace
    fit: Fit
    carried: Carried | None = None
    kept: ConvMap | None = None  # its value, until that is placed

    @property
    def base(self) -> fx.Node:
        return self.segments[0].base

    @property
    def root(self) -> fx.Node:
        return self.segments[-1].root

    @property
    def nodes(self) -> list[fx.Node]:
        return nodes_of(self.segments)

    @property
    def absorbed(self) -> set[Absorption]:
        """Scales that this merge does a part of; all merges that do the rest stand and fall with it."""
        return {one for segment in self.segments for one in segment.absorbed}

    @property
    def reordered(self) -> set[Reordered]:
        """The sums in another order that it adds up some of."""
        return {one for one in map(sum_order.reordered, self.nodes) if one is not None}

    @property
    def shared(self) -> set[object]:
        """What it has in common with others, with all of which it stands and falls: scales that it does a part of, sums
        in another order, a residual that is carried."""
        return {*self.absorbed, *self.reordered, *([] if self.carried is None else [self.carried])}

    def value(self) -> ConvMap:
        """The merged map; read from the weights as they are now, if it was not kept."""
        return self.kept or value(self.term, rigour=self.fit.rigour)

    @property
    def sizes(self) -> tuple[Ints, Ints] | None:
        """A spatial size of the input that it holds for, and by what another may differ; None if it holds for all."""
        holds = sized(self.term)
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


def nodes_of(stretch: Iterable[Segment]) -> list[fx.Node]:
    return [node for segment in stretch for node in segment.nodes]


def check_contexts(changed: Set[fx.Node]) -> None:
    """Raise if what is merged runs in several contexts; modules that are swapped are cast wherever they stand."""
    swapped = all(node.op == "call_module" for node in changed)
    around: dict[tuple[Context, ...], fx.Node] = {}
    for node in sorted(changed, key=lambda n: int(INDEX.of(n))):
        if odd := [one.code for one in CONTEXTS.of(node) if not one.known]:
            raise Unreadable(f"{node.name} runs in {odd[0]}, which may change what any operation does")
        around.setdefault(tuple(one for one in CONTEXTS.of(node) if not (swapped and one.casts)), node)
    if len(around) > 1:
        told = (f"{node.name} in {' in '.join(one.code for one in found) or 'none'}" for found, node in around.items())
        raise Unreadable(f"one layer runs in one context, and {', '.join(told)}")
