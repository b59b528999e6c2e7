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
import keyword
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Set
from types import FrameType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from structrep import process
from structrep.deployed.answers import described
from structrep.graph.reads import MISSING, PLACEHOLDER, UNSTABLE, Read
from structrep.graph.structures import proxies
from structrep.modules.objects import CONTAINERS, HOLDERS, OF_MODULES, is_object
from structrep.modules.source import functions, functions_in, is_full, written_in
from structrep.trace.asked import STORES, WALKS, Asked
from structrep.trace.class_reads import is_type
from structrep.trace.instructions import _is_constant, has_settings, instructions_of, onward
from structrep.trace.patches import exchange, namespaces

_METHODS = {name: value for name, value in vars(nn.Module).items() if not name.startswith("__")}
_BETWEEN = (
    "structrep.trace.",
    "structrep.deployed.",
    "structrep.rewrite.guards",
    "structrep.graph.structures",
    "torch._tensor",
    "torch.overrides",
)
_OF_CLASS = ("__class__", "__dict__")
# what its own code asks for at every turn
_OF_TORCH = (OF_MODULES | {"forward", *(name for name in dir(nn.Module) if name[0] == "_")}) - {
    "_get_name",
    *_OF_CLASS,
    *STORES,
}
_PARTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # torch's own containers of parts
INPUTS = "", "the dtype of inputs"  # what is answered for the dtype of inputs


def _ours(frame: FrameType) -> bool:
    """Whether a frame is the engine's own; modules that come along are models like others."""
    return _of_engine(frame.f_globals.get("__name__"))


def _torchs(frame: FrameType) -> bool:
    return _of_library(frame.f_globals.get("__name__"))


@functools.lru_cache(4096)  # asked at every attribute
def _of_library(name: Any) -> bool:
    return str(name).partition(".")[0] == "torch" or _of_engine(name)


@functools.lru_cache(4096)
def _part(name: str) -> str:
    """How a part is asked for; those of a Sequential have numbers for names."""
    plain = name.isidentifier() and not keyword.iskeyword(name)
    return f"{PLACEHOLDER}.{name}" if plain else f"getattr({PLACEHOLDER}, {name!r})"


def _of_engine(name: Any) -> bool:
    return str(name).startswith("structrep.") and not str(name).startswith(("structrep.blocks", "structrep.deployed"))


_get_tracing_state = torch._C._get_tracing_state
_PLAIN_TENSORS = (None, Tensor.__torch_function__, nn.Parameter.__torch_function__)


