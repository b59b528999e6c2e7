"""Traced values: written in place, and asked for what tensors are."""

from __future__ import annotations

import ast
import dis
import operator
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from structrep.graph import operations
from structrep.modules.boxes import FILLS
from structrep.modules.positions import definition, place
from structrep.trace.held import owner_of

if TYPE_CHECKING:
    from structrep.trace.tracer import CallTracer


class TracedValue(fx.Proxy):
    """A traced value that can be written in place, and has the attributes that tensors have.

    Stock torch.fx makes `y += b` a new value and leaves aliases old, and its proxies have every attribute asked for.
    """

    tracer: CallTracer

    def __getattr__(self, k: str) -> Any:
        if not hasattr(Tensor, k):
            raise AttributeError(f"'Tensor' object has no attribute {k!r}")
        if k in _OF_AUTOGRAD:
            raise self._refuse(TypeError(f"the .{k} of a value that depends on the input"))
        return torch.strided if k == "layout" else TracedAttribute(self, k)

    @property
    def keys(self) -> Any:
        """Of torch.fx's own, which tensors have none of."""
        raise AttributeError("'Tensor' object has no attribute 'keys'")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refuse(TypeError("'Tensor' object is not callable"))

    def __len__(self) -> int:
        return self.tracer.observer.length(self, "the length of a value that nothing tells")

    def __iter__(self) -> Iterator[Any]:
        """As torch.fx's own, which leaves a frame that holds itself, and all that it has in hand."""
        caller = sys._getframe(1)
        code, at = caller.f_code.co_code, caller.f_lasti
        if code[at] == dis.opmap["UNPACK_SEQUENCE"]:
            return (self[index] for index in range(code[at + 1]))  # type: ignore[index]
        return self.tracer.iter(self)

    def __hash__(self) -> int:
        raise self._refuse(TypeError("a value that depends on the input is used as a key"))

    def __eq__(self, other: object) -> Any:
        return self.tracer.create_proxy("call_function", operator.eq, (self, other), {})

    def __str__(self) -> str:
        raise self._refuse(TypeError("a value that depends on the input is written as text"))

    def __format__(self, spec: str) -> str:
        return repr(self) if _only_tells(sys._getframe(1)) else str(self)

    def __int__(self) -> int:
        return int(self.tracer.observer.number(self, int))

    def __float__(self) -> float:
        return float(self.tracer.observer.number(self, float))

    def __index__(self) -> int:
        return int(self.tracer.observer.number(self, operator.index))

    def __complex__(self) -> complex:
        return complex(self.tracer.observer.number(self, complex))

    def _refuse(self, error: Exception) -> Exception:
        return self.tracer.recorder.refuse(error)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "real", "imag"):
            raise self._refuse(RuntimeError(f"it assigns to .{name} of a value that depends on the input"))
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class TracedAttribute(fx.proxy.Attribute, TracedValue):
    """An attribute of a traced value; if it is called, a call of a method."""

    def __getattr__(self, k: str) -> Any:
        if self.attr == "device" and k == "index":  # None, perhaps, which no traced value is
            raise self._refuse(TypeError("the .index of the device of a value that depends on the input"))
        return super().__getattr__(k)

    def __str__(self) -> str:
        inner = getattr(self.root, "attr", None) if self.attr == "type" else None
        owner = owner_of(self.tracer.module)  # inputs are taken to be where the parameters are, and of their dtype
        if owner is None or (self.attr not in ("device", "dtype") and inner != "device"):
            return super().__str__()
        return str(owner.device.type if inner else getattr(owner, self.attr))


def _only_tells(frame: FrameType) -> bool:
    """Whether the text that code of a frame makes of a value is for somebody to read: of an error, of an assertion, or
    of a statement that gives nothing."""
    found = definition(frame.f_code)
    node = place(frame.f_code, frame.f_lasti) if found is not None else None
    while found is not None and node is not None:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FILLS:
            return False
        if isinstance(node, ast.stmt):
            return isinstance(node, (ast.Raise, ast.Assert, ast.Expr))
        node = found[1].get(node)
    return False


INFOS = (torch.finfo, torch.iinfo)


class TracedInfo(TracedValue):
    """What `torch.finfo` and `torch.iinfo` tell of the dtype of a traced value."""

    def __getattr__(self, k: str) -> Any:
        if not any(hasattr(one, k) for one in INFOS):
            raise AttributeError(f"'torch.finfo' object has no attribute {k!r}")
        return self.tracer.create_proxy("call_function", getattr, (self, k), {})


def augmented(function: Callable[[Any, Any], Any]) -> Callable[[TracedValue, Any], TracedValue]:
    def write(self: TracedValue, other: Any) -> TracedValue:
        self.node = self.tracer.create_proxy("call_function", function, (self, other), {}).node
        return self  # whoever else holds this value holds the new one

    return write


# What autograd tells of a tensor, which may be None, and names of its own.
_OF_AUTOGRAD = {
    *("grad", "grad_fn", "_grad", "_grad_fn", "_base", "_version", "_backward_hooks", "_post_accumulate_grad_hooks"),
    *("grad_dtype", "name", "output_nr", "retains_grad", "volatile", "_cdata", "_python_dispatch"),
}


for _function in operations.AUGMENTED:
    setattr(TracedValue, f"__{_function.__name__}__", augmented(_function))
