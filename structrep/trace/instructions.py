"""What code does next with a value, and which names it asks for, by its instructions."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import itertools
import operator
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from structrep.graph.reads import BY_ANY_NAME, Read, is_date, noted
from structrep.modules.objects import CONTAINERS, LIBRARIES, is_object
from structrep.modules.source import written_in


@functools.lru_cache(4096)
def instructions_of(code: CodeType) -> tuple[tuple[dis.Instruction, ...], dict[int, int]]:
    found = tuple(one for one in dis.get_instructions(code) if one.opname != "CACHE")
    return found, {one.offset: place for place, one in enumerate(found)}


def onward(code: CodeType, at: int, value: Any) -> tuple[str, Any]:
    """The entry of a container that code asks for next, if its key is a constant, as text behind the container's, and
    its value; "" and the container itself otherwise."""
    instructions, places = instructions_of(code)
    return _onward(instructions, places[at] + 1 if at in places else len(instructions), value)[:2]


def has_settings(value: Any) -> bool:
    """Whether a value is a namespace, or a class of somebody's own, which may stand for a configuration."""
    library = written_in(value).partition(".")[0] if isinstance(value, type) else ""
    return isinstance(value, SimpleNamespace) or (isinstance(value, type) and library not in (*LIBRARIES, "builtins"))


def _onward(instructions: tuple[dis.Instruction, ...], place: int, value: Any) -> tuple[str, Any, int]:
    text = ""
    while (isinstance(value, CONTAINERS) and not isinstance(value, (set, frozenset))) or has_settings(value):
        ahead = instructions[place : place + 5]
        if not ahead:
            break
        try:
            if is_constant(ahead[0]) and len(ahead) > 1 and _is_subscript(ahead[1]):
                key = ahead[0].argval
                text, value, place = f"{text}[{key!r}]", operator.getitem(value, key), place + 2
            elif ahead[0].opname == "LOAD_ATTR" and has_settings(value):
                text, value, place = f"{text}.{ahead[0].argval}", getattr(value, ahead[0].argval), place + 1
            elif ahead[0].opname in ("LOAD_METHOD", "LOAD_ATTR") and ahead[0].argval == "get":
                keys = []
                for one in ahead[1:3]:
                    if not is_constant(one):
                        break
                    keys.append(one.argval)
                after = instructions[place + 1 + len(keys) : place + 3 + len(keys)]
                called = bool(keys) and any(one.opname == "CALL" for one in after)
                if not called or not isinstance(value, Mapping):
                    break
                place += 1 + len(keys) + next(i for i, one in enumerate(after) if one.opname == "CALL") + 1
                text, value = f"{text}.get({', '.join(map(repr, keys))})", value.get(*keys)
            else:
                break
        except (KeyError, IndexError, TypeError, AttributeError):
            break
    return text, value, place


def is_constant(one: dis.Instruction) -> bool:
    return one.opname in ("LOAD_CONST", "LOAD_SMALL_INT") and isinstance(one.argval, (str, int, float, tuple))


def _is_subscript(one: dis.Instruction) -> bool:
    return one.opname == "BINARY_SUBSCR" or (one.opname == "BINARY_OP" and one.argrepr == "[]")


def namespace_reads(
    functions: Iterable[tuple[CodeType, dict[str, Any], FunctionType | None]], whole: Container[Any] = ()
) -> Iterator[Read]:
    """Plain values that code asks its namespace and its cells for, in functions that it calls by name too; not in those
    that are kept whole, which ask again."""
    pending, seen = list(functions), set[CodeType]()
    while pending:
        code, space, function = pending.pop()
        if code in seen or str(space.get("__name__", "")).partition(".")[0] in ("torch", "structrep"):
            continue
        seen.add(code)
        pending += [(one, space, function) for one in code.co_consts if isinstance(one, CodeType)]
        for text, value, holder in _asked_by(code, space, function):
            followed = isinstance(value, FunctionType) and value not in whole
            if followed and written_in(value).partition(".")[0] not in ("torch", "structrep"):
                pending.append((value.__code__, value.__globals__, value))
                defaults = {"__defaults__": value.__defaults__, "__kwdefaults__": value.__kwdefaults__}
                if isinstance(holder, FunctionType):  # what a decorator wraps is the method itself
                    defaults = {}
                for name, held in defaults.items():
                    if any(one is not None for one in (held.values() if isinstance(held, dict) else held or ())):
                        yield Read(holder, f"{text}.{name}", held, counts=False)
            called = inspect.getattr_static(type(value), "__call__", None) if is_object(value) else None
            if isinstance(called, FunctionType):  # an object that is called like a function
                pending.append((called.__code__, called.__globals__, called))
                held = {name: one for name, one in vars(value).items() if name in called.__code__.co_names}
                yield from (Read(holder, f"{text}.{name}", one, counts=False) for name, one in held.items())
            of_object = isinstance(value, MethodType) and (is_object(value.__self__) or has_settings(value.__self__))
            if of_object and isinstance(function := value.__func__, FunctionType):
                pending.append((function.__code__, function.__globals__, function))
                of = text.rpartition(".")[0]
                for name, one in _held(value.__self__, function.__code__).items():
                    yield Read(holder, f"{of}.{name}" if name else of, one, counts=False)
            if isinstance(value, ContextVar):
                with contextlib.suppress(LookupError):
                    yield Read(holder, f"{text}.get()", value.get(), counts=False)
            elif is_date(value):
                yield Read(holder, f"{text}()", value, counts=False)
            elif isinstance(value, (ModuleType, nn.Module, Tensor, fx.Proxy, MethodType)) or callable(value):
                name = text.rpartition(".")[2]
                renamed = callable(value) and getattr(value, "__name__", name) != name
                if renamed and not isinstance(value, nn.Module) and not isinstance(holder, FunctionType):
                    yield Read(holder, text, value, counts=False)
            else:
                yield Read(holder, text, value, counts=False)


