"""What is computed of weights alone while a trace runs, and how."""

from __future__ import annotations

import functools
import random
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from structrep.algebra.precision import doubled
from structrep.algebra.precision import exact as on_float64
from structrep.algebra.shadows import Shadows
from structrep.deployed.answers import numbers
from structrep.graph import operations
from structrep.graph.calls import Call, Origin, storage
from structrep.graph.facts import ASSIGNED
from structrep.graph.reads import PLACEHOLDER
from structrep.graph.structures import is_traced, snapshot
from structrep.terms.layer import Computed, Formula
from structrep.trace.aten import gives_more, in_torch
from structrep.trace.patches import unwatched
from structrep.trace.proxies import ASKED, TOLD

if TYPE_CHECKING:
    from structrep.trace.tracer import CallTracer


ROUNDINGS = 4  # of a dtype, by which what it computes may differ from what float64 does


def nearest_to(found: Any, stored: Any, given: Iterable[Any]) -> Any:
    """What float64 makes of a formula, if it is what was stored but for rounding: a step, `round(x)`, may be another.

    Args:
        given: the numbers on the way, whose size tells what rounding is.
    """
    if not (isinstance(found, Tensor) and isinstance(stored, Tensor) and stored.is_floating_point()):
        return stored
    if found.shape != stored.shape or not stored.numel():
        return stored
    numbers = [one.detach() for one in (found, *given) if isinstance(one, Tensor) and one.numel()]
    # of masks, of float8 and of numbers without a sign torch has no absolute value
    numbers = [one.double() if one.itemsize == 1 or not one.dtype.is_signed else one for one in numbers]
    sizes = [one.abs().max() for one in numbers]
    rounding = ROUNDINGS * torch.finfo(stored.dtype).eps * max(float(size) for size in sizes)
    off = float((doubled(found) - doubled(stored)).abs().max())
    return doubled(found) if off <= rounding else stored


