"""What a forward asks for while a trace runs, beside the values that it is given.

* Plain attributes of modules, and of objects that modules hold (configurations), by any way of asking: `self.low`,
  `getattr(self, name)`, a helper that is given the object.
* Entries of dicts and lists, where code asks for one of a constant key; else the whole.
* Questions about where it runs: `torch.jit.is_tracing()`, `torch.is_grad_enabled()`.
* dtype and device of tensors that the model holds.

What a trace was told holds for that trace. Told otherwise (`Observed(answers=...)`), a forward shows what hangs on it.
Module-level names and closures' cells are found in the code that ran (`namespace_reads`): nothing can watch those.
"""

from __future__ import annotations

import dis
import functools
import inspect
import operator
import os
import random
import sys
import threading
import time  # noqa: F401
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from enum import Enum
from types import CellType, CodeType, FrameType, FunctionType, MappingProxyType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from structrep import process
from structrep.intercept import exchange, namespaces
from structrep.ranks import written_in
from structrep.sources import functions, functions_in
from structrep.values import proxies

# --- what was asked -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Read:
    """One thing that a forward asked for, and what it was told.

    Args:
        holder: the module whose attribute it is, or the tensor whose dtype or device; the namespace or the function
            that has a name; the node that compares the dtype of an input; None of a question to torch or the system.
        text: how it is asked, behind what stands for the holder: ".low", ".cfg['t']", ".dtype"; the whole question.
        told: the answer; `MISSING` for an attribute that there was none of.
        counts: whether a trace may be told otherwise.
        places: the code and the instruction of each time that it was asked, and how many entries deep.
    """

    holder: Any
    text: str
    told: Any
    counts: bool = True
    places: list[tuple[CodeType, int, int]] = field(default_factory=list)

    @property
    def where_am_i(self) -> bool:
        """Whether it is asked how the forward is run, which a user changes without touching the model."""
        return (self.holder is None or isinstance(self.holder, fx.Node)) and isinstance(self.told, bool)

    @property
    def unstable(self) -> bool:
        """Whether the answer may be another at every call."""
        return self.text.partition("(")[0] in _UNSTABLE or _is_date(self.told)


class _Missing:
    def __repr__(self) -> str:
        return "missing"


MISSING = _Missing()

OF_MODULES = frozenset(vars(nn.Module()))  # torch's own attributes, `training` among them
_METHODS = {name: value for name, value in vars(nn.Module).items() if not name.startswith("__")}
INPUTS = "", "the dtype of inputs"  # what is answered for the dtype of inputs


def _ours(frame: FrameType) -> bool:
    """Whether a frame is the engine's own; modules that come along are models like others."""
    name = str(frame.f_globals.get("__name__", ""))
    return name.startswith("structrep.") and not name.startswith(("structrep.blocks", "structrep.layers"))


def _torchs(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch" or _ours(frame)


_HEAP = 1 << 9  # types made by a class statement, whose attributes can be set
_CONTAINERS = (dict, list, tuple, set, frozenset, MappingProxyType)
_HELD = (fx.Proxy, list, tuple, dict)  # what values stand in
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout,
          torch.memory_format, slice, range, type(...))  # fmt: skip
_LIBRARIES = ("torch", "builtins", "functools", "collections", "numpy", "structrep", "types", "typing", "enum")


def is_object(value: Any) -> bool:
    """Whether a value is an object of somebody's own class, which holds settings: a configuration."""
    cls = type(value)
    own = bool(cls.__flags__ & _HEAP) and written_in(cls).partition(".")[0] not in _LIBRARIES
    return own and not isinstance(value, (*_CONTAINERS, *_PLAIN, type, Enum, nn.Module, Tensor))


