"""Code that says whether what a forward was told still holds, and raises where it does not.

Written so that `torch.jit.script` takes it where it would take the question itself; what it would not take stands
behind `if not torch.jit.is_scripting()`.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._jit_internal import is_scripting

from structrep.deployed.answers import numbers
from structrep.modules.source import functions_in, written_in


@dataclass(frozen=True)
class Guard:
    """A question that has to have the same answer still.

    Args:
        asked: the question, as code.
        told: the answer, as a message shows it.
        unlike: code that is true where the answer is another.
        scripted: whether `torch.jit.script` takes that code.
    """

    asked: str
    told: str
    unlike: str
    scripted: bool
    message: tuple[str, str]  # what is said before and after what is found

    def passes(self, module: nn.Module, names: Mapping[str, Any]) -> bool:
        """Whether a module would pass."""
        try:
            return not eval(self.unlike, {**names, "self": module})
        except Exception:  # what is asked for is not there
            return False

    def lines(self) -> list[str]:
        before, after = self.message
        behind = f" + {after!r}" if after else ""
        return [f"if {self.unlike}:", f"    raise ValueError({before!r} + str({self.asked}){behind})"]


def guard(asked: str, named: str, told: Any, method: str, scripted: bool) -> Guard | None:
    """A guard for an answer; None if any answer would do.

    Args:
        asked, named: the question, as code and as a message says it.
        method: whose forward asks, as a message says it.
        scripted: whether `torch.jit.script` takes the question.
    """
    remedy = ": convert the model again after setting it"
    found = unlike(asked, told)
    if found is None:
        return None
    shown = described(told) if is_named(told) else literal(told)
    before = f"{method} was reparameterized for {named}={shown}, and {named} is "
    plain = told is None or type(told) in (bool, int, float, str)
    return Guard(asked, shown, found, scripted and plain, (before, f" now{remedy}"))


def missing(asked: str, holder: str, name: str, method: str) -> Guard:
    """A guard for an attribute that there was none of."""
    before = f"{method} was reparameterized for a model without {asked}, and {asked} is "
    after = " now: convert the model again after setting it"
    return Guard(asked, "missing", f"hasattr({holder}, {name!r})", False, (before, after))


def argument(name: str, told: Any) -> Guard | None:
    """A guard for an argument that a forward was traced with."""
    found = unlike(name, told)
    if found is None:
        return None
    plain = told is None or type(told) in (bool, int, float, str)
    before = f"this forward was reparameterized for {name}={literal(told)} and was called with {name}="
    return Guard(name, literal(told), found, plain, (before, ""))


def given(name: str) -> Guard:
    """A guard for an argument that is None by default, and was not."""
    before = f"this forward was reparameterized for a given {name} and was called with {name}="
    return Guard(name, "...", f"{name} is None", True, (before, ""))


def tensor(name: str) -> Guard:
    """A guard for an argument that was a tensor, of a forward that asks what it is."""
    before = f"this forward was reparameterized for a tensor as {name} and was called with {name}="
    return Guard(name, "a tensor", f"not isinstance({name}, torch.Tensor)", True, (before, ""))


def alike(asked: str, other: str, method: str) -> Guard:
    """A guard for two answers that were the same."""
    before = f"{method} was reparameterized for a model whose {asked} and {other} are the same, and {asked} is "
    return Guard(asked, other, f"{asked} != {other}", False, (before, ": convert the model again after casting it"))


def same(asked: str, kept: str, method: str) -> Guard:
    """A guard for a tensor that was merged."""
    before = f"{method} was reparameterized for the {asked} that was merged, and {asked} is "
    return Guard(
        asked, "merged", f"{asked} is not {kept}", False, (before, " now: convert the model again after setting it")
    )


def never(question: str, method: str) -> Guard:
    """A guard for an answer that a forward cannot be followed with."""
    before = f"{method} was reparameterized for {question}=False, and cannot be followed where it is "
    return Guard(question, "False", question, True, (before, ""))


def code(guards: Iterable[Guard]) -> list[str]:
    """Guards as lines of code."""
    once = list(dict.fromkeys(guards))
    scripted = [line for one in once if one.scripted for line in one.lines()]
    others = [f"    {line}" for one in once if not one.scripted for line in one.lines()]
    return scripted + (["if not structrep_is_scripting():", *others] if others else [])


def unlike(asked: str, told: Any) -> str | None:
    """Code that is true where the answer to a question is another than it was; None if any would do."""
    if told is None or told is ...:
        return None if told is ... else f"{asked} is not None"
    if is_named(told):
        return f"structrep_described({asked}) != {described(told)!r}"
    text = literal(told)
    if text == "...":
        return None
    if isinstance(told, float) and math.isnan(told):
        return f"{asked} == {asked}"
    return f"not structrep_matches({asked}, {text})" if _is_loose(told) else f"{asked} != {text}"


def _is_loose(told: Any) -> bool:
    """Whether a structure has something that may be anything, or is told by its name."""
    if isinstance(told, (dict, MappingProxyType)):
        return any(map(_is_loose, told.values()))
    if isinstance(told, (list, tuple)):
        return any(map(_is_loose, told))
    return literal(told) == "..." or is_named(told) or _is_numpys(told)


def _is_numpys(value: Any) -> bool:
    return written_in(type(value)).partition(".")[0] == "numpy" and hasattr(value, "tolist")


def literal(value: Any) -> str:
    """A value as code that gives an equal one, with `...` for what may be anything: tensors, modules, objects."""
    if _is_numpys(value):
        return literal(value.tolist()) if value.size <= 1024 else "..."
    if value is None or type(value) in (bool, int, str, bytes, complex, slice, range):
        return repr(value)
    if is_named(value) or isinstance(value, (nn.Module, Tensor)):
        return "..."
    if isinstance(value, int | str):
        return next(kind.__repr__(value) for kind in (int, str) if isinstance(value, kind))
    if isinstance(value, float):
        return float.__repr__(value) if math.isfinite(value) else f"float({float.__repr__(value)!r})"
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return repr(value)
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, (list, tuple)):
        items = [literal(item) for item in value]
        return f"[{', '.join(items)}]" if isinstance(value, list) else f"({''.join(f'{item}, ' for item in items)})"
    if isinstance(value, (dict, MappingProxyType)):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (set, frozenset)):
        items = sorted(map(literal, value))
        return "..." if "..." in items else f"{type(value).__name__}([{', '.join(items)}])"
    return "..."


def is_named(value: Any) -> bool:
    """Whether a value is told by its name: a function, a class, a member of an enumeration."""
    return isinstance(value, (FunctionType, BuiltinFunctionType, MethodType, type, Enum, functools.partial))


def described(value: Any) -> str:
    """A function, a class or a member of an enumeration by its name, and one that has none by its code."""
    if isinstance(value, functools.partial):
        return f"partial({described(value.func)}, {literal(value.args)}, {literal(value.keywords)})"
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    value = getattr(value, "__func__", value)
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if isinstance(value, FunctionType) and "<" in name:
        inner = value.__code__
        plain = [one for one in inner.co_consts if not isinstance(one, CodeType)]
        name += " " + hashlib.sha256(inner.co_code + repr((plain, inner.co_names)).encode()).hexdigest()[:12]
    return name


def matches(value: Any, told: Any) -> bool:
    """Whether a value is equal to what was told, but for what that leaves open (`...`)."""
    if told is ...:
        return True
    if _is_numpys(value):
        return matches(value.tolist(), told)
    if isinstance(told, (list, tuple)):
        alike = isinstance(value, (list, tuple)) and len(value) == len(told)
        return alike and all(map(matches, value, told))
    if isinstance(told, dict):
        known = isinstance(value, (dict, MappingProxyType)) and value.keys() == told.keys()
        return known and all(matches(value[key], told[key]) for key in told)
    return value is told or (value is not None and told is not None and bool(value == told))


def is_a(value: Any, kind: str) -> bool:
    """Whether a value is of a class, by that class's name."""
    return any(f"{base.__module__}.{base.__qualname__}" == kind for base in type(value).__mro__)


