"""Contexts that code enters as a trace runs: `torch.no_grad()` and its like, autocast, modes.

None is a step of a graph, but each changes what steps do: whether they have a gradient, in which dtype they compute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from structrep import process
from structrep.modules.source import written_in

_set_grad_enabled = torch._C._set_grad_enabled


class Context(NamedTuple):
    """A context that steps of a forward run in.

    Args:
        code: how it is entered.
        ends: whether it is left again where it was entered; `torch.set_grad_enabled(False)` alone is not.
        known: whether it is one of torch's; a mode of somebody's own may make another operation of any.
        asked: whether it is for the device that a value is on, as it is asked.
    """

    code: str
    ends: bool = True
    known: bool = True
    asked: bool = False

    @property
    def unwritable(self) -> str:
        """Why a forward that enters it cannot be written anew; "" if it can."""
        if not self.known:
            return f"enters {self.code}, which may change what any operation does"
        if self.asked:
            return f"enters {self.code} for the device that a value is on"
        return "" if self.ends else f"calls {self.code}, which stays so after it"

    @property
    def casts(self) -> bool:
        return self.code.startswith("torch.autocast(")


class Contexts:
    """Watches a trace.

    Args:
        around: what it starts in.
    """

    def __init__(self, around: Iterable[Context] = ()) -> None:
        self.entered: list[tuple[Any, Context]] = [(None, one) for one in around]
        self.wanted: dict[int, tuple[Any, bool]] = {}  # autocasts, by id, and whether they were to be enabled
        self.asked: dict[int, Any] = {}  # those whose device was asked of a value

    @property
    def now(self) -> tuple[Context, ...]:
        return tuple(context for _, context in self.entered)

    def watch(self) -> None:
        """Note what is entered as long as the process is ours."""
        for cls in (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.set_grad_enabled, torch.autocast):
            _exchange(cls, "__enter__", self._enter)
            _exchange(cls, "__exit__", self._leave)
        for mode in (TorchFunctionMode, TorchDispatchMode):
            _exchange(mode, "__enter__", self._enter_mode)
            _exchange(mode, "__exit__", self._leave)
        _exchange(torch.set_grad_enabled, "__init__", self._set)
        process.change(torch._C, "_set_grad_enabled", process.here(self._set_itself, torch._C._set_grad_enabled))
        _exchange(torch.autocast, "__init__", self._want)

    def _enter(self, plain: Callable[..., Any], manager: Any) -> Any:
        before = [one for one in self.entered if one[0] is not manager]
        entered = plain(manager)
        self.entered = [*before, (manager, Context(self._spelt(manager), asked=id(manager) in self.asked))]
        return entered

    def _enter_mode(self, plain: Callable[..., Any], mode: Any) -> Any:
        before, entered = self.entered, plain(mode)
        if written_in(type(mode)).partition(".")[0] not in ("torch", "structrep"):
            self.entered = [*before, (mode, Context(type(mode).__qualname__, known=False))]
        return entered

    def _leave(self, plain: Callable[..., Any], manager: Any, *raised: Any) -> Any:
        managers = [one for one, _ in self.entered]
        before = self.entered[: managers.index(manager)] if manager in managers else self.entered
        left = plain(manager, *raised)
        self.entered = before
        return left

    def _set(self, plain: Callable[..., Any], manager: Any, mode: bool) -> None:
        plain(manager, mode)
        self.entered = [*self.entered, (manager, Context(f"torch.set_grad_enabled({mode})", ends=False))]

    def _set_itself(self, mode: bool) -> None:
        """As `torch.set_grad_enabled` does, where somebody else calls what that calls."""
        _set_grad_enabled(mode)  # a mode of ours, `trace.constants`, sees that call, and calls this again
        if not str(sys._getframe(2).f_globals.get("__name__")).startswith(("torch.", "structrep.")):
            self.entered = [*self.entered, (None, Context(f"torch.set_grad_enabled({mode})", ends=False))]

    def _want(self, plain: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> None:
        device = args[0] if args else kwargs.get("device_type")
        if isinstance(device, fx.Proxy):
            self.asked[id(manager)] = manager
            args, kwargs = (str(device), *args[1:]), {key: one for key, one in kwargs.items() if key != "device_type"}
        plain(manager, *args, **kwargs)
        enabled = args[2] if len(args) > 2 else kwargs.get("enabled", True)
        self.wanted[id(manager)] = manager, bool(enabled)  # it is disabled itself where there is no such device

    def _spelt(self, manager: Any) -> str:
        if isinstance(manager, torch.autocast):
            _, enabled = self.wanted.get(id(manager), (manager, manager._enabled))
            how = f"dtype={manager.fast_dtype}, cache_enabled={manager._cache_enabled}" if enabled else "enabled=False"
            return f"torch.autocast({manager.device!r}, {how})"
        kinds = torch.no_grad, torch.enable_grad, torch.inference_mode, torch.set_grad_enabled
        name = next(kind.__name__ for kind in kinds if isinstance(manager, kind))
        return f"torch.{name}({getattr(manager, 'mode', '')})"


def _exchange(cls: Any, name: str, hook: Callable[..., Any]) -> None:
    plain = getattr(cls, name)

    def watching(manager: Any, *args: Any, **kwargs: Any) -> Any:
        return hook(plain, manager, *args, **kwargs)

    process.change(cls, name, process.here(watching, plain))