class Questions:
    """Watches a trace.

    Args:
        current: the call that runs.
        name_of: the path of a tensor that the model holds, or None.
        count: how many nodes the trace has made.
        answers: what is answered otherwise than it is, by `key`.
    """

    def __init__(
        self,
        paths: Mapping[nn.Module, str],
        current: Callable[[], Any],
        answers: Mapping[tuple[str, str], Any] | None = None,
    ) -> None:
        self.paths = {id(module): path for module, path in paths.items()}  # whose hash may ask them for attributes
        self.current = current
        self.answers = dict(answers or {})
        self.asked = 0
        self.routes: dict[int, tuple[Any, nn.Module, str]] = {}  # of objects, by id: themselves, who holds them, how
        self.thread = threading.get_ident()
        self.patched: set[type] = set()
        self.hooks: dict[int, tuple[Any, Any]] = {}  # of questions written in C, which may be known by any name

    def watch(self, model: nn.Module) -> None:
        """Note what is asked for as long as the process is ours."""
        # Only where code of the model's is: to change nn.Module itself makes Python look at all classes there are.
        classes = {type(module) for module in model.modules() if not written_in(type(module)).startswith("torch.")}
        plain = {cls: cls.__getattribute__ for cls in classes}
        for cls, get in plain.items():
            _watch(cls, get, self._of_module)
        self._watch_questions(model)
        process.change(type(os.environ), "__getitem__", self._environment(os.environ))

    def note(
        self, holder: Any, path: str, text: str, told: Any, frame: FrameType, counts: bool = True, deep: int = 0
    ) -> Any:
        """Note a question of the call that runs; returns what it is told."""
        call = self.current()
        if call is None:
            return told
        self.asked += 1
        call.codes[frame.f_code] = frame.f_globals
        if frame.f_code is not getattr(inspect.unwrap(call.code), "__code__", None):  # a function that it calls
            for proxy in proxies([one for one in frame.f_locals.values() if isinstance(one, _HELD)]):
                call.held.setdefault(proxy.node, set()).add(frame.f_code)
        key = (path, text)
        read = call.reads.setdefault(key, Read(holder, text, told, counts))
        read.places.append((frame.f_code, frame.f_lasti, deep))
        return self.answers.get(key, told) if counts else told

    def ask(self, tensor: Tensor, path: str, what: str, told: Any) -> Any:
        """A question about a tensor of the model: its dtype, or where it is."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") == "structrep.trace":
            frame = frame.f_back
        return told if frame is None or _torchs(frame) else self.note(tensor, path, f".{what}", told, frame)

    # --- attributes -------------------------------------------------------------------------------------------------

    def _of_module(self, module: nn.Module, name: str, get: Callable[[Any, str], Any]) -> Any:
        if name in OF_MODULES or name.startswith("__") or threading.get_ident() != self.thread:
            return get(module, name)
        torchs = name in _METHODS and getattr(type(module), name, None) is _METHODS[name]
        if torchs and name not in object.__getattribute__(module, "__dict__"):
            return get(module, name)
        before = self.asked
        try:
            value = get(module, name)
        except AttributeError:
            held = (module._parameters, module._buffers, module._modules)
            if not any(name in one for one in held):
                self._missing(module, name)
            raise
        if id(value) in self.hooks:
            return self.hooks[id(value)][1]
        if isinstance(value, (nn.Module, Tensor, fx.Proxy)) or self.asked > before:
            return value  # a property's parts were noted
        path = self.paths.get(id(module))
        if path is None or self.current() is None or (frame := _outside(sys._getframe(2))) is None:
            return value
        if isinstance(value, MethodType) and (name not in module.__dict__ or _torchs(frame)):
            return value
        if isinstance(value, functools.partial) and getattr(value.func, "__name__", "") == "_call_method":
            return value
        if isinstance(value, FunctionType) and name not in module.__dict__:
            return value  # a static method
        return self._told(module, path, f".{name}", value, frame)

    def _missing(self, module: nn.Module, name: str) -> None:
        path = self.paths.get(id(module))
        frame = sys._getframe(3)
        own = any("__getattr__" in vars(base) for base in type(module).__mro__ if base is not nn.Module)
        if path is not None and self.current() is not None and not own and not _torchs(frame):
            self.note(module, path, f".{name}", MISSING, frame, counts=False)

    def _of_object(self, held: Any, name: str, get: Callable[[Any, str], Any]) -> Any:
        route = self.routes.get(id(held))
        if route is None or route[0] is not held or name.startswith("__") or threading.get_ident() != self.thread:
            return get(held, name)
        before = self.asked
        value = get(held, name)
        if isinstance(value, (nn.Module, Tensor, fx.Proxy, MethodType)) or self.asked > before:
            return value
        if self.current() is None or (frame := _outside(sys._getframe(2))) is None:
            return value
        _, module, text = route
        return self._told(module, self.paths[id(module)], f"{text}.{name}", value, frame)

    def _told(self, module: nn.Module, path: str, text: str, value: Any, frame: FrameType) -> Any:
        if is_object(value) and self._adopt(value, module, text):
            return value  # what is asked of it is noted
        told, further = value, ""
        if isinstance(value, (*_CONTAINERS, SimpleNamespace)):
            further, told = onward(frame.f_code, frame.f_lasti, value)
            if isinstance(told, (nn.Module, Tensor, fx.Proxy)):
                return value
            if further and is_object(told) and self._adopt(told, module, text + further):
                return value
        deep = further.count("[") if "(" not in further else 99  # which no code is
        again = self.note(module, path, text + further, told, frame, counts=not further, deep=deep)
        return value if further else again

    def _adopt(self, value: Any, module: nn.Module, text: str) -> bool:
        """Watch an object too, from now on."""
        cls = type(value)
        if cls not in self.patched:
            try:
                get: Callable[[Any, str], Any] = vars(type)["__getattribute__"](cls, "__getattribute__")
                _watch(cls, get, self._of_object)
            except (TypeError, AttributeError):
                return False
            self.patched.add(cls)
        self.routes[id(value)] = value, module, text
        return True

    # --- questions --------------------------------------------------------------------------------------------------

    def _watch_questions(self, model: nn.Module) -> None:
        hooks = self.hooks
        for owner, name, plain, text in list(_questions()):
            if isinstance(plain, FunctionType):
                original = FunctionType(plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__)
                original.__kwdefaults__ = plain.__kwdefaults__
                exchange(plain, self._asking(original, text, 2))
            else:
                hook = self._asking(plain, text, 1)
                hooks[id(plain)] = plain, hook
                process.change(owner, name, hook)
        for space in namespaces(model):
            for alias in [name for name, value in space.items() if id(value) in hooks]:
                plain, hook = hooks[id(space[alias])]
                process.change(space, alias, hook)
        made = {one for cls in map(type, model.modules()) for f in functions(cls).values() for one in functions_in(f)}
        for cell in [cell for function in made for cell in function.__closure__ or () if is_full(cell)]:
            if id(cell.cell_contents) in hooks:
                plain, hook = hooks[id(cell.cell_contents)]
                process.change(cell, "cell_contents", hook)

    def _asking(self, plain: Callable[..., Any], text: str, depth: int) -> Callable[..., Any]:
        """A function that answers as another does, and notes it."""

        def asked(*args: Any, **kwargs: Any) -> Any:
            told = plain(*args, **kwargs)
            frame = sys._getframe(depth)
            if threading.get_ident() != self.thread or _torchs(frame):
                return told
            given = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])
            return self.note(None, "", f"{text}({given})", told, frame)

        return asked

    def _environment(self, environment: Any) -> Callable[[Any, str], str]:
        plain: Callable[[Any, str], str] = type(environment).__getitem__

        def get(variables: Any, key: str) -> str:
            frame = _outside(sys._getframe(1), ("os", "collections.abc", "_collections_abc"))
            noted = variables is environment and threading.get_ident() == self.thread
            told: str | None = None
            try:
                told = plain(variables, key)
                return told
            finally:
                if noted and frame is not None and not _torchs(frame):
                    self.note(None, "", f"os.environ.get({key!r})", told, frame, counts=False)

        return get


def is_full(cell: CellType) -> bool:
    """Whether a closure's cell has a value: the name may have none yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _outside(frame: FrameType | None, also: tuple[str, ...] = ()) -> FrameType | None:
    """The frame that asks; None if that is the engine."""
    while frame is not None and also and frame.f_globals.get("__name__") in also:
        frame = frame.f_back
    return None if frame is None or _ours(frame) else frame


