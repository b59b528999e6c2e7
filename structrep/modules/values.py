"""What the expressions of a function give of a module's parts, by its source: which parts, containers and functions,
and what it hangs on which."""

from __future__ import annotations

import ast
import contextlib
import inspect
import operator
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from structrep.modules.boxes import FILLS
from structrep.modules.holders import modules_in
from structrep.modules.objects import is_object
from structrep.modules.source import written_in

Place: TypeAlias = tuple[str, int, int | None, int, int | None]  # a file, and from where to where
CONTAINERS = (dict, list, tuple, set, frozenset)
SOME = (ast.If, ast.IfExp, ast.Try, ast.While, ast.Match, ast.BoolOp)


class Value(NamedTuple):
    """The parts, containers of parts and functions that an expression may give, and what it hangs on."""

    held: tuple[Any, ...] = ()
    hangs_on: frozenset[str] = frozenset()


def either(values: Iterable[Value]) -> Value:
    """Any of some values."""
    several = list(values)
    held = tuple(one for value in several for one in value.held)
    return Value(held, frozenset().union(*(value.hangs_on for value in several)))


class Mixed(list[Any]):
    """What a container that code makes may hold, in no order."""


class Super:
    """What `super()` stands for."""

    def __init__(self, module: nn.Module, function: Any) -> None:
        self.module, self.function = module, function

    def find(self, name: str) -> Any:
        classes = type(self.module).__mro__
        home = next(
            (
                i
                for i, base in enumerate(classes)
                if inspect.unwrap(vars(base).get(self.function.__name__, len)) is inspect.unwrap(self.function)
            ),
            0,
        )
        return next((f for base in classes[home + 1 :] if isinstance(f := vars(base).get(name), FunctionType)), None)


def place_of(node: ast.AST, code: CodeType) -> Place:
    at: Any = node
    return code.co_filename, at.lineno, at.end_lineno, at.col_offset, at.end_col_offset


def is_users(function: Any) -> bool:
    return written_in(function).partition(".")[0] not in ("torch", "structrep", "builtins")


def is_users_method(value: Any) -> bool:
    plain = getattr(value, "__func__", value)
    return isinstance(plain, FunctionType) and is_users(inspect.unwrap(plain))


def elements(held: Iterable[Any]) -> tuple[Any, ...]:
    """What a loop over containers gives."""
    found: list[Any] = []
    for one in held:
        if isinstance(one, nn.Module):
            found += [child for child in one._modules.values() if child is not None]
        elif isinstance(one, dict):
            found += one.values()
        elif isinstance(one, (list, tuple, set, frozenset)):
            found += one
    return tuple(found)


def parts_in(held: Iterable[Any]) -> Iterator[nn.Module]:
    """The modules in values, in containers too."""
    for one in held:
        if isinstance(one, (nn.ModuleList, nn.ModuleDict, *CONTAINERS)):
            yield from parts_in(elements([one]))
        elif isinstance(one, nn.Module):
            yield one
        elif isinstance(one, MethodType) and isinstance(one.__self__, nn.Module):
            yield one.__self__
        elif _holds(one):
            yield from modules_in(one)


def _holds(value: Any) -> bool:
    """Whether a value is an object that may hold parts under names of its own."""
    return isinstance(value, SimpleNamespace) or is_object(value)


def constant(node: ast.expr) -> Any:
    """A key that code spells out; None of another."""
    try:
        if isinstance(node, ast.Slice):
            return slice(*(one and ast.literal_eval(one) for one in (node.lower, node.upper, node.step)))
        return ast.literal_eval(node)
    except ValueError:
        return None


