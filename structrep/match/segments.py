"""A graph as terms: for each node the nearest that all its linear paths come through, and the expression between.

These nodes are its dominators (by networkx). A chain of dominators is a chain of segments, any part of it a stretch.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import networkx as nx
from torch import fx

from structrep.graph.facts import INDEX
from structrep.graph.operations import torch_name
from structrep.graph.shapes import spatial_size
from structrep.match.absorption import Absorption
from structrep.match.readings import inputs_of
from structrep.match.stretch import Segment, Stretch
from structrep.terms.layer import Blend, Concat, Identity, Layer, Reading, Readings, Sum
from structrep.terms.term import ONE, Term, concat_terms, leaf, seq, signed, sum_terms

FARTHEST = 32  # how many dominators back a merge may reach
LONGEST, DEEPEST = 64, 8  # how many steps a branch of a sum may have, and sums inside each other


class Segments:
    """The segments of a graph, by their roots.

    Args:
        nodes: those of the graph, in order.
        readings: what they are, each by itself.
        absorptions: scales that others take: they are nothing any more, and the terms of those hold them.
    """

    def __init__(self, nodes: Sequence[fx.Node], readings: Readings, absorptions: Sequence[Absorption]) -> None:
        self._readings = readings
        self._absorbed = {one.node: one for one in absorptions if not one.ends}
        self._taken: dict[fx.Node, list[Absorption]] = defaultdict(list)  # scales by the layers that take them
        for one in absorptions:
            for taker in one.takers:
                self._taken[taker].append(one)
        self._dominators = self._dominate(nodes)
        self._segments: dict[fx.Node, Segment] = {}
        self._stretches: dict[fx.Node, list[Stretch]] = {}
        for node in nodes:  # in order, so that each finds those before it: a chain of sums may be long
            if (segment := self._build(node)) is not None:
                self._segments[node] = segment

    def reading(self, node: fx.Node) -> Reading | None:
        """What a node is; a scale that others have absorbed is nothing any more, and what was read by way of it, no
        more what it was."""
        if node in self._absorbed:
            return Identity(self._absorbed[node].source)
        reading = self._readings.get(node)
        made = reading.through if isinstance(reading, (Layer, Sum)) else ()
        return None if any(part in self._absorbed for part in made) else reading

    def same(self, node: fx.Node) -> bool:
        """Whether a node gives what it is given."""
        return isinstance(self.reading(node), Identity)

    def segment(self, root: fx.Node) -> Segment | None:
        """The segment that ends at a node; None if that is no linear map of one value."""
        return self._segments.get(root)

    def walk(self, node: fx.Node, base: fx.Node | None) -> Iterator[Segment]:
        """Segments from a node back to `base`, or as far as they go."""
        while node is not base:
            segment = self.segment(node)
            if segment is None:
                return
            yield segment
            node = segment.base

    def stretches(self, root: fx.Node) -> list[Stretch]:
        """Stretches that end at root and could vanish into one layer, shortest first."""
        if root not in self._stretches:
            self._stretches[root] = list(self._find_stretches(root))
        return self._stretches[root]

    def stretch(self, early: fx.Node, late: fx.Node) -> Stretch | None:
        """The shortest stretch that ends at one node and holds another; None if none does."""
        taken: list[Segment] = []
        for segment in self.walk(late, None):
            taken.insert(0, segment)
            if early in segment.nodes:
                return Stretch(tuple(taken))
        return None

    def sum_of(self, addends: Sequence[fx.Node], additions: Sequence[fx.Node]) -> Stretch | None:
        """Some addends of a sum, from the nearest value that all are made of; None if there is none.

        Args:
            additions: those of the sum, the last of which is all of it.
        """
        above = [{one: None, **dict.fromkeys(step.base for step in self.walk(one, None))} for one in addends]
        base = next((node for node in above[0] if all(node in other for other in above)), None)
        found = self._branches([(one, ONE) for one in addends], base) if base is not None else None
        if base is None or found is None:
            return None
        nodes, branches = found
        root = additions[-1]
        return Stretch((Segment(base, root, sum_terms(branches, root, spatial_size(base)), (*nodes, *additions)),))

    def is_addend(self, node: fx.Node) -> bool:
        """Whether a sum is only a partial one."""
        pending = list(node.users) if isinstance(self.reading(node), Sum) else []
        while pending:
            user = pending.pop()
            reading = self.reading(user)
            if isinstance(reading, Identity):
                pending += user.users
            elif isinstance(reading, Sum) and self._dominators.get(user) is self._dominators.get(node):
                return True
        return False

    def _dominate(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node | None]:
        """For every node that can be read, the nearest node that all its linear paths come through."""
        start = object()
        graph: nx.DiGraph = nx.DiGraph()
        for node in nodes:
            inputs = inputs_of(self.reading(node))
            graph.add_edges_from((source, node) for source in inputs or (start,))
        found = nx.immediate_dominators(graph, start) if start in graph else {}
        return {
            node: None if found[node] is start else found[node]
            for node in nodes
            if node in self._readings and node in found
        }

    def _build(self, root: fx.Node) -> Segment | None:
        reading, base = self.reading(root), self._dominators.get(root)
        if reading is None or base is None:
            return None
        if isinstance(reading, Layer):
            taken = tuple(self._taken.get(root, ()))
            term = seq([*(leaf(one.before[root]) for one in taken if root in one.before), leaf(reading)])
            for one in taken:
                if root in one.behind:
                    term = seq([term, leaf(one.behind[root])])
                elif root in one.beside:
                    term = sum_terms([term, one.beside[root]])
            return Segment(base, root, term, (*reading.through, root), taken)
        if isinstance(reading, Identity):
            return Segment(base, root, ONE, (root,))
        found = self._branches(_scaled_parts(reading), base)
        if found is None:
            return None
        nodes, branches = found
        if any(torch_name(node) == "detach" for node in nodes):
            return None  # one branch has no gradient
        if isinstance(reading, Sum):
            nodes.update(dict.fromkeys(reading.through))
        size = spatial_size(base)
        term = (
            concat_terms(branches, root, reading.dim, size)
            if isinstance(reading, Concat)
            else sum_terms(branches, root, size)
        )
        ordered = sorted(nodes, key=INDEX.of)
        absorbed = dict.fromkeys(one for node in ordered for one in self._taken.get(node, ()))
        return Segment(base, root, term, (*ordered, root), tuple(absorbed))

    def _branches(
        self, parts: Iterable[tuple[fx.Node, Term]], base: fx.Node
    ) -> tuple[dict[fx.Node, None], list[Term]] | None:
        """Between a value and others made of it: the nodes, and a term for each, with what is done to it then; None if
        there is too much, or a view."""
        nodes: dict[fx.Node, None] = {}
        branches = []
        for source, then in parts:
            steps = list(itertools.islice(self.walk(source, base), LONGEST + 1))
            if len(steps) > LONGEST or any(step.term.depth >= DEEPEST for step in steps):
                return None
            nodes.update(dict.fromkeys(n for step in steps for n in step.nodes))
            branches.append(seq([*(step.term for step in reversed(steps)), then]))
        if any(layer.kind == "view" for branch in branches for layer in branch.leaves()):
            return None  # views stay where they are, and so must what they are views of
        return nodes, branches

    def _find_stretches(self, root: fx.Node) -> Iterator[Stretch]:
        reading = self.reading(root)
        if isinstance(reading, Identity) or (isinstance(reading, Layer) and reading.kind == "pad"):
            return  # what feeds it ends a stretch just as well; a pad belongs to what reads it
        taken: list[Segment] = []
        for segment in itertools.islice(self.walk(root, None), FARTHEST):
            taken.insert(0, segment)
            first = segment.term.layer
            cut = first is not None and first.kind == "slice"  # a layer of all channels costs more than one of some
            stretch = Stretch(tuple(taken))
            if segment.term.op != "one" and not cut and stretch.leak() is None:
                yield stretch


def _scaled_parts(reading: Sum | Blend | Concat) -> list[tuple[fx.Node, Term]]:
    """What is added or stacked, and what is done to each for that."""
    if isinstance(reading, Concat):
        return [(part, ONE) for part in reading.parts]
    if isinstance(reading, Sum):
        return [(part, signed(ONE, coefficient)) for part, coefficient in reading.parts]
    return [(part, leaf(scale)) for part, scale in reading.parts]
