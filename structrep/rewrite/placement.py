"""Where merged layers are put, and what that changes in the forwards around."""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Iterator, Sequence
from inspect import signature
from types import ModuleType
from typing import Any

from torch import fx

from structrep.blocks import REPLACE_A_LAYER
from structrep.graph.calls import Call, Traced
from structrep.graph.facts import ASSIGNED, AT, CALL, FORMULA, VALUE
from structrep.graph.operations import does, torch_name
from structrep.graph.table import Is
from structrep.match.absorption import Absorption
from structrep.match.merge import Merge
from structrep.match.stretch import Segment
from structrep.modules.positions import place
from structrep.modules.source import words
from structrep.read.nodes import hands_on
from structrep.rewrite.node_changes import NodeChanges
from structrep.rewrite.slot import is_asked_for
from structrep.rewrite.units import SUMS, Unit, handed_back, host_of, scales, units
from structrep.rewrite.untaken import Untaken
from structrep.terms.term import ONE, geometry


class Placement:
    """Where the merged layers are put, what gives way to them, and which forwards change for it.

    Attributes:
        hosts: the unit whose place each merged layer takes.
        homes: for those that take no module's place, the path of a module and a name there, "" for the module itself.
        idle: units that are modules, and do nothing then.
        ended: calls of norms that give up their weight and bias.
        anew: calls whose forwards change in more than expressions.
        owned: the merges for which the forward of a call changes.
        changes: what changes in forwards.
    """

    def __init__(self, traced: Traced, untaken: Untaken, merges: Sequence[Merge]) -> None:
        self.traced, self.untaken, self.merges = traced, untaken, merges
        self.hosts: dict[Merge, Unit] = {}
        self.homes: dict[Merge, tuple[str, str]] = {}
        self.idle: list[Unit] = []
        self.ended: set[Call] = set()
        self.anew: set[Call] = set()
        self.owned: dict[Call, set[Merge]] = {}
        self.changes = NodeChanges()

    def decide(self) -> None:
        """Find a place for each merge."""
        for merge in self.merges:
            self._decide(merge)
        self._change_untaken()
        swapped = {unit.module.module for unit in (*self.hosts.values(), *self.idle) if unit.module is not None}
        for owner in [one for one in self.changes.owners if any(call.module in swapped for call in one.chain())]:
            del self.changes.owners[owner]  # whose whole module is replaced
            self.owned.pop(owner, None)
        nodes = (node for merge in self.merges for node in all_nodes(merge))
        self.changes.layers = {str(node.target) for node in nodes if node.op == "call_module"}
        self.changes.homes = {name: home for merge in self.merges for name, home in self._tensors(merge)}

    def where(self, merge: Merge) -> str:
        """The path that the merged layer will have."""
        if merge.idle:
            (unit,) = units(merge)
            around = "" if unit.module is not None else next(CALL.of(merge.root).homes()).path
            return ".".join(filter(None, (around, unit.module.path if unit.module is not None else merge.root.name)))
        module = self.hosts[merge].module
        path = module.path if module is not None else ".".join(part for part in self.homes[merge] if part)
        return path or "(root)"

    def idle_sums(self) -> set[Call]:
        """Blocks whose forward adds a merged layer to 0, as those of their class with more branches do, whose forwards
        are written anew: so are theirs, and launch nothing for it."""
        same: dict[fx.Node, None] = {}  # as a merged layer, but for nothing
        pending = [user for merge in self.merges for node in merge.nodes for user in node.users]
        while pending:
            node = pending.pop()
            if node not in same and hands_on(node) is not None:
                same[node] = None
                pending += node.users
        owners = {next(CALL.of(n).homes()) for n in same if n.op == "call_function" and n.target in SUMS}
        swapped = {unit.module for unit in (*self.hosts.values(), *self.idle)}
        classes = {type(owner.module) for owner in self.changes.owners}
        return {
            call
            for call in owners - self.changes.owners.keys()
            if type(call.module) in classes
            and len(self.traced.calls[call.module, call.method]) == 1
            and len(call.args) == len(signature(call.function).parameters) == 1
            and isinstance(call.args[0], fx.Proxy)
            and swapped.isdisjoint(call.chain())
        }

    def _decide(self, merge: Merge) -> None:
        parts = units(merge)
        host = None if merge.idle else host_of(parts)
        if host is not None:
            self.hosts[merge] = host
        self.changes.reordered |= merge.reordered
        self.changes.vanishing |= merge.changed
        self.changes.vanishing.update(node for one in merge.absorbed for node in one.changed)
        self.changes.turned.update(node for one in merge.absorbed if one.turns for node in one.changed)
        for unit in [*parts, *scales(merge)]:
            if unit.module is None:
                self._change_text(unit, merge)
            elif unit is not host:
                self.idle.append(unit)
                self._change_told(unit.module, merge)
        for node in (node for one in merge.absorbed for node in _told_elsewhere(one)):
            self.anew.add(self._change(_lone(node), merge))  # which guards what it goes by
        for node in merge.nodes:
            if ASSIGNED.get(node):  # by a forward that need not do so any more
                self.anew.add(self._change(_lone(node), merge))
        for call in handed_back(merge, self.untaken.given):
            for depth, owner in enumerate(around := list(call.chain())):
                if merge in self.owned.get(owner, ()):
                    self.changes.owners[owner].update(around[:depth])
        for node in (one.node for one in merge.absorbed if one.ends):
            if node.op == "call_module":
                self.ended.add(CALL.of(node))
                self._change_told(CALL.of(node), merge)
            else:
                self.changes.ended.add(node)
                self._change(_lone(node), merge)

    def _change_text(self, unit: Unit, merge: Merge) -> None:
        """Have the forward changed that a unit is written in, which gives its place to the merged layer or vanishes."""
        host = unit is self.hosts.get(merge)
        refilled = self._refillable(unit, merge) if host else None
        owner = self._change(unit, merge)
        self.changes.units[unit.root] = owner, unit.nodes
        if refilled is not None:
            self.homes[merge] = (refilled, "")
            self.changes.refilled[unit.root] = (unit.base, refilled)
            return
        self.changes.dead.update(unit.nodes)
        if host:
            name = self._new_name(owner, merge)
            self.homes[merge] = (owner.path, name)
            self.changes.replaced[unit.root] = (unit.base, f"{owner.path}.{name}" if owner.path else name)
        else:
            self.changes.bypassed[unit.root] = unit.base

    def _change(self, unit: Unit, merge: Merge) -> Call:
        """Have the forward changed that a unit is written in: that of the innermost call that holds it, which it
        gives."""
        chains = [list(CALL.of(node).homes()) for node in unit.nodes]
        owner: Call = next(call for call in chains[0] if all(call in chain for chain in chains))
        inner = self.changes.owners.setdefault(owner, set())
        for node in unit.nodes:
            inner.update(itertools.takewhile(lambda call: call is not owner, CALL.of(node).chain()))
        self.owned.setdefault(owner, set()).add(merge)
        return owner

    def _change_told(self, call: Call, merge: Merge) -> None:
        """Have forwards written anew that ask for the dtype or device of what vanishes."""
        for name in (*call.module._parameters, *call.module._buffers):
            for asker in self.traced.told.get(f"{call.path}.{name}", ()):
                owner = next(asker.homes())
                self.changes.owners.setdefault(owner, set())
                self.owned.setdefault(owner, set()).add(merge)
                self.anew.add(owner)

    def _change_untaken(self) -> None:
        """Have forwards changed whose code, on a path that was not taken, reads a value that will be another, or gives
        another to what is merged: what the path hangs on is then guarded."""
        written = self.changes.owners.keys() | set().union(*self.changes.owners.values())
        for merge in self.merges:
            for call in self.untaken.risks(merge).calls:
                owner = next(call.homes())
                if call not in written and owner not in written:
                    inner = self.changes.owners.setdefault(owner, set())
                    around = list(call.chain())
                    inner.update(around[: around.index(owner)])
                if owner in self.changes.owners:
                    self.owned.setdefault(owner, set()).add(merge)

    def _tensors(self, merge: Merge) -> Iterator[tuple[str, str]]:
        """The tensors that a merge takes, by path, and the path of the layer that has them, with a + where that is more
        than one layer."""
        where = self.where(merge)
        home = "" if where == "(root)" or merge.idle else where
        single = merge.sizes is None and not merge.fit.remedy
        for node in all_nodes(merge):
            held = [VALUE.of(n) for n in node.all_input_nodes if VALUE.known(n)]
            held += [tensor for n in node.all_input_nodes if FORMULA.get(n) for tensor in FORMULA.of(n).tensors]
            if node.op == "call_module":
                held += CALL.of(node).module.parameters()
                held += CALL.of(node).module.buffers()
            for name in (self.traced.names.get(id(tensor)) for tensor in held):
                if name is not None:
                    yield name, home if single else f"{home}+"

    def _new_name(self, owner: Call, merge: Merge) -> str:
        """A name for a layer that is new: one that the method asks for itself, else one that the class's code does not
        know, which might ask whether it is there."""
        flat = "reparam_embedding" if merge.is_table else "reparam_linear"
        stem = "reparam_conv" if any(layer.dims for layer in merge.term.leaves()) else flat
        used = {name for path, name in self.homes.values() if path == owner.path}
        return next(
            name
            for name in itertools.chain((stem,), (f"{stem}_{i}" for i in itertools.count(1)))
            if name not in used
            and getattr(owner.module, name, None) is None
            and (is_asked_for(owner, name) or name not in words(type(owner.module)))
        )

    def _refillable(self, unit: Unit, merge: Merge) -> str | None:
        """The path of a convolution with a forward of its own, such as one that pads by itself, that may keep its
        place: the merged layer differs from what its forward calls in nothing but the numbers."""
        call, node = CALL.of(unit.root), unit.root
        layer, merged = unit.segments[0].term.layer, geometry(merge.term)
        module = call.module
        written = len(unit.nodes) == 1 and node.op == "call_function" and call.method == "forward"
        if merge.fit.remedy or merge.sizes is not None:
            return None  # what does that is a layer of its own
        if (
            not written
            or not isinstance(module, REPLACE_A_LAYER)
            or not {"weight", "bias"} <= module._parameters.keys()
        ):
            return None
        if layer is None or layer.formula or layer.weight is not module._parameters["weight"]:
            return None
        once = len(self.traced.calls[module, "forward"]) == 1 and self._is_alone(node)
        return call.path if once and layer.shape(merged.in_channels, merged.dims) == merged else None

    def _is_alone(self, node: fx.Node) -> bool:
        """Whether the parameters that a node is given are of use to nothing else, not even to make constants of."""
        held = [n for n in node.all_input_nodes if n.op == "get_attr"]
        own = {id(VALUE.of(n)) for n in held}
        bias = CALL.of(node).module._parameters["bias"]
        if bias is not None and id(bias) not in own:
            return False  # it has another use
        return all(len(n.users) == 1 for n in held) and own.isdisjoint(self._computed_from)

    @functools.cached_property
    def _computed_from(self) -> set[int]:
        """The tensors that constants are computed from, by id."""
        made = (FORMULA.of(n) for trace in self.traced.traces for n in trace.nodes if FORMULA.get(n))
        return {id(tensor) for formula in made for tensor in formula.tensors}


