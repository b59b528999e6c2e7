"""What a conversion changes for the whole process: by one thread at a time, for that thread, and never for good.

torch.fx exchanges methods of `nn.Module` while it traces, and so do we with functions of torch; settings of precision
and the state of random numbers belong to the process too. Whoever changes any of it does so `alone`: other conversions
wait. What was changed is put back at the end of that, in reverse, whatever happens; were even that interrupted, whoever
is `alone` next does it first. Threads that do not convert see through what is exchanged.

Code of the user's runs meanwhile. If it waits for another thread that converts, neither goes on.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

_ABSENT = object()
_lock = threading.RLock()
_depth = 0
_undo: list[Callable[[], None]] = []  # what puts back each change, in order


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keep other conversions waiting; what is changed meanwhile is put back."""
    global _depth
    with _lock:
        start = len(_undo) if _depth else 0
        _depth += 1
        try:
            _put_back(start)  # what an interrupt has left
            yield
        finally:
            _depth -= 1
            _put_back(start)


def _put_back(start: int) -> None:
    error: BaseException | None = None
    while len(_undo) > start:
        try:
            _undo[-1]()
            _undo.pop()
        except Exception as reason:  # the others are put back all the same
            error = reason
            _undo.pop()
        except BaseException as reason:  # an interrupt: once more
            error = reason
    if error is not None:
        raise error


def afterwards(put_back: Callable[[], None]) -> None:
    """Note how something is put back, before it is changed; doing it twice has to be no harm."""
    _undo.append(put_back)


def change(owner: Any, name: str, value: Any) -> None:
    """Change an attribute, or an entry of a dict, until the end of being alone."""
    keep(owner, name)
    _set(owner, name, value)


def keep(owner: Any, name: str) -> None:
    """Put an attribute back at the end of being alone, whoever changes it."""
    if isinstance(owner, dict):
        before = owner.get(name, _ABSENT)
    elif isinstance(owner, type):
        before = vars(owner).get(name, _ABSENT)
    else:
        before = getattr(owner, name)
    afterwards(functools.partial(_set, owner, name, before))


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner.pop(name, None) if value is _ABSENT else owner.__setitem__(name, value)
    elif value is not _ABSENT:
        setattr(owner, name, value)
    elif name in vars(owner):
        delattr(owner, name)


def here(function: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    """One function for this thread, and another one for all others."""
    mine = threading.get_ident()

    @functools.wraps(elsewhere)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if threading.get_ident() == mine else elsewhere)(*args, **kwargs)

    return call


class _Here:
    """True in this thread, false in all others."""

    def __init__(self) -> None:
        self.mine = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self.mine


@contextlib.contextmanager
def same_chance(*, cuda: bool = False) -> Iterator[None]:
    """The random numbers of torch as they were, afterwards."""
    with alone(), torch.random.fork_rng(devices=None if cuda else []):
        yield


@contextlib.contextmanager
def room() -> Iterator[None]:
    """As many calls inside each other as Python allows at its start, wherever one is: around a forward that runs here
    are those of the trace."""
    with alone():
        limit, depth, frame = sys.getrecursionlimit(), 0, sys._getframe()
        while (outer := frame.f_back) is not None:
            frame, depth = outer, depth + 1
        afterwards(functools.partial(sys.setrecursionlimit, limit))
        sys.setrecursionlimit(limit + depth)
        yield


class Tracer(fx.Tracer):
    """torch.fx's, for this thread alone."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with alone():
            afterwards(functools.partial(_end_patches, getattr(_fx, "CURRENT_PATCHER", None)))
            for name in _EXCHANGED:
                keep(nn.Module, name)
            self.thread = threading.get_ident()
            self.elsewhere = {name: getattr(nn.Module, name) for name in _EXCHANGED}
            if hasattr(_fx, "_is_fx_tracing_flag"):  # before torch 2.14, which has one for each thread
                change(_fx, "_is_fx_tracing_flag", _Here())
            # with names of its own, so that it does not raise that flag for all threads; torch.compile has wrapped it
            plain: Any = inspect.unwrap(fx.Tracer.trace)
            own = FunctionType(plain.__code__, {**plain.__globals__}, None, plain.__defaults__, plain.__closure__)
            traced: fx.Graph = own(self, root, concrete_args)
            return traced

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        run, args = self.arguments_of(root_fn, is_module, concrete_args)

        @functools.wraps(run)  # torch.fx takes the type of the output from its annotations
        def enter(*args: Any) -> Any:
            with alone():
                for name, elsewhere in self.elsewhere.items():
                    change(nn.Module, name, here(getattr(nn.Module, name), elsewhere))
                return run(*args)

        return enter, args

    def arguments_of(self, root_fn: Any, is_module: bool, concrete_args: Any) -> tuple[Any, list[Any]]:
        """What is run to trace, and the arguments that it is given."""
        return super().create_args_for_root(root_fn, is_module, concrete_args)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:  # just before `enter`
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _end_patches(before: Any) -> None:
    """Take back what torch.fx has exchanged, if an interrupt kept it from that."""
    patcher = getattr(_fx, "CURRENT_PATCHER", None)
    if patcher is not None and patcher is not before:
        patcher.revert_all_patches()
        _fx.CURRENT_PATCHER = before


_fx: Any = torch.fx._symbolic_trace
_EXCHANGED = ("__call__", "__getattr__")


def _in_child() -> None:
    """A process that was forked while another thread was alone has no such thread."""
    global _lock, _depth
    _lock, _depth = threading.RLock(), 0


os.register_at_fork(after_in_child=_in_child)
