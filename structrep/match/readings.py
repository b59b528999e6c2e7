"""Readings: what the nodes of a graph are, each by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from torch import fx

from structrep.errors import Hooked, Unreadable
from structrep.graph.calls import Trace
from structrep.graph.facts import AUTOCAST, CALL, VALUE
from structrep.graph.queries import counts_sizes
from structrep.guard.sharing import Replicas
from structrep.match.refusals import Refusals
from structrep.modules.parametrized import about_hooks, hooks
from structrep.read.endings import read_ending
from structrep.read.nodes import read_node
from structrep.terms.layer import Blend, Concat, Identity, Layer, Reading, Readings, Sum


def readable(trace: Trace, replicas: Replicas) -> list[fx.Node]:
    """The nodes that may be merged: those that depend on the input and are no sizes, nor a later call of what was read
    before."""
    return [n for n in trace.nodes if not (VALUE.known(n) or AUTOCAST.of(n) or replicas.repeats(n) or counts_sizes(n))]


def read(nodes: Iterable[fx.Node], refusals: Refusals) -> dict[fx.Node, Reading]:
    """The maps among some nodes; layers that are none, with the reason, become refusals."""
    readings: dict[fx.Node, Reading] = {}
    for node in nodes:
        try:
            reading = read_node(node)
        except Unreadable as reason:
            refusals.note([node], "-", str(CALL.of(node).path), reason)
            continue
        if reading is not None:
            readings[node] = reading
        elif node.op == "call_module" and hooks(CALL.of(node).module):
            refusals.note([node], "-", "layer with a hook", Hooked(about_hooks(CALL.of(node).module)))
    return readings


def refuse_autocast(trace: Trace, refusals: Refusals) -> None:
    """Note of each norm that the model's own code runs under autocast that it stays for that."""
    for node in trace.nodes:
        if AUTOCAST.get(node) and not VALUE.known(node):
            with contextlib.suppress(Unreadable):
                reading = read_node(node)
                if isinstance(reading, Layer) and reading.kind == "norm":
                    reason = Unreadable(
                        "it runs under autocast, which chooses dtypes as the model runs: call it outside"
                    )
                    refusals.note([node], "-", "norm", reason)


def endings(nodes: Iterable[fx.Node], readings: Readings) -> dict[fx.Node, Layer]:
    """The scales that norms of each value end with; one that is a map as a whole is no such norm."""
    found = {node: read_ending(node) for node in nodes if node not in readings}
    return {node: scale for node, scale in found.items() if scale is not None}


def inputs_of(reading: Reading | None) -> tuple[fx.Node, ...]:
    """What a node is given, as it was read."""
    if isinstance(reading, Layer):
        return (reading.source,) if reading.source is not None else ()
    if isinstance(reading, Identity):
        return (reading.source,)
    if isinstance(reading, (Sum, Blend)):
        return tuple(node for node, _ in reading.parts)
    return reading.parts if isinstance(reading, Concat) else ()
