"""Where code uses the parts of a module, on whatever path, and what it hangs on which of them it uses, by its source.

`self.n(self.a(x))` uses both, always. `(self.m if self.low else self.n)(self.a(x))` uses another norm some day, and
`self.a(x) if self.low else self.n(self.a(x))` has a use of the convolution that a trace may not come to.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from structrep.modules.boxes import FILLS
from structrep.modules.introspection import beginning
from structrep.modules.positions import branches, definition
from structrep.modules.values import (
    CONTAINERS,
    SOME,
    Mixed,
    Place,
    Super,
    Value,
    Values,
    constant,
    either,
    elements,
    is_users,
    is_users_method,
    parts_in,
    place_of,
)

__all__ = ["Place", "Use", "place_of", "uses"]

DEEPEST, MOST = 64, 10_000  # functions that call each other, and all that are read
_LOOPS = {"enumerate", "zip", "reversed", "list", "tuple", "iter", "next", "sorted", "chain", "islice", "dict", "set"}
_ASKS = {"isinstance", "hasattr", "type", "print", "callable", "id", "len", "repr", "str", "bool", "super", "getattr",
         "range", "int", "float", "min", "max", "abs", "any", "all", "sum", "issubclass", "vars"}  # fmt: skip
_INNER = (ast.Lambda, ast.GeneratorExp)
_LEAVES = (ast.Return, ast.Raise, ast.Break, ast.Continue)
_CHILDREN = {"children", "named_children", "values", "items"}
_BELOW = {"modules", "named_modules"}
_KEYS = {"get_submodule", "get", "pop", "__getitem__", "__getattr__"}
_TENSORS = {"get_parameter", "get_buffer", "state_dict", "named_parameters", "named_buffers"}
_OF_TENSORS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "is_cuda", "requires_grad", "element_size"}


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


def uses(module: nn.Module, function: Any) -> list[Use]:
    """What the code of a method, and what that calls, does with parts of its module."""
    found = _Uses()
    own = Value((module,))
    for one in _layers(function):
        found.scan(one, [own], frozenset())
    return found.all


def _layers(function: Any) -> Iterator[Any]:
    """A function, and what it wraps, as decorators of somebody's own are around it."""
    while True:
        inner = getattr(function, "__wrapped__", None)
        if inner is None or (isinstance(function, FunctionType) and is_users(_home(function))):
            yield function
        if inner is None:
            return
        function = inner


def _home(function: FunctionType) -> Any:
    """What says where a function was written, whatever it wraps: `functools.wraps` gives it the other's name."""
    return type("Home", (), {"__module__": function.__globals__.get("__name__", "")})


class _Uses:
    """A reader of functions that call each other."""

    def __init__(self) -> None:
        self.all: list[Use] = []
        self.known: dict[Any, Value] = {}  # what functions give, by what they are given
        self.depth = 0

    def scan(
        self,
        function: Any,
        given: list[Value],
        around: frozenset[Place],
        named: dict[str, Value] | None = None,
        rest: Value = Value(),  # noqa: B008
    ) -> Value:
        """Read a function that is given parts; tells which it gives."""
        code = getattr(function, "__code__", None)
        if code is None or not is_users(function):
            return Value()
        told = [*enumerate(given), *(named or {}).items(), ("", rest)]
        key = (code, around, *((place, one.hangs_on, *map(_print, one.held)) for place, one in told))
        if key not in self.known:
            self.known[key] = Value()  # where it calls itself
            found = definition(code)
            if found is None or self.depth > DEEPEST or len(self.known) > MOST:
                self._unread(code, [*given, *(named or {}).values(), rest], around, found is not None)
            else:
                self.depth += 1
                self.known[key] = _Scope(self, function, found[0], given, named or {}, around, rest).read()
                self.depth -= 1
        return self.known[key]

    def _unread(self, code: CodeType, given: list[Value], around: frozenset[Place], anyhow: bool) -> None:
        """Code that is known to Python only uses any part, if it can do one thing or another."""
        steps = [one for one in dis.get_instructions(code) if one.opname != "CACHE"]
        picks = any(
            one.opname == "BINARY_SUBSCR" and before.opname != "LOAD_CONST" for before, one in itertools.pairwise(steps)
        )
        if anyhow or picks or "getattr" in code.co_names or branches(code):
            held = [one for value in given for one in value.held]
            parts = frozenset(part for one in parts_in(held) for part in one.modules())
            self.all.append(Use(parts, around, frozenset({code.co_name}), code, code.co_firstlineno))