class Names:
    """A function, and what its names stand for.

    Args:
        given, named: the parts that it is given.
        rest: what it may be given as any other argument.
    """

    def __init__(
        self,
        function: Any,
        tree: ast.FunctionDef | ast.Lambda,
        given: list[Value],
        named: dict[str, Value],
        rest: Value,
    ) -> None:
        self.function, self.tree = function, tree
        self.code: CodeType = function.__code__
        first = [one for one in given[0].held if isinstance(one, nn.Module)] if given else []
        self.module = first[0] if len(first) == 1 else None
        positional = [*tree.args.posonlyargs, *tree.args.args]
        arguments = [*positional, *tree.args.kwonlyargs]
        told = {one.arg: value for one, value in zip(positional, given, strict=False)} | named
        if rest.held:
            told |= {one.arg: rest for one in arguments if one.arg not in told}
        for star, more in ((tree.args.vararg, given[len(positional) :]), (tree.args.kwarg, list(named.values()))):
            held, hangs = either((*more, rest))
            if star is not None and held:
                told[star.arg] = Value((Mixed(held),), hangs)
        self.given = {name: value for name, value in told.items() if value.held}
        self.open = {one.arg for one in arguments} - self.given.keys()
        self.bound: dict[str, list[tuple[ast.expr, str]]] = {}  # name -> expressions, and what it is of each
        self.inner: dict[str, ast.FunctionDef | ast.Lambda] = {}  # functions inside
        for node in ast.walk(tree):
            self._bind_all(node)

    def _name(self, text: str) -> str:
        return f"{id(self.module)} {self.function.__qualname__}: {text}"

    def _hangs(self, node: ast.AST) -> frozenset[str]:
        return frozenset({self._name(ast.unparse(node))})

    def _bind_all(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value, "is")
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)) and node.value is not None:
            self._bind(node.target, node.value, "is")
        elif isinstance(node, (ast.For, ast.comprehension)):
            self._bind(node.target, node.iter, "each")
        elif isinstance(node, ast.FunctionDef) and node is not self.tree:
            self.inner[node.name] = node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FILLS:
            if isinstance(node.func.value, ast.Name):
                for one in node.args:
                    self._bind(node.func.value, one, "in")
        elif isinstance(node, ast.MatchAs) and node.name is not None:
            self.open.add(node.name)

    def _bind(self, target: ast.expr, value: ast.expr, how: str) -> None:
        if isinstance(target, ast.Name):
            if isinstance(value, ast.Lambda):
                self.inner[target.id] = value
            self.bound.setdefault(target.id, []).append((value, how))
        elif isinstance(target, ast.Starred):
            self._bind(target.value, value, how)
        elif isinstance(target, (ast.Tuple, ast.List)):
            callee = value.func if isinstance(value, ast.Call) else None
            name = getattr(callee, "id", getattr(callee, "attr", ""))
            if isinstance(value, ast.Call) and how == "each" and name == "enumerate" and len(target.elts) == 2:
                self._bind(target.elts[0], ast.Constant(0), "is")
                self._bind(target.elts[1], value.args[0], "each")
            elif (
                isinstance(value, ast.Call) and how == "each" and name == "zip" and len(value.args) == len(target.elts)
            ):
                for inner, one in zip(target.elts, value.args, strict=True):
                    self._bind(inner, one, "each")
            elif isinstance(value, (ast.Tuple, ast.List)) and how == "is" and len(value.elts) == len(target.elts):
                for inner, one in zip(target.elts, value.elts, strict=True):
                    self._bind(inner, one, "is")
            else:
                for inner in target.elts:
                    self._bind(inner, value, "each" if how == "is" else "each of each")


