"""What the code of a class names of the parts of its module."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Set
from types import FunctionType

from torch import nn

from structrep.modules.objects import STORES
from structrep.modules.source import asks_by_name, attribute_of, functions, of_super, read_function, written_in

HOLDS_ALL = STORES | {"__dict__"}  # what gives all that a module holds at once


def mentions(cls: type, name: str, picks: bool = True) -> frozenset[str] | None:
    """The attributes of its module that a method mentions, itself or in methods that it calls.

    None if they may be any: the code cannot be read, or does something else with its module than ask for an attribute.

    Args:
        picks: leave out what the method itself picks by names that it is given: that is for those to say who call it.
    """
    known, found = functions(cls), set[str]()
    pending = [(known[name], picks)]
    while pending:
        one = _own_mentions(*pending.pop())
        if one is None or any(hasattr(nn.Module, attribute) for attribute in one - known.keys()):
            return None
        pending += [(inner, False) for attribute in one - found for inner in _all_of(cls, attribute)]
        found |= one
    return frozenset(found)


def _all_of(cls: type, name: str) -> Iterator[FunctionType]:
    """The methods of a name, its own and those that it may come to by `super()`, but for torch's."""
    for base in cls.__mro__:
        held = vars(base).get(name)
        if isinstance(held, FunctionType) and written_in(base).partition(".")[0] != "torch":
            yield held


def comes_to(cls: type, name: str | None, methods: Set[str]) -> bool:
    """Whether a call of a method, by a name that a class may have none of, may come to one of some methods."""
    if name is None or name not in functions(cls):
        return False
    found = mentions(cls, name, picks=False)
    return name in methods or found is None or not found.isdisjoint(methods)


@functools.lru_cache(4096)
def _own_mentions(function: FunctionType, picks: bool) -> frozenset[str] | None:
    """The same of one method.

    Args:
        picks: whether it may pick parts by names that it is given.
    """
    read = read_function(function)
    if read is None:
        return None
    tree, itself = read
    nodes = list(ast.walk(tree))
    asked = [node for node in nodes if attribute_of(node, itself) or of_super(node)]
    picked = [one for one in nodes if isinstance(one, ast.Call) and _picks(one, itself)]
    by_name = {one.args[1].value for one in picked if isinstance(one.args[1], ast.Constant)}
    given = _given(tree, itself) if picks else frozenset()
    computed = [one.args[1] for one in picked if not isinstance(one.args[1], ast.Constant)]
    if any(not isinstance(one, ast.Name) or one.id not in given for one in computed):
        return None
    if any(attribute_of(node, itself) and node.attr in HOLDS_ALL for node in nodes if isinstance(node, ast.Attribute)):
        return None
    uses = sum(isinstance(node, ast.Name) and node.id in (itself, "super") for node in nodes)
    bare = uses != len(asked) + len(picked)
    return None if bare else frozenset({*(n.attr for n in asked if isinstance(n, ast.Attribute)), *map(str, by_name)})


def _picks(call: ast.Call, itself: str) -> bool:
    """Whether a call is `getattr(self, name)`."""
    return asks_by_name(call) and isinstance(call.args[0], ast.Name) and call.args[0].id == itself


def _given(tree: ast.AST, itself: str) -> frozenset[str]:
    """The names of what a function has to be given, and of what is in that."""
    if not isinstance(tree, ast.FunctionDef):
        return frozenset()
    plain = [*tree.args.posonlyargs, *tree.args.args]
    needed = plain[: len(plain) - len(tree.args.defaults)]
    alone = zip(tree.args.kwonlyargs, tree.args.kw_defaults, strict=True)
    found = {one.arg for one in (*needed, *(one for one, default in alone if default is None))} - {itself}
    stored = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    loops = [n for n in ast.walk(tree) if isinstance(n, ast.For) and getattr(n.iter, "id", None) in found]
    targets = {one.target for one in loops}
    inside = {one.target.id for one in loops if isinstance(one.target, ast.Name)}
    others = {one.id for one in stored if one not in targets}
    return frozenset((found | inside) - others)


def taken_apart(module: nn.Module) -> set[str]:
    """The parts of a module that its class's code does anything else with than call them or ask whether they are there:
    it may run what is inside them one by one."""
    found: set[str] = set()
    cls = type(module)
    own = functions(getattr(cls, "__structrep_base__", cls))  # of a deploy model: converters that are none any more
    for name, function in (*own.items(), *functions(cls).items()):
        if name != "__init__":
            apart = _own_parts(function)
            if apart is None:
                return set(module._modules.keys())
            found |= apart
    return found.intersection(module._modules.keys())  # of a ScriptModule, a list


@functools.lru_cache(4096)
def _own_parts(function: FunctionType) -> frozenset[str] | None:
    read = read_function(function)
    if read is None:
        return frozenset() if function.__name__ != "forward" else None
    tree, itself = read
    harmless: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            harmless.add(node.func)
        elif isinstance(node, ast.Attribute):
            harmless.add(node.value)  # what is below is looked for by name
        elif isinstance(node, ast.Compare):
            harmless |= {node.left, *node.comparators}
        elif isinstance(node, (ast.If, ast.IfExp)):
            harmless.add(node.test)
        elif isinstance(node, ast.BoolOp):
            harmless.update(node.values)
        elif isinstance(node, ast.UnaryOp):
            harmless.add(node.operand)
    asked = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and attribute_of(node, itself))
    return frozenset(n.attr for n in asked if isinstance(n.ctx, ast.Load) and n not in harmless)