# How code is told of the shape of a tensor, of what its dtype says, and of its numbers.
_SHAPES = {"shape", "ndim", "size", "numel", "nelement", "dim", "ndimension", "__len__"}
_KINDS = {
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
    """Watches what the trace computes for real: notes where constants come from, stops what must not be baked in."""

    def __init__(self, tracer: CallTracer) -> None:
        super().__init__()
        self.tracer = tracer
        self.origins: dict[int, Origin] = {}
        self.written: set[int] = set()  # storages written in place: how they came about is no longer one expression
        self.unsteady: set[int] = set()  # storages that are other numbers at every call
        self.assigned: dict[int, tuple[Tensor, Call]] = {}  # id of a parameter -> what was assigned to its data, where
        self.touched: set[int] = set()  # ids of what was computed with
        self.used: dict[int, list[fx.Node]] = defaultdict(list)  # id of a parameter -> layers called that have it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_traced((args, kwargs)):
            return func(*args, **kwargs)
        if isinstance(func, OpOverload) and not gives_more(func):
            kind, func, args, kwargs = in_torch(func, args, kwargs)
            func = getattr(Tensor, func) if kind == "call_method" else func
        func = unwatched(func)
        name = getattr(func, "__name__", "")
        self._note_touched(func, pytree.tree_leaves((args, kwargs)))
        if name == "__set__" and id(args[0]) in self.tracer.names:  # `weight.data = ...`, at every call
            path, call = self.tracer.names[id(args[0])], self.tracer.stack[-1]
            self.tracer.reached.setdefault(path, set()).add(call)
            self.tracer.fetched[path, call] += 1
            self.assigned[id(args[0])] = args[1], next(call.homes())
            for node in self.used[id(args[0])]:
                ASSIGNED.note(node, None)  # it was called with other numbers than it is left with
        if name == "__get__" and func.__self__.__name__ in ("dtype", "device") and id(args[0]) in self.tracer.names:
            self.tracer.asked[self.tracer.names[id(args[0])], self.tracer.stack[-1]] += 1
        if operations.draws(func, args, kwargs):
            raise RuntimeError(f"torch.{name} draws new numbers at every call")
        written = [one for one in operations.written(func, args, kwargs) if isinstance(one, Tensor)]
        for one in written:
            self.note_written(one, name)
        drawn = None if operations.has_schema(func) else torch.get_rng_state()
        result = func(*args, **kwargs)
        if drawn is not None and not torch.equal(drawn, torch.get_rng_state()):
            raise RuntimeError(f"{name} draws new random numbers at every call")
        if name == "__get__" and func.__self__.__name__ in ASKED:
            return self._ask(args[0], func.__self__.__name__, result)
        self._note_told(func.__self__.__name__ if name == "__get__" else name, args, kwargs, result)
        itself = any(result is one for one in pytree.tree_leaves((args, kwargs)))  # `x.to(x.dtype)`
        if isinstance(result, Tensor) and not written and not itself:
            self.origins[id(result)] = Origin(result, func, args, kwargs, self.tracer.contexts.now)
        return result

    def note_written(self, tensor: Tensor, name: str) -> None:
        """Note that a forward writes to a tensor.

        Raises:
            RuntimeError: the model computes with it, as a parameter.
        """
        self.written.add(storage(tensor))
        if not self._is_fresh(tensor):
            if storage(tensor) in self.tracer.stored:
                raise RuntimeError(f"{name} writes to a parameter during forward")
            self.unsteady.add(storage(tensor))
            self.tracer.stack[-1].mutates = True

    def _ask(self, tensor: Tensor, what: str, told: Any) -> Any:
        """The answer to what a tensor is asked apart from its numbers; of a computed one, of what it is made of."""
        while id(tensor) not in self.tracer.names and (origin := self.origins.get(id(tensor))) is not None:
            given = [one for one in pytree.tree_leaves((origin.args, origin.kwargs)) if isinstance(one, Tensor)]
            source = next((one for one in given if getattr(one, what) == told), None)
            if source is None:
                return told
            tensor = source
        path = self.tracer.names.get(id(tensor))
        return told if path is None else self.tracer.questions.ask(tensor, path, f".{what}", told)

    def _note_told(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], told: Any) -> None:
        """Note what code is told of the shape, the dtype or the numbers of tensors that the model holds, or of what it
        computes of them."""
        asks = name in _NUMBERS or name in _SHAPES or name in _KINDS
        for given in pytree.tree_leaves((args, kwargs)) if asks else ():
            formula = self.formula(given) if isinstance(given, Tensor) else None
            for one in formula.tensors if formula else (given,):
                path, entry = self.tracer.names.get(id(one)), self.tracer.entries.get(id(one))
                if path is None and entry is None:
                    continue
                if name in _SHAPES:
                    text, answer = f"{PLACEHOLDER}.shape", tuple(one.shape)
                elif name in _KINDS:
                    text, answer = f"{PLACEHOLDER}.{_KINDS[name]}", told
                elif one is given and len(args) == 1 and _NUMBERS[name]:
                    text, answer = _NUMBERS[name], told
                else:
                    text, answer = f"structrep_numbers({PLACEHOLDER})", numbers(one)
                if name in _KINDS and (len(args) > 1 or kwargs or one.dtype != given.dtype):
                    continue  # a cast; a source of another dtype
                if path is not None:
                    self.tracer.questions.ask(one, path, text, answer, counts=False)
                elif entry is not None:
                    holder = next(module for module, where in self.tracer.paths.items() if where == entry.holder)
                    asked = text.replace(PLACEHOLDER, f"{PLACEHOLDER}{entry.text}")
                    self.tracer.questions.ask(holder, entry.holder, asked, answer, counts=False)

    def _is_fresh(self, tensor: Tensor) -> bool:
        """Whether a tensor was made during this trace, and is no view of what the model holds."""
        while id(tensor) in self.origins:
            base = next((a for a in self.origins[id(tensor)].args if isinstance(a, Tensor)), None)
            if base is None or storage(base) != storage(tensor):
                return True
            tensor = base
        return False

    def _note_touched(self, func: Any, given: list[Any]) -> None:
        """Raise where a forward computes with weights that it assigns: it may do another thing at every call."""
        what = getattr(getattr(func, "__self__", None), "__name__", "")
        if getattr(func, "__name__", "") == "__set__" and what == "data":
            changed, given = given[0], given[1:]
            if id(changed) in self.touched:
                raise RuntimeError("it assigns to weights that it computes with")
        if what not in TOLD:
            self.touched.update(id(one) for one in given if isinstance(one, Tensor))
        if any(id(one) in self.assigned for one in given if isinstance(one, Tensor) and what not in TOLD):
            raise RuntimeError("it computes with weights that it assigns to")

    def note_assigned(self, node: fx.Node, call: Call) -> None:
        """Note how the forward that a layer is called in has computed its numbers, if it has, as `meta["assigned"]`."""
        held = [tensor for tensor in call.module._parameters.values() if tensor is not None]
        given = [self.assigned[id(tensor)] for tensor in held if id(tensor) in self.assigned]
        formulas = [self.formula(value) for value, home in given if home is next(call.homes())]
        found = [formula for formula in formulas if formula is not None]
        ASSIGNED.note(node, None)
        if found and len(found) == len(held) and not any(self.used[id(tensor)] for tensor in held):
            tensors = {id(tensor): tensor for formula in found for tensor in formula.tensors}
            calls = frozenset().union(*(formula.calls for formula in found))
            ASSIGNED.note(node, Formula(calls, tuple(tensors.values())))
        for tensor in held:
            self.used[id(tensor)].append(node)

    def computed(self, tensor: Tensor) -> Computed:
        formula = self.formula(tensor) or Formula(frozenset(), (tensor,))
        return Computed(tensor, formula, functools.partial(self.exact, tensor))

    def exact(self, tensor: Tensor) -> Tensor:
        """A constant computed again, in float64; as it is where its storage was written to since."""
        known: dict[int, Tensor] = {}

        def again() -> Tensor:
            pending = [tensor]
            while pending:
                one = pending[-1]
                origin = self.origins.get(id(one))
                if storage(one) in self.written:
                    raise RuntimeError("it is no longer what it was")
                if origin is None or isinstance(one, nn.Parameter):
                    known[id(one)] = one.detach().to(on_float64(one.device))
                elif left := [given for given in origin.given if id(given) not in known]:
                    pending += left
                    continue
                elif id(one) not in known:
                    args, kwargs = pytree.tree_map(lambda v: known.get(id(v), v), (origin.args, origin.kwargs))
                    known[id(one)] = origin.function(*args, **kwargs)
                pending.pop()
            return known[id(tensor)]

        with torch.no_grad(), Shadows() as shadows:
            try:
                found = shadows.of(again())
            except Exception:  # code that wrote to what it had computed with
                return tensor
        nearer: Tensor = nearest_to(found, tensor, known.values())
        return nearer

    def formula(self, tensor: Tensor) -> Formula | None:
        """All that a constant was computed with and from; None if it was not computed here."""
        calls: set[str] = set()
        tensors: dict[int, Tensor] = {}
        pending, seen = [tensor], set()
        while pending:
            one = pending.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            origin = self.origins.get(id(one))
            if origin is None or isinstance(one, nn.Parameter):
                tensors[id(one)] = one
            else:
                calls.add(getattr(origin.function, "__name__", "").strip("_"))
                pending += origin.given
        return Formula(frozenset(calls), tuple(tensors.values())) if calls else None


def chance() -> tuple[Any, ...]:
    """The state of Python's own random numbers, and of numpy's."""
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is None:
        return (random.getstate(),)
    _, keys, *rest = numpy.get_state()
    return random.getstate(), keys.tobytes(), *rest


def state_of(module: nn.Module, but: Collection[str]) -> tuple[Any, list[int]]:
    """What a module and all below it hold, but for some of its tensors, and how often tensors were written."""
    held = [{k: v for k, v in part.__dict__.items() if part is not module or k not in but} for part in module.modules()]
    tensors = (*module.parameters(), *module.buffers())
    return snapshot(held), [0 if tensor.is_inference() else tensor._version for tensor in tensors]