def _watch(
    cls: type, get: Callable[[Any, str], Any], note: Callable[[Any, str, Callable[[Any, str], Any]], Any]
) -> None:
    """Look up attributes of instances of a class through a function."""

    def __getattribute__(self: Any, name: str) -> Any:
        return note(self, name, get)

    process.change(cls, "__getattribute__", __getattribute__)


_CLOCKS = ("time", "perf_counter", "monotonic", "process_time", "thread_time")
_UNSTABLE = {"os.urandom", *(f"time.{name}{unit}" for name in _CLOCKS for unit in ("", "_ns"))}


def _is_date(value: Any) -> bool:
    """Whether a value is a function that tells the date."""
    of = getattr(value, "__self__", None)
    return isinstance(of, type) and issubclass(of, date) and value.__name__ in ("now", "utcnow", "today")


def _questions() -> Iterator[tuple[Any, str, Any, str]]:
    """What can be asked of how a forward is run: who answers, under which name, with what, and as which text."""
    of_torch = {
        "torch.jit": ("is_tracing", "is_scripting"),
        "torch.onnx": ("is_in_onnx_export",),
        "torch.compiler": ("is_compiling", "is_exporting", "is_dynamo_compiling"),
        "torch.cuda": ("is_available",),
        "torch": (
            *("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled"),
            *("get_default_dtype", "get_default_device", "get_autocast_dtype", "get_autocast_gpu_dtype"),
        ),
    }
    for home, names in of_torch.items():
        for name in names:
            owner = sys.modules.get(home)
            if owner is not None and (plain := getattr(owner, name, None)) is not None:
                yield owner, name, plain, f"{home}.{name}"
    for text in _UNSTABLE:
        home, _, name = text.partition(".")
        yield sys.modules[home], name, getattr(sys.modules[home], name), text
    yield random, "_urandom", os.urandom, "os.urandom"  # by which `secrets` and `random.SystemRandom` draw


