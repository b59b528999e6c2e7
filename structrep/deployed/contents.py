"""What a value holds, as text that two values share if they hold the same: of what has no literal, to be guarded."""

from __future__ import annotations

import copyreg
import functools
import hashlib
import warnings
from collections.abc import Iterator
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from structrep.modules.source import written_in

MOST = 10_000  # things that are looked at
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
        return f"{kind} {_hashed(_Contents().of(value))}"
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


class _Contents:
    """What values hold, those that are in each other looked at once."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, Any]] = {}  # places of objects by their ids, with what keeps these their own

    def of(self, value: Any) -> Any:
        """What a value holds, as something that is the same for another that holds the same."""
        if isinstance(value, _OPEN):
            return "..."
        if isinstance(value, _PLAIN) and not isinstance(value, Enum):
            return repr(value)
        if is_numpys(value):
            return value.shape, value.tobytes().hex() if value.nbytes <= MOST else ""
        if is_named(value) and not isinstance(value, functools.partial):
            return described(value)
        if id(value) in self.seen or len(self.seen) > MOST:
            return self.seen.get(id(value), (None, None))[0]
        self.seen[id(value)] = len(self.seen), value
        kind = type(value).__qualname__
        if isinstance(value, (dict, MappingProxyType)) and type(value).__reduce_ex__ is object.__reduce_ex__:
            return kind, [(self.of(key), self.of(one)) for key, one in value.items()]
        if isinstance(value, (set, frozenset)):
            return kind, sorted(map(repr, map(self.of, value)))
        if type(value) in (list, tuple):
            return kind, [self.of(one) for one in value]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python will not copy iterators for ever
                reduce = copyreg.dispatch_table.get(type(value))
                made = reduce(value) if reduce is not None else value.__reduce_ex__(4)
        except Exception:  # what cannot be copied is told by its class alone
            return kind
        if isinstance(made, str):
            return made
        return kind, [self.of(list(one) if isinstance(one, Iterator) else one) for one in made[1:]]