def _print(value: Any) -> Any:
    """What tells a value from others; of a container that code has made, what is in it."""
    made = type(value) in (list, Mixed) and len(value) <= 1000
    return (type(value), *(one if isinstance(one, str) else id(one) for one in value)) if made else id(value)


class _Calls(Values):
    """What the calls of a function give, and what the functions that it calls do with parts."""

    def __init__(
        self,
        of: _Uses,
        function: Any,
        tree: ast.FunctionDef | ast.Lambda,
        given: list[Value],
        named: dict[str, Value],
        around: frozenset[Place],
        rest: Value,
    ) -> None:
        super().__init__(function, tree, given, named, rest)
        self.of, self.around = of, around

    def _property(self, found: FunctionType, module: nn.Module) -> Value:
        return self.of.scan(found, [Value((module,))], self.around)

    def _called(self, node: ast.Call) -> Value:
        callee = node.func
        functions = self.value(callee)
        given = [self.value(one) for one in (*node.args, *(keyword.value for keyword in node.keywords))]
        own = any(map(is_users_method, functions.held))
        found = None if own else self._of_builtin(node, given)
        if found is not None:
            return found
        hangs = frozenset().union(functions.hangs_on, *(value.hangs_on for value in given))
        held: list[Any] = []
        for one in functions.held:
            if isinstance(one, (FunctionType, MethodType)):
                ran = self._run(one, node)
                held, hangs = [*held, *ran.held], hangs | ran.hangs_on
            elif isinstance(one, operator.attrgetter):
                held += self._got(one, given[:1], node).held
        if isinstance(callee, ast.Name) and callee.id in self.inner:
            inner = self._given_by(self.inner[callee.id])
            held, hangs = [*held, *inner.held], hangs | inner.hangs_on
        name = getattr(callee, "id", getattr(callee, "attr", ""))
        known = name in _ASKS or any(not isinstance(one, type) for one in functions.held)
        return Value(tuple(held), hangs if known else hangs | self._hangs(node))

    def _of_builtin(self, node: ast.Call, given: list[Value]) -> Value | None:
        """What one of Python's, of torch's or a container's functions gives; None of others."""
        callee = node.func
        plain = isinstance(callee, ast.Name)
        name = callee.id if isinstance(callee, ast.Name) else getattr(callee, "attr", "")
        if plain and name == "super":
            return Value((Super(self.module, self.function),) if self.module is not None else ())
        if plain and name == "getattr" and len(node.args) > 1:
            return self._by_name(node, given)
        if plain and name in ("type", "vars") and len(node.args) == 1:
            return self._attribute(given[0], "__class__" if name == "type" else "__dict__", node)
        if name == "range":
            return Value()
        if name == "attrgetter" and node.args:
            paths = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            return Value((operator.attrgetter(*paths),)) if paths else None
        if name in _LOOPS and (plain or name in ("chain", "islice")):
            rounds = given[:1] if name == "islice" else given
            inner = tuple(one for value in rounds for one in elements(value.held))
            order = self._hangs(node) if name == "sorted" else frozenset()
            return Value((Mixed(inner),) if inner else (), order | either(rounds).hangs_on)
        if isinstance(callee, ast.Attribute):
            base = self.value(callee.value)
            containers = [one for one in base.held if isinstance(one, (nn.Module, *CONTAINERS))]
            if name in _CHILDREN and containers:
                return Value((Mixed(elements(containers)),), base.hangs_on)
            if name in _BELOW and containers:
                below = (part for one in containers if isinstance(one, nn.Module) for part in one.modules())
                return Value((Mixed(below),), base.hangs_on)
            if name in _KEYS and containers:
                return self._by_key(node, containers, base.hangs_on | either(given).hangs_on)
            if name in ("__getattr__", "__getattribute__") and len(node.args) == 2:  # of a class
                return self._by_name(node, given)
        return None

    def _got(self, getter: operator.attrgetter[Any], given: list[Value], node: ast.AST) -> Value:
        """What `operator.attrgetter` gives."""
        found: list[Value] = []
        for path in getter.__reduce__()[1]:
            value = either(given)
            for name in path.split("."):
                value = self._attribute(value, name, node)
            found.append(value)
        return either(found)

    def _given_by(self, inner: ast.FunctionDef | ast.Lambda) -> Value:
        """What a function inside gives."""
        if isinstance(inner, ast.Lambda):
            return self.value(inner.body)
        nodes = list(ast.walk(inner))
        yielded = [n.value for n in nodes if isinstance(n, ast.Yield) and n.value is not None]
        more = [n.value for n in nodes if isinstance(n, ast.YieldFrom)]
        given = [n.value for n in nodes if isinstance(n, ast.Return) and n.value is not None]
        held, hangs = either(map(self.value, (*yielded, *more, *given)))
        if any(isinstance(one, SOME) for one in nodes) and held:
            hangs |= {self._name(inner.name)}
        if yielded or more:
            out = [*either(map(self.value, yielded)).held, *elements(either(map(self.value, more)).held)]
            return Value((Mixed(out),) if out else (), hangs)
        return Value(held, hangs)

    def _by_name(self, node: ast.Call, given: list[Value]) -> Value:
        """What `getattr` gives."""
        name = node.args[1]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            return self._attribute(given[0], name.value, node)
        if not any(isinstance(one, ast.Name) for one in ast.walk(name)):  # made of constants: "no" + "rm"
            with contextlib.suppress(Exception):
                told = eval(compile(ast.Expression(name), "<name>", "eval"), {"__builtins__": {}})
                return self._attribute(given[0], str(told), node)
        start = beginning(name)
        held: list[Any] = []
        for one in (one for one in given[0].held if isinstance(one, nn.Module)):
            held += [child for key, child in one._modules.items() if child is not None and key.startswith(start)]
            counts = not given[1].hangs_on
            own = () if counts or self._names_a_part(name, one) else dir(type(one))
            methods = (key for key in own if key.startswith(start) and not hasattr(nn.Module, key))
            held += [found for key in methods for found in self._of_module(one, key)[0].held]
        return Value(tuple(held), given[0].hangs_on | given[1].hangs_on)

    def _names_a_part(self, name: ast.expr, module: nn.Module) -> bool:
        """Whether a name is a setting that says which part is meant: not a method, which would be another model."""
        if not isinstance(name, ast.Attribute):
            return False
        told = [vars(one).get(name.attr) for one in self.value(name.value).held if isinstance(one, nn.Module)]
        return bool(told) and all(isinstance(one, str) and one in module._modules for one in told)

    def _by_key(self, node: ast.Call, containers: list[Any], hangs: frozenset[str]) -> Value:
        key = node.args[0] if node.args else None
        held: list[Any] = []
        for one in containers:
            found: Any = None
            if isinstance(key, ast.Constant):
                with contextlib.suppress(Exception):
                    found = one.get_submodule(key.value) if hasattr(one, "get_submodule") else one[key.value]
            below = list(one.modules())[1:] if isinstance(one, nn.Module) else elements([one])
            held += [found] if found is not None else below
        return Value(tuple(held), hangs)

    def _run(self, function: FunctionType | MethodType, node: ast.Call) -> Value:
        """What a function of the user's does with the parts that a call gives to it."""
        owner = getattr(function, "__self__", None)
        given = [Value((owner,))] if owner is not None else []
        loose: list[Value] = []
        for one in node.args:
            if isinstance(one, ast.Starred) or loose:  # from there on, nobody knows which is which
                held, hangs = self.value(one)
                loose.append(Value(elements(held) if isinstance(one, ast.Starred) else held, hangs))
            else:
                given.append(self.value(one))
        named = {one.arg: self.value(one.value) for one in node.keywords if one.arg is not None}
        mapped = [self.value(one.value) for one in node.keywords if one.arg is None]
        rest = either((*loose, *(Value(elements(held), hangs) for held, hangs in mapped)))
        if not any(value.held for value in (*given, *named.values(), rest)):
            return Value()
        around = frozenset() if branches(self.code) else self.around
        found = [
            self.of.scan(one, given, around | {place_of(node, self.code)}, named, rest)
            for one in _layers(getattr(function, "__func__", function))
        ]
        return either(found)