# --- what code does next with a value ---------------------------------------------------------------------------------


@functools.lru_cache(4096)
def _instructions(code: CodeType) -> tuple[tuple[dis.Instruction, ...], dict[int, int]]:
    found = tuple(one for one in dis.get_instructions(code) if one.opname != "CACHE")
    return found, {one.offset: place for place, one in enumerate(found)}


def onward(code: CodeType, at: int, value: Any) -> tuple[str, Any]:
    """The entry of a container that code asks for next, if its key is a constant, as text behind the container's, and
    its value; "" and the container itself otherwise."""
    instructions, places = _instructions(code)
    return _onward(instructions, places[at] + 1 if at in places else len(instructions), value)[:2]


def _onward(instructions: tuple[dis.Instruction, ...], place: int, value: Any) -> tuple[str, Any, int]:
    text = ""
    while isinstance(value, (*_CONTAINERS, SimpleNamespace)) and not isinstance(value, (set, frozenset)):
        ahead = instructions[place : place + 5]
        if not ahead:
            break
        try:
            if _is_constant(ahead[0]) and len(ahead) > 1 and _is_subscript(ahead[1]):
                key = ahead[0].argval
                text, value, place = f"{text}[{key!r}]", operator.getitem(value, key), place + 2
            elif ahead[0].opname == "LOAD_ATTR" and isinstance(value, SimpleNamespace):
                text, value, place = f"{text}.{ahead[0].argval}", getattr(value, ahead[0].argval), place + 1
            elif ahead[0].opname in ("LOAD_METHOD", "LOAD_ATTR") and ahead[0].argval == "get":
                keys = []
                for one in ahead[1:3]:
                    if not _is_constant(one):
                        break
                    keys.append(one.argval)
                after = instructions[place + 1 + len(keys) : place + 3 + len(keys)]
                called = bool(keys) and any(one.opname == "CALL" for one in after)
                if not called or not isinstance(value, Mapping):
                    break
                place += 1 + len(keys) + next(i for i, one in enumerate(after) if one.opname == "CALL") + 1
                text, value = f"{text}.get({', '.join(map(repr, keys))})", value.get(*keys)
            else:
                break
        except (KeyError, IndexError, TypeError, AttributeError):
            break
    return text, value, place