# Whatever sizes and modes these are told, numbers stay of their channel.
_ANY = {"interpolate", "pixel_shuffle", "pixel_unshuffle", "contiguous", "clone",
        *(f"{pool}{dims}d" for pool in ("max_pool", "adaptive_avg_pool") for dims in (1, 2, 3))}  # fmt: skip


def _told_elsewhere(one: Absorption) -> list[fx.Node]:
    """What stands between a scale and what takes it, and moves numbers by what may be set to something else."""
    steps = [node for node in one.between if node.op != "call_module"]
    asks = one.moves and not all(torch_name(node) in _ANY for node in steps)
    counts = (node for node in steps if asks or does(node, Is.PERMUTES) or torch_name(node) in ("roll", "flip"))
    return [node for node in counts if not _is_written_out(node)]


def _is_written_out(node: fx.Node) -> bool:
    """Whether all that an operation is told beside values stands in its text: not what is set elsewhere."""
    if node.target is getattr:
        return True
    call, at = CALL.of(node), AT.of(node)
    text = place(call.bytecode, at) if call.bytecode is not None and at is not None else None
    if isinstance(text, ast.Subscript):
        return _says(text.slice, node.args[1])
    told = node.args[node.op == "call_method" :]
    if not isinstance(text, ast.Call) or len(text.args) != len(told) or not _is_named(text.func, node):
        return False
    named = all(_says(one.value, node.kwargs.get(one.arg or "")) for one in text.keywords)
    return named and all(map(_says, text.args, told))


