"""Methods that only compute: kernels, say, of weights."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection, Iterator
from types import CodeType, FunctionType

from torch import nn

from structrep.modules.objects import is_object
from structrep.modules.positions import definition
from structrep.modules.presence import path_to
from structrep.modules.settable import own_writes
from structrep.modules.source import functions


def computing(module: nn.Module, tree: ast.AST, itself: str) -> dict[str, frozenset[FunctionType]]:
    """The methods of a module and of its parts that code calls and that only compute, by path, each with all methods of
    the model's classes that it may come to.

    Args:
        tree: the code.
        itself: what it calls its module.
    """
    known = {type(one): functions(type(one)) for one in module.modules()}
    # functions among the attributes, and methods of objects there, may go by anything
    held = {name for one in module.modules() for name, value in vars(one).items() if callable(value)}
    objects = {type(value) for one in module.modules() for value in vars(one).values() if is_object(value)}
    held |= {name for cls in objects for name, value in vars(cls).items() if hasattr(value, "__get__")}
    found: dict[str, frozenset[FunctionType]] = {}
    parts = dict(module.named_modules())
    for call in (one for one in ast.walk(tree) if isinstance(one, ast.Call)):
        holder, _, name = (path_to(call.func, itself) or "").rpartition(".")
        part = parts.get(holder)
        function = known[type(part)].get(name) if part is not None else None
        if function is None or name in vars(part) or name in nn.Module.__dict__ or name == "forward":
            continue
        reached = _reached(function, known.keys(), held)
        if reached is not None and all(_only_computes(*one) for one in reached):
            found[f"{holder}.{name}" if holder else name] = frozenset(one for one, _ in reached)
    return found


def _reached(
    function: FunctionType, classes: Collection[type], opaque: Collection[str]
) -> list[tuple[FunctionType, bool]] | None:
    """A method, and all methods of some classes that it may call, by their names, and whether each is static; None if
    those are not all plain, or it names what may go by anything."""
    reached, static = [function], set[FunctionType]()
    for one in reached:
        names = set(_names(one.__code__))
        if not names.isdisjoint(("type", "__class__", "__dict__", "vars")):
            return None
        if not names.isdisjoint(opaque):
            return None
        for name in sorted(names):
            for cls in classes if name not in nn.Module.__dict__ else ():
                held = inspect.getattr_static(cls, name, None)
                own = held.fget if isinstance(held, property) else getattr(held, "__func__", held)
                if isinstance(own, FunctionType):
                    static |= {own} if isinstance(held, staticmethod) else set()
                    reached += [own] if own not in reached else []
                elif hasattr(held, "__get__"):
                    return None  # asked for in a way of its own
    return [(one, one in static) for one in reached]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _only_computes(function: FunctionType, static: bool) -> bool:
    """Whether a method sets nothing, and writes to nothing but what it has made itself."""
    plain = inspect.unwrap(function)
    found = definition(plain.__code__)
    if plain is not function or found is None or not isinstance(found[0], ast.FunctionDef):
        return False
    nodes = list(ast.walk(found[0]))
    if any(isinstance(one, (ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom, ast.Await)) for one in nodes):
        return False
    made = {
        target.id
        for one in nodes
        if isinstance(one, (ast.Assign, ast.NamedExpr))
        for target in (one.targets if isinstance(one, ast.Assign) else [one.target])
        if isinstance(target, ast.Name)
    }
    stored = [one for one in nodes if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)]
    for one in stored:
        if not isinstance(found[1].get(one), (ast.Assign, ast.AugAssign, ast.NamedExpr)):
            made.discard(one.id)  # by a loop, say: it may be what others hold
    made -= {*inspect.signature(function).parameters}
    return own_writes(function, static) <= made
