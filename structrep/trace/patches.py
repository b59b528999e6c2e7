"""What torch.fx does not see of a forward's Python, caught while a trace runs.

* A function that cannot be followed is kept whole: its call becomes one node.
* So does a call that gives traced sizes to a real tensor or to a factory: `token.expand(B, -1, -1)`, `torch.zeros(B)`.
* `isinstance(x, torch.Tensor)` and `torch.is_tensor(x)` hold for traced values, which torch.fx answers with no.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType, FunctionType, ModuleType, TracebackType
from typing import Any

import torch
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from torch import Tensor, fx, nn

from structrep import process
from structrep.graph.structures import Unknown, is_traced, proxies, stand_in
from structrep.graph.table import SIZED
from structrep.modules.source import gives_something, reads_settings_only, written_in

Record = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], Any]
_ENGINE = ("torch.fx", "structrep.", "torch._", "torch.overrides")


class NotKept(RuntimeError):
    """A function that cannot be kept whole is called."""

    def __init__(self, function: FunctionType, reason: str) -> None:
        super().__init__(f"{function.__name__} {reason}")
        self.function = function


def keep_whole(functions: Iterable[FunctionType], record: Record) -> None:
    """Make single nodes of the calls of these functions on traced values, whatever name they are called by.

    The code of each is exchanged for as long as the process is ours: a function may be known by any name in any module.
    """
    for function in functions:
        exchange(function, _hook(function, record))


def keep_scripted(record: Callable[..., Any]) -> None:
    """Make single nodes of the calls of functions of TorchScript on traced values."""
    plain = torch.jit.ScriptFunction.__call__

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_traced((args, kwargs)):
            return plain(function, *args, **kwargs)
        return record("call_function", function, args, kwargs, name=function.name)  # torch 2.6 knows no `__name__`

    process.change(torch.jit.ScriptFunction, "__call__", process.here(call, plain))


def see_through_checkpoints() -> None:
    """Have reentrant activation checkpoints run what they are given, as the others do: the numbers are the same."""
    checkpoint = torch.utils.checkpoint.CheckpointFunction
    run = process.here(lambda function, preserve, *args: function(*args), checkpoint.apply)
    process.change(checkpoint, "apply", staticmethod(run))


def exchange(function: FunctionType, hook: Callable[..., Any]) -> None:
    """Make calls of a function calls of `hook`, whatever name it is called by."""
    # the code last, and put back first: whoever calls it meanwhile finds a code and what it needs
    process.change(function, "__kwdefaults__", {**(function.__kwdefaults__ or {}), "_hook": hook})
    process.change(function, "__code__", _forwards.__code__)


def _forwards(*args: Any, _hook: Any, **kwargs: Any) -> Any:
    return _hook(*args, **kwargs)


def _hook(function: FunctionType, record: Record) -> Callable[..., Any]:
    original = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    original.__kwdefaults__ = function.__kwdefaults__
    something = gives_something(original)

    def hook(*args: Any, **kwargs: Any) -> Any:
        if not is_traced((args, kwargs)):
            return original(*args, **kwargs)
        if not something:
            raise NotKept(function, "may give None, or nothing at all")
        for value in (*args, *kwargs.values()):
            if isinstance(value, (list, dict, set)) and (not value or _holds_values(value)):
                raise NotKept(function, f"is given a {type(value).__name__}, which it may write to")
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, nn.Module) and not reads_settings_only(original, value, args, kwargs):
                raise RuntimeError(f"{function.__name__} is given a module, which it may run")
        return record("call_function", function, args, kwargs)

    return process.here(hook, original)


def stopping_function(traceback: TracebackType | None, outermost: Callable[..., Any]) -> FunctionType | None:
    """The innermost function of some module's namespace that an exception came out of, called by `outermost`."""
    found = None
    inside = False
    code = getattr(outermost, "__code__", None)
    while traceback is not None:
        if inside:
            found = _plain(traceback.tb_frame) or found
        inside |= traceback.tb_frame.f_code is code
        traceback = traceback.tb_next
    return found


def plain_function(frame: FrameType | None, outermost: CodeType | None) -> FunctionType | None:
    """The innermost function of some module's namespace that runs a frame, called by the code `outermost`."""
    found = None
    while frame is not None and frame.f_code is not outermost:
        found = found or _plain(frame)
        frame = frame.f_back
    return found if frame is not None else None


