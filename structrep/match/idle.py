"""What a deploy model need not run: norms whose value nobody reads, and activations that give what they are given.

No layer takes their place. A norm that is there to watch statistics in training does nothing in eval mode that anything
sees; so it does not keep what it watches where it is either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn

from structrep.errors import Refusal
from structrep.graph.aliases import aliases, writers
from structrep.graph.calls import Trace
from structrep.graph.facts import CALL, IDLE, STORED
from structrep.match.fit import Fit
from structrep.match.legality import Legality, owner_of
from structrep.match.merge import Merge
from structrep.match.stretch import Segment, Stretch
from structrep.terms.cost import Cost
from structrep.terms.layer import Identity, Layer, Readings
from structrep.terms.term import ONE, leaf

UNREAD = "unread", "a value that nothing reads is not computed"
IDENTITY = "identity", "an activation of slope 1 gives what it is given"
_CURVES = (nn.LeakyReLU, nn.PReLU)
_CURVE_FUNCTIONS = (F.leaky_relu, F.prelu, torch.prelu)
_NOTHING = Cost(0, 0, 0)


def unread(nodes: Iterable[fx.Node], readings: Readings, trace: Trace, legality: Legality) -> Iterator[Merge]:
    """The norms whose value nobody reads, and that can be taken out; each is noted to be one."""
    for node in nodes:
        IDLE.forget(node)
        reading = readings.get(node)
        if not isinstance(reading, Layer) or reading.kind != "norm" or node.users or STORED.get(node):
            continue
        cost = Cost(reading.in_channels or 0, reading.parameters, 1)
        if (found := _merge(node, reading, cost, UNREAD, trace, legality)) is None:
            continue
        with contextlib.suppress(Refusal):  # another forward reads it
            legality.findings.borders.check({node}, None, found.owner)
            IDLE.note(node, True)
            yield found


def identities(
    nodes: Iterable[fx.Node], readings: Readings, trace: Trace, legality: Legality, taken: Container[fx.Node]
) -> Iterator[Merge]:
    """The activations that give what they are given, in no merge, and of which neither side is written to."""
    for node in nodes:
        reading = readings.get(node)
        if node in taken or not isinstance(reading, (Layer, Identity)) or reading.source is None or not is_curve(node):
            continue
        if len(reading.source.users) > 1:
            continue  # whoever else has it would have the same tensor
        same = aliases(reading.source) | aliases(node)
        given = any(one.op == "placeholder" for one in same)  # nobody is to get back what they gave
        if given or writers(same) or any(map(STORED.get, same)):
            continue
        cost = Cost(0, reading.parameters if isinstance(reading, Layer) else 0, 1)
        if (found := _merge(node, reading, cost, IDENTITY, trace, legality)) is not None:
            yield found


def is_curve(node: fx.Node) -> bool:
    """Whether a node is an activation that may be of slope 1."""
    return isinstance(CALL.of(node).module, _CURVES) if node.op == "call_module" else node.target in _CURVE_FUNCTIONS


def _merge(
    node: fx.Node, reading: Layer | Identity, cost: Cost, named: tuple[str, str], trace: Trace, legality: Legality
) -> Merge | None:
    """A node on its own as what becomes nothing; None if it has to stay."""
    term = leaf(reading) if isinstance(reading, Layer) else ONE
    assert reading.source is not None
    stretch = Stretch((Segment(reading.source, node, term, (node,)),))
    if not legality.in_one_block(stretch):
        return None
    try:
        legality.check(stretch)
    except Refusal:
        return None
    fit = Fit((cost, _NOTHING), "exact", "", (0.0, 0.0), ())
    (rule, source), owner = named, owner_of(stretch.nodes)
    return Merge((rule,), (source,), term, stretch, owner, trace, fit, idle=True)