class _Scope(_Calls):
    """A function, read statement by statement."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.returned: list[Value] = []
        self.yielded: list[Value] = []
        self.perhaps = False  # whether code is read that may not be run
        self.within: list[Place] = []  # the expressions around what is read
        self.runs: dict[str, set[Place]] = {}  # name of a function inside -> calls that run it, or hand it on
        for node in ast.walk(self.tree) if self.inner else ():
            if isinstance(node, ast.Call):
                for name in {n.id for n in (node.func, *node.args) if isinstance(n, ast.Name)} & self.inner.keys():
                    self.runs.setdefault(name, set()).add(place_of(node, self.code))

    def read(self) -> Value:
        if isinstance(self.tree, ast.Lambda):
            self._expression(self.tree.body, self.around)
            return self.value(self.tree.body)
        self._block(self.tree.body, self.around)
        held, hangs = either(self.returned)
        several = sum(bool(value.held) for value in self.returned) > 1
        if self.yielded:
            out, more = either(self.yielded)
            return Value((Mixed(out),) if out else (), hangs | more)
        return Value(held, hangs | ({self._name(self.code.co_name)} if several else frozenset()))

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
                gives = len(self.returned), len(self.yielded)
                self._block(one.body, around | self.runs.get(one.name, set()))
                self.perhaps = before
                del self.returned[gives[0] :], self.yielded[gives[1] :]  # what the function inside gives
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
        if isinstance(node, (ast.Yield, ast.YieldFrom)) and node.value is not None:
            held, hangs = self.value(node.value)
            some = {self._name(self.code.co_name)} if self.perhaps else set[str]()
            self.yielded.append(Value(elements(held) if isinstance(node, ast.YieldFrom) else held, hangs | some))
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
        parts = frozenset(part for part in parts_in(value.held) if part is not self.module)
        if parts:
            line = getattr(node, "lineno", self.code.co_firstlineno)
            self.of.all.append(Use(parts, around | {place_of(node, self.code)}, value.hangs_on, self.code, line))

    def _use_call(self, node: ast.Call, around: frozenset[Place]) -> None:
        callee = node.func
        self.value(node)  # what it calls is read
        called = self.value(callee)
        own = any(map(is_users_method, called.held))
        base = Value()
        if isinstance(callee, ast.Attribute):
            base = self.value(callee.value)
            if callee.attr in ("forward", "__call__"):
                first = self.value(node.args[0]).held if node.args else ()
                whole = any(
                    isinstance(one, Super) or (isinstance(one, type) and self.module in first) for one in base.held
                )
                self._use(Value(elements([self.module])) if whole and not own else base, node, around)
            elif callee.attr in _TENSORS and self.perhaps and not own:
                self._use_tensors(node, callee.attr, base, around)
        parts = tuple(o for o in called.held if isinstance(o, (nn.Module, *CONTAINERS)))
        self._use(Value(parts, called.hangs_on), node, around)
        if called.hangs_on and any(isinstance(o, MethodType) and o.__self__ is self.module for o in called.held):
            self._use(Value(elements([self.module]), called.hangs_on), node, around)  # one method or another
        name = callee.id if isinstance(callee, ast.Name) else getattr(callee, "attr", "")
        if name in ("eval", "exec") and isinstance(callee, ast.Name) and self.module is not None:
            self._use(Value(tuple(self.module.modules())), node, around)
        of_container = name in _KEYS and base.held and all(isinstance(one, CONTAINERS) for one in base.held)
        if own or of_container or name in _LOOPS | _ASKS | FILLS or (name == "setattr" and self._sets_a_setting(node)):
            return
        for one in (*node.args, *(keyword.value for keyword in node.keywords)):
            self._use(self.value(one), node, around)
            for handed in self.value(one).held:  # a method that somebody else will call
                if isinstance(handed, MethodType) and handed.__self__ is self.module:
                    self.of.scan(handed.__func__, [Value((self.module,))], around | {place_of(node, self.code)})

    def _sets_a_setting(self, node: ast.Call) -> bool:
        """Whether `setattr` sets what is no part of a module, and holds none."""
        name = constant(node.args[1]) if len(node.args) == 3 else None
        holders = [one for one in self.value(node.args[0]).held if isinstance(one, nn.Module)] if node.args else []
        parts = any(name in held for one in holders for held in (one._modules, one._parameters, one._buffers))
        return isinstance(name, str) and not parts and not self.value(node.args[2]).held

    def _use_tensors(self, node: ast.Call, name: str, base: Value, around: frozenset[Place]) -> None:
        """Note that parts are asked for tensors, one by its name or all of them."""
        holders = [one for one in base.held if isinstance(one, nn.Module)]
        path = constant(node.args[0]) if node.args and name.startswith("get_") else None
        parts = [part for one in holders for part in one.modules()]
        if isinstance(path, str):
            with contextlib.suppress(AttributeError):
                parts = [one.get_submodule(path.rpartition(".")[0]) for one in holders]
        self._use(Value(tuple(parts)), node, around)

    def _use_numbers(self, node: ast.Attribute, around: frozenset[Place]) -> None:
        holders = [one for one in self.value(node.value).held if isinstance(one, nn.Module) and one is not self.module]
        holding = tuple(one for one in holders if node.attr in one._parameters or node.attr in one._buffers)
        if holding:
            self._use(Value(holding), node, around)
