"""Modules whose methods were written by structrep: instances of generated subclasses of their own classes.

A generated class pickles as its base class and the text of its methods, so that what holds such a module can be copied,
saved and loaded. The text is registered with `linecache`: tracebacks and `inspect.getsource` find it.
"""

from __future__ import annotations

import hashlib
import importlib
import linecache
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from structrep.deployed.edited import EditedMethod
from structrep.modules.source import written_in
from structrep.process import Tracer


@dataclass(frozen=True)
class Method:
    """A method as text, with the names that the text uses: functions and numbers by value, modules by name."""

    name: str
    source: str
    names: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, name: str, source: str, names: dict[str, Any]) -> Method:
        plain = {k: ("module", v.__name__) if isinstance(v, ModuleType) else v for k, v in names.items()}
        return cls(name, source, tuple(sorted(plain.items(), key=lambda item: item[0])))

    def compile(self, filename: str, base: type | None = None) -> Any:
        namespace = {
            key: importlib.import_module(value[1]) if isinstance(value, tuple) and value[:1] == ("module",) else value
            for key, value in self.names
        }
        exec(compile(self.source, filename, "exec"), namespace)
        linecache.cache[filename] = (len(self.source), None, self.source.splitlines(keepends=True), filename)
        return namespace[self.name]


_CLASSES: dict[tuple[type[nn.Module], tuple[Method | EditedMethod, ...]], type[nn.Module]] = {}


def install(module: nn.Module, method: Method | EditedMethod) -> None:
    """Give a module a method, by making it an instance of a generated subclass of its own class."""
    module.__dict__.pop(method.name, None)
    base = getattr(type(module), "__structrep_base__", type(module))
    earlier = getattr(type(module), "__structrep_methods__", ())
    module.__class__ = generated_class(base, (*(m for m in earlier if m.name != method.name), method))


def generated_class(base: type[nn.Module], methods: tuple[Method | EditedMethod, ...]) -> type[nn.Module]:
    """The subclass of `base` with those methods; the same one for the same text."""
    key = (base, methods)
    if key not in _CLASSES:

        def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
            state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
            return rebuild, key, state

        digest = hashlib.sha256("".join(m.source for m in methods).encode()).hexdigest()[:12]
        body = {m.name: m.compile(f"<reparameterized {base.__qualname__}.{m.name} {digest}>", base) for m in methods}
        made = type(
            base.__name__,
            (base,),
            {
                **body,
                "__reduce_ex__": __reduce_ex__,
                "__module__": written_in(base),
                "__qualname__": base.__qualname__,
                "__doc__": base.__doc__,
                "__structrep_base__": base,
                "__structrep_methods__": methods,
            },
        )
        _CLASSES.setdefault(key, made)  # another thread may have been faster
    return _CLASSES[key]


class Whole(Tracer):
    """Calls of modules and of torch's functions are nodes: torch 2.6 wants numbers itself where a graph has them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def arguments_of(self, root_fn: Any, is_module: bool, concrete_args: Any) -> tuple[Any, list[Any]]:
        spaces = {name: self.noted(value) for name, value in root_fn.__globals__.items()}
        run = FunctionType(root_fn.__code__, spaces, root_fn.__name__, root_fn.__defaults__, root_fn.__closure__)
        run.__kwdefaults__, run.__annotations__ = root_fn.__kwdefaults__, root_fn.__annotations__
        return super().arguments_of(run, is_module, concrete_args)

    def noted(self, value: Any) -> Any:
        """A function of torch's, or a module of such, whose calls are noted without being looked at."""
        if isinstance(value, ModuleType):
            return _Space(self, value)
        if not isinstance(value, BuiltinFunctionType) or not str(value.__module__).startswith("torch"):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            known = not any(isinstance(one, fx.Proxy) for one in pytree.tree_leaves((args, kwargs)))
            return value(*args, **kwargs) if known else self.create_proxy("call_function", value, args, kwargs)

        return call


class _Space:
    """A module as a tracer sees it."""

    def __init__(self, tracer: Whole, module: ModuleType) -> None:
        self._tracer, self._module = tracer, module

    def __getattr__(self, name: str) -> Any:
        return self._tracer.noted(getattr(self._module, name))


def regraph(module: fx.GraphModule) -> None:
    """Give a graph module whose forward was written anew the graph of it, and its own class back."""
    graph = Whole().trace(module)
    module.__class__ = type(module).__structrep_base__  # type: ignore[attr-defined]
    module.graph = graph


def rebuild(base: type[nn.Module], methods: tuple[Method | EditedMethod, ...]) -> nn.Module:
    """An empty instance of a generated class, for pickle and copy."""
    cls = generated_class(base, methods)
    return cls.__new__(cls)
