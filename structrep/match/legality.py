"""Legality of merges: whether a stretch can be taken out of its graph, and out of the modules that it is written in."""

from __future__ import annotations

from collections.abc import Iterable, Set

from torch import fx, nn

from structrep.errors import Incompatible, Unreadable
from structrep.graph.calls import Call
from structrep.graph.contexts import Context
from structrep.graph.facts import CALL, CONTEXTS, INDEX, SHAPE
from structrep.graph.shapes import channels
from structrep.guard.sharing import written_in_forwards
from structrep.guard.writes import Writes
from structrep.match.findings import Findings
from structrep.match.segments import Segments
from structrep.match.stretch import Stretch
from structrep.terms.term import geometry


class Legality:
    """What keeps stretches of a graph from being merged, whatever they compute.

    Args:
        findings: what is known of the model, and what of it may be merged at all.
        segments: of the graph.
        everywhere: layers that are to vanish at each of their calls.
    """

    def __init__(self, findings: Findings, segments: Segments, everywhere: Set[nn.Module]) -> None:
        self.findings = findings
        self.segments = segments
        self.everywhere = everywhere
        self.writes = Writes()

    def in_one_block(self, stretch: Stretch) -> bool:
        """Whether a stretch is inside one of the blocks that alone may be merged."""
        blocks = self.findings.blocks
        if not blocks:
            return True
        paths = {next((c.path for c in CALL.of(n).chain() if c.path in blocks), None) for n in stretch.nodes}
        return len(paths) == 1 and None not in paths

    def check(self, stretch: Stretch) -> None:
        """Raise unless the stretch can be cut out of the graph and of the modules that it is written in.

        Raises:
            Refusal: it cannot.
        """
        findings, base, root = self.findings, stretch.base, stretch.root
        if (base, root) in findings.slower:
            raise findings.slower[base, root]
        inside, scales = set(stretch.nodes), stretch.scales
        self.writes.check(base, root, inside)
        _check_channels(stretch)
        changed = {node for node in inside if not self.segments.same(node)} | scales
        _check_contexts(changed)
        for where in written_in_forwards(changed):
            if where in findings.unwritable:
                raise Unreadable(str(findings.unwritable[where]))
            if (doubt := findings.callers.doubt(*where)) is not None:
                raise Unreadable(doubt)
        owner = owner_of(inside | scales)
        findings.adapters.check(changed, inside, self.segments.same)
        findings.replicas.check(changed, owner, self.everywhere)
        findings.borders.check(inside, root, owner)
        for one in stretch.absorbed:
            findings.borders.check_absorbed(one.changed, one.between, one.before, owner)


def owner_of(nodes: Iterable[fx.Node]) -> Call:
    """The innermost call that holds all nodes, and is no single layer."""
    common: list[Call] | None = None
    for node in nodes:
        chain = list(CALL.of(node).homes())
        common = chain if common is None else [call for call in common if call in chain]
    assert common
    return common[0]


def _check_channels(stretch: Stretch) -> None:
    """Raise if a value has fewer channels than a scale spreads it over, or seems to for want of a batch."""
    given, ranks = channels(stretch.base), {layer.dims + 2 for layer in stretch.term.leaves() if layer.dims}
    if given is not None and ranks:
        wanted = geometry(stretch.term).in_channels
        shape = tuple(SHAPE.of(stretch.base)) if SHAPE.known(stretch.base) else ()
        if given != wanted and len(shape) + 1 in ranks and shape[0] == wanted:
            raise Incompatible(
                f"the example inputs have no batch ({shape} is given here): convert with one, or without inputs"
            )
        if given != wanted:
            raise Incompatible(f"a value of {given} channels is spread over {wanted} by a scale, and no layer does so")


def _check_contexts(changed: Set[fx.Node]) -> None:
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