def _held(owner: Any, code: CodeType) -> dict[str, Any]:
    """What code of an object's own asks it for, and the methods that it calls; under "" the object, if any of it may be
    asked for."""
    held: dict[str, Any] = {}
    pending, seen = [code], set[CodeType]()
    for one in pending:
        seen.add(one)
        pending += [inner for inner in one.co_consts if isinstance(inner, CodeType) and inner not in seen]
        if not _BY_NAME.isdisjoint(one.co_names):
            return {"": owner}
        for name in one.co_names:
            value = inspect.getattr_static(owner, name, None)
            inner = getattr(value, "fget", getattr(value, "__func__", value))
            if isinstance(inner, FunctionType):
                pending += [inner.__code__] if inner.__code__ not in seen else []
            elif value is not None and not callable(value):
                held[name] = value
    return held


_ANSWERS = (bool, int, float, str, torch.dtype, torch.device)
_BY_NAME = {"getattr", "vars", "__dict__", "hasattr", "__getitem__", "items", "values", "keys"}
_PURE = {"math", "numpy", "builtins", "typing", "collections", "functools", "operator", "structrep", "enum", "re",
         "itertools", "string", "copy", "inspect", "types", "abc", "dataclasses", "contextlib", "time",
         "random"}  # fmt: skip
_STEADY = {"torch", "math", "numpy", "builtins", "typing", "collections", "functools", "operator", "os", "sys",
           "structrep", "enum", "itertools", "warnings", "logging"}  # fmt: skip


def _asked_by(code: CodeType, space: dict[str, Any], function: FunctionType | None) -> Iterator[tuple[str, Any, Any]]:
    """The names that code asks for, with what it asks of them next, their values, and where they are."""
    instructions, _ = instructions_of(code)
    imported = _imported(instructions, space)
    yield from ((text, value, None) for text, value in imported.values() if not isinstance(value, ModuleType))
    cells = (
        {} if function is None else dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
    )
    for place, one in enumerate(instructions):
        holder: Any
        if not str(one.argval).isidentifier():
            continue  # what pytest puts into the assertions of tests
        text = str(one.argval)
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME") and one.argval in space:
            holder, value = space, space[one.argval]
        elif one.opname == "LOAD_FAST" and isinstance(imported.get(text, ("", None))[1], ModuleType):
            holder, (text, value) = None, imported[text]
        elif one.opname == "LOAD_GLOBAL" and one.argval in BY_ANY_NAME:
            holder, value, text = None, None, f"{text}()"
        elif one.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF") and one.argval in cells:
            try:
                holder, value = function, cells[one.argval].cell_contents
            except ValueError:
                continue
        else:
            continue
        ahead, steady = place + 1, False
        while ahead < len(instructions):
            further, value, ahead = _onward(instructions, ahead, value)
            text += further
            name = instructions[ahead].argval if ahead < len(instructions) else None
            attribute = ahead < len(instructions) and instructions[ahead].opname in ("LOAD_ATTR", "LOAD_METHOD")
            if isinstance(value, ModuleType):
                steady = value.__name__.partition(".")[0] in _STEADY and not value.__name__.startswith(
                    "torch.backends."
                )
            asks = isinstance(value, (ModuleType, type)) or is_object(value)
            asks |= isinstance(value, FunctionType) and name in vars(value)
            asks |= text.startswith("torch.backends.") and not callable(value)
            if (given := _given(instructions, ahead, value)) is not None:
                further, value, ahead = given
                text += further
                for name in _asked_later(instructions, instructions[ahead]):
                    yield f"{text}.{name}", getattr(value, name, None), holder
                continue
            if not attribute or not asks or not isinstance(name, str) or isinstance(value, nn.Module):
                break
            try:
                value = getattr(value, name)
            except AttributeError:
                break
            text, ahead = f"{text}.{name}", ahead + 1
        if (told := _of_library(instructions, ahead, value)) is not None:
            yield f"{text}{told[0]}", told[1], holder
        elif not steady:
            yield text, value, holder


