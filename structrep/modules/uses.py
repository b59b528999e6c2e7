"""Where code uses the parts of a module, on whatever path, and what it hangs on which of them it uses, by its source.

`self.n(self.a(x))` uses both, always. `(self.m if self.low else self.n)(self.a(x))` uses another norm some day, and
`self.a(x) if self.low else self.n(self.a(x))` has a use of the convolution that a trace may not come to.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import inspect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from structrep.modules.paths import branches, definition
from structrep.modules.source import written_in

Place: TypeAlias = tuple[str, int, int | None, int, int | None]  # a file, and from where to where


@dataclass(frozen=True)
class Use:
    """One expression that runs parts, reads their numbers, or hands them to somebody.

    Args:
        parts: which it may be.
        places: where the expression stands, and what surely runs it.
        hangs_on: what it hangs on which part it is; nothing where that is always the same, or counted by a loop.
        code: whose expression it is.
    """

    parts: frozenset[nn.Module]
    places: frozenset[Place]
    hangs_on: frozenset[str]
    code: CodeType
    line: int


class Value(NamedTuple):
    """The parts, containers of parts and functions that an expression may give, and what it hangs on."""

    held: tuple[Any, ...] = ()
    hangs_on: frozenset[str] = frozenset()


def uses(module: nn.Module, function: Any) -> list[Use]:
    """What the code of a method, and what that calls, does with parts of its module."""
    found = _Uses()
    found.scan(function, [Value((module,))], frozenset())
    return found.all


def place_of(node: ast.AST, code: CodeType) -> Place:
    at: Any = node
    return code.co_filename, at.lineno, at.end_lineno, at.col_offset, at.end_col_offset


def _is_users(function: Any) -> bool:
    return written_in(function).partition(".")[0] not in ("torch", "structrep", "builtins")


def _elements(held: Iterable[Any]) -> tuple[Any, ...]:
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


def _parts(held: Iterable[Any]) -> Iterator[nn.Module]:
    """The modules in values, in containers too."""
    for one in held:
        if isinstance(one, (nn.ModuleList, nn.ModuleDict, dict, list, tuple, set, frozenset)):
            yield from _parts(_elements([one]))
        elif isinstance(one, nn.Module):
            yield one
        elif isinstance(one, MethodType) and isinstance(one.__self__, nn.Module):
            yield one.__self__


_CONTAINERS = (dict, list, tuple, set, frozenset)
_LOOPS = {"enumerate", "zip", "reversed", "list", "tuple", "iter", "next", "sorted", "chain", "islice", "dict", "set"}
_ASKS = {"isinstance", "hasattr", "type", "print", "callable", "id", "len", "repr", "str", "bool", "super", "getattr",
         "range", "int", "float", "min", "max", "abs", "any", "all", "sum", "issubclass"}  # fmt: skip
_INNER = (ast.Lambda, ast.GeneratorExp)
_LEAVES = (ast.Return, ast.Raise, ast.Break, ast.Continue)
_CHILDREN = {"children", "named_children", "values", "items"}
_BELOW = {"modules", "named_modules"}
_PUTS = {"append", "extend", "insert", "add", "update", "setdefault"}
_OF_TENSORS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "is_cuda", "requires_grad", "element_size"}


class _Uses:
    """A reader of functions that call each other."""

    def __init__(self) -> None:
        self.all: list[Use] = []
        self.known: dict[Any, Value] = {}  # what functions give, by what they are given

    def scan(
        self, function: Any, given: list[Value], around: frozenset[Place], named: dict[str, Value] | None = None
    ) -> Value:
        """Read a function that is given parts; tells which it gives."""
        plain = inspect.unwrap(function)
        code = getattr(plain, "__code__", None)
        if code is None or not _is_users(plain):
            return Value()
        told = [*enumerate(given), *(named or {}).items()]
        key = (code, around, *((place, one.hangs_on, *map(id, one.held)) for place, one in told))
        if key not in self.known:
            self.known[key] = Value()  # where it calls itself
            found = definition(code)
            if found is None:
                self._unread(code, given, around)
            else:
                self.known[key] = _Scope(self, plain, found[0], given, named or {}, around).read()
        return self.known[key]

    def _unread(self, code: CodeType, given: list[Value], around: frozenset[Place]) -> None:
        """Code that is known to Python only uses any part, if it can do one thing or another."""
        steps = [one for one in dis.get_instructions(code) if one.opname != "CACHE"]
        picks = any(
            one.opname == "BINARY_SUBSCR" and before.opname != "LOAD_CONST" for before, one in itertools.pairwise(steps)
        )
        if picks or "getattr" in code.co_names or branches(code):
            held = [one for value in given for one in value.held]
            parts = frozenset(part for one in held if isinstance(one, nn.Module) for part in one.modules())
            self.all.append(Use(parts, around, frozenset({code.co_name}), code, code.co_firstlineno))


class _Scope:
    """A function, and what its names stand for."""

    def __init__(
        self,
        of: _Uses,
        function: Any,
        tree: ast.FunctionDef | ast.Lambda,
        given: list[Value],
        named: dict[str, Value],
        around: frozenset[Place],
    ) -> None:
        self.of, self.function, self.tree, self.around = of, function, tree, around
        self.code: CodeType = function.__code__
        first = [one for one in given[0].held if isinstance(one, nn.Module)] if given else []
        self.module = first[0] if len(first) == 1 else None
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        told = {one.arg: value for one, value in zip(arguments, given, strict=False)} | named
        self.given = {name: value for name, value in told.items() if value.held}
        self.open = {one.arg for one in (*arguments, *tree.args.kwonlyargs)} - self.given.keys()
        self.bound: dict[str, list[tuple[ast.expr, str]]] = {}  # name -> expressions, and what it is of each
        self.inner: dict[str, ast.FunctionDef | ast.Lambda] = {}  # functions inside
        self.values: dict[ast.AST, Value] = {}
        self.returned: list[Value] = []
        self.perhaps = False  # whether code is read that may not be run
        self.within: list[Place] = []  # the expressions around what is read
        for node in ast.walk(tree):
            self._bind_all(node)
        self.runs: dict[str, set[Place]] = {}  # name of a function inside -> calls that run it, or hand it on
        for node in ast.walk(tree) if self.inner else ():
            if isinstance(node, ast.Call):
                for name in {n.id for n in (node.func, *node.args) if isinstance(n, ast.Name)} & self.inner.keys():
                    self.runs.setdefault(name, set()).add(place_of(node, self.code))

    def read(self) -> Value:
        if isinstance(self.tree, ast.Lambda):
            self._expression(self.tree.body, self.around)
            return self.value(self.tree.body)
        self._block(self.tree.body, self.around)
        held = tuple(one for value in self.returned for one in value.held)
        hangs = frozenset().union(*(value.hangs_on for value in self.returned))
        several = sum(bool(value.held) for value in self.returned) > 1
        return Value(held, hangs | ({self._name(self.code.co_name)} if several else frozenset()))

    def _name(self, text: str) -> str:
        return f"{id(self.module)} {self.function.__qualname__}: {text}"

    def _hangs(self, node: ast.AST) -> frozenset[str]:
        return frozenset({self._name(ast.unparse(node))})

    # --- names --------------------------------------------------------------------------------------------------------

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
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _PUTS:
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

    def _of_name(self, name: str) -> Value:
        if name in self.given:
            return self.given[name]
        values: list[Value] = []
        for expression, how in self.bound.get(name, ()):
            held, hangs = self.value(expression)
            if how == "in":
                held = (_Mixed(held),) if held else ()
            elif how == "each":
                held = _elements(held)
            elif how == "each of each":
                inner = _elements(held)
                held = (*_elements(one for one in inner if isinstance(one, _CONTAINERS)), *inner)
            values.append(Value(held, hangs))
        if values:
            held = tuple(one for value in values for one in value.held)
            hangs = frozenset().union(*(value.hangs_on for value in values))
            several = len(values) > 1 and sum(bool(value.held) for value in values) != 1
            told = {self._name(name)} if several or name in self.open else set[str]()
            return Value(held, hangs | told)
        if name in self.open:
            return Value((), frozenset({self._name(name)}))
        cells = dict(zip(self.code.co_freevars, self.function.__closure__ or (), strict=True))
        found: Any = None
        with contextlib.suppress(ValueError):  # a cell that has no value yet
            found = cells[name].cell_contents if name in cells else self.function.__globals__.get(name)
        if isinstance(found, (nn.Module, FunctionType, MethodType, ModuleType, *_CONTAINERS)):
            return Value((found,))
        plain = name in cells or (name in self.function.__globals__ and not callable(found))
        return Value((), frozenset({self._name(name)}) if plain else frozenset())

    # --- expressions --------------------------------------------------------------------------------------------------

    def value(self, node: ast.AST) -> Value:
        if node not in self.values:
            self.values[node] = Value()  # where a name is bound to something that is made of it
            self.values[node] = self._value(node)
        return self.values[node]

    def _value(self, node: ast.AST) -> Value:
        if isinstance(node, ast.Name):
            return self._of_name(node.id)
        if isinstance(node, ast.Constant):
            return Value()
        if isinstance(node, ast.Attribute):
            base = self.value(node.value)
            return self._attribute(base, node.attr, node)
        if isinstance(node, ast.Subscript):
            return self._entry(node)
        if isinstance(node, ast.Call):
            return self._called(node)
        if isinstance(node, ast.IfExp):
            known = self._known(node.test)
            if known is not None:
                return self.value(node.body if known else node.orelse)
            ways = self.value(node.body), self.value(node.orelse)
            return Value((*ways[0].held, *ways[1].held), ways[0].hangs_on | ways[1].hangs_on | self._hangs(node.test))
        if isinstance(node, ast.BoolOp):
            left = [one for one in node.values if self._known(one) is not isinstance(node.op, ast.And)]
            left = left[: next((i for i, one in enumerate(left) if self._known(one) is not None), len(left)) + 1]
            values = [self.value(one) for one in left or node.values]
            held = tuple(one for value in values for one in value.held)
            hangs = frozenset().union(*(value.hangs_on for value in values))
            return Value(held, hangs | (self._hangs(node) if len(values) > 1 else frozenset()))
        if isinstance(node, (ast.NamedExpr, ast.Starred)):
            return self.value(node.value)
        if isinstance(node, (ast.Lambda, ast.FunctionDef)):
            return Value()
        values = [
            self.value(one) for one in ast.iter_child_nodes(node) if isinstance(one, (ast.expr, ast.comprehension))
        ]
        held = tuple(one for value in values for one in value.held)
        hangs = frozenset().union(*(value.hangs_on for value in values))
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
            element = self.value(node.elt)
            return Value((_Mixed(element.held),) if element.held else (), hangs)
        shown = isinstance(node, (ast.List, ast.Tuple, ast.Set, ast.Dict)) and held
        return Value((_Mixed(held),) if shown else held, hangs)

    def _attribute(self, base: Value, name: str, node: ast.AST) -> Value:
        held: list[Any] = []
        hangs = base.hangs_on
        for one in base.held:
            if isinstance(one, ModuleType):
                found = getattr(one, name, None)
                if isinstance(found, (FunctionType, ModuleType, nn.Module)):
                    held.append(found)
                elif not callable(found):
                    hangs |= self._hangs(node)
            elif isinstance(one, _Super):
                found = one.find(name)
                held += [] if found is None else [MethodType(found, one.module)]
            elif isinstance(one, nn.Module):
                own, plain = self._of_module(one, name)
                held += own.held
                hangs |= own.hangs_on | (self._hangs(node) if plain else frozenset())
        return Value(tuple(held), hangs)

    def _of_module(self, module: nn.Module, name: str) -> tuple[Value, bool]:
        """What a module has by a name, and whether that is a setting."""
        if name in module._modules:
            child = module._modules[name]
            return Value(() if child is None else (child,)), False
        if name in module._parameters or name in module._buffers or name == "training":
            return Value(), False
        own = vars(module).get(name)
        if isinstance(own, _CONTAINERS) and (name == "_modules" or any(_parts([own]))):
            return Value((own,)), False
        if isinstance(own, (nn.Module, FunctionType, MethodType)):
            return Value((own,)), isinstance(own, MethodType) and name != "forward"
        if name in vars(module):
            return Value(), name not in vars(nn.Module())
        found = inspect.getattr_static(type(module), name, None)
        if isinstance(found, property) and isinstance(found.fget, FunctionType):
            return self.of.scan(found.fget, [Value((module,))], self.around), False
        found = getattr(found, "__func__", found)
        if isinstance(found, FunctionType):
            return Value((MethodType(found, module),)), False
        return Value(), not hasattr(nn.Module, name)

    def _entry(self, node: ast.Subscript) -> Value:
        base, key = self.value(node.value), self.value(node.slice)
        constant = _constant(node.slice)
        held: list[Any] = []
        for one in base.held:
            found: Any = None
            if isinstance(node.slice, ast.Slice):
                found = list(_elements([one])[constant or slice(None)])
            elif constant is not None and not isinstance(one, _Mixed):
                with contextlib.suppress(Exception):  # of a class of its own, it may do anything
                    found = one[constant]
            held += [found] if found is not None else _elements([one])
        return Value(tuple(held), base.hangs_on | key.hangs_on)

    def _called(self, node: ast.Call) -> Value:
        callee = node.func
        name = callee.id if isinstance(callee, ast.Name) else getattr(callee, "attr", "")
        given = [self.value(one) for one in (*node.args, *(keyword.value for keyword in node.keywords))]
        hangs = frozenset().union(*(value.hangs_on for value in given))
        if name == "super" and isinstance(callee, ast.Name):
            return Value((_Super(self.module, self.function),) if self.module is not None else ())
        if name == "getattr" and isinstance(callee, ast.Name) and len(node.args) > 1:
            return self._by_name(node, given)
        if name == "range":
            return Value()
        if name in _LOOPS:
            rounds = given[:1] if name == "islice" else given
            held = tuple(one for value in rounds for one in _elements(value.held))
            order = self._hangs(node) if name == "sorted" else frozenset()
            return Value((_Mixed(held),) if held else (), order.union(*(value.hangs_on for value in rounds)))
        if isinstance(callee, ast.Attribute):
            base = self.value(callee.value)
            containers = [one for one in base.held if isinstance(one, (nn.Module, *_CONTAINERS))]
            if name in _CHILDREN and containers:
                return Value((_Mixed(_elements(containers)),), base.hangs_on)
            if name in _BELOW and containers:
                below = (part for one in containers if isinstance(one, nn.Module) for part in one.modules())
                return Value((_Mixed(below),), base.hangs_on)
            if name in ("get_submodule", "get", "pop", "__getitem__", "__getattr__") and containers:
                return self._by_key(node, containers, base.hangs_on | hangs)
        functions = self.value(callee)
        held = ()
        for one in functions.held:
            if isinstance(one, (FunctionType, MethodType)):
                found = self._run(one, node)
                held, hangs = (*held, *found.held), hangs | found.hangs_on
        hangs |= functions.hangs_on
        known = bool(functions.held) or name in _ASKS
        return Value(held, hangs if known else hangs | self._hangs(node))

    def _by_name(self, node: ast.Call, given: list[Value]) -> Value:
        """What `getattr` gives."""
        name = node.args[1]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            return self._attribute(given[0], name.value, node)
        first: ast.AST = name.values[0] if isinstance(name, ast.JoinedStr) and name.values else name
        first = first.left if isinstance(first, ast.BinOp) else first
        start = str(first.value) if isinstance(first, ast.Constant) else ""
        held: list[Any] = []
        for one in (one for one in given[0].held if isinstance(one, nn.Module)):
            held += [child for key, child in one._modules.items() if child is not None and key.startswith(start)]
            own = dir(type(one)) if given[1].hangs_on else ()  # else it counts parts
            methods = (key for key in own if key.startswith(start) and not hasattr(nn.Module, key))
            held += [found for key in methods for found in self._of_module(one, key)[0].held]
        return Value(tuple(held), given[0].hangs_on | given[1].hangs_on)

    def _by_key(self, node: ast.Call, containers: list[Any], hangs: frozenset[str]) -> Value:
        key = node.args[0] if node.args else None
        held: list[Any] = []
        for one in containers:
            found: Any = None
            if isinstance(key, ast.Constant):
                with contextlib.suppress(Exception):
                    found = one.get_submodule(key.value) if hasattr(one, "get_submodule") else one[key.value]
            below = list(one.modules())[1:] if isinstance(one, nn.Module) else _elements([one])
            held += [found] if found is not None else below
        return Value(tuple(held), hangs)

    def _run(self, function: FunctionType | MethodType, node: ast.Call) -> Value:
        """What a function of the user's does with the parts that a call gives to it."""
        plain = getattr(function, "__func__", function)
        owner = getattr(function, "__self__", None)
        given = [Value((owner,))] if owner is not None else []
        given += [self.value(one) for one in node.args]
        named = {one.arg: self.value(one.value) for one in node.keywords if one.arg is not None}
        parts = any(value.held for value in (*given, *named.values()))
        if not parts or not _is_users(inspect.unwrap(plain)):
            return Value()
        around = frozenset() if branches(self.code) else self.around
        return self.of.scan(plain, given, around | {place_of(node, self.code)}, named)

    # --- statements ---------------------------------------------------------------------------------------------------

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
        for one in (holder._modules, holder._parameters, holder._buffers):
            if node.attr in one:
                return one[node.attr] is not None
        return None

    def _block(self, body: list[ast.stmt], around: frozenset[Place]) -> bool:
        """Read statements; tells whether code surely ends there."""
        for one in body:
            if isinstance(one, ast.If):
                self._expression(one.test, around)
                known = self._known(one.test)
                before, self.perhaps = self.perhaps, self.perhaps or known is None
                ends = [self._block(one.body, around)] if known is not False else []
                ends += [self._block(one.orelse, around)] if known is not True else []
                if all(ends):
                    return True
                self.perhaps = before or (known is None and any(isinstance(n, _LEAVES) for n in ast.walk(one)))
            elif isinstance(one, ast.FunctionDef):
                before, self.perhaps = self.perhaps, False
                self._block(one.body, around | self.runs.get(one.name, set()))
                self.perhaps = before
            else:
                self.perhaps |= isinstance(one, (ast.Try, ast.While, ast.Match))
                for _, value in ast.iter_fields(one):
                    for inner in value if isinstance(value, list) else [value]:
                        if isinstance(inner, ast.stmt):
                            self._block([inner], around)
                        elif isinstance(inner, ast.ExceptHandler | ast.match_case):
                            self._block(inner.body, around)
                        elif isinstance(inner, ast.withitem):
                            self._expression(inner.context_expr, around)
                        elif isinstance(inner, ast.expr):
                            self._expression(inner, around)
                if isinstance(one, ast.Return) and one.value is not None:
                    self.returned.append(self.value(one.value))
                if isinstance(one, (ast.Return, ast.Raise)):
                    return True
        return False

    def _expression(self, node: ast.AST, around: frozenset[Place]) -> None:
        if isinstance(node, ast.IfExp):
            known = self._known(node.test)
            self._expression(node.test, around)
            before, self.perhaps = self.perhaps, self.perhaps or known is None
            for way, left_out in ((node.body, False), (node.orelse, True)):
                if known is not left_out:
                    self._expression(way, around)
            self.perhaps = before
            return
        if isinstance(node, ast.Lambda):
            named = (name for name, one in self.inner.items() if one is node)
            around = around.union(*(self.runs.get(name, set()) for name in named))
        if isinstance(node, ast.Call):
            self._use_call(node, frozenset() if self.perhaps else around)
        elif isinstance(node, ast.Attribute) and self.perhaps:  # what is always read is nothing else
            self._use_numbers(node, frozenset(self.within))
        if isinstance(node, ast.expr):
            self.within.append(place_of(node, self.code))
        before, here = self.perhaps, around
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp, ast.Lambda)):
            self.perhaps = False  # it is code of its own
            here = around | {place_of(node, self.code)}
        elif isinstance(node, ast.Call) and any(isinstance(n, _INNER) for n in (node.func, *node.args)):
            here = around | {place_of(node, self.code)}
        self.perhaps |= isinstance(node, ast.BoolOp)
        for child in ast.iter_child_nodes(node):
            asks = isinstance(node, ast.Attribute) and node.attr in _OF_TENSORS
            if asks and isinstance(child, ast.Attribute):
                child = child.value
            self._expression(child, here)
        self.perhaps = before
        if isinstance(node, ast.expr):
            self.within.pop()

    def _use(self, value: Value, node: ast.AST, around: frozenset[Place]) -> None:
        parts = frozenset(part for part in _parts(value.held) if part is not self.module)
        if parts:
            line = getattr(node, "lineno", self.code.co_firstlineno)
            self.of.all.append(Use(parts, around | {place_of(node, self.code)}, value.hangs_on, self.code, line))

    def _use_call(self, node: ast.Call, around: frozenset[Place]) -> None:
        callee = node.func
        self.value(node)  # what it calls is read
        if isinstance(callee, ast.Attribute) and callee.attr in ("forward", "__call__"):
            base = self.value(callee.value)
            if any(isinstance(one, _Super) for one in base.held) and not any(
                map(_is_users_method, self.value(callee).held)
            ):
                self._use(Value(_elements([self.module])), node, around)
            else:
                self._use(base, node, around)
        called = self.value(callee)
        parts = tuple(o for o in called.held if isinstance(o, (nn.Module, *_CONTAINERS)))
        self._use(Value(parts, called.hangs_on), node, around)
        if called.hangs_on and any(isinstance(o, MethodType) and o.__self__ is self.module for o in called.held):
            self._use(Value(_elements([self.module]), called.hangs_on), node, around)  # one method or another
        name = callee.id if isinstance(callee, ast.Name) else getattr(callee, "attr", "")
        if name in _LOOPS | _ASKS | _PUTS or any(map(_is_users_method, called.held)):
            return
        for one in (*node.args, *(keyword.value for keyword in node.keywords)):
            self._use(self.value(one), node, around)

    def _use_numbers(self, node: ast.Attribute, around: frozenset[Place]) -> None:
        holders = [one for one in self.value(node.value).held if isinstance(one, nn.Module) and one is not self.module]
        holding = tuple(one for one in holders if node.attr in one._parameters or node.attr in one._buffers)
        if holding:
            self._use(Value(holding), node, around)


def _constant(node: ast.expr) -> Any:
    """A key that code spells out; None of another."""
    try:
        if isinstance(node, ast.Slice):
            return slice(*(one and ast.literal_eval(one) for one in (node.lower, node.upper, node.step)))
        return ast.literal_eval(node)
    except ValueError:
        return None


class _Mixed(list[Any]):
    """What a container that code makes may hold, in no order."""


class _Super:
    """What `super()` stands for."""

    def __init__(self, module: nn.Module, function: Any) -> None:
        self.module, self.function = module, function

    def find(self, name: str) -> Any:
        classes = type(self.module).__mro__
        home = next(
            (
                i
                for i, base in enumerate(classes)
                if inspect.unwrap(vars(base).get(self.function.__name__, len)) is self.function
            ),
            0,
        )
        return next((f for base in classes[home + 1 :] if isinstance(f := vars(base).get(name), FunctionType)), None)


def _is_users_method(value: Any) -> bool:
    plain = getattr(value, "__func__", value)
    return isinstance(plain, FunctionType) and _is_users(inspect.unwrap(plain))