class Questions:
    """Watches a trace.

    Args:
        current: the call that runs.
        answers: what is answered otherwise than it is, by `key`.
        reach: is told of tensors that code gets by a walk.
    """

    def __init__(
        self,
        paths: Mapping[nn.Module, str],
        current: Callable[[], Any],
        answers: Mapping[tuple[str, str], Any] | None,
        reach: Callable[[str, Any], None],
    ) -> None:
        self.paths = {id(module): path for module, path in paths.items()}  # whose hash may ask them for attributes
        self.current = current
        self.parts = Asked(self.paths, current, reach)
        self.answers = dict(answers or {})
        self.asked = 0
        self.routes: dict[int, tuple[Any, nn.Module, str]] = {}  # of objects, by id: themselves, who holds them, how
        self.thread = threading.get_ident()
        self.patched: set[type] = set()
        self.hooks: dict[int, tuple[Any, Any]] = {}  # of questions written in C, which may be known by any name

    def watch(self, model: nn.Module) -> None:
        """Note what is asked for as long as the process is ours."""
        # Only classes of the model's: to change nn.Module itself makes Python look at all classes there are.
        plain = {cls: cls.__getattribute__ for cls in {type(module) for module in model.modules()}}
        for cls, get in plain.items():
            library = written_in(cls)
            if not library.startswith("torch."):
                _watch(cls, get, self._of_module)
            elif library.startswith("torch.nn."):
                _watch(cls, get, self._of_layer, _OF_TORCH)
        for cls in [one for one in _PARTS if any(issubclass(kind, one) for kind in plain)]:
            self._watch_parts(cls)
        self._watch_questions(model)
        process.change(type(os.environ), "__getitem__", _environment(self, os.environ))

    def note(
        self, holder: Any, path: str, text: str, told: Any, frame: FrameType, counts: bool = True, deep: int = 0
    ) -> Any:
        """Note a question of the call that runs; returns what it is told."""
        call = self.current()
        if call is None:
            return told
        self.asked += 1
        call.codes[frame.f_code] = frame.f_globals
        if frame.f_code is not call.bytecode:  # a function that it calls
            for proxy in proxies([one for one in frame.f_locals.values() if isinstance(one, HOLDERS)]):
                call.held.setdefault(proxy.node, set()).add(frame.f_code)
        key = (path, text)
        read = call.reads.setdefault(key, Read(holder, text, told, counts))
        read.places.append((frame.f_code, frame.f_lasti, deep))
        return self.answers.get(key, told) if counts else told

    def ask(self, holder: Any, path: str, text: str, told: Any, counts: bool = True) -> Any:
        """A question about a tensor of the model: its dtype, where it is, what its numbers are."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and str(frame.f_globals.get("__name__")).startswith(_BETWEEN):
            frame = frame.f_back
        return told if frame is None or _torchs(frame) else self.note(holder, path, text, told, frame, counts)

    # --- attributes -------------------------------------------------------------------------------------------------

    def _of_layer(self, module: nn.Module, name: str, get: Callable[[Any, str], Any]) -> Any:
        """An attribute of a module of torch's own."""
        return get(module, name) if _torchs(sys._getframe(2)) else self._of_module(module, name, get, 3)

    def _of_module(self, module: nn.Module, name: str, get: Callable[[Any, str], Any], depth: int = 2) -> Any:
        frame = sys._getframe(depth)
        users = not _torchs(frame) and threading.get_ident() == self.thread
        if name in _OF_CLASS and users:
            self._of_class(module, name, frame)
        elif name in STORES and users:
            self.parts.store(module, name, frame)
        if name in OF_MODULES or name.startswith("__") or threading.get_ident() != self.thread:
            return get(module, name)
        torchs = _is_torchs(module, name)
        if torchs and name in WALKS and users:
            return self.parts.walk(module, name, get(module, name), frame)
        if users:
            self.parts.attribute(module, name, frame)
        if torchs:
            return get(module, name)
        before = self.asked
        try:
            value = get(module, name)
        except AttributeError:
            held = (module._parameters, module._buffers, module._modules)
            if any(name in one for one in held):
                if module._parameters.get(name, module) is None or module._buffers.get(name, module) is None:
                    self._of_part(module, f".{name}", None, frame)
                elif module._modules.get(name) is not None:
                    self._looked_at(module, name, frame)
                raise
            try:
                value = _instead(module, name)
            except AttributeError:
                if users:
                    self._of_part(module, f".{name}", MISSING, frame)
                raise
        if id(value) in self.hooks:
            return self.hooks[id(value)][1]
        if isinstance(value, nn.Module) and users:
            self.parts.part(value, (), frame)
        if isinstance(value, (nn.Module, Tensor, fx.Proxy)) or self.asked > before:
            return value  # a property's parts were noted
        path = self.paths.get(id(module))
        if path is None or self.current() is None or _outside(frame) is None:
            return value
        if isinstance(value, MethodType) and (name not in module.__dict__ or _torchs(frame)):
            return value
        if isinstance(value, functools.partial) and getattr(value.func, "__name__", "") == "_call_method":
            return value
        if isinstance(value, FunctionType) and name not in module.__dict__:
            return value  # a static method
        return self._told(module, path, f".{name}", value, frame)

    def _of_class(self, module: nn.Module, name: str, frame: FrameType) -> None:
        """Note what code asks a module's class, or all its attributes at once, for."""
        if self.current() is None or frame.f_code.co_name.startswith("__"):
            return
        instructions, places = instructions_of(frame.f_code)
        place = places.get(frame.f_lasti, len(instructions))
        ahead, key = instructions[place:][:2], instructions[max(place - 2, 0)]
        if name == "__dict__" and ahead[1:] and ahead[1].opname == "CONTAINS_OP" and _is_constant(key):
            self._of_part(module, f"({key.argval!r} in {PLACEHOLDER}.__dict__)", key.argval in vars(module), frame)
        elif name == "__dict__":
            self.parts.attribute(module, name, frame)
            further, told = onward(frame.f_code, frame.f_lasti, vars(module))
            held = isinstance(told, (nn.Module, Tensor, fx.Proxy)) or callable(told)
            if not held:
                self._of_part(module, f".__dict__{further}", told if further else None, frame)
        elif ahead and ahead[0].argval == "__class__":
            self.parts.attribute(module, name, frame)
            further = ahead[1].argval if len(ahead) > 1 and ahead[1].opname == "LOAD_ATTR" else ""
            self._ask_class(module, further, frame)

    def _ask_class(self, module: nn.Module, name: str, frame: FrameType) -> None:
        told = getattr(type(module), name, MISSING) if name else type(module)
        if told is not MISSING and not isinstance(told, (FunctionType, property)):
            self._of_part(module, f"type({PLACEHOLDER})" + (f".{name}" if name else ""), told, frame)

    def _looked_at(self, module: nn.Module, name: str, frame: FrameType) -> None:
        """Note whether there is a part, or of which class it is, where code looks at it instead of calling it."""
        if self.current() is None or _torchs(frame):
            return
        self.parts.part(module, (name,), frame)
        instructions, places = instructions_of(frame.f_code)
        place = places.get(frame.f_lasti)
        if place is None:
            return
        ahead = [one.opname for one in instructions[place + 1 : place + 3]]
        asks_type = ahead[:1] in (["PRECALL"], ["CALL"]) and instructions[place + 1].argval == 1
        if asks_type and any(is_type(one) for one in instructions[max(place - 4, 0) : place]):
            self._of_part(module, f"type({_part(name)})", type(module._modules[name]), frame)
        elif not _calls(instructions[place]) and ahead[:1] not in (["LOAD_ATTR"], ["LOAD_METHOD"], ["GET_ITER"]):
            self._of_part(module, f"({_part(name)} is None)", False, frame)

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
        if isinstance(value, CONTAINERS) or has_settings(value):
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

    # --- parts ------------------------------------------------------------------------------------------------------

    def _watch_parts(self, cls: type) -> None:
        """Note how many parts a container has, and which names, where code counts them or goes through them."""
        size: Callable[[Any], int] = vars(cls)["__len__"]
        names = issubclass(cls, nn.ModuleDict)

        def watched(plain: Callable[..., Any], name: str) -> Callable[..., Any]:
            def asked(held: nn.Module, *args: Any) -> Any:
                told = plain(held, *args)
                if name == "__contains__":
                    self._of_part(held, f"({args[0]!r} in {PLACEHOLDER})", told, sys._getframe(2))
                elif names and name != "__len__":
                    self._of_part(held, f"list({PLACEHOLDER})", list(held._modules), sys._getframe(2))
                else:
                    self._of_part(held, f"len({PLACEHOLDER})", size(held), sys._getframe(2))
                return told

            return process.here(asked, plain)

        for name in ("__len__", "__iter__", "keys", "items", "values", *(("__contains__",) if names else ())):
            if name in vars(cls):
                process.change(cls, name, watched(vars(cls)[name], name))

    def is_instance(self, module: nn.Module, kinds: Any, frame: FrameType) -> None:
        """Note of which classes a part of the model is, or is not."""
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            if isinstance(kind, tuple):
                self.is_instance(module, kind, frame)
            elif isinstance(kind, type):
                told = isinstance(module, kind)
                self.parts.kind(module, kind, told, frame)
                self._of_part(module, f"structrep_is({PLACEHOLDER}, {described(kind)!r})", told, frame)

    def _of_part(self, module: nn.Module, text: str, told: Any, frame: FrameType) -> None:
        path = self.paths.get(id(module))
        if path is not None and self.current() is not None and not _ours(frame):
            self.note(module, path, text, told, frame, counts=False)

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
        process.change(torch._C, "_get_tracing_state", _watched_tracing(self))
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

    def _as_for_real(self, plain: Callable[..., bool], depth: int) -> Callable[..., bool]:
        """A function that tells code of the model's, where traced values are tensors to it, that nothing traces."""

        def asked(*args: Any) -> bool:
            if threading.get_ident() != self.thread or _torchs(sys._getframe(depth)):
                return plain(*args)
            given = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
            own = (type(one) for one in given if not isinstance(one, fx.Proxy))
            return any(getattr(kind, "__torch_function__", None) not in _PLAIN_TENSORS for kind in own)

        return asked


