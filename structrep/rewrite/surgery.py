"""A draft, done to a model."""

from __future__ import annotations

import re
from collections import Counter

from torch import fx, nn

from structrep.deployed.answers import written
from structrep.deployed.layers import Sizes
from structrep.deployed.methods import Method, install, regraph
from structrep.errors import StructrepError
from structrep.match.merge import Merge
from structrep.modules.source import functions, words_of
from structrep.modules.wrappers import as_before
from structrep.read.lower import lower, lower_table
from structrep.rewrite.draft import Draft
from structrep.rewrite.edit import Edit
from structrep.rewrite.guards import NUMBERS
from structrep.rewrite.leftovers import Leftovers
from structrep.rewrite.norms import end
from structrep.rewrite.refill import kernels_of, nothing, refill
from structrep.rewrite.slot import Slot
from structrep.rewrite.untouched import Untouched

_CONVERTS = re.compile("convert|deploy|equivalent|fuse|merge|reparam")  # in the names that published converters have


class Surgery:
    """A model that is changed as a draft says.

    Args:
        model: one that has the names of the traced one.
    """

    def __init__(self, draft: Draft, model: nn.Module) -> None:
        self.draft, self.placement, self.model = draft, draft.placement, model
        self.left = Leftovers(draft.traced, draft.replicas, self.placement.changes, draft.forwards, draft.merges)
        self.places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}  # who holds a module, under which name
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self.places.setdefault(child, []).append((parent, name))

    def perform(self, release: bool = False) -> nn.Module:
        """Change the model; returns it, or what stands for it if it was itself a block.

        Args:
            release: give back the memory of kernels as soon as they are merged.

        Raises:
            StructrepError: a forward that was written anew would no longer do what the model does.
        """
        self._check_unchanged()
        self._put_layers(release)
        for call in self.placement.ended:
            end(self._at(call.path))
        dead = self.left.settle(self.model)
        for owner, forward in self.draft.forwards.items():
            module = self._at(owner.path)
            for name, tensor in forward.constants.items():
                module.register_buffer(name, tensor.detach().clone(), persistent=False)
            for (holder, alias), entry in forward.merged.items():
                kept, tensor = vars(self._at(holder)), entry.of(self.model)
                kept[alias], kept[f"{alias}{NUMBERS}"] = tensor, tensor.detach().clone()
                written(tensor, tensor)  # as it is now
        self.left.bury(self.model, dead)
        self._install()
        return self.model

    def _check_unchanged(self) -> None:
        """Raise where a forward that was written anew would no longer do what the model does."""
        for owner, forward in self.draft.forwards.items():
            for guard in self.draft.at_rest[owner] - forward.holding(self._at(owner.path)):
                raise StructrepError(
                    f"{guard.asked} of {owner.path or 'the model'} was {guard.told} when this plan was made, and is "
                    f"another now: make a new one, structrep.plan(model)"
                )

    def _put_layers(self, release: bool) -> None:
        held = Counter(id(p) for _, p in self.model.named_parameters(remove_duplicate=False))
        merges = self.draft.merges
        read = Counter(id(t) for merge in merges for layer in merge.term.leaves() for t in kernels_of(layer))
        stay = self.left.needed() if release else set()
        for merge in (one for one in merges if not one.idle):
            self._place(merge)
            if release:
                self._release(merge, held, read, stay)
        for unit in self.placement.idle:
            assert unit.module is not None
            self._swap(unit.module.path, nothing(unit))

    def _place(self, merge: Merge) -> None:
        map_, host = merge.value(), self.placement.hosts[merge]
        merge.cached = None
        bias = any(layer.shifts for layer in merge.term.leaves())
        kernels = [layer for segment in host.segments for layer in segment.term.leaves() if layer.weight is not None]
        learned = any(tensor.requires_grad for layer in kernels for tensor in kernels_of(layer))
        like = kernels[0].weight
        assert like is not None
        if (
            host.module is not None
            and merge.sizes is None
            and refill(self._at(host.module.path), map_, like, bias=bias, requires_grad=learned)
        ):
            return
        if merge.is_table:
            layer: nn.Module = lower_table(map_, like, requires_grad=learned)
        else:
            layer = lower(map_, like, bias=bias, requires_grad=learned)
        if merge.sizes is not None:
            layer = nn.Sequential(Sizes(*merge.sizes), *(layer if isinstance(layer, nn.Sequential) else [layer]))
        if host.module is not None:
            self._swap(host.module.path, as_before(self._at(host.module.path), layer))
            return
        path, name = self.placement.homes[merge]
        module = self._at(path)
        if host.root in self.placement.changes.refilled:
            module._parameters |= layer._parameters
        else:
            module.__dict__.pop(name, None)
            module.add_module(name, layer)

    def _release(self, merge: Merge, held: Counter[int], read: Counter[int], stay: set[int]) -> None:
        """Give back the memory of kernels that a merge was the last to read, before the next is made."""
        names = self.draft.traced.names
        for layer in merge.term.leaves():
            for tensor in kernels_of(layer):
                if read[id(tensor)] > 1 or id(tensor) in stay or id(tensor) not in names:
                    continue
                own = self._parameter(names[id(tensor)])
                if own is not None and own.data_ptr() == tensor.data_ptr() and held[id(own)] == 1:
                    own.data = own.data.new_empty(0)  # of a layer that is about to go
                tensor.data = tensor.data.new_empty(0)

    def _parameter(self, path: str) -> nn.Parameter | None:
        """The parameter at a path, if the model still has it."""
        try:
            return self.model.get_parameter(path)
        except AttributeError:
            return None

    def _install(self) -> None:
        """Install the methods, with the guards that hold still: what was asked for may be no more, or merged."""
        for owner, forward in self.draft.forwards.items():
            module = self._at(owner.path)
            now, before = forward.holding(module), self.draft.at_rest[owner]
            stays = lambda one, now=now, before=before: one in now or not (one.later or one in before)  # noqa: E731
            if not isinstance(forward, (Slot, Untouched)) and not (isinstance(forward, Edit) and forward.same):
                install(module, forward.method(stays))
                self._stop_converters(owner.path, module)
            if isinstance(module, fx.GraphModule):
                regraph(module)

    def _stop_converters(self, path: str, module: nn.Module) -> None:
        """Have methods that convert the module themselves say that there is nothing left to convert: without the
        branches they would die, or give zeros."""
        base: type = getattr(type(module), "__structrep_base__", type(module))
        had = self.draft.traced.model.get_submodule(path)._modules
        gone = {name for name, part in had.items() if part is not None and module._modules.get(name) is None}
        for name, function in functions(base).items():
            if _CONVERTS.search(name) and (parts := sorted(gone & words_of(function))):
                said = (
                    f"{base.__name__}.{name}() is for the training-time model: structrep has merged {', '.join(parts)} "
                    f"already, and there is nothing left to convert"
                )
                source = f"def {name}(self, *args, **kwargs):\n    raise RuntimeError({said!r})\n"
                install(module, Method.of(name, source, {}))

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
            self.places[part] = [one for one in self.places.get(part, ()) if one[0] not in gone]
            if not self.places[part]:
                del self.places[part]
