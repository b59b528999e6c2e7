"""What the parts of a model are given as it runs: one run, on a copy, notes the arguments of every call.

Noted are shapes and plain values, no tensors. Where a forward cannot be followed, its parts are traced with what it was
seen to give them, and nothing is written anew for anything else.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from structrep.graph.structures import form_of, mapped
from structrep.modules.source import functions

Site = tuple[str, str]  # the path of a module, and one of its methods


@dataclass(frozen=True)
class Given:
    """A tensor or a number that a part was given: all but a tensor's numbers."""

    number: int | float | None = None
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    @classmethod
    def of(cls, value: Tensor | int | float) -> Given:
        if not isinstance(value, Tensor):
            return cls(value)
        return cls(None, tuple(value.shape), tuple(value.stride()), value.dtype, value.device)


@dataclass(frozen=True)
class Part:
    """A module of the model that another was given, by its path."""

    path: str


@dataclass(frozen=True)
class Thing:
    """An object that a part was given, of which only the type is noted: it may hold anything, and change."""

    cls: type


@dataclass(eq=False)
class Arguments:
    """What a method was given in all calls of one form: equal constants, and tensors of as many dims, in equal
    structures."""

    # by parameter, those that some call gave; with `Given`, `Part` and `Thing` for what they are of
    given: dict[str, Any]
    # the parameters that some call gave by keyword: decorators count on that
    named: set[str] = field(default_factory=set)

    def bound(self, signature: inspect.Signature) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As positional and keyword arguments."""
        both = inspect.BoundArguments(signature, self.given)
        names = list(signature.parameters)[: len(both.args)]
        last = next((at for at, name in enumerate(names) if name in self.named), len(both.args))
        return both.args[:last], dict(zip(names[last:], both.args[last:], strict=False)) | both.kwargs

    @property
    def tensors(self) -> int:
        """How many tensors there are in it."""
        found: list[Given] = []
        mapped(lambda one: found.append(one) if isinstance(one, Given) and one.number is None else None, self.given)
        return len(found)


@dataclass(eq=False)
class Observed:
    """The calls of its modules that one run of a model made; none before there was a run.

    Args:
        paths: the modules of the model that will run, by which they are known.
        capture: paths of modules whose arguments, at their first call, are captured as they are.
        inputs: what the model was given, in a dtype that it has.
    """

    paths: dict[nn.Module, str] = field(default_factory=dict)
    capture: Collection[str] = ()
    inputs: Any = None
    captured: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    # what is called -> by which code -> in which forms; None for one that cannot be noted
    calls: dict[Site, dict[Site, dict[Any, Arguments | None]]] = field(default_factory=dict)

    def forms(self, path: str, method: str) -> list[Arguments | None]:
        """The forms in which a method is called, whoever calls it."""
        return _different(self.calls.get((path, method), {}).values())

    def called_by(self, path: str, method: str) -> Iterator[tuple[Site, list[Arguments | None]]]:
        """What the code of a module calls of others, and in which forms: all of its code for its forward, and for
        another method all but its forward."""
        for callee, callers in self.calls.items():
            by = [forms for (where, name), forms in callers.items() if where == path and method in ("forward", name)]
            if by and callee[0] != path:
                yield callee, _different(by)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note calls for as long as this lasts: methods are wrapped in the namespace of each module."""
        stack: list[Site] = []
        watched: list[tuple[nn.Module, str, Any]] = []
        names: dict[type, list[str]] = {}
        for module, path in self.paths.items():
            cls = type(module)
            if cls not in names:
                own = [one for one in functions(cls) if not (one.startswith("__") or hasattr(nn.Module, one))]
                names[cls] = ["forward", *own] if not issubclass(cls, torch.jit.ScriptModule) else []
            for name in names[cls]:
                before = module.__dict__.get(name)
                if name == "forward" or before is None:
                    run = functools.partial(self._run, stack, module, (path, name), getattr(module, name))
                    functools.update_wrapper(run, getattr(module, name))  # whose signature is asked for
                    watched.append((module, name, before))
                    module.__dict__[name] = run
        try:
            yield
        finally:
            for module, name, before in watched:
                if before is None:
                    module.__dict__.pop(name, None)
                else:
                    module.__dict__[name] = before

    def _run(
        self, stack: list[Site], module: nn.Module, site: Site, function: Callable[..., Any], /, *args: Any, **kw: Any
    ) -> Any:
        path, method = site
        if path in self.capture and method == "forward":
            self.captured.setdefault(path, () if kw else args)
        if stack:
            forms = self.calls.setdefault(site, {}).setdefault(stack[-1], {})
            self._note(forms, function, args, kw)
        stack.append(site)
        try:
            return function(*args, **kw)
        finally:
            stack.pop()

    def _note(
        self, forms: dict[Any, Arguments | None], function: Callable[..., Any], args: tuple[Any, ...], kw: Any
    ) -> None:
        try:
            bound = signature_of(function).bind(*args, **kw)
        except TypeError:  # which the call itself will raise, and its caller may expect
            return
        try:
            given = {name: mapped(self._noted, one) for name, one in bound.arguments.items()}
            bound.apply_defaults()
            form = form_of(bound.arguments, _mark)
        except TypeError:
            forms[None] = None
            return
        known = forms.setdefault(form, Arguments({}))
        assert known is not None
        known.given |= {name: one for name, one in given.items() if name not in known.given}
        known.named |= kw.keys()

    def _noted(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested:
            return Given.of(value)
        if type(value) in (int, float):
            return Given.of(value)
        if isinstance(value, nn.Module) and value in self.paths:
            return Part(self.paths[value])
        return value if _is_constant(value) else Thing(type(value))


def _is_constant(value: Any) -> bool:
    """Whether a value is plain, and stays what it is."""
    kinds = (bool, str, bytes, complex, int, float, torch.dtype, torch.device, torch.layout, torch.memory_format, Enum)
    plain = isinstance(value, (*kinds, type, BuiltinFunctionType)) or value is None or value is Ellipsis
    return plain or (isinstance(value, FunctionType) and value.__closure__ is None)


def _mark(value: Any) -> Any:
    """What a merge may go by of an argument: of a tensor how many dims, not how large they are; of a number not which;
    of all else which."""
    if isinstance(value, Tensor):
        return Tensor, value.ndim
    return type(value), value if _is_constant(value) and type(value) not in (int, float) else None


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """A method's signature, without its module."""
    if isinstance(function, MethodType):
        return _signature(function.__func__)
    return inspect.signature(function)


@functools.lru_cache(1024)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    whole = inspect.signature(function)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def _different(some: Any) -> list[Arguments | None]:
    return list({form: one for forms in some for form, one in forms.items()}.values())
