"""What a value holds, as text that two values share if they hold the same: of what has no literal, to be guarded."""

from __future__ import annotations

import functools
import hashlib
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from structrep.modules.contents import INSIDE, Contents
from structrep.modules.source import written_in

_OPEN = (nn.Module, Tensor, fx.Proxy, type(...))  # which may be anything here: others look after them
_PLAIN = (bool, int, float, complex, str, bytes, type(None), slice, range, torch.dtype, torch.device, torch.layout,
          torch.memory_format)  # fmt: skip


def is_named(value: Any) -> bool:
    """Whether a value is told by its name: a function, a class, a member of an enumeration."""
    return isinstance(value, (FunctionType, BuiltinFunctionType, MethodType, type, Enum, functools.partial))


def is_numpys(value: Any) -> bool:
    return written_in(type(value)).partition(".")[0] == "numpy" and hasattr(value, "tolist")


def described(value: Any) -> str:
    """A function, a class or a member of an enumeration by its name, one that has none by its code, and anything else
    by what it holds."""
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if not is_named(value) or isinstance(value, functools.partial):
        kind = "partial" if isinstance(value, functools.partial) else type(value).__qualname__
        return f"{kind} {_hashed(_Spelt().of(value))}"
    value = getattr(value, "__func__", value)
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if isinstance(value, FunctionType) and "<" in name:
        inner = value.__code__
        plain = [one for one in inner.co_consts if not isinstance(one, CodeType)]
        name += " " + hashlib.sha256(inner.co_code + repr((plain, inner.co_names)).encode()).hexdigest()[:12]
    return name


def is_open(value: Any) -> bool:
    """Whether a structure has something that no literal tells, and that others do not look after."""
    if isinstance(value, (*_PLAIN, *_OPEN)) and not is_named(value):
        return False
    if isinstance(value, (dict, MappingProxyType)):
        return any(map(is_open, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(map(is_open, value))
    return not is_numpys(value)


def _hashed(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


class _Spelt(Contents):
    """What values hold, told by text that is the same in another process."""

    def leaf(self, value: Any) -> Any:
        if isinstance(value, _OPEN):
            return "..."
        if isinstance(value, _PLAIN) and not isinstance(value, Enum):
            return repr(value)
        return described(value) if is_named(value) and not isinstance(value, functools.partial) else INSIDE

    def closed(self, value: Any) -> Any:
        return type(value).__qualname__
