"""A method of the user's with its text edited; what it is closed over, its decorators and names are the original's."""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import linecache
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from structrep.modules.source import is_full

_NESTED = inspect.CO_NESTED
_FUTURE = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


@dataclass(frozen=True)
class EditedMethod:
    """A method whose class has the original.

    Args:
        source: its definition, indented as in its file.
    """

    name: str
    source: str

    def compile(self, filename: str, base: type) -> Any:
        """The function, with all decorators that the original has around it."""
        *around, plain = layers(original(base, self.name))
        linecache.cache[filename] = (len(self.source), None, re.findall(r".*\n|.+", self.source), filename)
        code = compiled(self.source, plain.__code__, filename)
        cells = dict(zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True))
        made = _copied(plain, code, tuple(cells[name] for name in code.co_freevars))
        for outer, inner in zip(reversed(around), [plain, *reversed(around)], strict=False):
            made = _around(outer, inner, made)
        return made


def original(base: type, name: str) -> Any:
    """What a class has by a name, as it is there."""
    return next((vars(one)[name] for one in base.__mro__ if name in vars(one)), None)


def layers(function: Any) -> Iterator[FunctionType]:
    """A function, and what is inside its decorators, outermost first.

    Raises:
        TypeError: one of these is no plain function.
    """
    while True:
        if not isinstance(function, FunctionType):
            raise TypeError(f"a {type(function).__name__} is around it")
        yield function
        if not hasattr(function, "__wrapped__"):
            return
        inner = function.__wrapped__
        if not any(is_full(cell) and cell.cell_contents is inner for cell in function.__closure__ or ()):
            raise TypeError(f"its decorator {function.__code__.co_qualname} does not hold it")
        function = inner


@functools.lru_cache(1024)  # blocks of a class mostly have one text
def compiled(source: str, like: CodeType, filename: str, imported: tuple[str, ...] = ()) -> CodeType:
    """The code of a method's text, in surroundings like those of other code: the same class around it, whose name its
    private names have, and the same variables of functions around it.

    Args:
        imported: the names that its file imports, whose methods Python calls in another way.

    Raises:
        SyntaxError: it is no definition.
    """
    indented = source[:1].isspace()
    tree: ast.Module | ast.If = ast.parse(f"if 1:\n{source}" if indented else source, filename)
    if indented:
        (tree,) = tree.body  # type: ignore[assignment]
    (function,) = tree.body
    if indented:
        ast.increment_lineno(function, -1)
    free = [name for name in like.co_freevars if name != "__class__"]
    around = like.co_qualname.split(".")[:-1]
    name = around[-1] if around and around[-1] != "<locals>" else "_"
    scope = ast.parse(
        f"def scope({', '.join(free)}):\n    {'pass' if name in free else f'global {name}'}\n    class {name}: pass"
    )
    scope.body[0].body[1].body = [function]  # type: ignore[attr-defined]
    scope.body += ast.parse("\n".join(f"import {name}" for name in imported)).body
    code: CodeType = compile(scope, filename, "exec", like.co_flags & _FUTURE, dont_inherit=True)
    for inside in ("scope", name, like.co_name):
        code = next(one for one in code.co_consts if isinstance(one, CodeType) and one.co_name == inside)
    return code


def same(one: CodeType, other: CodeType) -> bool:
    """Whether two codes do the same, wherever they stand."""
    what = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_kwonlyargcount")
    if any(getattr(one, name) != getattr(other, name) for name in what):
        return False
    if (one.co_flags ^ other.co_flags) & ~_NESTED or len(one.co_consts) != len(other.co_consts):
        return False
    return all(
        same(a, b) if isinstance(a, CodeType) and isinstance(b, CodeType) else type(a) is type(b) and repr(a) == repr(b)
        for a, b in zip(one.co_consts, other.co_consts, strict=True)
    )


def _copied(function: FunctionType, code: CodeType, closure: tuple[Any, ...]) -> FunctionType:
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    made.__qualname__, made.__doc__, made.__module__ = function.__qualname__, function.__doc__, function.__module__
    made.__dict__.update(function.__dict__)
    return made


def _around(outer: FunctionType, inner: FunctionType, made: FunctionType) -> FunctionType:
    """A decorator's function around another one than it is around."""

    def held() -> Any:
        return made

    assert held.__closure__ is not None
    (cell,) = held.__closure__
    own = outer.__closure__ or ()
    found = _copied(outer, outer.__code__, tuple(cell if is_full(c) and c.cell_contents is inner else c for c in own))
    found.__wrapped__ = made  # type: ignore[attr-defined]
    return found
