"""What code asks of where it runs, as a trace runs: modes of torch, clocks, variables of the system."""

from __future__ import annotations

import importlib
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from structrep import process
from structrep.graph.reads import OF_TORCH, UNSTABLE
from structrep.modules.source import functions, functions_in, is_full
from structrep.trace.frames import is_library
from structrep.trace.patches import exchange, namespaces
from structrep.trace.reads import Reads

_get_tracing_state = torch._C._get_tracing_state
_OF_SYSTEM = ("os", "collections.abc", "_collections_abc")  # which look up variables of the system for code
_PLAIN_TENSORS = (None, Tensor.__torch_function__, nn.Parameter.__torch_function__)


class Environment:
    """Watches the functions that tell where code runs; notes what they are asked as reads.

    Args:
        reads: of the trace.
    """

    def __init__(self, reads: Reads) -> None:
        self.reads = reads
        self.thread = threading.get_ident()
        self.hooks: dict[int, tuple[Any, Callable[..., Any]]] = {}  # of functions in C, which may have any name, by id

    def watch(self, model: nn.Module) -> None:
        """Note what is asked as long as the process is ours, by whatever names a model's code knows those functions."""
        hooks = self.hooks
        if "torch._dynamo" not in sys.modules and any("_dynamo" in code.co_names for code in _codes(model)):
            importlib.import_module("torch._dynamo")  # as the first call would
        for owner, name, plain, text in list(_questions()):
            if isinstance(plain, FunctionType):
                original = FunctionType(plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__)
                original.__kwdefaults__ = plain.__kwdefaults__
                exchange(plain, self._asking(original, text, 2))
            else:
                hook = self._asking(plain, text, 1)
                hooks[id(plain)] = plain, hook
                process.change(owner, name, hook)
        process.change(torch._C, "_get_tracing_state", self._tracing())
        for name in ("is_fx_tracing", "is_fx_symbolic_tracing"):
            tracing = getattr(torch.fx._symbolic_trace, name, None)
            if isinstance(tracing, FunctionType):
                exchange(tracing, self._as_for_real(FunctionType(tracing.__code__, tracing.__globals__), 2))
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
            plain = getattr(torch.overrides, name)
            hooks[id(plain)] = plain, self._as_for_real(plain, 1)
            process.change(torch.overrides, name, hooks[id(plain)][1])
        for space in namespaces(model):
            for alias in [name for name, value in space.items() if id(value) in hooks]:
                plain, hook = hooks[id(space[alias])]
                process.change(space, alias, hook)
        made = {one for cls in map(type, model.modules()) for f in functions(cls).values() for one in functions_in(f)}
        for cell in [cell for function in made for cell in function.__closure__ or () if is_full(cell)]:
            if id(cell.cell_contents) in hooks:
                plain, hook = hooks[id(cell.cell_contents)]
                process.change(cell, "cell_contents", hook)
        process.change(type(os.environ), "__getitem__", self._variables(os.environ))

    def _asking(self, plain: Callable[..., Any], text: str, depth: int) -> Callable[..., Any]:
        """A function that answers as another does, and notes it."""

        def asked(*args: Any, **kwargs: Any) -> Any:
            told = plain(*args, **kwargs)
            frame = sys._getframe(depth)
            if threading.get_ident() != self.thread or is_library(frame):
                return told
            given = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])
            return self.reads.note(None, "", f"{text}({given})", told, frame)

        return asked

    def _as_for_real(self, plain: Callable[..., bool], depth: int) -> Callable[..., bool]:
        """A function that tells code of the model's, where traced values are tensors to it, that nothing traces."""

        def asked(*args: Any) -> bool:
            if threading.get_ident() != self.thread or is_library(sys._getframe(depth)):
                return plain(*args)
            given = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
            own = (type(one) for one in given if not isinstance(one, fx.Proxy))
            return any(getattr(kind, "__torch_function__", None) not in _PLAIN_TENSORS for kind in own)

        return asked

    def _tracing(self) -> Callable[[], Any]:
        """What torch's own `is_tracing` asks, noted where somebody else asks it."""

        def asked() -> Any:
            state, frame = _get_tracing_state(), sys._getframe(1)
            if threading.get_ident() != self.thread or is_library(frame):
                return state
            traces = state is not None
            told = self.reads.note(None, "", "torch._C._get_tracing_state() is not None", traces, frame)
            return state if told is traces else object() if told else None

        return asked

    def _variables(self, environment: Any) -> Callable[[Any, str], str]:
        """What `os.environ` is asked for, noted where the user's code asks it."""
        plain: Callable[[Any, str], str] = type(environment).__getitem__

        def get(variables: Any, key: str) -> str:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_globals.get("__name__") in _OF_SYSTEM:
                frame = frame.f_back
            noted = variables is environment and threading.get_ident() == self.thread
            told: str | None = None
            try:
                told = plain(variables, key)
                return told
            finally:
                if noted and frame is not None and not is_library(frame):
                    self.reads.note(None, "", f"os.environ.get({key!r})", told, frame, counts=False)

        return get


def _codes(model: nn.Module) -> Iterator[CodeType]:
    return (one.__code__ for cls in set(map(type, model.modules())) for one in functions(cls).values())


def _questions() -> Iterator[tuple[Any, str, Any, str]]:
    """What can be asked of how a forward is run: who answers, under which name, with what, and as which text."""
    for home, names in OF_TORCH.items():
        for name in names:
            owner = sys.modules.get(home)
            if owner is not None and (plain := getattr(owner, name, None)) is not None:
                yield owner, name, plain, f"{home}.{name}"
    for text in UNSTABLE:
        home, _, name = text.partition(".")
        yield sys.modules[home], name, getattr(sys.modules[home], name), text
    yield random, "_urandom", os.urandom, "os.urandom"  # by which `secrets` and `random.SystemRandom` draw
