"""What the code of a class names of the parts of its module, and asks them."""

from __future__ import annotations

import ast
import functools
from types import FunctionType

from torch import nn

from structrep.modules.source import _asked_of, attribute_of, functions, read_function, syntax


def mentions(cls: type, name: str) -> frozenset[str] | None:
    """The attributes of its module that a method mentions, itself or in methods that it calls.

    None if they may be any: the code cannot be read, or does something else with its module than ask for an attribute.
    """
    known, found, pending = functions(cls), set[str](), [name]
    while pending:
        one = _own_mentions(known[pending.pop()])
        if one is None or any(hasattr(nn.Module, attribute) for attribute in one - known.keys()):
            return None
        pending += [attribute for attribute in one - found if attribute in known]
        found |= one
    return frozenset(found)


@functools.lru_cache(4096)
def _own_mentions(function: FunctionType) -> frozenset[str] | None:
    read = read_function(function)
    if read is None:
        return None
    tree, itself = read
    nodes = list(ast.walk(tree))
    asked = [node for node in nodes if attribute_of(node, itself)]
    bare = sum(isinstance(node, ast.Name) and node.id in (itself, "super") for node in nodes) != len(asked)
    return None if bare else frozenset(node.attr for node in asked if isinstance(node, ast.Attribute))


def taken_apart(module: nn.Module) -> set[str]:
    """The parts of a module that its class's code does anything else with than call them or ask whether they are there:
    it may run what is inside them one by one."""
    found: set[str] = set()
    for name, function in functions(type(module)).items():
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


def questions(module: nn.Module) -> frozenset[tuple[str, ...]]:
    """What the forward of a module, or what it calls of its own, asks of its parts other than to run: their settings
    (`self.norm.eps`), their types (`isinstance(self.norm, ...)`), or hands them to somebody; each as the names on the
    way there. A way that ends in "+" is to all its parts, in "*" to all that is below."""
    cls = type(module)
    known = functions(cls)
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        known |= {
            k: v.fget for k, v in vars(base).items() if isinstance(v, property) and isinstance(v.fget, FunctionType)
        }
    found, pending, seen = set[tuple[str, ...]](), ["forward", "__call__"], set[str]()
    while pending:
        name = pending.pop()
        if name in known and name not in seen:
            seen.add(name)
            asked, used = _own_questions(known[name])
            found |= asked
            pending += known if "*" in used else used
    return frozenset(found)


_WALKS = {"modules", "children", "named_modules", "named_children", "parameters", "named_parameters", "state_dict"}


@functools.lru_cache(4096)
def _own_questions(function: FunctionType) -> tuple[frozenset[tuple[str, ...]], frozenset[str]]:
    """The questions that a method asks, and the names of its module's attributes that it may call; "*" for any."""
    read = read_function(function)
    if read is None:
        return frozenset(), frozenset()
    tree, itself = read
    nodes = list(ast.walk(tree))
    others: dict[str, tuple[str, ...]] = {itself: ()}  # names of the module and, of its parts, those given in passing
    for node in nodes:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            names = _names(node.value, {itself: ()})
            if names:
                others[node.targets[0].id] = names
    asked: set[tuple[str, ...]] = set()
    used: set[str] = set()
    outermost = {node for node in nodes if isinstance(node, ast.Attribute)}
    outermost -= {node.value for node in outermost if isinstance(node.value, ast.Attribute)}
    run = {node.func for node in nodes if isinstance(node, ast.Call)}
    loops = [node for node in nodes if isinstance(node, ast.For) and _only_calls(node, nodes, run)]
    plain_loops = {loop.iter.func for loop in loops if isinstance(loop.iter, ast.Call)}
    for attribute in outermost:
        names = _names(attribute, others) or ()
        if names and names[-1] in _WALKS and attribute in run:
            if attribute not in plain_loops:
                asked.add((*names[:-1], "+" if "children" in names[-1] else "*"))
        elif len(names) == 1:
            used.add(names[0])
        elif names and not (attribute in run and names[-1] == "forward"):
            asked.add(names)
    for node in nodes:
        given: list[ast.expr] = []
        if isinstance(node, ast.Call):
            helper = function.__globals__.get(node.func.id) if isinstance(node.func, ast.Name) else None
            plain = isinstance(helper, FunctionType)
            given = [arg for place, arg in enumerate(node.args) if not (plain and _asks_for_geometry(helper, place))]
            given += [keyword.value for keyword in node.keywords]
        elif isinstance(node, ast.Match):
            given = [node.subject]
        for one in given:
            names = _names(one, others) or ()
            if isinstance(node, ast.Call) and not names and isinstance(one, ast.Name) and one.id == itself:
                names = _named_attribute(node)
                if not names and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                    used.add("*")
            if names:
                asked.add((*names, "what it is"))
    return frozenset(asked), frozenset(used)


def _only_calls(loop: ast.For, nodes: list[ast.AST], run: set[ast.expr]) -> bool:
    """Whether a loop over what a call gives does no more with each than to call it: `for block in self.children()`."""
    target = loop.target
    uses = {n for n in nodes if isinstance(n, ast.Name) and isinstance(target, ast.Name) and n.id == target.id}
    return isinstance(loop.iter, ast.Call) and bool(uses) and uses - {target} <= run


_GEOMETRY = {"stride", "padding", "kernel_size", "dilation", "groups", "padding_mode"}


@functools.lru_cache(4096)
def _asks_for_geometry(function: FunctionType, place: int) -> bool:
    """Whether all that a function asks of an argument is how a convolution moves, as one that computes pads does."""
    tree = syntax(function)
    if not isinstance(tree, ast.FunctionDef) or place >= len(tree.args.args):
        return False
    asked = _asked_of({tree.args.args[place].arg}, tree)
    return asked is not None and bool(asked) and _GEOMETRY.issuperset(asked)


def _named_attribute(call: ast.Call) -> tuple[str, ...]:
    """("conv",) of `getattr(self, "conv")`."""
    plain = isinstance(call.func, ast.Name) and call.func.id == "getattr" and len(call.args) > 1
    name = call.args[1] if plain else None
    return (name.value,) if isinstance(name, ast.Constant) and isinstance(name.value, str) else ()


def _names(node: ast.AST, known: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """("a", "b") of `self.a.b`, and of `c.b` where c is known to be self.a; None of anything else. An index counts as a
    name, if it is a number."""
    names: list[str] = []
    inner = node
    while isinstance(inner, (ast.Attribute, ast.Subscript)):
        if isinstance(inner, ast.Attribute):
            names.insert(0, inner.attr)
        elif isinstance(inner.slice, ast.Constant) and isinstance(inner.slice.value, int):
            names.insert(0, str(inner.slice.value))
        else:
            return None
        inner = inner.value
    return (*known[inner.id], *names) if isinstance(inner, ast.Name) and inner.id in known else None