def _plain(frame: FrameType) -> FunctionType | None:
    """The function that a frame runs, if it is one of some module's namespace."""
    function = frame.f_globals.get(frame.f_code.co_name)
    engine = str(frame.f_globals.get("__name__", "")).startswith(_ENGINE)
    plain = isinstance(function, FunctionType) and function.__code__ is frame.f_code and not function.__closure__
    return function if plain and not engine else None


def _holds_values(container: Any) -> bool:
    """Whether a container holds traced values other than sizes."""
    for proxy in proxies(container):
        try:
            if isinstance(stand_in(proxy.node), Tensor):
                return True
        except Unknown:
            return True
    return False


def take_traced_sizes(model: nn.Module, record: Record) -> None:
    """Make real tensors and factories take traced sizes: such a call becomes a node, by whatever name a model's code
    knows the function."""
    hooks: dict[int, Callable[..., Any]] = {}
    for place, names in SIZED.items():
        for name in names:
            function = getattr(place, name)
            kind, target = ("call_method", name) if place is Tensor else ("call_function", function)
            hooks[id(function)] = _sized(function, kind, target, record)
            process.change(place, name, hooks[id(function)])
    for space in namespaces(model):
        for alias in [name for name, value in space.items() if id(value) in hooks]:
            process.change(space, alias, hooks[id(space[alias])])


def _sized(function: Callable[..., Any], kind: str, target: Any, record: Record) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_traced((args, kwargs)):
            return record(kind, target, args, kwargs)
        return function(*args, **kwargs)

    watching = process.here(call, function)
    watching.__dict__["watched"] = function
    return watching


@contextlib.contextmanager
def compiled_inlined() -> Iterator[None]:
    """Functions that `torch.compile` has compiled run as they are written."""
    config = sys.modules.get("torch._dynamo.config")  # if not there, nothing was compiled
    with config.patch(error_on_nested_fx_trace=False) if config else contextlib.nullcontext():
        yield


def unwatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a function is outside of `take_traced_sizes`: torch itself looks up a tensor's methods, and finds these."""
    found: Callable[..., Any] = getattr(function, "watched", function)
    return found


def show_tensors(model: nn.Module, note: Callable[[nn.Module, Any, FrameType], None]) -> None:
    """Make type questions of a model's code see traced values as what they stand for.

    `isinstance` and `callable` are shadowed in the namespaces of that code alone: torch's own code has to see proxies.

    Args:
        note: is told what is asked of modules.
    """

    def is_instance(value: Any, classes: Any) -> bool:
        if not isinstance(value, fx.Proxy):
            if isinstance(value, nn.Module):
                note(value, classes, sys._getframe(1))
            return isinstance(value, classes)
        try:
            return isinstance(stand_in(value.node), classes)
        except Unknown:
            return isinstance(value.tracer.observer.of_same_type(value), classes)  # type: ignore[attr-defined]

    def is_tensor(value: Any) -> bool:
        return is_instance(value, Tensor)

    def is_callable(value: Any) -> bool:
        return callable(value) and (not isinstance(value, fx.Proxy) or isinstance(value, fx.proxy.Attribute))

    for space in namespaces(model):
        for name, answer in (("isinstance", is_instance), ("callable", is_callable)):
            if name not in space:
                process.change(space, name, answer)
    process.change(torch, "is_tensor", is_tensor)


def namespaces(model: nn.Module) -> list[dict[str, Any]]:
    """The namespaces of a model's classes, and of the functions that those call by name."""
    found: dict[int, dict[str, Any]] = {}
    for cls in {base for module in model.modules() for base in type(module).__mro__}:
        for function in vars(cls).values():
            if isinstance(function, FunctionType) and not written_in(cls).startswith(("torch.", "builtins")):
                space = function.__globals__
                called = (space.get(name) for name in function.__code__.co_names)
                for one in (function, *called):
                    inner = one.__globals__ if isinstance(one, FunctionType) else getattr(one, "__dict__", None)
                    if isinstance(one, (FunctionType, ModuleType)) and isinstance(inner, dict):
                        found[id(inner)] = inner
    return [s for s in found.values() if not str(s.get("__name__", "")).startswith(("torch.", "structrep."))]
