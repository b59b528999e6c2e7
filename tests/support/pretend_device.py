"""A device that is not the CPU, for machines that have no other: `cuda:0` by name, computed on the CPU.

A tensor there and one here do not meet, as on a real one: torch's own error is raised. Numbers without dims may.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from structrep.algebra import precision

DEVICE = torch.device("cuda", 0)
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.copy_, Tensor.type_as}
# What is asked of the tensor itself; a module's `to` parses its arguments for later.
ITSELF = {
    Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.is_cpu.__get__, Tensor.get_device, Tensor.shape.__get__,
    Tensor.dtype.__get__, Tensor.ndim.__get__, Tensor.requires_grad.__get__, Tensor.requires_grad.__set__,
    Tensor.requires_grad_, Tensor.grad.__get__, Tensor.grad_fn.__get__, Tensor.is_leaf.__get__, Tensor.__hash__,
    torch.device, torch._C._nn._parse_to, torch._has_compatible_shallow_copy_type,
}  # fmt: skip


class Elsewhere(Tensor):
    """A tensor there, whose numbers are in `numbers`, here."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device=DEVICE, requires_grad=numbers.requires_grad,
        )  # fmt: skip
        made.numbers = numbers
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = Elsewhere(self.numbers.detach().clone())
        memo[id(self)] = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        return memo[id(self)]  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Everywhere(TorchFunctionMode):
    """Factories and moves that name the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {}, mode=True)


def _call(func: Any, args: Any, kwargs: Any, *, mode: bool = False) -> Any:
    if func in ITSELF:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    leaves = pytree.tree_leaves((args, kwargs))
    if any(isinstance(one, fx.Proxy) for one in leaves):
        return func(*args, **kwargs) if mode else NotImplemented
    there = [one for one in leaves if isinstance(one, Elsewhere)]
    here = [one for one in leaves if isinstance(one, Tensor) and not isinstance(one, Elsewhere) and one.ndim]
    if there and here and func not in MOVES and func is not torch.ops.aten.copy_.default:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
    stays = _on(func, leaves, there)
    if stays and kwargs.get("generator") is not None:  # all of them are here
        raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found 'cpu'")
    inner = pytree.tree_map(_here, (args, kwargs))
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*inner[0], **inner[1])

    def placed(one: Any) -> Any:
        if not (isinstance(one, Tensor) and stays):
            return one
        if DEVICE.type in precision.WITHOUT_FLOAT64 and one.dtype is torch.float64:
            raise TypeError("Cannot convert a Tensor to float64 dtype as the device doesn't support float64")
        return next((tensor for tensor in there if tensor.numbers is one), Elsewhere(one))

    return pytree.tree_map(placed, result)


def _on(func: Any, leaves: list[Any], there: list[Elsewhere]) -> bool:
    """Whether a result is there."""
    named = [torch.device(one) for one in leaves if _is_device(one)]
    if named:
        return named[0].type == DEVICE.type
    if func in (Tensor.cpu, Tensor.cuda):
        return func is Tensor.cuda
    if func is Tensor.copy_:
        return isinstance(leaves[0], Elsewhere)
    if func in MOVES and len(leaves) > 1 and isinstance(leaves[1], Tensor):
        return isinstance(leaves[1], Elsewhere)
    return bool(there)


def _is_device(one: Any) -> bool:
    return isinstance(one, torch.device) or (isinstance(one, str) and one.split(":")[0] in (DEVICE.type, "cpu"))


def _here(one: Any) -> Any:
    if isinstance(one, Elsewhere):
        return one.numbers
    return torch.device("cpu") if _is_device(one) else one


@contextlib.contextmanager
def device(*, float64: bool = True) -> Iterator[torch.device]:
    """The device, for as long as this lasts, and whether it has float64: Apple's has none."""
    getattr(torch._C, "_ensureCUDADeviceGuardSet", lambda: None)()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (
            mock.patch("torch.cuda._lazy_init"),
            mock.patch.object(precision, "WITHOUT_FLOAT64", set() if float64 else {DEVICE.type}),
            _Everywhere(),
        ):
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