def _is_named(function: ast.expr, node: fx.Node) -> bool:
    """Whether an operation is called as a method of a value, or by the name of torch's module."""
    if node.op == "call_method":
        return isinstance(function, ast.Attribute) and function.attr == node.target
    root = function
    while isinstance(root, ast.Attribute):
        root = root.value
    space = CALL.of(node).code
    held = getattr(space, "__globals__", {}).get(root.id) if isinstance(root, ast.Name) else None
    return isinstance(held, ModuleType) or held is node.target


def _says(text: ast.expr, told: Any) -> bool:
    """Whether an argument is what its text says, or a value."""
    if isinstance(told, fx.Node):
        return True
    if isinstance(text, (ast.Tuple, ast.List)) and isinstance(told, (tuple, list)) and len(text.elts) == len(told):
        return all(map(_says, text.elts, told))
    if isinstance(text, ast.Slice) and isinstance(told, slice):
        ends = ((text.lower, told.start), (text.upper, told.stop), (text.step, told.step))
        return all(expression is None or _says(expression, end) for expression, end in ends)
    return not any(isinstance(one, (ast.Name, ast.Attribute, ast.Call)) for one in ast.walk(text))


def _lone(node: fx.Node) -> Unit:
    return Unit((Segment(node, node, ONE, (node,)),))


def all_nodes(merge: Merge) -> Iterator[fx.Node]:
    """The nodes of a merge, and of the scales that it does a part of."""
    yield from merge.nodes
    for one in merge.absorbed:
        yield from one.nodes
