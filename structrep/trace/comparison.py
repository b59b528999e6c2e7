"""Two traces of one call, compared."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx

from structrep.graph.calls import Call, site
from structrep.graph.facts import CONTEXTS, VALUE
from structrep.graph.operations import torch_name, writes
from structrep.graph.structures import proxies
from structrep.trace.followed import Followed

Where = tuple[Any, tuple[Any, ...]]  # a node, the id of a constant or a call, and the way to one of its arguments


@dataclass(frozen=True)
class ArgumentDifference:
    """An argument that is another, in the forward as it was followed."""

    where: Where
    before: Any
    after: Any


class Different(Exception):
    """Two forwards differ in more than what they hand to operations."""


def differences(before: Followed, after: Followed) -> list[ArgumentDifference] | None:
    """The arguments that differ in a call as it was followed from what it is otherwise; None if more does."""
    if asks_more(before, after):
        return None
    try:
        return Comparison(before, after).differences
    except Different:
        return None


def asks_more(before: Followed, after: Followed) -> bool:
    """Whether a call as it is otherwise goes by what it did not ask for as it was followed, or writes to it."""
    asked = {key for call in before.calls() for key in call.reads}
    return any(not call.reads.keys() <= asked or call.mutates for call in after.calls())


class Comparison:
    """Two traces of one call.

    Args:
        before, after: as it was followed, and as it is otherwise.

    Attributes:
        differences: arguments that are another; all else is the same.

    Raises:
        Different: more is.
    """

    def __init__(self, before: Followed, after: Followed) -> None:
        traces = before.traced, after.traced
        self.origins = traces[0].origins, traces[1].origins
        self.names: tuple[dict[int, Any], ...] = tuple({**one.entries, **one.names} for one in traces)
        self.differences: list[ArgumentDifference] = []
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.constants: dict[tuple[int, int], None] = {}
        first, second = before.call, after.call
        given = [proxies((call.args, call.kwargs)) for call in (first, second)]
        self.nodes |= {proxy.node: same.node for proxy, same in zip(*given, strict=True)}
        entries = list(before.steps()), list(after.steps())
        if len(entries[0]) != len(entries[1]):
            raise Different
        for one, other in zip(*entries, strict=True):
            self._step(one, other)
        self._pair(first.result, second.result, None, ())

    def _step(self, one: fx.Node | Call, other: fx.Node | Call) -> None:
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            if not _same_operation(one, other) or CONTEXTS.of(one) != CONTEXTS.of(other):
                raise Different
            self._pair(one.args, other.args, one, ("args",))
            self._pair(dict(one.kwargs), dict(other.kwargs), one, ("kwargs",))
            self.nodes[one] = other
        elif isinstance(one, Call) and isinstance(other, Call):
            if site(one) != site(other) or one.contexts != other.contexts:
                raise Different
            self._pair(one.args, other.args, one, ("args",))
            self._pair(one.kwargs, other.kwargs, one, ("kwargs",))
            results = list(proxies(one.result)), list(proxies(other.result))
            if len(results[0]) != len(results[1]):
                raise Different
            for first, second in zip(*results, strict=True):
                self.nodes.setdefault(first.node, second.node)
            for (_, first_new), (_, second_new) in zip(one.written, other.written, strict=False):
                self.nodes.setdefault(first_new, second_new)
        else:
            raise Different

    def _pair(self, one: Any, other: Any, where: Any, way: tuple[Any, ...]) -> None:
        one = one.node if isinstance(one, fx.Proxy) else one
        other = other.node if isinstance(other, fx.Proxy) else other
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            self._pair_nodes(one, other)
        elif isinstance(one, Tensor) and isinstance(other, Tensor):
            self._pair_constants(one, other)
        elif isinstance(one, slice) and isinstance(other, slice):
            self._pair((one.start, one.stop, one.step), (other.start, other.stop, other.step), None, ())
        elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
            if len(one) != len(other) or type(one) is not type(other):
                raise Different
            for place, (first, second) in enumerate(zip(one, other, strict=True)):
                self._pair(first, second, where, (*way, place))
        elif isinstance(one, dict) and isinstance(other, dict):
            if list(one) != list(other):
                raise Different
            for key in one:
                self._pair(one[key], other[key], where, (*way, key))
        elif is_dataclass(one) and type(one) is type(other) and not isinstance(one, type):
            for f in fields(one):
                self._pair(getattr(one, f.name), getattr(other, f.name), None, ())
        elif one is not other and (type(one) is not type(other) or one != other):
            if where is None:
                raise Different
            self.differences.append(
                ArgumentDifference((id(where) if isinstance(where, Tensor) else where, way), one, other)
            )

    def _pair_nodes(self, one: fx.Node, other: fx.Node) -> None:
        if one.op == "get_attr" and other.op == "get_attr":
            if VALUE.known(one) and VALUE.known(other):
                self._pair_constants(VALUE.of(one), VALUE.of(other))
            elif one.target != other.target:
                raise Different
        elif self.nodes.get(one) is not other:
            raise Different

    def _pair_constants(self, one: Tensor, other: Tensor) -> None:
        if (id(one), id(other)) in self.constants:
            return
        self.constants[id(one), id(other)] = None
        names = self.names[0].get(id(one)), self.names[1].get(id(other))
        if names[0] is not None or names[1] is not None:
            if names[0] != names[1]:
                raise Different
            return
        origins = self.origins[0].get(id(one)), self.origins[1].get(id(other))
        if origins[0] is None or origins[1] is None:
            if origins[0] is not origins[1] or one.shape != other.shape or not torch.equal(one, other):
                raise Different
            return
        if any(getattr(origins[0], name) != getattr(origins[1], name) for name in ("function", "contexts", "item")):
            raise Different
        self._pair(origins[0].args, origins[1].args, one, ("args",))
        self._pair(origins[0].kwargs, origins[1].kwargs, one, ("kwargs",))


def _same_operation(one: fx.Node, other: fx.Node) -> bool:
    if one.op == other.op and one.target == other.target:
        return True
    names = [torch_name(node).strip("_").removeprefix("i") for node in (one, other)]
    written = [writes(node) for node in (one, other)]
    # In place or not is the same, if nothing else looks at what is written to.
    alone = all(len(source.users) == 1 for sources in written for source in sources)
    return "call_module" not in (one.op, other.op) and names[0] == names[1] and any(written) and alone
