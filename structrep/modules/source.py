"""The source of functions and classes: found, read, and simple things about it."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import textwrap
from collections.abc import Callable, Iterator
from types import CellType, FunctionType
from typing import Any

from torch import nn

from structrep.errors import listed


def written_in(value: Any) -> str:
    """The name of the Python module that a class or function comes from; "" if it has none, as in a bare `exec`."""
    return getattr(value, "__module__", None) or ""


def is_full(cell: CellType) -> bool:
    """Whether a closure's cell has a value: the name may have none yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def functions(cls: type) -> dict[str, FunctionType]:
    """The functions of a class, as they are inherited, but for torch's own."""
    found: dict[str, FunctionType] = {}
    for base in reversed(cls.__mro__):
        for name, held in vars(base).items() if written_in(base).partition(".")[0] != "torch" else ():
            if isinstance(held, FunctionType):
                found[name] = held
            else:
                found.pop(name, None)  # taken back
    return found


def functions_in(value: Any) -> Iterator[FunctionType]:
    """A function, and those that it was made with: what decorators have wrapped."""
    pending, seen = [value], set[int]()
    while pending:
        one = pending.pop(0)
        one = one.fget if isinstance(one, property) else getattr(one, "__func__", one)
        if not isinstance(one, FunctionType) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        for inner in one.__closure__ or ():
            try:
                pending.append(inner.cell_contents)
            except ValueError:
                continue


def written_first(cls: type, attribute: str) -> bool:
    """Whether each method of a class that names an attribute of its module gives it a value before it looks at it."""
    for name, function in functions(cls).items():
        if name == "__init__":
            continue
        body = syntax(inspect.unwrap(function))
        if not isinstance(body, ast.FunctionDef):
            return False
        named = [n for n in ast.walk(body) if isinstance(n, ast.Attribute) and n.attr == attribute]
        stored = {id(n) for n in named if isinstance(n.ctx, ast.Store)}
        plain = (one for one in body.body if isinstance(one, (ast.Assign, ast.AnnAssign)))
        first = next((one for one in plain if any(id(n) in stored for n in ast.walk(one))), None)
        if named and first is None:
            return False
        if first is not None and any(id(n) not in stored and n.lineno <= (first.end_lineno or 0) for n in named):
            return False
    return True


def syntax(source: Any) -> ast.stmt | None:
    """The definition of a function or class; None if it cannot be read."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(source))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return definition


def told_of_sources(model: nn.Module) -> tuple[str, ...]:
    """What is to be known of the classes of a model's modules whose code is known to Python but not as text."""
    classes = dict.fromkeys(map(type, model.modules()))
    unread = [cls.__name__ for cls in classes if not all(map(_is_readable, functions(cls).values()))]
    if not unread:
        return ()
    return (
        f"Python finds no source of {listed(unread)} (typed in, piped, run by exec, or a .pyc alone): no text of "
        "theirs can be edited, and what they may ask of their parts is not known: the branches, and the norms behind "
        "layers, of all that they call may stay. Put them into a file, and more may merge",
    )


def _is_readable(function: FunctionType) -> bool:
    plain = inspect.unwrap(function)
    code = getattr(plain, "__code__", None)
    made = function.__name__.startswith("__")  # as a dataclass does
    return made or code is None or bool(linecache.getlines(code.co_filename, plain.__globals__))


def read_function(function: Callable[..., Any]) -> tuple[ast.AST, str] | None:
    """The syntax of a method, and what it calls its module; None if that cannot be read."""
    body = syntax(inspect.unwrap(function))
    if not isinstance(body, (ast.FunctionDef, ast.AsyncFunctionDef)) or not body.args.args:
        return None
    return body, body.args.args[0].arg


def names_reached(module: nn.Module) -> frozenset[str]:
    """Attributes of attributes that the code of a module's class mentions, where that code can be read."""
    bases = (base for base in type(module).__mro__ if written_in(base).partition(".")[0] != "torch")
    trees = (syntax(one) for base in bases for held in vars(base).values() for one in functions_in(held))
    nodes = (node for tree in trees if tree is not None for node in ast.walk(tree))
    return frozenset(n.attr for n in nodes if isinstance(n, ast.Attribute) and not isinstance(n.value, ast.Name))


def words(cls: type) -> frozenset[str]:
    """All attributes that the code of a class asks anything for."""
    return frozenset().union(*map(words_of, functions(cls).values()))


@functools.lru_cache(4096)
def words_of(function: FunctionType) -> frozenset[str]:
    """All attributes that the code of a function asks anything for."""
    tree = syntax(inspect.unwrap(function))
    nodes = ast.walk(tree) if tree is not None else ()
    return frozenset(node.attr for node in nodes if isinstance(node, ast.Attribute))


def gives_something(function: FunctionType) -> bool:
    """Whether a function ends with a value, and no None, wherever it ends."""
    body = syntax(function)
    if not isinstance(body, ast.FunctionDef):
        return False
    returns = [node for node in ast.walk(body) if isinstance(node, ast.Return)]
    empty = any(r.value is None or (isinstance(r.value, ast.Constant) and r.value.value is None) for r in returns)
    return bool(returns) and not empty and _always_ends(body.body)


def _always_ends(body: list[ast.stmt]) -> bool:
    """Whether statements end in a return or a raise, whichever way they go."""
    last = body[-1]
    if isinstance(last, ast.If):
        return bool(last.orelse) and _always_ends(last.body) and _always_ends(last.orelse)
    if isinstance(last, ast.Try):
        caught = all(_always_ends(handler.body) for handler in last.handlers)
        return _always_ends(last.finalbody or [ast.Pass()]) or (caught and _always_ends(last.orelse or last.body))
    return isinstance(last, (ast.Return, ast.Raise)) or (isinstance(last, ast.With) and _always_ends(last.body))


def reads_settings_only(function: FunctionType, module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether all that a function does with a module it is given is to read plain attributes: a stride, a padding."""
    tree = syntax(function)
    if tree is None:
        return False
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:
        return False
    names = {name for name, value in given.items() if value is module}
    asked = asked_of_names(names, tree)
    plain = (bool, int, float, str, tuple)
    return bool(names) and asked is not None and all(isinstance(module.__dict__.get(a), plain) for a in asked)


def asked_of_names(names: set[str], tree: ast.AST) -> list[str] | None:
    """The attributes that code asks of what some names stand for; None if it does anything else with that."""
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in names]
    asked = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.value in uses]
    return asked if len(asked) == len(uses) else None


def attribute_of(node: ast.AST, itself: str) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == itself


def of_super(node: ast.AST) -> bool:
    """Whether syntax asks for an attribute of `super()`."""
    owner = node.value if isinstance(node, ast.Attribute) else None
    return isinstance(owner, ast.Call) and getattr(owner.func, "id", "") == "super"


def asks_by_name(call: ast.Call) -> bool:
    """Whether a call is `getattr(owner, name)` or `hasattr(owner, name)`."""
    return isinstance(call.func, ast.Name) and call.func.id in ("getattr", "hasattr") and len(call.args) > 1
