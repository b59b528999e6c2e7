"""What code does with the modules that it is given, and a class with the parts of its module, by its source."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import linecache
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from structrep.ranks import written_in

Site = dict[str, Any]  # the arguments of a call, by parameter


def functions(cls: type) -> dict[str, FunctionType]:
    """The functions of a class, as they are inherited, but for torch's own."""
    found: dict[str, FunctionType] = {}
    for base in reversed(cls.__mro__):
        if written_in(base).partition(".")[0] != "torch":
            found |= {name: f for name, f in vars(base).items() if isinstance(f, FunctionType)}
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


def without_source(model: nn.Module) -> list[str]:
    """The names of the classes of a model's modules whose code is known to Python but not as text."""
    classes = dict.fromkeys(map(type, model.modules()))
    return [cls.__name__ for cls in classes if not all(map(_is_readable, functions(cls).values()))]


def _is_readable(function: FunctionType) -> bool:
    plain = inspect.unwrap(function)
    code = getattr(plain, "__code__", None)
    made = function.__name__.startswith("__")  # as a dataclass does
    return made or code is None or bool(linecache.getlines(code.co_filename, plain.__globals__))


def _tree(function: Callable[..., Any]) -> tuple[ast.AST, str] | None:
    """The syntax of a method, and what it calls its module; None if that cannot be read."""
    body = syntax(inspect.unwrap(function))
    if not isinstance(body, (ast.FunctionDef, ast.AsyncFunctionDef)) or not body.args.args:
        return None
    return body, body.args.args[0].arg


def names_reached(module: nn.Module) -> frozenset[str]:
    """Attributes of attributes that the code of a module's class mentions, where that code can be read."""
    definition = syntax(type(module))
    nodes = ast.walk(definition) if definition else ()
    return frozenset(n.attr for n in nodes if isinstance(n, ast.Attribute) and not isinstance(n.value, ast.Name))


def words(cls: type) -> frozenset[str]:
    """All attributes that the code of a class asks anything for."""
    trees = (syntax(inspect.unwrap(function)) for function in functions(cls).values())
    nodes = (node for tree in trees if tree is not None for node in ast.walk(tree))
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
    asked = _asked_of(names, tree)
    plain = (bool, int, float, str, tuple)
    return bool(names) and asked is not None and all(isinstance(module.__dict__.get(a), plain) for a in asked)


def _asked_of(names: set[str], tree: ast.AST) -> list[str] | None:
    """The attributes that code asks of what some names stand for; None if it does anything else with that."""
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in names]
    asked = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.value in uses]
    return asked if len(asked) == len(uses) else None


def _attribute(node: ast.AST, itself: str) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == itself


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
    read = _tree(function)
    if read is None:
        return None
    tree, itself = read
    nodes = list(ast.walk(tree))
    asked = [node for node in nodes if _attribute(node, itself)]
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
    read = _tree(function)
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
    asked = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _attribute(node, itself))
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
    read = _tree(function)
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


def sites(
    cls: type, way: tuple[str, ...], parameters: tuple[str, ...], near: bool, sure: bool = False
) -> list[Site | None]:
    """What the code of a class around a part may give it: of each call that may be one of the part, the arguments by
    parameter, ... or COMPUTED for what is no literal; None for a call that may give it anything, or for code that
    cannot be read.

    Args:
        way: the names from a module of that class to the part.
        parameters: their names, in order.
        near: whether nothing but containers is between; else calls count that are of a thing of the part's name.
        sure: leave out calls of what may be another part, or none.
    """
    found: list[Site | None] = []
    for name, function in functions(cls).items():
        calls = _own_calls(function)
        if calls is None and name == "forward":
            found.append(None)
        for call in calls or () if name != "__init__" else ():
            there = call.key is None or len(way) < 2 or call.key == way[1]
            itself = near and there and (way[0] in call.of or (_ANY in call.of and not sure))
            if itself or (call.last == way[-1] and not sure):
                plain = call.places is not None and len(call.places) <= len(parameters)
                given = zip(parameters, call.places or (), strict=False)
                found.append({**dict(given), **dict(call.names)} if plain else None)
    return found