class Values(Names):
    """What the expressions of a function give."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.values: dict[ast.AST, Value] = {}

    def value(self, node: ast.AST) -> Value:
        if node not in self.values:
            self.values[node] = Value()  # where a name is bound to something that is made of it
            self.values[node] = self._value(node)
        return self.values[node]

    def _called(self, node: ast.Call) -> Value:
        """What a call gives."""
        raise NotImplementedError

    def _property(self, found: FunctionType, module: nn.Module) -> Value:
        """What a property gives."""
        raise NotImplementedError

    def _value(self, node: ast.AST) -> Value:
        if isinstance(node, ast.Name):
            return self._of_name(node.id)
        if isinstance(node, ast.Constant):
            return Value()
        if isinstance(node, ast.Attribute):
            return self._attribute(self.value(node.value), node.attr, node)
        if isinstance(node, ast.Subscript):
            return self._entry(node)
        if isinstance(node, ast.Call):
            return self._called(node)
        if isinstance(node, ast.IfExp):
            known = self._known(node.test)
            if known is not None:
                return self.value(node.body if known else node.orelse)
            held, hangs = either((self.value(node.body), self.value(node.orelse)))
            return Value(held, hangs | self._hangs(node.test))
        if isinstance(node, ast.BoolOp):
            left = [one for one in node.values if self._known(one) is not isinstance(node.op, ast.And)]
            left = left[: next((i for i, one in enumerate(left) if self._known(one) is not None), len(left)) + 1]
            values = [self.value(one) for one in left or node.values]
            held, hangs = either(values)
            return Value(held, hangs | (self._hangs(node) if len(values) > 1 else frozenset()))
        if isinstance(node, (ast.NamedExpr, ast.Starred)):
            return self.value(node.value)
        if isinstance(node, (ast.Lambda, ast.FunctionDef)):
            return Value()
        children = (one for one in ast.iter_child_nodes(node) if isinstance(one, (ast.expr, ast.comprehension)))
        held, hangs = either(map(self.value, children))
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
            element = self.value(node.elt)
            return Value((Mixed(element.held),) if element.held else (), hangs)
        shown = isinstance(node, (ast.List, ast.Tuple, ast.Set, ast.Dict)) and held
        return Value((Mixed(held),) if shown else held, hangs)

    def _of_name(self, name: str) -> Value:
        if name in self.given:
            return self.given[name]
        values: list[Value] = []
        for expression, how in self.bound.get(name, ()):
            held, hangs = self.value(expression)
            if how == "in":
                held = (Mixed(held),) if held else ()
            elif how == "each":
                held = elements(held)
            elif how == "each of each":
                inner = elements(held)
                held = (*elements(one for one in inner if isinstance(one, CONTAINERS)), *inner)
            values.append(Value(held, hangs))
        if values:
            held, hangs = either(values)
            several = len(values) > 1 and sum(bool(value.held) for value in values) != 1
            told = {self._name(name)} if several or name in self.open else set[str]()
            return Value(held, hangs | told)
        if name in self.open:
            return Value((), frozenset({self._name(name)}))
        cells = dict(zip(self.code.co_freevars, self.function.__closure__ or (), strict=True))
        found: Any = None
        with contextlib.suppress(ValueError):  # a cell that has no value yet
            found = cells[name].cell_contents if name in cells else self.function.__globals__.get(name)
        plain = name in cells or (name in self.function.__globals__ and not callable(found))
        kinds = (nn.Module, FunctionType, MethodType, ModuleType, type, operator.attrgetter, *CONTAINERS)
        if isinstance(found, kinds):
            return Value((found,))
        return Value((), frozenset({self._name(name)}) if plain else frozenset())

    def _attribute(self, base: Value, name: str, node: ast.AST) -> Value:
        held: list[Any] = []
        hangs = base.hangs_on
        for one in base.held:
            if isinstance(one, ModuleType):
                found = getattr(one, name, None)
                if isinstance(found, (FunctionType, ModuleType, nn.Module, type)):
                    held.append(found)
                elif not callable(found):
                    hangs |= self._hangs(node)
            elif isinstance(one, Super):
                found = one.find(name)
                held += [] if found is None else [MethodType(found, one.module)]
            elif isinstance(one, nn.Module):
                own, plain = self._of_module(one, name)
                held += own.held
                hangs |= own.hangs_on | (self._hangs(node) if plain else frozenset())
            elif isinstance(one, MethodType):
                held += [one.__func__] if name == "__func__" else []
            elif isinstance(one, type) or _holds(one) or isinstance(one, CONTAINERS):
                found = _of_class(one, name) if isinstance(one, type) else _of_object(one, name)
                held += [] if found is None else [found]
        return Value(tuple(held), hangs)

    def _of_module(self, module: nn.Module, name: str) -> tuple[Value, bool]:
        """What a module has by a name, and whether that is a setting."""
        if name in module._modules:
            child = module._modules[name]
            return Value(() if child is None else (child,)), False
        if name in module._parameters or name in module._buffers or name == "training":
            return Value(), False
        if name in ("__dict__", "__class__"):
            return Value((vars(module) if name == "__dict__" else type(module),)), False
        own = vars(module).get(name)
        if isinstance(own, CONTAINERS) and (name == "_modules" or any(parts_in([own]))):
            return Value((own,)), False
        if isinstance(own, (nn.Module, FunctionType, MethodType, operator.attrgetter)):
            return Value((own,)), isinstance(own, MethodType) and name != "forward"
        if _holds(own) and any(modules_in(own)):
            return Value((own,)), False
        if name in vars(module):
            return Value(), name not in vars(nn.Module())
        found = inspect.getattr_static(type(module), name, None)
        if isinstance(found, property) and isinstance(found.fget, FunctionType):
            return self._property(found.fget, module), False
        if isinstance(found, classmethod):
            return Value((MethodType(found.__func__, type(module)),)), False
        if isinstance(found, staticmethod):
            return Value((found.__func__,)), False
        if isinstance(found, FunctionType):
            return Value((MethodType(found, module),)), False
        return Value(), not hasattr(nn.Module, name)

    def _entry(self, node: ast.Subscript) -> Value:
        base, key = self.value(node.value), self.value(node.slice)
        told = constant(node.slice)
        held: list[Any] = []
        for one in base.held:
            found: Any = None
            if isinstance(node.slice, ast.Slice):
                found = list(elements([one])[told or slice(None)])
            elif told is not None and not isinstance(one, Mixed):
                with contextlib.suppress(Exception):  # of a class of its own, it may do anything
                    found = one[told]
            held += [found] if found is not None else elements([one])
        return Value(tuple(held), base.hangs_on | key.hangs_on)

    # --- conditions ---------------------------------------------------------------------------------------------------

    def _known(self, test: ast.expr) -> bool | None:
        """The answer to whether a part is there, or in training; None to other questions."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._known(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            ends = isinstance(test.op, ast.Or)
            known = [self._known(one) for one in test.values]
            return ends if ends in known else None if None in known else not ends
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], (ast.Is, ast.IsNot)):
            nothing = isinstance(test.comparators[0], ast.Constant) and test.comparators[0].value is None
            there = self._known_part(test.left) if nothing else None
            return None if there is None else there == isinstance(test.ops[0], ast.IsNot)
        if isinstance(test, ast.Constant):
            return bool(test.value)
        return self._known_part(test)

    def _known_part(self, node: ast.expr) -> bool | None:
        if not isinstance(node, ast.Attribute):
            return None
        holders = [one for one in self.value(node.value).held if isinstance(one, nn.Module)]
        if len(holders) != 1:
            return None
        (holder,) = holders
        if node.attr == "training":
            return holder.training
        if node.attr in holder._modules:
            return holder._modules[node.attr] is not None
        tensors = holder._parameters.get(node.attr), holder._buffers.get(node.attr)
        return True if any(one is not None for one in tensors) else None  # one that is not there may be set


def _of_class(cls: type, name: str) -> Any:
    """A function of a class, called by way of it."""
    found = inspect.getattr_static(cls, name, None)
    if isinstance(found, classmethod):
        return MethodType(found.__func__, cls)
    found = getattr(found, "__func__", found)
    return found if isinstance(found, FunctionType) else None


def _of_object(held: Any, name: str) -> Any:
    """What an object that holds parts, or a container, has by a name."""
    found = inspect.getattr_static(held, name, None)
    if isinstance(found, FunctionType) and name not in getattr(held, "__dict__", {}):
        return MethodType(found, held)
    with contextlib.suppress(Exception):
        found = object.__getattribute__(held, name) if not isinstance(found, property) else None
    return found
