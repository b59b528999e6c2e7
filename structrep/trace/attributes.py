"""What code looks up in modules, and in objects that modules hold, as a trace runs."""

from __future__ import annotations

import dis
import functools
import keyword
import sys
import threading
from collections.abc import Callable, Mapping, Set
from types import FrameType, FunctionType, MethodType
from typing import Any

from torch import Tensor, fx, nn

from structrep import process
from structrep.deployed.contents import described
from structrep.graph.reads import MISSING, PLACEHOLDER
from structrep.modules.objects import CONTAINERS, OF_MODULES, STORES, is_object
from structrep.modules.source import written_in
from structrep.trace.class_reads import is_type
from structrep.trace.frames import is_engine, is_library
from structrep.trace.instructions import has_settings, instructions_of, is_constant, onward
from structrep.trace.introspection import WALKS, Introspections
from structrep.trace.reads import Reads

_METHODS = {name: value for name, value in vars(nn.Module).items() if not name.startswith("__")}
_OF_CLASS = ("__class__", "__dict__")
# what its own code asks for at every turn
_OF_TORCH = (OF_MODULES | {"forward", *(name for name in dir(nn.Module) if name[0] == "_")}) - {
    "_get_name",
    *_OF_CLASS,
    *STORES,
}
_PARTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # torch's own containers of parts


class Attributes:
    """Watches lookups of plain attributes, of entries behind them, and of parts; notes each as a read.

    Args:
        reads: of the trace.
        parts: are told of lookups of parts too.
        hooks: functions by id, each with itself and what is found in its place (`Environment.hooks`).
    """

    def __init__(
        self, reads: Reads, parts: Introspections, hooks: Mapping[int, tuple[Any, Callable[..., Any]]]
    ) -> None:
        self.reads, self.parts, self.hooks = reads, parts, hooks
        self.current, self.paths = reads.current, parts.paths
        self.routes: dict[int, tuple[Any, nn.Module, str]] = {}  # of objects, by id: themselves, who holds them, how
        self.thread = threading.get_ident()
        self.patched: set[type] = set()

    def watch(self, model: nn.Module) -> None:
        """Note lookups in a model's modules as long as the process is ours."""
        # Only classes of the model's: to change nn.Module itself makes Python look at all classes there are.
        plain = {cls: cls.__getattribute__ for cls in {type(module) for module in model.modules()}}
        for cls, get in plain.items():
            library = written_in(cls)
            if not library.startswith("torch."):
                _watch(cls, get, self._of_module)
            elif library.startswith("torch.nn."):
                _watch(cls, get, self._of_layer, _OF_TORCH)
        for cls in [one for one in _PARTS if any(issubclass(own, one) for own in plain)]:
            self._watch_parts(cls)

    def _of_layer(self, module: nn.Module, name: str, get: Callable[[Any, str], Any]) -> Any:
        """An attribute of a module of torch's own."""
        return get(module, name) if is_library(sys._getframe(2)) else self._of_module(module, name, get, 3)

    def _of_module(self, module: nn.Module, name: str, get: Callable[[Any, str], Any], depth: int = 2) -> Any:
        frame = sys._getframe(depth)
        users = not is_library(frame) and threading.get_ident() == self.thread
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
        before = self.reads.noted
        try:
            value = get(module, name)
        except AttributeError:
            held = (module._parameters, module._buffers, module._modules)
            if any(name in one for one in held):
                if module._parameters.get(name, module) is None or module._buffers.get(name, module) is None:
                    self._of_part(module, f".{name}", None, frame)
                elif module._modules.get(name) is not None:
                    self._looked_at(module, name, frame)
                elif users and _asks_for_none(frame):
                    self._of_part(module, f"({_part(name)} is None)", False, frame)
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
        if isinstance(value, (nn.Module, Tensor, fx.Proxy)) or self.reads.noted > before:
            return value  # a property's parts were noted
        path = self.paths.get(id(module))
        if path is None or self.current() is None or is_engine(frame):
            return value
        if isinstance(value, MethodType) and (name not in module.__dict__ or is_library(frame)):
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
        if name == "__dict__" and ahead[1:] and ahead[1].opname == "CONTAINS_OP" and is_constant(key):
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
        if self.current() is None or is_library(frame):
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
        before, frame = self.reads.noted, sys._getframe(2)
        try:
            value = get(held, name)
        except AttributeError:
            if self.current() is not None and not is_engine(frame):
                self.reads.note(route[1], self.paths[id(route[1])], f"{route[2]}.{name}", MISSING, frame)
            raise
        if isinstance(value, (nn.Module, Tensor, fx.Proxy, MethodType)) or self.reads.noted > before:
            return value
        if self.current() is None or is_engine(frame):
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
        again = self.reads.note(module, path, text + further, told, frame, counts=not further, deep=deep)
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

    def is_instance(self, module: nn.Module, classes: Any, frame: FrameType) -> None:
        """Note of which classes a part of the model is, or is not."""
        for cls in classes if isinstance(classes, tuple) else (classes,):
            if isinstance(cls, tuple):
                self.is_instance(module, cls, frame)
            elif isinstance(cls, type):
                told = isinstance(module, cls)
                self.parts.is_instance(module, cls, told, frame)
                self._of_part(module, f"structrep_is({PLACEHOLDER}, {described(cls)!r})", told, frame)

    def _of_part(self, module: nn.Module, text: str, told: Any, frame: FrameType) -> None:
        path = self.paths.get(id(module))
        if path is not None and self.current() is not None and not is_engine(frame):
            self.reads.note(module, path, text, told, frame, counts=False)


@functools.lru_cache(4096)
def _part(name: str) -> str:
    """How a part is asked for; those of a Sequential have numbers for names."""
    plain = name.isidentifier() and not keyword.iskeyword(name)
    return f"{PLACEHOLDER}.{name}" if plain else f"getattr({PLACEHOLDER}, {name!r})"


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


def _calls(one: dis.Instruction) -> bool:
    """Whether an attribute is looked up to be called."""
    return one.opname == "LOAD_METHOD" or (one.opname == "LOAD_ATTR" and sys.version_info >= (3, 12) and one.arg & 1)


def _asks_for_none(frame: FrameType) -> bool:
    """Whether code compares what it looks up to None."""
    instructions, places = instructions_of(frame.f_code)
    place = places.get(frame.f_lasti, len(instructions))
    ahead = instructions[place + 1 : place + 3]
    compared = [one.opname for one in ahead[1:]] == ["IS_OP"] and ahead[0].argval is None
    return compared or bool(ahead and ahead[0].opname.endswith(("IF_NONE", "IF_NOT_NONE")))