def methods_called(cls: type) -> frozenset[str]:
    """The names of what the forward of a class, or what that calls of its own, calls with arguments."""
    known = functions(cls)
    own = {"forward", *(mentions(cls, "forward") or ())} & known.keys() if "forward" in known else set()
    calls = (call for name in own for call in _own_calls(known[name]) or ())
    return frozenset(call.last for call in calls if call.last and call.places != ())


def asks_what(function: Callable[..., Any], parameter: str) -> bool | None:
    """Whether a function may do something else if an argument is None, or of another type; None if its code cannot be
    read."""
    tree = syntax(inspect.unwrap(function))
    if tree is None:
        return None
    tests: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot, ast.Eq, ast.NotEq)):
            tests += [node.left, *node.comparators]
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            tests.append(node.test)
        elif isinstance(node, ast.BoolOp):
            tests += node.values
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            tests.append(node.operand)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "type"):
            tests += node.args[:1]
    return any(isinstance(one, ast.Name) and one.id == parameter for one in tests)


_ANY = "*"  # a part of a module, by a name that is computed
_HANDS_ON = {"enumerate", "iter", "list", "reversed", "sorted", "tuple", "zip"}  # what it is given
_ASKS = {"getattr", "hasattr", "id", "isinstance", "len", "print", "range", "repr", "str", "type"}


@dataclass(frozen=True)
class _CallOf:
    """A call in the code of a method."""

    of: frozenset[str]  # the attributes of its module of which it may be, or of what is in them
    last: str  # the last name on the way there: "block" in `model.block(x)`
    places: tuple[Any, ...] | None  # positional arguments, as `sites` has them; None if there may be any
    names: tuple[tuple[str, Any], ...] = ()
    key: str | None = None  # "0" in `self.blocks[0](x)`


@functools.lru_cache(4096)
def _own_calls(function: FunctionType, callers: frozenset[FunctionType] = frozenset()) -> tuple[_CallOf, ...] | None:
    """The calls in the code of a method, and in functions that it hands its module to; None if it cannot be read."""
    read = _tree(function)
    if read is None:
        return None
    tree, itself = read
    nodes = list(ast.walk(tree))
    known: dict[str, frozenset[str]] = {}
    before: dict[str, frozenset[str]] | None = None
    while known != before:
        before = dict(known)
        for node in nodes:
            if isinstance(node, (ast.For, ast.comprehension)):
                _note_parts(node.target, node.iter, itself, known)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    _note_parts(target, node.value, itself, known)
            elif isinstance(node, ast.NamedExpr):
                _note_parts(node.target, node.value, itself, known)
    found: list[_CallOf] = []
    for node in nodes:
        if isinstance(node, ast.Call):
            callee = node.func
            if isinstance(callee, ast.Attribute) and callee.attr == "forward":
                callee = callee.value
            last = callee.attr if isinstance(callee, ast.Attribute) and not _is_torchs(callee, function) else ""
            stars = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
            places = None if stars else tuple(map(_literal, node.args))
            names = tuple((keyword.arg, _literal(keyword.value)) for keyword in node.keywords if keyword.arg)
            bound = isinstance(callee, ast.Attribute) and not _attribute(
                callee, itself
            )  # a method of a part, if of one
            index = _literal(callee.slice) if isinstance(callee, ast.Subscript) else ...
            key = str(index) if isinstance(index, (int, str)) else None
            of = frozenset() if bound else _parts_in(callee, itself, known)
            found.append(_CallOf(of, last, places, names, key))
            plain = isinstance(callee, ast.Name) and callee.id in _HANDS_ON | _ASKS
            if any(isinstance(one, ast.Name) and one.id == itself for one in node.args) and not plain:
                helper = _function_of(callee, function)
                first = isinstance(node.args[0], ast.Name) and node.args[0].id == itself
                if first and helper is not None and helper not in callers:
                    further = _own_calls(helper, callers | {function})
                    found += further if further is not None else [_CallOf(frozenset({_ANY}), "", None)]
            for one in () if plain else (*node.args, *(keyword.value for keyword in node.keywords)):
                if handed := _parts_in(one, itself, known):
                    found.append(_CallOf(handed, "", None))  # to somebody who may call it with anything
    return tuple(found)


