"""What methods ask for by their module: its class for what it is set to, and other methods for what they give."""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import inspect
import itertools
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType

from torch import nn

from structrep.graph.reads import MISSING, PLACEHOLDER, Read
from structrep.modules.source import attribute_of, functions, functions_in, read_function, written_in
from structrep.trace.instructions import instructions_of


def is_type(one: dis.Instruction) -> bool:
    return one.opname == "LOAD_GLOBAL" and one.argval == "type"


def class_reads(codes: Iterable[CodeType], module: nn.Module) -> Iterator[Read]:
    """What methods of a module ask its class for: `type(self).name`, `hasattr(type(self), "name")`, or `cls.name` in a
    class method."""
    codes = list(codes)
    own = {function.__code__ for f in functions(type(module)).values() for function in functions_in(f)}
    for code in (one for one in codes if one in own and one.co_argcount):
        for inner in (code, *(one for one in code.co_consts if isinstance(one, CodeType))):
            plain = [one for one in instructions_of(inner)[0] if one.opname not in ("PRECALL", "RESUME", "PUSH_NULL")]
            for asks, given, call, then in zip(plain, plain[1:], plain[2:], plain[3:], strict=False):
                if is_type(asks) and given.argval == code.co_varnames[0] and call.opname == "CALL":
                    yield from _of_its_class(then, module)
            for asks, _, given, call, named in zip(plain, plain[1:], plain[2:], plain[3:], plain[4:], strict=False):
                name, itself = named.argval, given.argval == code.co_varnames[0] and call.opname == "CALL"
                if asks.argval in ("hasattr", "getattr") and itself and isinstance(name, str):
                    told = hasattr(type(module), name)
                    yield Read(module, f"hasattr(type({PLACEHOLDER}), {name!r})", told, counts=False)
    for name in sorted({name for code in codes for name in code.co_names}):
        method = inspect.getattr_static(type(module), name, None)
        of_class = method.__func__.__code__ if isinstance(method, classmethod) else None
        steps = instructions_of(of_class)[0] if of_class is not None and of_class.co_argcount else ()
        for given, then in itertools.pairwise(steps):
            if given.opname.startswith("LOAD_FAST") and given.arg == 0:  # what it is given first
                yield from _of_its_class(then, module)


def methods_of(codes: Iterable[CodeType], module: nn.Module) -> Iterator[FunctionType]:
    """The methods and properties of a module that code asks for what they give, one by another: not methods that do
    something and give nothing."""
    pending, seen = _written(codes, module), set[FunctionType]()
    for function in pending:
        for name, _ in _calls(function):
            for one in functions_in(inspect.getattr_static(type(module), name, None)):
                if one not in seen and written_in(one).partition(".")[0] not in ("torch", "structrep"):
                    seen.add(one)
                    pending.append(one)
                    yield one


def settings_given(codes: Iterable[CodeType], module: nn.Module) -> Iterator[Read]:
    """What code asks of what a method of its module gives, as of a configuration: `self.config().low`."""
    for name, asked in (call for function in _written(codes, module) for call in _calls(function)):
        with contextlib.suppress(Exception):  # whatever code of the user's raises
            if asked:
                told = getattr(getattr(module, name)(), asked)
                yield Read(module, f".{name}().{asked}", told, counts=False)


def _written(codes: Iterable[CodeType], module: nn.Module) -> list[FunctionType]:
    """The methods of a module's class that have some code."""
    wanted = set(codes)
    return [one for one in functions(type(module)).values() if inspect.unwrap(one).__code__ in wanted]


@functools.lru_cache(4096)
def _calls(function: FunctionType) -> tuple[tuple[str, str], ...]:
    """The calls of methods of the same module in a method, but for those whose results nothing looks at, and what else
    it asks its module for, properties perhaps: their names, and which attribute of what they give without being given
    anything is asked for."""
    read = read_function(function)
    if read is None:
        return ()
    tree, itself = read
    around = {inner: node for node in ast.walk(tree) for inner in ast.iter_child_nodes(node)}
    found = []
    for call, outer in around.items():
        if isinstance(call, ast.Call) and attribute_of(call.func, itself) and not isinstance(outer, ast.Expr):
            assert isinstance(call.func, ast.Attribute)
            plain = isinstance(outer, ast.Attribute) and not (call.args or call.keywords)
            found.append((call.func.attr, outer.attr if plain and isinstance(outer, ast.Attribute) else ""))
        elif attribute_of(call, itself) and not (isinstance(outer, ast.Call) and outer.func is call):
            assert isinstance(call, ast.Attribute)
            found.append((call.attr, ""))
    return tuple(found)


def _of_its_class(step: dis.Instruction, module: nn.Module) -> Iterator[Read]:
    """What an instruction asks the class of a module for, which is no function."""
    told = getattr(type(module), step.argval, MISSING) if step.opname == "LOAD_ATTR" else MISSING
    if told is not MISSING and not isinstance(told, (FunctionType, MethodType, property)):
        yield Read(module, f"type({PLACEHOLDER}).{step.argval}", told, counts=False)
