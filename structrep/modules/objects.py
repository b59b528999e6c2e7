"""Objects that modules hold which hold settings: configurations."""

from __future__ import annotations

from enum import Enum
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from structrep.modules.source import written_in

OF_MODULES = frozenset(vars(nn.Module()))  # torch's own attributes, `training` among them
STORES = {"_modules", "_parameters", "_buffers"}  # the dicts that a module keeps what it holds in
_HEAP, _IMMUTABLE = 1 << 9, 1 << 8  # of types: made as Python runs, as by a class statement; their attributes are fixed
CONTAINERS = (dict, list, tuple, set, frozenset, MappingProxyType)
HOLDERS = (fx.Proxy, list, tuple, dict)  # what values stand in
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout,
          torch.memory_format, slice, range, type(...))  # fmt: skip
LIBRARIES = ("torch", "builtins", "functools", "collections", "numpy", "structrep", "types", "typing", "enum")


def is_object(value: Any) -> bool:
    """Whether a value is an object of somebody's own class, which holds settings: a configuration."""
    cls = type(value)
    own = cls.__flags__ & (_HEAP | _IMMUTABLE) == _HEAP and written_in(cls).partition(".")[0] not in LIBRARIES
    return own and not isinstance(value, (*CONTAINERS, *PLAIN, type, Enum, nn.Module, Tensor))