def _is_constant(one: dis.Instruction) -> bool:
    return one.opname in ("LOAD_CONST", "LOAD_SMALL_INT") and isinstance(one.argval, (str, int, float, tuple))


def _is_subscript(one: dis.Instruction) -> bool:
    return one.opname == "BINARY_SUBSCR" or (one.opname == "BINARY_OP" and one.argrepr == "[]")


# --- names and cells --------------------------------------------------------------------------------------------------


def namespace_reads(functions: Iterable[tuple[CodeType, dict[str, Any], FunctionType | None]]) -> Iterator[Read]:
    """Plain values that code asks its namespace and its cells for, in functions that it calls by name too."""
    pending, seen = list(functions), set[CodeType]()
    while pending:
        code, space, function = pending.pop()
        if code in seen or str(space.get("__name__", "")).partition(".")[0] in ("torch", "structrep"):
            continue
        seen.add(code)
        pending += [(one, space, None) for one in code.co_consts if isinstance(one, CodeType)]
        for text, value, holder in _asked_by(code, space, function):
            if isinstance(value, FunctionType) and written_in(value).partition(".")[0] not in ("torch", "structrep"):
                pending.append((value.__code__, value.__globals__, value))
            if _is_date(value):
                yield Read(holder, f"{text}()", value, counts=False)
            elif isinstance(value, (ModuleType, nn.Module, Tensor, fx.Proxy, MethodType)) or callable(value):
                name = text.rpartition(".")[2]
                renamed = callable(value) and getattr(value, "__name__", name) != name
                if renamed and not isinstance(value, nn.Module) and not isinstance(holder, FunctionType):
                    yield Read(holder, text, value, counts=False)
            else:
                yield Read(holder, text, value, counts=False)


_STEADY = {"torch", "math", "numpy", "builtins", "typing", "collections", "functools", "operator", "os", "sys",
           "structrep", "enum", "itertools", "warnings", "logging"}  # fmt: skip


def _asked_by(code: CodeType, space: dict[str, Any], function: FunctionType | None) -> Iterator[tuple[str, Any, Any]]:
    """The names that code asks for, with what it asks of them next, their values, and where they are."""
    instructions, _ = _instructions(code)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=False)) if function is not None else {}
    for place, one in enumerate(instructions):
        holder: Any
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME") and one.argval in space:
            holder, value = space, space[one.argval]
        elif one.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF") and one.argval in cells:
            try:
                holder, value = function, cells[one.argval].cell_contents
            except ValueError:
                continue
        else:
            continue
        text, ahead, steady = str(one.argval), place + 1, False
        while ahead < len(instructions):
            further, value, ahead = _onward(instructions, ahead, value)
            text += further
            name = instructions[ahead].argval if ahead < len(instructions) else None
            attribute = ahead < len(instructions) and instructions[ahead].opname in ("LOAD_ATTR", "LOAD_METHOD")
            steady |= isinstance(value, ModuleType) and value.__name__.partition(".")[0] in _STEADY
            asks = isinstance(value, (ModuleType, type)) or is_object(value)
            if not attribute or not asks or not isinstance(name, str) or isinstance(value, nn.Module):
                break
            try:
                value = getattr(value, name)
            except AttributeError:
                break
            text, ahead = f"{text}.{name}", ahead + 1
        if not steady:
            yield text, value, holder
