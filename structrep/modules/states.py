"""What the objects that a model uses hold, beside modules and tensors: whether code changes that as it runs.

A generator of random numbers, an iterator, a counter in an object: what they give is no constant, for they give
another thing at the next call. What an object holds is what a copy of it would be made of.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from structrep.modules.objects import OF_MODULES
from structrep.modules.source import functions, functions_in, written_in

MOST, DEEPEST = 20_000, 16  # parts that are looked at, and objects in each other
_ATOMS = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
_FIXED = (nn.Module, Tensor, fx.Proxy, FunctionType, type, ModuleType, CodeType)  # which other means see change


class Holdings:
    """The objects that a module, all below it and their code use."""

    def __init__(self, module: nn.Module) -> None:
        held = (value for part in module.modules() for name, value in vars(part).items() if name not in OF_MODULES)
        classes = {type(part) for part in module.modules()}
        named = (one for cls in classes for f in functions(cls).values() for one in _named(f))
        assigned = (one for part in module.modules() for one in _named(vars(part).get("forward")))
        every = itertools.chain(held, named, assigned)
        self.objects = {id(one): one for one in every if type(one) not in _ATOMS and not isinstance(one, _FIXED)}

    def state(self) -> tuple[Any, ...]:
        """What they hold now; two that are equal hold the same."""
        parts = _Parts()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python will not copy iterators for ever
            return tuple(parts.of(one) for one in self.objects.values())


def _named(function: Any) -> Iterator[Any]:
    """What a function, and those that it calls by name, ask for by names of their modules or in cells."""
    pending, seen = list(functions_in(function)), set[CodeType]()
    while pending:
        one = pending.pop()
        library = str(one.__globals__.get("__name__", "")).partition(".")[0]
        if one.__code__ in seen or library in ("torch", "structrep"):
            continue
        seen.add(one.__code__)
        for name in one.__code__.co_names:
            value = one.__globals__.get(name)
            pending += [value] if isinstance(value, FunctionType) else []
            yield value
        for cell in one.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # it has no value yet
                continue


class _Parts:
    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, Any]] = {}  # places of objects by their ids, with what keeps these their own

    def of(self, value: Any, depth: int = 0) -> Any:
        """What a value holds, as something that is equal to another if that holds the same."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if isinstance(value, _FIXED):
            return id(value)
        if isinstance(value, torch.Generator):
            return tuple(value.get_state().tolist())
        if id(value) in self.seen:
            return self.seen[id(value)][0]
        if len(self.seen) > MOST or depth > DEEPEST:
            return None
        self.seen[id(value)] = len(self.seen), value
        if kind in (list, tuple):
            return kind.__name__, *(self.of(one, depth + 1) for one in value)
        if kind is dict:
            return tuple((self.of(key, depth + 1), self.of(one, depth + 1)) for key, one in value.items())
        if written_in(kind).partition(".")[0] == "numpy" and hasattr(value, "tobytes"):
            return value.shape, value.tobytes() if value.nbytes <= MOST else None
        try:
            made = value.__reduce_ex__(4)
            rest = [list(one) if isinstance(one, Iterator) else one for one in made[1:]]
        except Exception:  # it cannot be copied
            return id(value)
        return kind.__name__, made if isinstance(made, str) else tuple(self.of(one, depth + 1) for one in rest)
