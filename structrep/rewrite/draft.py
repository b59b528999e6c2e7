"""Surgery: apply a plan so that the user gets their own model back.

* A layer of the chain that is a module gives up its place: the host takes the merged coefficients, the others become
  identities. No forward changes.
* What is written in a module's own forward changes that forward: it is cut out of the traced graph and installed as a
  generated subclass of the module's own class, so that `isinstance`, methods and attributes stay, and copying,
  pickling, exporting and tracing again work. Children that nothing calls any more are set to None.
* A block that stands for one plain layer (structrep.blocks, a subclass of a convolution) is replaced by it.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from structrep import process
from structrep.blocks import STAND_INS
from structrep.deployed.layers import Sizes
from structrep.deployed.methods import install, regraph
from structrep.errors import ExampleOnly, Refusal, StructrepError, Unreadable
from structrep.graph.calls import Call, Traced
from structrep.graph.facts import ASSIGNED, AT, CALL, COMPUTED, FORMULA, VALUE
from structrep.graph.queries import only_asserted
from structrep.graph.shapes import torch_name
from structrep.graph.structures import proxies
from structrep.guard.callers import Callers
from structrep.guard.sharing import Replicas, site
from structrep.match.merge import Merge, Segment
from structrep.modules.parametrized import computed, made_of, settle
from structrep.modules.paths import branches, parts_of, place, span, strays
from structrep.modules.uses import Place, Use, place_of, uses
from structrep.read.lower import lower
from structrep.read.nodes import read_node
from structrep.rewrite.edits import Edits
from structrep.rewrite.forward import Forward
from structrep.rewrite.norms import _shown_still, end
from structrep.rewrite.refill import _all_dead, _kernels, _nothing, _refill
from structrep.rewrite.units import SUMS, Unit, _scales, fallen, handed_back, host_of, units
from structrep.terms.layer import Same
from structrep.terms.term import ONE, geometry


class Draft:
    """How a model will be changed, decided before anything is.

    Merges that cannot be written back are left out and listed in `refused`, with the reason.
    """

    def __init__(self, traced: Traced, replicas: Replicas, merges: Iterable[Merge]) -> None:
        self.traced = traced
        self.replicas, self.callers = replicas, Callers(traced)
        self.refused: list[tuple[Merge, Refusal]] = []
        self.unwritable: dict[tuple[str, str], Refusal] = {}  # methods that cannot be written anew, by path and name
        self.merges = list(merges)
        self.strays: dict[Merge, set[Call]] = {}  # calls whose code reads what a merge takes away
        self.chosen: dict[Call, tuple[str, set[Merge]]] = {}  # calls whose code may use parts otherwise: where, of what
        self.uses: dict[tuple[nn.Module, str], list[Use]] = {}  # of parts, by the code of a method
        self.alike: dict[Any, tuple[dict[nn.Module, str], list[Use]]] = {}  # and of modules that have the same parts
        self.sites: dict[nn.Module, set[Place]] = defaultdict(
            set
        )  # where the code of a module was seen to do something
        self.given: dict[fx.Node, set[Call]] = defaultdict(set)  # a value -> the calls that are given it
        for call in itertools.chain(*traced.calls.values()):
            given = [] if call.leaf else [proxy.node for proxy in proxies((call.args, call.kwargs))]
            for node in (*given, *call.held):
                self.given[node].add(call)
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
                    if kept is not None:
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
                    self._written_by(Unit((Segment(node, node, ONE, (node,)),)), merge, dead=False)
            for call in handed_back(merge, self.given):
                for depth, owner in enumerate(around := list(call.chain())):
                    if merge in self.owned.get(owner, ()):
                        self.edits.owners[owner].update(around[:depth])
            for node in (one.node for one in merge.absorbed if one.ends):
                if node.op == "call_module":
                    self.ended.add(CALL.of(node))
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
                gone = {node for node in merge.nodes if node is not merge.root}
                gone = gone.union(*(one.changed for one in merge.absorbed))
                self.strays[merge] = {call for node in gone for call in self._seen_by(node) if _strays(node, call)}
                self.strays[merge] |= self._used_otherwise(merge)
                self.strays[merge].update(_told_to_do_nothing(merge.nodes))
            for call in self.strays[merge]:
                owner = next(call.homes())
                if call not in written and owner not in written:
                    inner = self.edits.owners.setdefault(owner, set())
                    around = list(call.chain())
                    inner.update(around[: around.index(owner)])
                if owner in self.edits.owners:
                    self.owned.setdefault(owner, set()).add(merge)

    def _used_otherwise(self, merge: Merge) -> set[Call]:
        """The calls whose code, on a path that was not taken, may run some of what is merged without the rest."""
        nodes = {*merge.nodes, *(one.node for one in merge.absorbed)}
        made = [CALL.of(node) for node in nodes]
        chains = [list((call.parent if call.leaf else call).chain()) for call in made]
        owner = next((one for one in chains[0] if all(one in chain for chain in chains)), None)
        paths = [call.path.split(".") for call in made]
        above = len(owner.path.split(".")) if owner is not None and owner.path else 0
        below = {tuple(path[:depth]) for path in paths for depth in range(above + 1, len(path) + 1)}
        some = {way for way in below if not all(tuple(path[: len(way)]) == way for path in paths)}
        parts = {self.traced.model.get_submodule(".".join(way)) for way in some}
        if not parts:
            return set()
        around = list(dict.fromkeys(call for chain in chains for call in chain))
        found: dict[Call, Use] = {}
        hangs: dict[frozenset[str], list[tuple[Call, Use]]] = {}
        for call in around:
            others = {one.bytecode for one in around if one.module is call.module and one is not call}
            for use in self._uses_of(call):
                if use.parts.isdisjoint(parts) or use.code in others - {call.bytecode}:
                    continue
                several = bool(use.hangs_on) and len(use.parts & parts) > 1
                if several or use.places.isdisjoint(self._sites_of(call.module)):
                    found.setdefault(call, use)
                else:
                    hangs.setdefault(use.hangs_on, []).append((call, use))
        if len(hangs) > 1:  # what is always the same part goes with what may be another
            for on, those in hangs.items():
                for call, use in those if on else ():
                    found.setdefault(call, use)
        for call, use in found.items():
            where = f"line {use.line} of {use.code.co_filename}"
            self.chosen.setdefault(call, (where, set()))[1].add(merge)
        return set(found)

    def _uses_of(self, call: Call) -> list[Use]:
        """What the code of a call does with parts of its module; read once for modules that have the same."""
        key = (call.module, call.method)
        if key not in self.uses:
            paths = {part: path for path, part in call.module.named_modules()}
            parts = tuple((path, type(part)) for part, path in paths.items())
            like = (call.bytecode, parts, *vars(call.module))
            first, found = self.alike.get(like, (paths, None))
            if found is None or not all(use.parts <= first.keys() for use in found):  # or parts that are held elsewhere
                self.uses[key] = uses(call.module, call.code)
                self.alike.setdefault(like, (paths, self.uses[key]))
            else:
                own = dict(zip(first, paths, strict=True))
                self.uses[key] = [replace(use, parts=frozenset(own[part] for part in use.parts)) for use in found]
        return self.uses[key]

    def _sites_of(self, module: nn.Module) -> set[Place]:
        if not self.sites:
            for call in itertools.chain(*self.traced.calls.values()):
                code, made = call.bytecode, self.sites[call.module]
                for step in call.steps if not call.leaf else ():
                    at = step.at if isinstance(step, Call) else AT.of(step)
                    if code is not None and at is not None and (node := place(code, at)) is not None:
                        made.add(place_of(node, code))
        return self.sites[module]

    def _seen_by(self, node: fx.Node) -> set[Call]:
        """The calls whose code has a value in hand: that made it, were given it, or were given it back."""
        found: set[Call] = set(self.given.get(node, ()))
        made: Call | None = CALL.of(node)
        while made is not None:
            found |= {made} if not made.leaf else set()
            if node not in {proxy.node for proxy in proxies(made.result)}:
                break
            made = made.parent
        return found

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

    def _write(self) -> dict[Merge, Refusal]:
        """Write all new forwards; gives the merges of those that cannot be written."""
        self.forwards: dict[Call, Forward] = {}
        failed: dict[Merge, Refusal] = {}
        for owner, written_out in self.edits.owners.items():
            try:
                if (doubt := self.callers.doubt(*site(owner))) is not None:
                    raise Unreadable(doubt)
                forward = self.forwards[owner] = Forward(self.traced, self.edits, owner, written_out)
                self._check_choice(owner, forward)
            except Refusal as reason:
                self.unwritable[reason.where if isinstance(reason, ExampleOnly) else site(owner)] = reason
                failed.update(dict.fromkeys(self.owned[owner], reason))
        for owner in self._idle_sums() - self.edits.owners.keys():
            with contextlib.suppress(Refusal):
                self.forwards[owner] = Forward(self.traced, self.edits, owner, set())
        at = self.traced.model.get_submodule
        self.at_rest = {owner: forward.holding(at(owner.path)) for owner, forward in self.forwards.items()}
        return failed

    def _check_choice(self, owner: Call, forward: Forward) -> None:
        """Raise where it cannot be told, and so not be guarded, what code picks parts by."""
        for call, (where, merges) in self.chosen.items():
            inside = owner in call.homes() and not merges.isdisjoint(self.owned[owner])
            told = [one for one in forward.reads if not one.asked.endswith(" is None)")]  # whether a part is there
            if inside and not (told or forward.ways or forward.guards):
                raise Unreadable(f"{where} may use what is merged otherwise, and what that hangs on is not known")

    def _idle_sums(self) -> set[Call]:
        """Blocks whose forward adds a merged layer to 0, as those of their class with more branches do, whose forwards
        are written anew: so are theirs, and launch nothing for it."""
        same: dict[fx.Node, None] = {}  # as a merged layer, but for nothing
        pending = [user for merge in self.merges for node in merge.nodes for user in node.users]
        while pending:
            node = pending.pop()
            if node not in same and _does_nothing(node):
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
        stay = {*self._used()[1], *self._of_layers_that_stay()} if release else set()
        for merge in self.merges:
            self._place(merge)
            if release:
                self._release(merge, held, read, stay)
        for unit in self.idle:
            assert unit.module is not None
            self._swap(unit.module.path, _nothing(unit))
        for call in self.ended:
            end(self._at(call.path))
        dead = self._settle()
        for owner, forward in self.forwards.items():
            module = self._at(owner.path)
            for name, tensor in forward.constants.items():
                module.register_buffer(name, tensor.detach().clone(), persistent=False)
            for (holder, alias), entry in forward.merged.items():
                vars(self._at(holder))[alias] = entry.of(self.model)
        self._bury(dead)
        for owner, forward in self.forwards.items():
            module = self._at(owner.path)
            gone = self.at_rest[owner] - forward.holding(module)  # what was asked for is no more, or is merged
            install(module, forward.method(lambda guard, gone=gone: guard not in gone))  # type: ignore[misc]
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

    def _of_layers_that_stay(self) -> list[int]:
        """The parameters of layers that are called and in no merge, by id."""
        merged = {node for merge in self.merges for node in merge.nodes}
        nodes = (node for trace in self.traced.traces for node in trace.nodes)
        called = (CALL.of(n).module for n in nodes if n.op == "call_module" and n not in merged)
        return [id(parameter) for module in called for parameter in module.parameters()]

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

    def _settle(self) -> set[str]:
        """Take from modules whose forward is written anew what they compute tensors of, if nothing needs those; gives
        the paths of all other tensors that nothing needs."""
        dead = self._dead_tensors() if self.edits.owners else set()
        alive = {self.traced.names.get(tensor) for tensor in self._used()[1]} if dead else set()
        for owner in self.edits.owners if dead else ():
            module, names = self._at(owner.path), computed(self._at(owner.path))
            held = {f"{owner.path}.{name}" if owner.path else name for name in made_of(module)}
            if held & dead and held.isdisjoint(alive):
                settle(module)
                module._parameters |= dict.fromkeys(names)
            dead -= held
        return dead

    def _bury(self, tensors: set[str]) -> None:
        """Set to None the modules and parameters that only dead nodes used.

        Args:
            tensors: paths of such parameters and buffers.
        """
        if not self.edits.owners:
            return
        dead = {self._at(call.path) for call in self._dead_calls()} | self._idle_holders(tensors)
        for owner in self.edits.owners:
            self._bury_below(self._at(owner.path), dead)
        for name in tensors:
            self._drop_tensor(name)

    def _dead_tensors(self) -> set[str]:
        """Paths of the tensors that dead nodes were computed from, and nothing else."""
        dead, alive = self._used()
        assigned = [ASSIGNED.of(n) for merge in self.merges for n in merge.nodes if ASSIGNED.get(n)]
        dead.update(id(tensor) for formula in assigned for tensor in formula.tensors)
        called = {call.path for calls in self.traced.calls.values() for call in calls if call.leaf}
        names = {self.traced.names[tensor] for tensor in dead - alive if tensor in self.traced.names}
        return {name for name in names if name.rpartition(".")[0] not in called}

    def _used(self) -> tuple[set[int], set[int]]:
        """The tensors that dead nodes use otherwise than by calling a layer, and those that others do, by id."""
        dead: set[int] = set()
        alive: set[int] = set()
        merged = {node for merge in self.merges for node in merge.nodes}
        for trace in self.traced.traces:
            alive.update(*map(self._made_of, pytree.tree_leaves(trace.root.result)))
            for node in trace.nodes:
                if node.op == "get_attr" and node.users and VALUE.known(node):
                    formula = FORMULA.get(node)
                    held = {id(t) for t in formula.tensors} if formula else {id(VALUE.of(node))}
                    (dead if self._only_dead(node) else alive).update(held)
                for one in (COMPUTED.get(node) or {}).values() if node not in merged else ():
                    alive.update(map(id, one.formula.tensors))
        return dead, alive

    def _made_of(self, given: Any) -> set[int]:
        """A constant that the model gives back, and what it is computed from, by id."""
        found: set[int] = set()
        pending = [given]
        while pending:
            one = pending.pop()
            if isinstance(one, Tensor) and id(one) not in found:
                found.add(id(one))
                if (origin := self.traced.origins.get(id(one))) is not None:
                    pending += pytree.tree_leaves((origin.args, origin.kwargs))
        return found

    def _only_dead(self, node: fx.Node) -> bool:
        """Whether a constant is of use to dead nodes alone, perhaps by way of other constants."""
        pending, seen = [node], {node}
        for one in pending:
            for user in one.users:
                if user in seen or user in self.edits.dead or user in self.edits.ended or self.replicas.repeats(user):
                    continue
                if not VALUE.known(user):
                    return False
                pending.append(user)
                seen.add(user)
        return True

    def _idle_holders(self, dead: set[str]) -> set[nn.Module]:
        """Modules of which nothing was called, which only held tensors that are dead now, and that nothing asks for."""
        parts = [name.split(".") for name in dead]
        homes = {".".join(path[:depth]) for path in parts for depth in range(1, len(path))}
        called = {module for module, _ in self.traced.calls}
        homes -= {holder for forward in self.forwards.values() for holder, _ in forward.merged}
        holders = ((path, self.traced.model.get_submodule(path)) for path in homes)
        return {
            self._at(path)
            for path, module in holders
            if called.isdisjoint(module.modules()) and {f"{path}.{n}" for n, _ in module.named_parameters()} <= dead
        }

    def _dead_calls(self) -> list[Call]:
        """Calls in which everything is dead."""
        calls = {call for inner in self.edits.owners.values() for call in inner}
        dead = {c for c in calls if all(n in self.edits.dead or only_asserted(n) or VALUE.known(n) for n in c.nodes())}
        return [
            c
            for c in dead
            if c.method == "forward"
            and all(other in dead or self.replicas.is_repeat(other) for other in self.traced.calls[c.module, c.method])
        ]

    def _bury_below(self, module: nn.Module, dead: set[nn.Module]) -> None:
        holds_order = isinstance(module, (nn.ModuleList, nn.Sequential))
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            if _all_dead(child, dead):
                module._modules[name] = nn.Identity() if holds_order else None
            else:
                self._bury_below(child, dead)

    def _drop_tensor(self, path: str) -> None:
        parent, _, name = path.rpartition(".")
        try:
            module = self._at(parent)
        except AttributeError:
            return  # buried with its module
        with _shown_still(module):
            for store in (module._parameters, module._buffers):
                if name in store:
                    store[name] = None
        if name == "running_mean" and "num_batches_tracked" in module._buffers:
            module._buffers["num_batches_tracked"] = None
            module.__dict__["track_running_stats"] = False  # or loading a plain state dict would count batches again


def _does_nothing(node: fx.Node) -> bool:
    try:
        return isinstance(read_node(node), Same)
    except Refusal:  # a norm of each batch
        return False


def _told_to_do_nothing(nodes: Sequence[fx.Node]) -> Iterator[Call]:
    """The calls that do nothing between layers for a number, a factor of 1, that their code does not spell out."""
    inert = [node.op != "call_module" and _does_nothing(node) for node in nodes]
    while inert and inert[-1]:  # behind all of them it may do something
        inert.pop()
    for node in (node for node, nothing in zip(nodes, inert, strict=False) if nothing):
        numbers = [one for one in (*node.args, *node.kwargs.values()) if type(one) in (int, float)]
        at = AT.of(node)
        spelt = place(CALL.of(node).bytecode, at) if numbers and at is not None else None
        given = [*ast.iter_child_nodes(spelt), *(one.value for one in getattr(spelt, "keywords", ()))] if spelt else []
        told = any(all(getattr(one, "value", None) != number for one in given) for number in numbers)
        if told and "dropout" not in torch_name(node):
            yield CALL.of(node)


def _strays(node: fx.Node, call: Call) -> bool:
    """Whether a call's code may read a value on a path that was not taken, or read another instead."""
    code = call.bytecode
    if code is None or str(getattr(inspect.unwrap(call.code), "__module__", "")).startswith("torch."):
        return False
    if any(map(branches, call.held.get(node, ()))):
        return True
    maker: fx.Node | Call = node
    taken: list[int | None] = []
    names: list[str] = []
    for step in call.steps:
        if isinstance(step, fx.Node):
            if node in step.all_input_nodes:
                taken.append(AT.of(step))
            continue
        if node in {proxy.node for proxy in proxies((step.args, step.kwargs))}:
            taken.append(step.at)
        if step in CALL.of(node).chain():
            maker = step
    given = inspect.signature(call.function).bind(*call.args, **call.kwargs).arguments
    names = [name for name, value in given.items() if node in {proxy.node for proxy in proxies(value)}]
    at = maker.at if isinstance(maker, Call) else AT.of(maker) if CALL.of(maker) is call else None
    returned = node in {proxy.node for proxy in proxies(call.result)}
    spans = frozenset(None if one is None else span(code, one) for one in taken)
    made = None if at is None else span(code, at)
    single = all(isinstance(given[name], fx.Proxy) for name in names)
    single &= isinstance(maker, fx.Node) or isinstance(maker.result, fx.Proxy)
    parts = parts_of(call.module)
    return strays(code, made, frozenset(names), spans, returned, parts, single, call.counted)