def _environment(questions: Questions, environment: Any) -> Callable[[Any, str], str]:
    """What `os.environ` is asked for, noted where the user's code asks it."""
    plain: Callable[[Any, str], str] = type(environment).__getitem__

    def get(variables: Any, key: str) -> str:
        frame = _outside(sys._getframe(1), ("os", "collections.abc", "_collections_abc"))
        noted = variables is environment and threading.get_ident() == questions.thread
        told: str | None = None
        try:
            told = plain(variables, key)
            return told
        finally:
            if noted and frame is not None and not _torchs(frame):
                questions.note(None, "", f"os.environ.get({key!r})", told, frame, counts=False)

    return get


def _is_torchs(module: nn.Module, name: str) -> bool:
    """Whether an attribute is a method that torch gives to all modules."""
    inherited = name in _METHODS and getattr(type(module), name, None) is _METHODS[name]
    return inherited and name not in object.__getattribute__(module, "__dict__")


def _instead(module: nn.Module, name: str) -> Any:
    """What a class's own `__getattr__` has for an attribute that there is none of."""
    own = next((base for base in type(module).__mro__ if "__getattr__" in vars(base)), nn.Module)
    if own is nn.Module:
        raise AttributeError(name)
    return vars(own)["__getattr__"](module, name)


def _watched_tracing(questions: Questions) -> Callable[[], Any]:
    """What torch's own `is_tracing` asks, noted where somebody else asks it."""

    def asked() -> Any:
        state, frame = _get_tracing_state(), sys._getframe(1)
        if threading.get_ident() != questions.thread or _torchs(frame):
            return state
        told = questions.note(None, "", "torch._C._get_tracing_state() is not None", state is not None, frame)
        return state if told is (state is not None) else object() if told else None

    return asked


