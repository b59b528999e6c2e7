"""What holds a model's modules beside the tree of modules: lists, objects, functions among the attributes.

Code may run them from there, where a module that was swapped in the tree is still the old one.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from structrep.modules.copies import ATOMS, is_compiled
from structrep.modules.objects import OF_MODULES
from structrep.modules.source import written_in

MOST = 20_000  # objects that are looked into
_APART = (Tensor, type, ModuleType, CodeType, FrameType, BuiltinFunctionType, torch.dtype, torch.device)


def held_elsewhere(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that attributes hold in whatever way, and which do; a module's hold on itself is none."""
    found: dict[nn.Module, str] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items() if not is_compiled(module) else ():  # it runs what it wraps, no more
            if name not in OF_MODULES and type(value) not in ATOMS - {FunctionType}:
                where = f"{path}.{name}" if path else name
                found |= {one: where for one in modules_in(value) if one is not module}
    return found


def modules_in(value: Any) -> Iterator[nn.Module]:
    """The modules that can be come by from a value, but for those below them."""
    pending, seen = [value], set[int]()
    while pending and len(seen) < MOST:
        one = pending.pop()
        if type(one) in ATOMS - {FunctionType} or isinstance(one, _APART) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, nn.Module):
            yield one
        else:
            pending += parts_of(one)


def parts_of(value: Any) -> list[Any]:
    """What an object holds; of a function, what it was made with."""
    if isinstance(value, FunctionType):
        return [*(value.__closure__ or ()), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(),
                *vars(value).values()]  # fmt: skip
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if written_in(type(value)).partition(".")[0] == "torch" and not isinstance(value, (list, tuple, dict)):
        return []
    return gc.get_referents(value)
