"""What is replaced as one, and which of it is the host of the merged layer."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from structrep.blocks import REPLACE_A_LAYER
from structrep.errors import Refusal
from structrep.graph.calls import Call
from structrep.graph.facts import CALL, VALUE
from structrep.graph.queries import asks_dtype, counts_sizes, only_asserted
from structrep.graph.structures import proxies
from structrep.match.idle import is_curve
from structrep.match.merge import Merge, together
from structrep.match.stretch import Segment, Stretch
from structrep.modules.parametrized import computed, hooks
from structrep.modules.wrappers import stands_in
from structrep.read.modules import knows
from structrep.read.nodes import read_node
from structrep.terms.layer import Identity
from structrep.terms.term import ONE

SUMS = (operator.add, operator.iadd)


@dataclass(frozen=True, eq=False)
class Unit(Stretch):
    """The part of a merge that is replaced as one: a node, an addition with its branches, or a block."""

    block: Call | None = None  # a block that stands for a plain layer

    @property
    def module(self) -> Call | None:
        """The call whose module can be swapped without touching a forward."""
        if self.block:
            return self.block
        return CALL.of(self.root) if len(self.nodes) == 1 and self.root.op == "call_module" else None

    @property
    def taps(self) -> int:
        """Kernel taps, as a measure of which unit is the convolution that the others surround."""
        return max(
            (
                layer.weight[0, 0].numel()
                for s in self.segments
                for layer in s.term.leaves()
                if layer.weight is not None
            ),
            default=0,
        )


def units(merge: Merge) -> list[Unit]:
    """The units of a merge, from its base to its root."""
    if merge.idle:
        return [Unit(merge.segments)]
    result: list[Unit] = []
    rest = list(merge.segments)
    while rest:
        block, count = _block_at(rest)
        result.append(Unit(tuple(rest[:count]), block))
        rest = rest[count:]
    return [unit for unit in result if unit.block or any(not _stays(s) for s in unit.segments)]


def scales(merge: Merge) -> list[Unit]:
    """The scales that a merge does a part of, which vanish."""
    return [Unit((Segment(one.source, one.node, ONE, one.nodes),)) for one in merge.absorbed if not one.ends]


def fallen(merges: Sequence[Merge], failed: Mapping[Merge, Refusal]) -> dict[Merge, Refusal]:
    """What falls of some merges when some of them fail, and why: also what has anything in common with one of these."""
    groups = [(group, [failed[merge] for merge in group if merge in failed]) for group in together(merges)]
    return {merge: failed.get(merge, reasons[0]) for group, reasons in groups if reasons for merge in group}


def _stays(segment: Segment) -> bool:
    """Whether a segment does nothing to its value, and may go on doing so; an activation need not be run for that."""
    same = segment.term.op == "one" and not any(map(is_curve, segment.nodes))
    return same or (segment.term.layer is not None and segment.term.layer.kind == "view")


def _block_at(segments: list[Segment]) -> tuple[Call | None, int]:
    """The largest block that the first segments are all of, and how many they are."""
    first = CALL.of(segments[0].nodes[0])
    for call in reversed(list(first.chain())):
        layer = knows(call.module) and bool(computed(call.module))  # which is a call of its own only as a root
        adapted = stands_in(call.module)
        stands = isinstance(call.module, REPLACE_A_LAYER) or adapted
        if call.leaf or call.method != "forward" or hooks(call.module):
            continue
        if not layer and (not stands or (call.parent is None and not call.path)):
            continue
        if not adapted and _goes_by_its_input(call):  # peft's layers ask whether to cast, no more
            continue
        inner = [s for s in segments if all(call.holds(n) for n in s.nodes)]
        count = len(inner)
        whole = {n for s in inner for n in s.nodes}
        behind = _same_as(call.result, inner[-1].root) if inner else []
        rest = [n for n in call.nodes() if n not in whole and n not in behind]
        covers = all(only_asserted(n) or VALUE.known(n) or asks_dtype(n) or counts_sizes(n) for n in rest)
        entry = [p.node for p in proxies((call.args, call.kwargs))]
        if inner == segments[:count] and covers and behind and entry == [inner[0].base]:
            return call, count
    return None, 1


def _goes_by_its_input(call: Call) -> bool:
    """Whether a call was told what may be otherwise for another input, or where it runs in another way."""
    reads = (read for one in call.all_calls() for read in one.reads.values())
    of_inputs = any(isinstance(read.holder, fx.Node) or read.where_am_i for read in reads)
    return next(call.observed(), None) is not None or of_inputs


def _same_as(result: Any, root: fx.Node) -> list[fx.Node]:
    """The nodes that a result comes through unchanged, back to one; none of that if it does not come from there."""
    found: list[fx.Node] = [result.node] if isinstance(result, fx.Proxy) else []
    while found and found[-1] is not root:
        reading = read_node(found[-1])
        if not isinstance(reading, Identity):
            return []
        found.append(reading.source)
    return found


def host_of(parts: list[Unit]) -> Unit:
    """The unit that the merged layer takes the place of: a module before an expression, the largest kernel first."""
    able = [unit for unit in parts if unit.taps]
    return max(able, key=lambda unit: (unit.module is not None, unit.taps))


def handed_back(merge: Merge, given: Mapping[fx.Node, Iterable[Call]]) -> Iterator[Call]:
    """The calls that are given a value which vanishes, do nothing, and give it back: drop paths that do not drop."""
    for node in merge.nodes:
        for call in given.get(node, ()) if node is not merge.root else ():
            same = isinstance(call.result, fx.Proxy) and call.result.node is node
            if same and call.method == "forward" and not call.mutates and not any(True for _ in call.nodes()):
                yield call
