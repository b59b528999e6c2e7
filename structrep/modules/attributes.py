"""How a module finds an attribute: where attributes are, or as its class computes it."""

from __future__ import annotations

import inspect
from types import FunctionType

from torch import nn


def is_computed(module: nn.Module, name: str) -> bool:
    """Whether an attribute of a module is a property, or given by its class where there is none of that name."""
    held = inspect.getattr_static(type(module), name, None)
    if held is not None:
        return hasattr(type(held), "__get__") and not isinstance(held, FunctionType)
    own = (vars(module), module._modules, module._parameters, module._buffers)
    return looks_itself(module) and not any(name in one for one in own)


def looks_itself(module: nn.Module) -> bool:
    """Whether its class has its own way to find attributes."""
    return type(module).__getattr__ is not nn.Module.__getattr__