def _imported(instructions: tuple[dis.Instruction, ...], space: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """What code imports as it runs, by the names that it gives it: its own name, and what that is now."""
    found: dict[str, tuple[str, Any]] = {}
    module, of = None, ""
    for one, then in itertools.pairwise(instructions):
        if one.opname == "IMPORT_NAME":
            near = [x.argval for x in instructions[: instructions.index(one)] if x.opname == "LOAD_CONST"]
            level = next((x for x in reversed(near) if type(x) is int), 0)
            package = str(space.get("__package__") or "").split(".")
            of = ".".join([*package[: len(package) - level + 1], one.argval] if level else [one.argval]).strip(".")
            if then.opname.startswith("STORE"):  # `import a.b` gives a
                of = of.partition(".")[0]
            module = sys.modules.get(of)
        elif one.opname == "IMPORT_FROM" and module is not None and hasattr(module, one.argval):
            found[then.argval] = f"{of}.{one.argval}", getattr(module, one.argval)
            continue
        if then.opname == "STORE_FAST" and module is not None and one.opname in ("IMPORT_NAME", "POP_TOP"):
            found[then.argval] = of, module
    return found


def _of_library(instructions: tuple[dis.Instruction, ...], place: int, value: Any) -> tuple[str, Any] | None:
    """A call of a library's function for constants, or for nothing, of which something is asked: a question how things
    stand. Its text, and the answer; None if it is none, or one that is noted as it is asked."""
    if not isinstance(value, (FunctionType, BuiltinFunctionType)) or value is sys.getrecursionlimit:
        return None  # that limit is another while a forward is followed (`process.room`)
    library = written_in(value).partition(".")[0]
    if library in _PURE or (library != "torch" and library not in sys.stdlib_module_names):
        return None
    called = _called_for_constants(instructions, place)
    if called is None or called[1].opname == "POP_TOP" or value in noted():
        return None
    args = called[0]
    with contextlib.suppress(Exception):
        told = value(*args)
        if isinstance(told, _ANSWERS):
            return f"({', '.join(map(repr, args))})", told
    return None


def _given(instructions: tuple[dis.Instruction, ...], place: int, value: Any) -> tuple[str, Any, int] | None:
    """A call of a function of the user's for constants, of whose result something is asked, as of a configuration: its
    text, what it gives, and where that is in hand. None if there is no such call."""
    singleton = isinstance(value, type) and "__new__" in vars(value)
    if not (singleton or isinstance(value, (FunctionType, MethodType, functools._lru_cache_wrapper))):
        return None
    if written_in(value).partition(".")[0] in LIBRARIES:
        return None
    called = _called_for_constants(instructions, place)
    if called is None:
        return None
    args, then = called
    if then.opname != "LOAD_ATTR" and not _asked_later(instructions, then):
        return None
    with contextlib.suppress(Exception):  # whatever code of the user's raises
        return f"({', '.join(map(repr, args))})", value(*args), instructions.index(then, place)
    return None


def _called_for_constants(
    instructions: tuple[dis.Instruction, ...], place: int
) -> tuple[list[Any], dis.Instruction] | None:
    """The constants that what is in hand is called for, and what comes next; None if it is not called so."""
    given = list(itertools.takewhile(is_constant, instructions[place:]))
    steps = [one for one in instructions[place + len(given) : place + len(given) + 3] if one.opname != "PRECALL"]
    if len(steps) < 2 or steps[0].opname != "CALL" or steps[0].arg != len(given):
        return None
    return [one.argval for one in given], steps[1]


def _asked_later(instructions: tuple[dis.Instruction, ...], stored: dis.Instruction) -> list[str]:
    """What a value is asked for that is given a name, of a method's own, which has no other value."""
    kept = [one for one in instructions if one.opname == "STORE_FAST" and one.argval == stored.argval]
    if stored.opname != "STORE_FAST" or len(kept) > 1:
        return []
    pairs = itertools.pairwise(instructions)
    return [
        then.argval
        for one, then in pairs
        if one.opname.startswith("LOAD_FAST") and one.argval == stored.argval and then.opname == "LOAD_ATTR"
    ]