def _function_of(callee: ast.expr, function: FunctionType) -> FunctionType | None:
    """The function that code calls by its name, or by that of the module which it is in; not one of torch's."""
    found: Any = None
    if isinstance(callee, ast.Name):
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        with contextlib.suppress(ValueError):  # a cell that has no value yet
            found = cells[callee.id].cell_contents if callee.id in cells else function.__globals__.get(callee.id)
    elif isinstance(callee, ast.Attribute) and isinstance(callee.value, ast.Name):
        home = function.__globals__.get(callee.value.id)
        found = getattr(home, callee.attr, None) if isinstance(home, ModuleType) else None
    return found if isinstance(found, FunctionType) and written_in(found).partition(".")[0] != "torch" else None


COMPUTED = object()  # an argument that a forward computes, or chooses


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        chosen = any(isinstance(one, (ast.Call, ast.Compare, ast.IfExp)) for one in ast.walk(node))
        return COMPUTED if chosen else ...


def _is_torchs(callee: ast.Attribute, function: FunctionType) -> bool:
    """Whether a call is of a function in some Python module, or by its name of a tensor's method."""
    base = callee.value
    while isinstance(base, ast.Attribute):
        base = base.value
    if not isinstance(base, ast.Name):
        return hasattr(Tensor, callee.attr)
    return isinstance(function.__globals__.get(base.id), ModuleType) or (
        base is callee.value and base.id not in function.__code__.co_varnames[:1] and hasattr(Tensor, callee.attr)
    )


def _note_parts(target: ast.expr, value: ast.expr, itself: str, known: dict[str, frozenset[str]]) -> None:
    """Note which parts of its module the names that a loop or an assignment gives may be."""
    called = value.func if isinstance(value, ast.Call) else None
    if isinstance(target, (ast.Tuple, ast.List)):
        values: list[ast.expr] = [value] * len(target.elts)
        if isinstance(value, ast.Call) and isinstance(called, ast.Name) and len(target.elts) > 1:
            if called.id == "enumerate":
                values = [ast.Constant(0), *value.args[:1]]
            elif called.id == "zip":
                values = list(value.args)
        elif isinstance(value, (ast.Tuple, ast.List)):
            values = value.elts
        if len(values) != len(target.elts):
            values = [value] * len(target.elts)
        for inner, one in zip(target.elts, values, strict=True):
            _note_parts(inner, one, itself, known)
    elif isinstance(target, ast.Name) and (parts := _parts_in(value, itself, known)):
        known[target.id] = known.get(target.id, frozenset()) | parts


def _parts_in(node: ast.expr, itself: str, known: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """The attributes of its module that a value may be, or be in, or hold."""
    if isinstance(node, ast.Name):
        return known.get(node.id, frozenset())
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == itself:
            return frozenset({_ANY if node.attr == "_modules" else node.attr})
        return _parts_in(node.value, itself, known)
    if isinstance(node, (ast.Subscript, ast.Starred)):
        return _parts_in(node.value, itself, known)
    inner: list[ast.expr] = []
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        inner = node.elts
    elif isinstance(node, ast.Dict):
        inner = node.values
    elif isinstance(node, ast.IfExp):
        inner = [node.body, node.orelse]
    elif isinstance(node, ast.BoolOp):
        inner = node.values
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and node.args:
            whose = node.args[0]
            own = isinstance(whose, ast.Name) and whose.id == itself
            return frozenset({_ANY}) if own else _parts_in(whose, itself, known)
        if isinstance(node.func, ast.Name) and node.func.id in _HANDS_ON:
            inner = node.args
        elif isinstance(node.func, ast.Attribute) and node.func.attr in (
            "items",
            "values",
            "children",
            "named_children",
        ):
            if isinstance(node.func.value, ast.Name) and node.func.value.id == itself:
                return frozenset({_ANY})
            inner = [node.func.value]
    return frozenset().union(*(_parts_in(one, itself, known) for one in inner))