class Space:
    """Names that no module has: of code that was made by `exec`."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.names:
            raise AttributeError(name)
        return self.names[name]

    def __deepcopy__(self, memo: Any) -> Space:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Space) and self.names is other.names

    def __hash__(self) -> int:
        return id(self.names)


class Cells:
    """What a function was made with that no class has any more; in a file, what that was."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "function" or name not in self.function.__code__.co_freevars:
            raise AttributeError(name)
        return self._contents()[name]

    def _contents(self) -> dict[str, Any]:
        cells = self.function.__closure__ or ()
        return {name: one.cell_contents for name, one in zip(self.function.__code__.co_freevars, cells, strict=True)}

    def __deepcopy__(self, memo: Any) -> Cells:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cells) and self.function is other.function

    def __hash__(self) -> int:
        return id(self.function)

    def __reduce__(self) -> Any:
        return Space, ({name: value for name, value in self._contents().items() if literal(value) != "..."},)


def cell(cls: type, method: str, qualname: str, name: str) -> Any:
    """What a cell holds that a method of a class, or a function inside of it, was made with."""
    for base in cls.__mro__:
        for function in functions_in(vars(base).get(method)):
            if function.__qualname__ == qualname and name in function.__code__.co_freevars:
                cells = function.__closure__ or ()
                return cells[function.__code__.co_freevars.index(name)].cell_contents
    raise AttributeError(f"{cls.__qualname__}.{method} has no {name}")


NAMES: dict[str, Any] = {
    "structrep_is_scripting": is_scripting,
    "structrep_described": described,
    "structrep_matches": matches,
    "structrep_is_exporting": getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling),
    "structrep_is": is_a,
    "structrep_numbers": numbers,
    "structrep_cell": cell,
}
