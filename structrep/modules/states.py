"""What a model's code uses beside modules and tensors: whether that changes as it runs.

A generator of random numbers, an iterator, a counter, in an object, a cell, a class or a Python module: what they give
is no constant, for they give another thing at the next call. What an object holds is what a copy of it would be made
of.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from structrep.modules.contents import INSIDE, MOST, Contents
from structrep.modules.objects import OF_MODULES
from structrep.modules.source import is_full, written_in

_ATOMS = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
_CALLED = (FunctionType, MethodType, BuiltinFunctionType, staticmethod, classmethod, property, functools.partial)
_FIXED = (nn.Module, Tensor, fx.Proxy, FunctionType, type, ModuleType, CodeType)  # which other means see change
_LIBRARIES = {"torch", "structrep", "numpy", *sys.stdlib_module_names}


class Holdings:
    """What a module, all below it and their code use beside modules and tensors: objects, names of Python modules,
    cells, defaults, attributes of functions and of classes."""

    def __init__(self, module: nn.Module) -> None:
        self.objects: dict[int, Any] = {}
        self.spaces: list[tuple[Mapping[str, Any], list[str]]] = []  # namespaces, and what code asks them for
        self.cells: list[CellType] = []
        self.made: list[FunctionType] = []  # functions with defaults
        self.classes: list[type] = []
        self.seen: set[int] = set()
        parts = list(module.modules())
        held = (value for part in parts for name, value in vars(part).items() if name not in OF_MODULES)
        own = {type(part) for part in parts}
        self.own = own.union(*(cls.__mro__ for cls in own))
        self.pending: list[Any] = [*held, *own]
        while self.pending and len(self.seen) < MOST:
            one = self.pending.pop()
            if type(one) not in _ATOMS and id(one) not in self.seen and not _is_plain(one):
                self.seen.add(id(one))
                self._add(one)

    def _add(self, value: Any) -> None:
        """Note what is to be looked at for a value, and what that leads to."""
        if isinstance(value, FunctionType):
            if not _is_library(value.__globals__.get("__name__")):
                self._add_function(value)
        elif isinstance(value, MethodType):
            self.pending += [value.__func__, value.__self__]
        elif isinstance(value, (staticmethod, classmethod)):
            self.pending.append(value.__func__)
        elif isinstance(value, property):
            self.pending.append(value.fget)
        elif isinstance(value, type):
            if not _is_library(written_in(value)):
                self.classes.append(value)
                self.pending += value.__bases__
                if value in self.own or not issubclass(value, nn.Module):  # else a forward only names it, or makes one
                    called = ((name, one) for name, one in vars(value).items() if isinstance(one, _CALLED))
                    self.pending += [one for name, one in called if name != "__init__"]
        elif not isinstance(value, _FIXED):
            self.objects[id(value)] = value
            self.pending.append(type(value))
            if isinstance(value, functools.partial):
                self.pending += [value.func, *value.args, *value.keywords.values()]
            elif isinstance(value, (list, tuple, dict)):
                items = value.values() if isinstance(value, dict) else value
                self.pending += [one for one in items if isinstance(one, _CALLED)]

    def _add_function(self, function: FunctionType) -> None:
        names = _names(function.__code__)
        spaces: list[Mapping[str, Any]] = [function.__globals__]
        for space in spaces:
            asked = {name: space[name] for name in names if name in space}
            inner = [one for one in asked.values() if isinstance(one, ModuleType) and not _is_library(one.__name__)]
            spaces += [vars(one) for one in inner if all(vars(one) is not other for other in spaces)]
            plain = [name for name, one in asked.items() if not isinstance(one, (*_CALLED, type, ModuleType))]
            if plain:
                self.spaces.append((space, plain))
            self.pending += asked.values()
        if vars(function):
            self.spaces.append((vars(function), list(vars(function))))
        if function.__defaults__ or function.__kwdefaults__:
            self.made.append(function)
        own = [cell for cell in function.__closure__ or () if is_full(cell)]
        self.cells += own
        given = (function.__defaults__ or (), (function.__kwdefaults__ or {}).values(), vars(function).values())
        self.pending += [*(cell.cell_contents for cell in own), *itertools.chain(*given)]

    def state(self, places: Container[int] | None = None) -> tuple[Any, ...]:
        """What they hold now; two that are equal hold the same.

        Args:
            places: which of them to look at; all, if none is named.
        """
        parts = _Parts()
        looks = enumerate(self._looks(parts))
        return tuple(look() for place, look in looks if places is None or place in places)

    def changes(self, before: tuple[Any, ...]) -> frozenset[int]:
        """The places of those that hold something else than they did."""
        both = itertools.zip_longest(before, self.state())
        return frozenset(place for place, (one, other) in enumerate(both) if one != other)

    def _looks(self, parts: _Parts) -> Iterator[Callable[[], Any]]:
        for one in self.objects.values():
            yield functools.partial(parts.of, one)
        for space, names in self.spaces:
            yield from (functools.partial(lambda held, name: parts.kept(held.get(name)), space, name) for name in names)
        for cell in self.cells:
            yield functools.partial(lambda cell: parts.kept(cell.cell_contents) if is_full(cell) else None, cell)
        for made in self.made:
            yield functools.partial(lambda made: parts.of([made.__defaults__, made.__kwdefaults__]), made)
        for cls in self.classes:
            yield functools.partial(parts.of_class, cls)


def _is_plain(value: Any) -> bool:
    """Whether a value is a tuple of what never changes: of sizes."""
    return type(value) is tuple and all(type(one) in _ATOMS for one in value)


def _is_library(name: Any) -> bool:
    return str(name).partition(".")[0] in _LIBRARIES


@functools.lru_cache(4096)
def _names(code: CodeType) -> tuple[str, ...]:
    """The names that code asks for, and code inside of it."""
    inner = (_names(one) for one in code.co_consts if isinstance(one, CodeType))
    return tuple(dict.fromkeys(itertools.chain(code.co_names, *inner)))


class _Parts(Contents):
    """What is held now, told by values that are equal as long as nothing changes."""

    def kept(self, value: Any) -> Any:
        """What a name stands for; of functions, classes and modules, which a trace exchanges, nothing."""
        return None if isinstance(value, (*_CALLED, type, ModuleType)) else self.of(value)

    def of_class(self, cls: type) -> Any:
        own = ((name, value) for name, value in list(vars(cls).items()) if not name.startswith("__"))
        return tuple((name, self.of(value)) for name, value in own if not isinstance(value, (*_CALLED, type)))

    def leaf(self, value: Any) -> Any:
        if type(value) in _ATOMS:
            return value
        return id(value) if isinstance(value, _FIXED) else INSIDE

    def closed(self, value: Any) -> Any:
        return id(value)
