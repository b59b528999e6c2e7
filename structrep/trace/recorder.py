"""The calls of a trace: what each was given, did and gave, and whether it changed anything that outlives it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn

from structrep.graph.calls import Call
from structrep.graph.contexts import Contexts
from structrep.graph.facts import CALL, STORED
from structrep.graph.structures import alike, held, holds_still, is_traced, proxies, snapshot
from structrep.modules import parametrized
from structrep.modules.objects import is_object
from structrep.modules.source import functions_in, written_first
from structrep.read.modules import settings as settings_of
from structrep.trace.class_reads import methods_of
from structrep.trace.frames import may_go_otherwise
from structrep.trace.origins import Origins
from structrep.trace.proxies import TracedValue


class Recorder:
    """Records calls, nested as they run.

    Args:
        paths: of the modules whose calls are recorded.
        contexts: that code has entered.
        origins: of the constants of the trace.
        look: gives what objects hold of which it is noted which call changes them, if there are any.
    """

    def __init__(
        self,
        paths: Mapping[nn.Module, str],
        contexts: Contexts,
        origins: Origins,
        look: Callable[[], tuple[Any, ...]] | None,
    ) -> None:
        self.paths, self.contexts, self.origins, self.look = paths, contexts, origins, look
        self.state = look() if look is not None else ()
        self.calls: list[Call] = []
        self.called: set[nn.Module] = set()  # also those whose calls are constants
        self.stack: list[Call] = []
        self.stopped: Call | None = None  # the innermost call that an error came out of
        self.catcher: Call | None = None  # a call that caught an error of one that had begun
        self.refused: Exception | None = None  # the first question that had no answer

    @property
    def current(self) -> Call | None:
        """The call that runs."""
        return self.stack[-1] if self.stack else None

    def refuse(self, error: Exception) -> Exception:
        """An error that stops the trace, also where the forward catches it."""
        if self.refused is None and self.stack:
            self.refused, self.stopped = error, self.stack[-1]
        return error

    @contextlib.contextmanager
    def methods(self, modules: list[nn.Module]) -> Iterator[None]:
        """Record calls of methods too: forward_features and its like are then rewritten where they stand."""
        watched: list[tuple[nn.Module, str]] = []
        for module in modules:
            bases = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
            for name in dict.fromkeys(name for base in bases for name in vars(base)):
                plain = isinstance(inspect.getattr_static(type(module), name), FunctionType)
                plain &= not name.startswith("__") and name != "forward"
                if plain and name not in module.__dict__ and not hasattr(nn.Module, name):
                    module.__dict__[name] = functools.partial(self._call_method, module, name, getattr(module, name))
                    watched.append((module, name))
        try:
            yield
        finally:
            for module, name in watched:
                module.__dict__.pop(name, None)

    def _call_method(self, m: nn.Module, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.stack:
            return function(*args, **kwargs)
        if not is_traced((args, kwargs)):  # its code is asked what it goes by; all that it gives is constant
            code = inspect.unwrap(function).__code__
            for one in (inspect.unwrap(function), *methods_of([code], m), *_functions_held(m)):
                self.stack[-1].codes[one.__code__] = one.__globals__
                self.stack[-1].functions[one.__code__] = one, m, self.paths[m]
            return self._unrecorded(m, function, args, kwargs)
        return self.record(m, function, args, kwargs, False, name, function)

    def _unrecorded(self, m: nn.Module, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a method gives that is given no value; it may count its calls in its module."""
        before = snapshot(m.__dict__)
        result = function(*args, **kwargs)
        now = m.__dict__
        settled = {key for key, value in now.items() if isinstance(value, Tensor) and self.origins.formula(value)}
        kept = [{key: one for key, one in held.items() if key not in settled} for held in (before, now)]
        self.stack[-1].mutates |= not alike(*kept)
        return result

    def record(
        self, m: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any, leaf: bool, method: str, function: Any
    ) -> Any:
        """What a call gives.

        Args:
            run: makes it: what is recorded, or a node for it.
            leaf: whether that is one node.
            method, function: what is called, by name and bound.

        Raises:
            RuntimeError: it gives another thing at every call.
        """
        parent = self.current
        self._note_changes(parent)
        call = Call(m, self.paths[m], parent, snapshot(args), snapshot(kwargs), leaf, method, function)
        call.settings = settings_of(m) if leaf else {}
        call.at = self.place() if parent else None
        call.contexts = self.contexts.now
        if parent:
            parent.steps.append(call)
        self.calls.append(call)
        self.called.add(m)
        self.stack.append(call)
        attributes = {} if leaf else snapshot(m.__dict__)
        holders = [] if leaf else held((args, kwargs))
        drawn = None if leaf else _chance()  # a leaf only makes a node
        try:
            result = run(*args, **kwargs)
            if isinstance(result, Iterator):
                raise RuntimeError("it gives an iterator, whose code runs later")
            if not leaf and _chance() != drawn:
                raise RuntimeError("it draws new random numbers at every call")
        except Exception:
            self.stopped = self.stopped or call
            if parent and not call.steps and self.calls[-1] is call:
                del parent.steps[-1], self.calls[-1]  # it has done nothing; whoever catches the error may go on
            else:
                self.catcher = parent
            raise
        finally:
            self.stack.pop()
        self._note_changes(call)
        call.result = snapshot(result)
        given = zip(proxies((call.args, call.kwargs)), proxies((args, kwargs)), strict=False)
        call.written = [(old.node, new.node) for old, new in given if old.node is not new.node]
        constant = not any(map(is_traced, (args, kwargs, result)))
        dropped = parent and constant and parent.steps[-1] is call and self.calls[-1] is call
        if parent and dropped:
            del parent.steps[-1], self.calls[-1]  # its origin says how it came about
        if not leaf:
            self._note_stored(call, attributes)
        own = {} if leaf else m.__dict__
        now = {key: value for key, value in own.items() if not self._settles(m, key, attributes.get(key), value)}
        before = {key: value for key, value in attributes.items() if key in now or key not in own}
        call.mutates |= not alike((call.args, call.kwargs, before), (args, kwargs, now))
        call.mutates |= not all(holds_still(one, held_before) for one, held_before in holders)
        if parent and dropped:
            parent.mutates |= call.mutates
        return result

    def place(self) -> int | None:
        """The instruction at which the code of the call that runs stands; None if that has called other code of the
        user's that may go several ways."""
        code = self.stack[-1].bytecode
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code is code:
                return frame.f_lasti
            engine = str(frame.f_globals.get("__name__", "")).startswith(("torch.", "structrep."))
            if not engine and may_go_otherwise(frame):
                return None
            frame = frame.f_back
        return None

    def _settles(self, m: nn.Module, key: str, before: Any, value: Any) -> bool:
        """Whether an attribute was given what a call computes of the model's tensors alone, the same at every call."""
        if not isinstance(value, Tensor) or value is before:
            return False
        if key not in parametrized.computed(m) and not written_first(type(m), key):
            return False
        formula = self.origins.formula(value)
        return formula is not None and all(t is not before for t in formula.tensors)

    def replaces(self, module: nn.Module, name: str, before: Tensor) -> bool:
        """Whether a parameter or buffer is another than it was, and so is yet another at the next call."""
        now = module._parameters.get(name, module._buffers.get(name))
        return now is not before and not self._settles(module, name, before, now)

    def _note_changes(self, call: Call | None) -> None:
        """Note whether a call has changed what an object holds, since the last call began or ended."""
        if self.look is not None:
            before, self.state = self.state, self.look()
            if call is not None and self.state != before:
                call.mutates = True

    def _note_stored(self, call: Call, before: dict[str, Any]) -> None:
        """Mark the traced values that a call has stored in its module: they are looked at later."""
        stored = {key: value for key, value in call.module.__dict__.items() if before.get(key) is not value}
        for proxy in proxies(stored):
            if isinstance(proxy, TracedValue):
                STORED.note(proxy.node, True)
                call.mutates = True

    def note_escaped(self, values: Iterable[fx.Proxy]) -> None:
        """Mark traced values that something outside holds when all is done, and the calls that may have given them
        away."""
        for value in values:
            STORED.note(value.node, True)
            makers = set(CALL.of(value.node).chain()) if CALL.get(value.node) is not None else set()
            for call in self.calls:
                given = {proxy.node for proxy in proxies((call.args, call.kwargs, call.result))}
                call.mutates |= call in makers or value.node in given


def _functions_held(m: nn.Module) -> Iterator[FunctionType]:
    """The functions among a module's attributes, and those of objects there."""
    for value in vars(m).values():
        if isinstance(value, FunctionType):
            yield value
        elif is_object(value):
            yield from (one for held in vars(type(value)).values() for one in functions_in(held))


def _chance() -> tuple[Any, ...]:
    """The state of Python's own random numbers, and of numpy's."""
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is None:
        return (random.getstate(),)
    _, keys, *rest = numpy.get_state()
    return random.getstate(), keys.tobytes(), *rest