def _outside(frame: FrameType | None, also: tuple[str, ...] = ()) -> FrameType | None:
    """The frame that asks; None if that is the engine."""
    while frame is not None and also and frame.f_globals.get("__name__") in also:
        frame = frame.f_back
    return None if frame is None or _ours(frame) else frame


def _watch(
    cls: type,
    get: Callable[[Any, str], Any],
    note: Callable[[Any, str, Callable[[Any, str], Any]], Any],
    spared: Set[str] = frozenset(),
) -> None:
    """Look up attributes of instances of a class through a function, but for some."""

    def __getattribute__(self: Any, name: str) -> Any:
        return get(self, name) if name in spared else note(self, name, get)

    process.change(cls, "__getattribute__", __getattribute__)


WHOLE = ".__dict__"  # all that a module has, of which no guard could say that it is the same


def _questions() -> Iterator[tuple[Any, str, Any, str]]:
    """What can be asked of how a forward is run: who answers, under which name, with what, and as which text."""
    of_torch = {
        "torch.jit": ("is_tracing", "is_scripting"),
        "torch.onnx": ("is_in_onnx_export",),
        "torch.compiler": ("is_compiling", "is_exporting", "is_dynamo_compiling"),
        "torch.cuda": ("is_available",),
        "torch": (
            *("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled"),
            *("are_deterministic_algorithms_enabled", "get_num_threads", "get_float32_matmul_precision"),
            *("get_default_dtype", "get_default_device", "get_autocast_dtype", "get_autocast_gpu_dtype"),
        ),
    }
    for home, names in of_torch.items():
        for name in names:
            owner = sys.modules.get(home)
            if owner is not None and (plain := getattr(owner, name, None)) is not None:
                yield owner, name, plain, f"{home}.{name}"
    for text in UNSTABLE:
        home, _, name = text.partition(".")
        yield sys.modules[home], name, getattr(sys.modules[home], name), text
    yield random, "_urandom", os.urandom, "os.urandom"  # by which `secrets` and `random.SystemRandom` draw


def _calls(one: dis.Instruction) -> bool:
    """Whether an attribute is looked up to be called."""
    return one.opname == "LOAD_METHOD" or (one.opname == "LOAD_ATTR" and sys.version_info >= (3, 12) and one.arg & 1)
