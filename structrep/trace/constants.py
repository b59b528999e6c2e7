"""What is computed of weights alone while a trace runs, and how."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from structrep.deployed.answers import numbers
from structrep.graph import operations
from structrep.graph.calls import Call, Entry, Origin, storage
from structrep.graph.facts import ASSIGNED
from structrep.graph.reads import PLACEHOLDER
from structrep.graph.structures import alike, is_traced, snapshot
from structrep.graph.table import QUESTIONS
from structrep.modules import parametrized
from structrep.terms.layer import Formula
from structrep.trace.aten import gives_more, in_torch
from structrep.trace.origins import Origins
from structrep.trace.patches import unwatched
from structrep.trace.reach import Reach
from structrep.trace.reads import Reads
from structrep.trace.recorder import Recorder

_ASKED = {name for name, one in QUESTIONS.items() if one.of in ("dtype", "place", "gradient")}
_TOLD = QUESTIONS.keys() | {"grad"}
_SHAPES = {"__len__", *(name for name, one in QUESTIONS.items() if one.of in ("rank", "sizes"))}
# How code is told what the dtype of a tensor is like, and of its numbers.
_DTYPES = {
    **{"element_size": "element_size()", "itemsize": "itemsize", "type": "type()", "is_complex": "is_complex()"},
    "is_floating_point": "is_floating_point()",
}
_NUMBERS = {
    **{
        "item": f"{PLACEHOLDER}.item()",
        "tolist": f"{PLACEHOLDER}.tolist()",
        "__bool__": f"bool({PLACEHOLDER})",
        "is_nonzero": f"bool({PLACEHOLDER})",
    },
    **{
        "__float__": f"float({PLACEHOLDER})",
        "__int__": f"int({PLACEHOLDER})",
        "__index__": f"int({PLACEHOLDER})",
        "__complex__": "",
    },
    **dict.fromkeys(("numpy", "__array__", "__contains__", "equal", "allclose"), ""),
}


class Constants(TorchFunctionMode):
    """Watches what the trace computes for real: notes where constants come from, stops what must not be baked in.

    Args:
        recorder, reach, origins, reads: are told of it.
        entries: plain tensors in what modules hold, by id.
        parameters, buffers: of the module that is traced.
    """

    def __init__(
        self,
        recorder: Recorder,
        reach: Reach,
        origins: Origins,
        reads: Reads,
        entries: Mapping[int, Entry],
        parameters: Iterable[Tensor],
        buffers: Iterable[Tensor],
    ) -> None:
        super().__init__()
        self.recorder, self.reach, self.origins, self.reads = recorder, reach, origins, reads
        self.names, self.entries = reach.names, entries
        self.stored = {storage(p) for p in parameters if p.numel()}
        self.held = self.stored | {storage(b) for b in buffers if b.numel()}
        self.unsteady: set[int] = set()  # storages that are other numbers at every call
        self.assigned: dict[int, tuple[Tensor, Call]] = {}  # id of a parameter -> what was assigned to its data, where
        self.touched: set[int] = set()  # ids of what was computed with
        self.used: dict[int, list[fx.Node]] = defaultdict(list)  # id of a parameter -> layers called that have it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_traced((args, kwargs)):
            return func(*args, **kwargs)
        if isinstance(func, OpOverload) and not gives_more(func):
            op, func, args, kwargs = in_torch(func, args, kwargs)
            func = getattr(Tensor, func) if op == "call_method" else func
        func = unwatched(func)
        name = getattr(func, "__name__", "")
        self._note_touched(func, pytree.tree_leaves((args, kwargs)))
        if name == "__set__" and id(args[0]) in self.names:  # `weight.data = ...`, at every call
            call = self.recorder.stack[-1]
            self.reach.fetch(self.names[id(args[0])], call)
            self.assigned[id(args[0])] = args[1], next(call.homes())
            for node in self.used[id(args[0])]:
                ASSIGNED.note(node, None)  # it was called with other numbers than it is left with
        if name == "__get__" and func.__self__.__name__ in ("dtype", "device") and id(args[0]) in self.names:
            self.reach.ask(self.names[id(args[0])], self.recorder.stack[-1])
        if operations.draws(func, args, kwargs):
            raise RuntimeError(f"torch.{name} draws new numbers at every call")
        written = [one for one in operations.written(func, args, kwargs) if isinstance(one, Tensor)]
        for one in written:
            self.note_written(one, name)
            self.origins.put[storage(one)] += (
                given for given in pytree.tree_leaves((args, kwargs)) if isinstance(given, Tensor) and given is not one
            )
        drawn = None if operations.has_schema(func) else torch.get_rng_state()
        result = func(*args, **kwargs)
        if drawn is not None and not torch.equal(drawn, torch.get_rng_state()):
            raise RuntimeError(f"{name} draws new random numbers at every call")
        if name == "__get__" and func.__self__.__name__ in _ASKED:
            return self._ask(args[0], func.__self__.__name__, result)
        self._note_told(func.__self__.__name__ if name == "__get__" else name, args, kwargs, result)
        itself = any(result is one for one in pytree.tree_leaves((args, kwargs)))  # `x.to(x.dtype)`
        if isinstance(result, Tensor) and not written and not itself:
            self.origins.known[id(result)] = Origin(result, func, args, kwargs, self.recorder.contexts.now)
        several = result if isinstance(result, (tuple, list)) and not written else ()
        for item, one in enumerate(several):
            if isinstance(one, Tensor) and id(one) not in self.names:
                self.origins.known[id(one)] = Origin(one, func, args, kwargs, self.recorder.contexts.now, item)
        return result

    def holds(self, tensor: Tensor) -> bool:
        """Whether a module has a tensor, or one that it is a view of."""
        return id(tensor) in self.names or id(tensor) in self.entries or storage(tensor) in self.held

    def note_written(self, tensor: Tensor, name: str) -> None:
        """Note that a forward writes to a tensor.

        Raises:
            RuntimeError: the model computes with it, as a parameter.
        """
        self.origins.written.add(storage(tensor))
        if not self.origins.is_fresh(tensor):
            if storage(tensor) in self.stored:
                raise RuntimeError(f"{name} writes to a parameter during forward")
            self.unsteady.add(storage(tensor))
            self.recorder.stack[-1].mutates = True

    def _ask(self, tensor: Tensor, what: str, told: Any) -> Any:
        """The answer to what a tensor is asked apart from its numbers; of a computed one, of what it is made of."""
        while id(tensor) not in self.names and (origin := self.origins.known.get(id(tensor))) is not None:
            given = [one for one in pytree.tree_leaves((origin.args, origin.kwargs)) if isinstance(one, Tensor)]
            source = next((one for one in given if getattr(one, what) == told), None)
            if source is None:
                return told
            tensor = source
        path = self.names.get(id(tensor))
        return told if path is None else self.reads.ask(tensor, path, f".{what}", told)

    def _note_told(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], told: Any) -> None:
        """Note what code is told of the shape, the dtype or the numbers of tensors that the model holds, or of what it
        computes of them."""
        asks = name in _NUMBERS or name in _SHAPES or name in _DTYPES
        for given in pytree.tree_leaves((args, kwargs)) if asks else ():
            formula = self.origins.formula(given) if isinstance(given, Tensor) else None
            for one in formula.tensors if formula else (given,):
                path, entry = self.names.get(id(one)), self.entries.get(id(one))
                if path is None and entry is None:
                    continue
                if name in _SHAPES:
                    text, answer = f"{PLACEHOLDER}.shape", tuple(one.shape)
                elif name in _DTYPES:
                    text, answer = f"{PLACEHOLDER}.{_DTYPES[name]}", told
                elif one is given and len(args) == 1 and _NUMBERS[name]:
                    text, answer = _NUMBERS[name], told
                else:
                    text, answer = f"structrep_numbers({PLACEHOLDER})", numbers(one)
                if name in _DTYPES and (len(args) > 1 or kwargs or one.dtype != given.dtype):
                    continue  # a cast; a source of another dtype
                if path is not None:
                    self.reads.ask(one, path, text, answer, counts=False)
                elif entry is not None:
                    holder = next(module for module, where in self.recorder.paths.items() if where == entry.holder)
                    asked = text.replace(PLACEHOLDER, f"{PLACEHOLDER}{entry.text}")
                    self.reads.ask(holder, entry.holder, asked, answer, counts=False)

    def _note_touched(self, func: Any, given: list[Any]) -> None:
        """Raise where a forward computes with weights that it assigns: it may do another thing at every call."""
        what = getattr(getattr(func, "__self__", None), "__name__", "")
        if getattr(func, "__name__", "") == "__set__" and what == "data":
            changed, given = given[0], given[1:]
            if id(changed) in self.touched:
                raise RuntimeError("it assigns to weights that it computes with")
        if what not in _TOLD:
            self.touched.update(id(one) for one in given if isinstance(one, Tensor))
        if any(id(one) in self.assigned for one in given if isinstance(one, Tensor) and what not in _TOLD):
            raise RuntimeError("it computes with weights that it assigns to")

    def note_assigned(self, node: fx.Node, call: Call) -> None:
        """Note how the forward that a layer is called in has computed its numbers, if it has, as `meta["assigned"]`."""
        held = [tensor for tensor in call.module._parameters.values() if tensor is not None]
        given = [self.assigned[id(tensor)] for tensor in held if id(tensor) in self.assigned]
        formulas = [self.origins.formula(value) for value, home in given if home is next(call.homes())]
        found = [formula for formula in formulas if formula is not None]
        ASSIGNED.note(node, None)
        if found and len(found) == len(held) and not any(self.used[id(tensor)] for tensor in held):
            tensors = {id(tensor): tensor for formula in found for tensor in formula.tensors}
            calls = frozenset().union(*(formula.calls for formula in found))
            ASSIGNED.note(node, Formula(calls, tuple(tensors.values())))
        for tensor in held:
            self.used[id(tensor)].append(node)


def compute(module: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors that a module computes before every call.

    Raises:
        RuntimeError: that changes the module.
    """
    held, versions = _state_of(module, names)
    values = parametrized.compute(module)
    now, written = _state_of(module, names)
    if written != versions or not alike(held, now):
        mode = ", in training mode: call model.eval() first" if any(one.training for one in module.modules()) else ""
        raise RuntimeError(f"to compute it changes the layer{mode}")
    return values


def _state_of(module: nn.Module, but: Collection[str]) -> tuple[Any, list[int]]:
    """What a module and all below it hold, but for some of its tensors, and how often tensors were written."""
    held = [{k: v for k, v in part.__dict__.items() if part is not module or k not in but} for part in module.modules()]
    tensors = (*module.parameters(), *module.buffers())
    return snapshot(held), [0 if tensor.is_inference() else tensor._version for tensor in tensors]
