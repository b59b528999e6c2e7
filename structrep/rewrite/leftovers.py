"""What nothing needs any more, once merges are made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from structrep.errors import Unreadable
from structrep.graph.calls import Call, Traced
from structrep.graph.facts import ASSIGNED, CALL, COMPUTED, FORMULA, VALUE
from structrep.graph.queries import only_asserted
from structrep.guard.sharing import Replicas
from structrep.match.merge import Merge
from structrep.modules.parametrized import computed, made_of, settle
from structrep.rewrite.edit import Edit
from structrep.rewrite.node_changes import NodeChanges
from structrep.rewrite.norms import shown_still
from structrep.rewrite.refill import all_dead


class Leftovers:
    """The modules and tensors that only what vanishes used.

    Args:
        forwards: how methods are changed.
    """

    def __init__(
        self,
        traced: Traced,
        replicas: Replicas,
        changes: NodeChanges,
        forwards: Mapping[Call, Any],
        merges: Sequence[Merge],
    ) -> None:
        self.traced, self.replicas, self.changes = traced, replicas, changes
        self.forwards, self.merges = forwards, merges

    def _at(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def of_layers_that_stay(self) -> list[int]:
        """The parameters of layers that are called and in no merge, by id."""
        merged = {node for merge in self.merges for node in merge.nodes}
        nodes = (node for trace in self.traced.traces for node in trace.nodes)
        called = (CALL.of(n).module for n in nodes if n.op == "call_module" and n not in merged)
        return [id(parameter) for module in called for parameter in module.parameters()]

    def of_what_is_mentioned(self) -> Iterator[int]:
        """The tensors that edited text still asks for on some path, by id."""
        mentions = self._mentions()
        for path in mentions & {call.path for call in self.dead_calls()}:
            yield from map(id, self.traced.model.get_submodule(path).parameters())
        yield from (tensor for tensor, path in self.traced.names.items() if path in mentions)

    def _mentions(self) -> set[str]:
        return {path for one in self.forwards.values() if isinstance(one, Edit) for path in one.mentions}

    def needed(self) -> set[int]:
        """The tensors that stay, by id."""
        return {*self.used()[1], *self.of_layers_that_stay(), *self.of_what_is_mentioned()}

    def settle(self, model: nn.Module) -> set[str]:
        """Take from modules whose forward is written anew what they compute tensors of, if nothing needs those; gives
        the paths of all other tensors that nothing needs."""
        self.model = model
        dead = self._dead_tensors() if self.changes.owners else set()
        alive = {self.traced.names.get(tensor) for tensor in self.used()[1]} if dead else set()
        for owner in self.changes.owners if dead else ():
            module, names = self._at(owner.path), computed(self._at(owner.path))
            held = {f"{owner.path}.{name}" if owner.path else name for name in made_of(module)}
            if held & dead and held.isdisjoint(alive):
                settle(module)
                module._parameters |= dict.fromkeys(names)
            dead -= held
        return dead

    def bury(self, model: nn.Module, tensors: set[str]) -> None:
        """Set to None the modules and parameters that only dead nodes used.

        Args:
            tensors: paths of such parameters and buffers.
        """
        self.model = model
        dead = {self._at(call.path) for call in self.dead_calls()} | self._idle_holders(tensors)
        mentions = self._mentions()
        kept = self._mentioned(mentions, dead)
        for owner in self.changes.owners:
            self._bury_below(self._at(owner.path), dead - kept)
        for name in tensors - mentions:
            with contextlib.suppress(AttributeError):  # buried with its module
                if self._at(name.rpartition(".")[0]) not in kept:
                    self._drop_tensor(name)

    def _mentioned(self, paths: set[str], dead: set[nn.Module]) -> set[nn.Module]:
        """The dead modules that edited text still asks for on some path, with all that is in them."""
        asked = (part for path, part in self.model.named_modules(remove_duplicate=False) if path in paths)
        return {inner for part in asked if part in dead for inner in part.modules()}

    def _dead_tensors(self) -> set[str]:
        """Paths of the tensors that dead nodes were computed from, and nothing else."""
        dead, alive = self.used()
        assigned = [ASSIGNED.of(n) for merge in self.merges for n in merge.nodes if ASSIGNED.get(n)]
        dead.update(id(tensor) for formula in assigned for tensor in formula.tensors)
        names = {self.traced.names[tensor] for tensor in dead - alive if tensor in self.traced.names}
        called = {call.path for calls in self.traced.calls.values() for call in calls if call.leaf} - self._uncalled
        return {name for name in names if called.isdisjoint(_holders(name))}

    @cached_property
    def computed_from(self) -> set[Call]:
        """The calls of parts that nothing was seen to make, whose numbers were all in what a forward computed of
        them: these parts go with that."""
        found = {
            root
            for root in self.traced.guessed
            if {*_holders(f"{root.path}."), ""}.isdisjoint(self.traced.whole)
            and any(True for _ in root.module.parameters())
        }
        while found:
            dead, alive = self._used(found)
            left = {root for root in found if {*map(id, root.module.parameters())} <= dead - alive}
            if left == found:
                break
            found = left
        return found

    @property
    def _uncalled(self) -> set[str]:
        """Paths of the modules of these parts."""
        inside = ((root.path, name) for root in self.computed_from for name, _ in root.module.named_modules())
        return {f"{path}.{name}".rstrip(".") for path, name in inside}

    def used(self) -> tuple[set[int], set[int]]:
        """The tensors that dead nodes use otherwise than by calling a layer, and those that others do, by id."""
        return self._used(self.computed_from)

    def _used(self, uncalled: Set[Call]) -> tuple[set[int], set[int]]:
        dead: set[int] = set()
        alive: set[int] = set()
        merged = {node for merge in self.merges for node in merge.nodes}
        for trace in self.traced.traces:
            if trace.root in uncalled:
                continue
            alive.update(*map(self._made_of, pytree.tree_leaves(trace.root.result)))
            for node in trace.nodes:
                if node.op == "get_attr" and node.users and VALUE.known(node):
                    formula = FORMULA.get(node)
                    held = {id(t) for t in formula.tensors} if formula else {id(VALUE.of(node))}
                    (dead if self._only_dead(node) else alive).update(held)
                made = COMPUTED.get(node) if node not in merged else None
                if isinstance(made, Unreadable):  # anew at every call
                    alive.update(map(id, CALL.of(node).module.parameters()))
                elif made:
                    alive.update(id(tensor) for one in made.values() for tensor in one.formula.tensors)
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
                if (
                    user in seen
                    or user in self.changes.dead
                    or user in self.changes.ended
                    or self.replicas.repeats(user)
                ):
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
        called -= {self.traced.model.get_submodule(path) for path in self._uncalled}
        homes -= {holder for forward in self.forwards.values() for holder, _ in forward.merged}
        found = set()
        for path in homes:
            module = self.traced.model.get_submodule(path)
            if called.isdisjoint(module.modules()) and {f"{path}.{n}" for n, _ in module.named_parameters()} <= dead:
                with contextlib.suppress(AttributeError):  # gone with the layer whose numbers it was to compute
                    found.add(self._at(path))
        return found

    def dead_calls(self) -> list[Call]:
        """Calls in which everything is dead."""
        calls = {call for inner in self.changes.owners.values() for call in inner}
        dead = {
            c for c in calls if all(n in self.changes.dead or only_asserted(n) or VALUE.known(n) for n in c.nodes())
        }
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
            if all_dead(child, dead):
                module._modules[name] = nn.Identity() if holds_order else None
            else:
                self._bury_below(child, dead)

    def _drop_tensor(self, path: str) -> None:
        parent, _, name = path.rpartition(".")
        module = self._at(parent)
        with shown_still(module):
            for store in (module._parameters, module._buffers):
                if name in store:
                    store[name] = None
        if name == "running_mean" and "num_batches_tracked" in module._buffers:
            module._buffers["num_batches_tracked"] = None
            module.__dict__["track_running_stats"] = False  # or loading a plain state dict would count batches again


def _holders(name: str) -> set[str]:
    """The paths of all modules that a tensor is in."""
    parts = name.split(".")
    return {".".join(parts[:depth]) for depth in range(len(parts))}
