"""What written forwards ask by: whether an answer still is what it was."""

from __future__ import annotations

import math
from types import FunctionType, MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._jit_internal import is_scripting
from torch.utils import weak

from structrep.deployed.contents import described, is_named, is_numpys
from structrep.modules.source import functions_in


def numbers(tensor: Tensor) -> Any:
    """The numbers of a tensor; of one that has many, what tells whether they are the same."""
    if tensor.numel() <= 16:
        return tensor.tolist()
    bits = tensor.detach().contiguous().flatten().view(torch.uint8).long()
    return int((bits * (torch.arange(len(bits), device=bits.device) * 2654435761 + 1)).sum())


class Held:
    """A value that written code has by a name; no other one is equal to it."""

    def __init__(self, value: Any) -> None:
        self.value = value


_VERSIONS: Any = weak.WeakIdKeyDictionary()  # of tensors, when their numbers were last looked at


def written(tensor: Any, numbers: Any) -> bool:
    """Whether a tensor was written to, and has other numbers than it had. They are looked at when it was, and once of
    a copy. Never under torch.compile, which would stop at that, nor in inference mode, which counts no writes."""
    if torch.compiler.is_compiling() or not isinstance(tensor, Tensor) or tensor.is_inference():
        return False
    if _VERSIONS.get(tensor) != tensor._version:
        alike = (tensor == numbers) | ((tensor != tensor) & (numbers != numbers))  # NaN
        if not bool(alike.all()):
            return True
        _VERSIONS[tensor] = tensor._version
    return False


def literal(value: Any) -> str:
    """A value as code that gives an equal one, with `...` for what may be anything: tensors, modules, objects."""
    if is_numpys(value):
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


def matches(value: Any, told: Any) -> bool:
    """Whether a value is equal to what was told, but for what that leaves open (`...`)."""
    if told is ...:
        return True
    if is_numpys(value):
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
    return any(described(base) == kind for base in type(value).__mro__)


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
    "structrep_written": written,
    "structrep_cell": cell,
}
