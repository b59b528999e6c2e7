"""Surgery: apply a plan so that the user gets their own model back.

* A layer of the chain that is a module gives up its place: the host takes the merged coefficients, the others become
  identities. No forward changes.
* What is written in a module's own forward changes that forward: it is cut out of the traced graph and installed as a
  generated subclass of the module's own class, so that `isinstance`, methods and attributes stay, and copying,
  pickling, exporting and tracing again work. Children that nothing calls any more are set to None.
* A block that stands for one plain layer (structrep.blocks, a subclass of a convolution) is replaced by it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from inspect import signature

from torch import fx, nn

from structrep import process
from structrep.blocks import STAND_INS
from structrep.deployed.layers import Sizes
from structrep.deployed.methods import install, regraph
from structrep.errors import ExampleOnly, Refusal, StructrepError, Unreadable
from structrep.graph.calls import Call, Traced
from structrep.graph.facts import ASSIGNED, CALL, FORMULA, VALUE
from structrep.guard.callers import Callers
from structrep.guard.sharing import Replicas, site
from structrep.match.merge import Merge, Segment
from structrep.modules.uses import Use
from structrep.read.lower import lower
from structrep.read.nodes import hands_on
from structrep.records.plan import Way
from structrep.rewrite.edit import Edit
from structrep.rewrite.edits import Edits
from structrep.rewrite.forward import Forward, written_anew
from structrep.rewrite.leftovers import Leftovers
from structrep.rewrite.norms import end
from structrep.rewrite.refill import _kernels, _nothing, _refill
from structrep.rewrite.slot import Slot, is_asked_for, slot
from structrep.rewrite.units import SUMS, Unit, _scales, fallen, handed_back, host_of, units
from structrep.rewrite.untaken import Untaken, told_to_do_nothing
from structrep.rewrite.untouched import Untouched
from structrep.terms.term import ONE, geometry


class Draft:
    """How a model will be changed, decided before anything is.

    Merges that cannot be written back are left out and listed in `refused`, with the reason.
    """

    def __init__(
        self, traced: Traced, replicas: Replicas, merges: Iterable[Merge], flagged: Mapping[fx.Node, set[Call]]
    ) -> None:
        self.traced = traced
        self.replicas, self.callers, self.flagged = replicas, Callers(traced), flagged
        self.refused: list[tuple[Merge, Refusal]] = []
        self.unwritable: dict[tuple[str, str], Refusal] = {}  # methods that cannot be written anew, by path and name
        self.unedited: dict[tuple[str, str], Refusal] = {}  # and those that are, but not by editing their text
        self.merges = list(merges)
        self.strays: dict[Merge, set[Call]] = {}  # calls whose code reads what a merge takes away
        self.untaken = Untaken(traced)
        self.guarded: dict[Merge, set[Call]] = {}  # those that are right for what their modules are set to alone
        self.misuses: dict[Merge, dict[Call, list[Use]]] = {}  # what the code of calls may do with some of it alone
        made = (FORMULA.of(n) for trace in traced.traces for n in trace.nodes if FORMULA.get(n))
        self.computed_from = {id(tensor) for formula in made for tensor in formula.tensors}
        with process.alone():  # forwards are asked what the names of their modules stand for
            self._settle_on()

    def _settle_on(self) -> None:
        while True:
            self._decide()
            if not (failed := self._write()):
                return
            lost = fallen(self.merges, failed)
            self.refused += lost.items()
            self.merges = [merge for merge in self.merges if merge not in lost]

    def _decide(self) -> None:
        self.hosts: dict[Merge, Unit] = {}
        self.homes: dict[Merge, tuple[str, str]] = {}  # owner's path and name of a layer that is new
        self.idle: list[Unit] = []  # swapped for identities
        self.anew: set[Call] = set()  # whose forwards change in more than expressions
        self.ended: set[Call] = set()  # norms that give up their weight and bias
        self.edits = Edits()
        self.owned: dict[Call, set[Merge]] = {}
        for merge in self.merges:
            parts = units(merge)
            host = self.hosts[merge] = host_of(parts)
            self.edits.reordered |= merge.reordered
            self.edits.vanishing.update(node for node in merge.nodes if node is not merge.root)
            self.edits.vanishing.update(node for one in merge.absorbed for node in one.changed)
            for unit in [*parts, *_scales(merge)]:
                if unit.module is None:
                    kept = self._refillable(unit, merge) if unit is host else None
                    owner = self._written_by(unit, merge, dead=kept is None)
                    self.edits.units[unit.root] = owner, unit.nodes
                    if kept is not None:
                        self.anew.add(owner)
                        self.homes[merge] = (kept, "")
                        self.edits.refilled[unit.root] = (unit.base, kept)
                    elif unit is host:
                        name = self._new_name(owner, merge)
                        self.homes[merge] = (owner.path, name)
                        self.edits.replaced[unit.root] = (unit.base, f"{owner.path}.{name}" if owner.path else name)
                    else:
                        self.edits.bypassed[unit.root] = unit.base
                elif unit is not host:
                    self.idle.append(unit)
                    self._told_by(unit.module, merge)
            for node in merge.nodes:
                if ASSIGNED.get(node):  # by a forward that need not do so any more
                    self.anew.add(self._written_by(Unit((Segment(node, node, ONE, (node,)),)), merge, dead=False))
            for call in handed_back(merge, self.untaken.given):
                for depth, owner in enumerate(around := list(call.chain())):
                    if merge in self.owned.get(owner, ()):
                        self.edits.owners[owner].update(around[:depth])
            for node in (one.node for one in merge.absorbed if one.ends):
                if node.op == "call_module":
                    self.ended.add(CALL.of(node))
                    self._told_by(CALL.of(node), merge)
                else:
                    self.edits.ended.add(node)
                    self._written_by(Unit((Segment(node, node, ONE, (node,)),)), merge, dead=False)

        self._write_strays()
        swapped = {unit.module.module for unit in (*self.hosts.values(), *self.idle) if unit.module is not None}
        for owner in [one for one in self.edits.owners if any(call.module in swapped for call in one.chain())]:
            del self.edits.owners[owner]  # whose whole module is replaced
            self.owned.pop(owner, None)
        nodes = (n for merge in self.merges for n in (*merge.nodes, *(n for one in merge.absorbed for n in one.nodes)))
        self.edits.layers = {str(node.target) for node in nodes if node.op == "call_module"}
        self.edits.homes = {name: home for merge in self.merges for name, home in self._homes_of(merge)}

    def _write_strays(self) -> None:
        """Have forwards written anew whose code, on a path that was not taken, reads a value that will be another, or
        gives another to what is merged: what the path hangs on is then guarded."""
        written = self.edits.owners.keys() | set().union(*self.edits.owners.values())
        for merge in self.merges:
            if merge not in self.strays:
                self.misuses[merge] = self.untaken.misuses(merge)
                self.guarded[merge] = {*told_to_do_nothing(merge.nodes), *self.replicas.asking.otherwise(merge.nodes)}
                self.guarded[merge] |= self.flagged.get(merge.root, set())
                self.strays[merge] = {*self.untaken.strays(merge), *self.misuses[merge], *self.guarded[merge]}
            for call in self.strays[merge]:
                owner = next(call.homes())
                if call not in written and owner not in written:
                    inner = self.edits.owners.setdefault(owner, set())
                    around = list(call.chain())
                    inner.update(around[: around.index(owner)])
                if owner in self.edits.owners:
                    self.owned.setdefault(owner, set()).add(merge)

    def _homes_of(self, merge: Merge) -> Iterator[tuple[str, str]]:
        """The tensors that a merge takes, by path, and the path of the layer that has them, with a + where that is more
        than one layer."""
        where = self.where(merge)
        home = "" if where == "(root)" else where
        single = merge.sizes is None and not merge.fit.remedy
        for node in (*merge.nodes, *(n for one in merge.absorbed for n in one.nodes)):
            held = [VALUE.of(n) for n in node.all_input_nodes if VALUE.known(n)]
            if node.op == "call_module":
                held += CALL.of(node).module.parameters()
                held += CALL.of(node).module.buffers()
            for name in (self.traced.names.get(id(tensor)) for tensor in held):
                if name is not None:
                    yield name, home if single else f"{home}+"

    def _new_name(self, owner: Call, merge: Merge) -> str:
        stem = "reparam_conv" if any(layer.dims for layer in merge.term.leaves()) else "reparam_linear"
        used = {name for path, name in self.homes.values() if path == owner.path}
        return next(
            name
            for name in itertools.chain((stem,), (f"{stem}_{i}" for i in itertools.count(1)))
            if name not in used and getattr(owner.module, name, None) is None
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
        if not written or not isinstance(module, STAND_INS) or not {"weight", "bias"} <= module._parameters.keys():
            return None
        if layer is None or layer.formula or layer.weight is not module._parameters["weight"]:
            return None
        once = len(self.traced.calls[module, "forward"]) == 1 and self._alone(node)
        return call.path if once and layer.shape(merged.in_channels, merged.dims) == merged else None

    def _alone(self, node: fx.Node) -> bool:
        """Whether the parameters that a node is given are of use to nothing else, not even to make constants of."""
        held = [n for n in node.all_input_nodes if n.op == "get_attr"]
        own = {id(VALUE.of(n)) for n in held}
        bias = CALL.of(node).module._parameters["bias"]
        if bias is not None and id(bias) not in own:
            return False  # it has another use
        return all(len(n.users) == 1 for n in held) and own.isdisjoint(self.computed_from)

    def _written_by(self, unit: Unit, merge: Merge, dead: bool = True) -> Call:
        """The innermost call that holds a unit, whose forward the unit vanishes from."""
        self.edits.dead.update(unit.nodes if dead else ())
        chains = [list(CALL.of(node).homes()) for node in unit.nodes]
        owner: Call = next(call for call in chains[0] if all(call in chain for chain in chains))
        inner = self.edits.owners.setdefault(owner, set())
        for node in unit.nodes:
            inner.update(itertools.takewhile(lambda call: call is not owner, CALL.of(node).chain()))
        self.owned.setdefault(owner, set()).add(merge)
        return owner

    def _told_by(self, call: Call, merge: Merge) -> None:
        """Have forwards written anew that ask for the dtype or device of what vanishes."""
        for name in (*call.module._parameters, *call.module._buffers):
            for asker in self.traced.told.get(f"{call.path}.{name}", ()):
                owner = next(asker.homes())
                self.edits.owners.setdefault(owner, set())
                self.owned.setdefault(owner, set()).add(merge)
                self.anew.add(owner)

    def _write(self) -> dict[Merge, Refusal]:
        """Write all new forwards; gives the merges of those that cannot be written."""
        self.forwards: dict[Call, Forward | Edit | Slot | Untouched] = {}
        self.left = Leftovers(self.traced, self.replicas, self.edits, self.forwards, self.merges)
        failed: dict[Merge, Refusal] = {}
        for owner, written_out in self.edits.owners.items():
            try:
                self.forwards[owner] = (
                    self._slot(owner, written_out)
                    or self._edited(owner, written_out)
                    or self._written_anew(owner, written_out)
                )
            except Refusal as reason:
                if (text := self.unedited.get(site(owner))) is not None:
                    reason.args = (f"{reason}; nor can its text be edited: {text}", *reason.args[1:])
                self.unwritable[reason.where if isinstance(reason, ExampleOnly) else site(owner)] = reason
                failed.update(dict.fromkeys(self.owned[owner], reason))
        for owner in self._idle_sums() - self.edits.owners.keys():
            with contextlib.suppress(Refusal):
                self.forwards[owner] = written_anew(self.traced, self.edits, owner, set())
        self.at_rest = {owner: forward.holding(owner.module) for owner, forward in self.forwards.items()}
        return failed

    def _edited(self, owner: Call, written_out: set[Call]) -> Edit | Untouched | None:
        """The method with its own text edited; None if that is not all that changes, or would not be right."""
        if owner in self.anew or self.callers.doubt(*site(owner)) is not None:
            return None
        misuses: list[Use] = []
        for merge in self.owned[owner]:
            if any(unit.module is not None for unit in units(merge)):  # which is another one on all paths
                if any(next(call.homes()) is owner for call in self.guarded[merge]):
                    return None
                misuses += [
                    use for call, uses in self.misuses[merge].items() if next(call.homes()) is owner for use in uses
                ]
        nodes = list(owner.nodes())
        try:
            if any(node in self.edits.ended for node in nodes) and self.edits.dead.isdisjoint(nodes):
                return Untouched(self.traced, self.edits, owner)
            return Edit(self.traced, self.edits, owner, written_out, misuses)
        except Unreadable as reason:
            self.unedited[site(owner)] = reason
            return None

    def _slot(self, owner: Call, written_out: set[Call]) -> Slot | None:
        """The slot that a method has for the one layer that is new in its module."""
        homes = [self.homes.get(merge, ("", "")) for merge in self.owned[owner]]
        names = [name for path, name in homes if path == owner.path and name]
        if len(names) != 1 or not is_asked_for(owner, names[0]):
            return None
        with contextlib.suppress(Unreadable):
            forward = self._written_anew(owner, written_out)
            return slot(forward, names[0], {call.module for call in self.left.dead_calls()})
        return None

    def _written_anew(self, owner: Call, written_out: set[Call]) -> Forward:
        if (doubt := self.callers.doubt(*site(owner))) is not None:
            raise Unreadable(doubt)
        forward = written_anew(self.traced, self.edits, owner, written_out)
        self._check_choice(owner, forward)
        return forward

    def _check_choice(self, owner: Call, forward: Forward) -> None:
        """Raise where it cannot be told, and so not be guarded, what code picks parts by."""
        told = [one for one in forward.reads if not one.asked.endswith(" is None)")]  # whether a part is there
        if told or forward.ways or forward.guards:
            return
        for merge in self.owned[owner]:
            for call, (use, *_) in self.misuses[merge].items():
                if owner in call.homes():
                    where = f"line {use.line} of {use.code.co_filename}"
                    raise Unreadable(f"{where} may use what is merged otherwise, and what that hangs on is not known")

    def _idle_sums(self) -> set[Call]:
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
        classes = {type(owner.module) for owner in self.edits.owners}
        return {
            call
            for call in owners
            if type(call.module) in classes
            and len(self.traced.calls[call.module, call.method]) == 1
            and len(call.args) == len(signature(call.function).parameters) == 1
            and isinstance(call.args[0], fx.Proxy)
            and swapped.isdisjoint(call.chain())
        }

    def way(self, merge: Merge) -> Way:
        """How a merge is made: by modules alone, by an edit of a forward, or by one that is written anew."""
        made = [one for owner, one in self.forwards.items() if merge in self.owned.get(owner, ())]
        edited = any(isinstance(one, Edit) and not one.same for one in made)
        return "rewrite" if any(isinstance(one, Forward) for one in made) else "edit" if edited else "swap"

    def where(self, merge: Merge) -> str:
        """The path that the merged layer will have."""
        module = self.hosts[merge].module
        path = module.path if module is not None else ".".join(part for part in self.homes[merge] if part)
        return path or "(root)"

    # --- doing it ---------------------------------------------------------------------------------

    def apply(self, model: nn.Module, release: bool = False) -> nn.Module:
        """Change a model that has the names of the traced one; returns it, or what stands for it if it was itself a
        block."""
        self.model = model
        self._check_unchanged()
        self.places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}  # who holds a module, under which name
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self.places.setdefault(child, []).append((parent, name))
        held = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        read = Counter(id(t) for merge in self.merges for layer in merge.term.leaves() for t in _kernels(layer))
        stay = self.left.needed() if release else set()
        for merge in self.merges:
            self._place(merge)
            if release:
                self._release(merge, held, read, stay)
        for unit in self.idle:
            assert unit.module is not None
            self._swap(unit.module.path, _nothing(unit))
        for call in self.ended:
            end(self._at(call.path))
        dead = self.left.settle(self.model)
        for owner, forward in self.forwards.items():
            module = self._at(owner.path)
            for name, tensor in forward.constants.items():
                module.register_buffer(name, tensor.detach().clone(), persistent=False)
            for (holder, alias), entry in forward.merged.items():
                vars(self._at(holder))[alias] = entry.of(self.model)
        self.left.bury(self.model, dead)
        for owner, forward in self.forwards.items():
            module = self._at(owner.path)
            now, before = forward.holding(module), self.at_rest[owner]  # what was asked for may be no more, or merged
            stays = lambda one, now=now, before=before: one in now or not (one.later or one in before)  # noqa: E731
            if not isinstance(forward, (Slot, Untouched)) and not (isinstance(forward, Edit) and forward.same):
                install(module, forward.method(stays))
            if isinstance(module, fx.GraphModule):
                regraph(module)
        deploy = self.model
        del self.model, self.places  # a plan does not keep what it made
        return deploy

    def _check_unchanged(self) -> None:
        """Raise where a forward that was written anew would no longer do what the model does."""
        for owner, forward in self.forwards.items():
            for guard in self.at_rest[owner] - forward.holding(self._at(owner.path)):
                raise StructrepError(
                    f"{guard.asked} of {owner.path or 'the model'} was {guard.told} when this plan was made, and is "
                    f"another now: make a new one, structrep.plan(model)"
                )

    def _release(self, merge: Merge, held: Counter[int], read: Counter[int], stay: set[int]) -> None:
        """Give back the memory of kernels that a merge was the last to read, before the next is made."""
        for layer in merge.term.leaves():
            for tensor in _kernels(layer):
                if read[id(tensor)] > 1 or id(tensor) in stay or id(tensor) not in self.traced.names:
                    continue
                own = self._parameter(self.traced.names[id(tensor)])
                if own is not None and own.data_ptr() == tensor.data_ptr() and held[id(own)] == 1:
                    own.data = own.data.new_empty(0)  # of a layer that is about to go
                tensor.data = tensor.data.new_empty(0)

    def _parameter(self, path: str) -> nn.Parameter | None:
        """The parameter at a path, if the model still has it."""
        try:
            return self.model.get_parameter(path)
        except AttributeError:
            return None

    def _place(self, merge: Merge) -> None:
        map_, host = merge.value(), self.hosts[merge]
        merge.kept = None
        bias = any(layer.shifts for layer in merge.term.leaves())
        kernels = [layer for segment in host.segments for layer in segment.term.leaves() if layer.weight is not None]
        learned = any(tensor.requires_grad for layer in kernels for tensor in _kernels(layer))
        like = kernels[0].weight
        assert like is not None
        if (
            host.module is not None
            and merge.sizes is None
            and _refill(self._at(host.module.path), map_, like, bias=bias, requires_grad=learned)
        ):
            return
        layer = lower(map_, like, bias=bias, requires_grad=learned)
        if merge.sizes is not None:
            layer = nn.Sequential(Sizes(*merge.sizes), *(layer if isinstance(layer, nn.Sequential) else [layer]))
        if host.module is not None:
            self._swap(host.module.path, layer)
            return
        path, name = self.homes[merge]
        module = self._at(path)
        if host.root in self.edits.refilled:
            module._parameters |= layer._parameters
        else:
            module.__dict__.pop(name, None)
            module.add_module(name, layer)

    def _at(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def _swap(self, path: str, layer: nn.Module) -> None:
        old = self._at(path)
        layer.train(old.training)
        if old is self.model:
            self.model = layer
        self.places[layer] = self.places.pop(old, [])
        for parent, name in self.places[layer]:
            parent._modules[name] = layer
        gone = set(old.modules())
        for part in gone - {old}:  # whose kernels would stay as long as they are known here
            self.places[part] = [(parent, name) for parent, name in self.places[part] if parent not in gone]
            if not self.places[part]:
                del self.places[part]

    # --- what is left over ------------------------------------------------------------------------
