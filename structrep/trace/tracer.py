"""The tracer that records which call of which module made each node."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from structrep import process
from structrep.errors import BadInput, Unreadable, said
from structrep.graph import operations
from structrep.graph.calls import Call, Traced, storage
from structrep.graph.contexts import Context, Contexts
from structrep.graph.facts import (
    AT,
    AUTOCAST,
    CALL,
    COMPUTED,
    CONTEXTS,
    FORMULA,
    HELD,
    INDEX,
    KEPT,
    RECOMPUTE,
    STAND_IN,
    UNFOLLOWED,
    UNKNOWN,
    VALUE,
)
from structrep.graph.observed import Arguments, Given, Part, Thing
from structrep.graph.structures import alike, held, holds_still, is_torch, is_traced, mapped, proxies, snapshot
from structrep.modules import parametrized
from structrep.modules.arguments import Example, as_arguments
from structrep.modules.copies import is_compiled
from structrep.modules.positions import branches
from structrep.modules.source import written_first
from structrep.modules.states import Holdings
from structrep.read.endings import ends
from structrep.read.modules import generated, knows
from structrep.read.modules import settings as settings_of_modules
from structrep.terms.layer import Computed
from structrep.trace.aten import gives_more, in_torch
from structrep.trace.constants import Constants, chance, state_of
from structrep.trace.observing import Observer
from structrep.trace.patches import compiled_inlined, keep_scripted, keep_whole, show_tensors, take_traced_sizes
from structrep.trace.proxies import TracedValue
from structrep.trace.questions import Questions


class Root(nn.Module):
    """What torch.fx is given to trace, so that the module itself is called like any other."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> None: ...


class CallTracer(process.Tracer):
    def __init__(
        self,
        module: nn.Module,
        method: str,
        paths: dict[nn.Module, str],
        held: Traced,
        opaque: Set[type[nn.Module]],
        whole: Set[FunctionType],
        followed: Set[FunctionType],
        assumed: Set[type],
        answers: Mapping[tuple[str, str], Any] | None = None,
        contexts: tuple[Context, ...] = (),
    ) -> None:
        super().__init__()
        self.module = module
        self.method = method
        self.paths = paths
        self.opaque = opaque
        self.whole = whole
        self.hooked = {m for m in module.modules() if m is not module and parametrized.hooks(m)}
        self.calls: list[Call] = []
        self.called: set[nn.Module] = set()  # also those whose calls are constants
        self.stack: list[Call] = []
        self.stopped: Call | None = None
        self.refused: Exception | None = None  # the first question that had no answer
        self.constants = Constants(self)
        self.questions = Questions(paths, lambda: self.stack[-1] if self.stack else None, answers, self.getattr)
        self.contexts = Contexts(contexts)
        self.observer = Observer(self, followed, assumed)
        self.holdings: Holdings | None = None  # whose changes are noted
        self.state: tuple[Any, ...] = ()
        self.stored = {storage(p) for p in module.parameters() if p.numel()}
        self.reached: dict[str, set[Call]] = {}
        self.fetched: Counter[tuple[str, Call]] = Counter()  # how often a forward looked up what is not its own
        self.asked: Counter[tuple[str, Call]] = Counter()  # and asked it for no more than its dtype or device
        self.count = 0
        self.names, self.entries = held.names, held.entries
        self.tensor_nodes: dict[int, fx.Node] = {}

    def bind(self, example: Example | Arguments | None, flags: Mapping[str, Any]) -> list[Any]:
        """Decide what the forward is called with: placeholders for tensors, some flags, the defaults for the rest.

        Returns the tensors of the example, in the order of the placeholders.
        """
        signature = inspect.signature(getattr(self.module, self.method))
        if isinstance(example, Arguments):
            return self._bind_as_called(example, signature)
        if example is None:
            required = [
                p for p in signature.parameters.values()
                if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in flags
            ]  # fmt: skip
            first = next(iter(signature.parameters.values()), None)
            if not required and first is not None and first.default is None:
                required = [first]  # as in transformers, where all is optional and the first is the input
            by_name = any(name in flags and p.default is p.empty for name, p in signature.parameters.items())
            positional = tuple(Slot(p.name) for p in required if p.kind is not p.KEYWORD_ONLY and not by_name)
            if not positional and any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
                positional = (Slot("input"),)  # a wrapper that hands on what it is given
            named = {p.name: Slot(p.name) for p in required if p.kind is p.KEYWORD_ONLY or by_name}
            more = {name: Slot(name) if value is ... else value for name, value in flags.items()}
            self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = (positional, {**named, **more})
            return []
        args, kwargs = as_arguments(example)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise BadInput(f"the model's {self.method}{signature} does not take the example inputs: {error}") from error
        tensors: list[Tensor] = []

        def slot(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            tensors.append(leaf)
            return Slot(f"input_{len(tensors)}")

        self.arguments = pytree.tree_map(slot, (tuple(args), dict(kwargs)))
        return tensors

    def _bind_as_called(self, called: Arguments, signature: inspect.Signature) -> list[Given | Thing]:
        """Placeholders for tensors, numbers and objects, which may be others at the next call, and constants for the
        rest."""
        modules = {path: module for module, path in self.paths.items()}
        values: list[Given | Thing] = []

        def slot(leaf: Any) -> Any:
            if isinstance(leaf, Part):
                return modules[leaf.path]
            if not isinstance(leaf, (Given, Thing)):
                return leaf
            values.append(leaf)
            return Slot(f"input_{len(values)}", leaf)

        self.arguments = mapped(slot, called.bound(signature))
        return values

    # --- torch.fx's hooks --------------------------------------------------------------------------------------------

    def arguments_of(self, root_fn: Any, is_module: bool, concrete_args: Any) -> tuple[Any, list[Any]]:
        def placed(leaf: Any) -> Any:
            if not isinstance(leaf, Slot):
                return leaf
            proxy = self.create_proxy("placeholder", leaf.name, (), {})
            if isinstance(leaf.given, Thing):
                UNKNOWN.note(proxy.node, leaf.given.kind)
            elif leaf.given is not None and leaf.given.number is not None:
                STAND_IN.note(proxy.node, leaf.given.number)
            return proxy

        args, kwargs = mapped(placed, self.arguments)

        def enter() -> list[fx.Proxy]:
            function = getattr(self.module, self.method)
            if self.method in self.module.__dict__ and self.method != "forward":
                function = function.args[-1]  # the method itself, not what watches it
            run = functools.partial(self._run_root, function)
            return list(proxies(self._record(self.module, run, args, kwargs, False, self.method, function)))

        return enter, []

    def _run_root(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.method == "forward" and self.module._forward_pre_hooks:
            self._compute(self.module, parametrized.computed(self.module))
        return function(*args, **kwargs)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.observer.busy or m not in self.paths:  # held outside the module tree: a part of whoever calls it
            return forward(*args, **kwargs)
        if is_compiled(m):
            forward = m.get_submodule("_orig_mod")  # as if it were not: what is merged inside is compiled when it runs
        elif type(m).__call__ is not nn.Module.__call__ and self.stack:
            self.stopped = self.stack[-1]
            raise RuntimeError(f"{type(m).__name__} does more than its forward when it is called")
        leaf = bool(self.stack) and self.is_leaf_module(m, self.paths[m])
        if leaf and not is_traced((args, kwargs)):
            leaf = False  # it depends on constants alone
        function = (lambda *a, **k: self.create_proxy("call_module", self.paths[m], a, k)) if leaf else forward
        return self._record(m, function, args, kwargs, leaf, "forward", m.forward)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """All that has to be watched or changed while the trace runs."""
        with self.watched_methods(), process.alone(), parametrized.uncached(), compiled_inlined(), self.constants:
            take_traced_sizes(self.create_proxy)
            keep_whole(self.whole, self.create_proxy)
            keep_scripted(self.create_proxy)
            show_tensors(self.module, self.questions.is_instance)
            self.questions.watch(self.module)
            self.contexts.watch()
            yield

    @contextlib.contextmanager
    def watched_methods(self) -> Iterator[None]:
        """Record calls of methods too: forward_features and its like are then rewritten where they stand."""
        watched: list[tuple[nn.Module, str]] = []
        for module in self.module.modules():
            if module not in self.paths or self.is_leaf_module(module, ""):
                continue
            for base in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
                for name, function in vars(base).items():
                    plain = isinstance(function, FunctionType) and not name.startswith("__") and name != "forward"
                    if plain and name not in module.__dict__ and not hasattr(nn.Module, name):
                        module.__dict__[name] = functools.partial(
                            self._call_method, module, name, getattr(module, name)
                        )
                        watched.append((module, name))
        try:
            yield
        finally:
            for module, name in watched:
                module.__dict__.pop(name, None)

    def _call_method(self, m: nn.Module, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.stack or not is_traced((args, kwargs)):
            return function(*args, **kwargs)
        return self._record(m, function, args, kwargs, False, name, function)

    def _record(
        self, m: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any, leaf: bool, method: str, function: Any
    ) -> Any:
        parent = self.stack[-1] if self.stack else None
        self._note_changes(parent)
        call = Call(m, self.paths[m], parent, snapshot(args), snapshot(kwargs), leaf, method, function)
        call.settings = settings_of_modules(m) if leaf else {}
        call.at = self._place() if parent else None
        call.contexts = self.contexts.now
        if parent:
            parent.steps.append(call)
        self.calls.append(call)
        self.called.add(m)
        self.stack.append(call)
        attributes = {} if leaf else snapshot(m.__dict__)
        holders = [] if leaf else held((args, kwargs))
        drawn = None if leaf else chance()  # a leaf only makes a node
        try:
            result = run(*args, **kwargs)
            if isinstance(result, Iterator):
                raise RuntimeError("it gives an iterator, whose code runs later")
            if not leaf and chance() != drawn:
                raise RuntimeError("it draws new random numbers at every call")
        except Exception:
            self.stopped = self.stopped or call
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
            self._note_kept(call, attributes)
        own = {} if leaf else m.__dict__
        now = {key: value for key, value in own.items() if not self._settles(m, key, attributes.get(key), value)}
        before = {key: value for key, value in attributes.items() if key in now or key not in own}
        call.mutates |= not alike((call.args, call.kwargs, before), (args, kwargs, now))
        call.mutates |= not all(holds_still(one, held_before) for one, held_before in holders)
        if parent and dropped:
            parent.mutates |= call.mutates
        return result

    def _place(self) -> int | None:
        """The instruction at which the code of the call that runs stands; None if that has called other code of the
        user's that may go several ways."""
        code = self.stack[-1].bytecode
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code is code:
                return frame.f_lasti
            engine = str(frame.f_globals.get("__name__", "")).startswith(("torch.", "structrep."))
            if not engine and branches(frame.f_code):
                return None
            frame = frame.f_back
        return None

    def _settles(self, m: nn.Module, key: str, before: Any, value: Any) -> bool:
        """Whether an attribute was given what a call computes of the model's tensors alone, the same at every call."""
        if not isinstance(value, Tensor) or value is before:
            return False
        if key not in parametrized.computed(m) and not written_first(type(m), key):
            return False
        formula = self.constants.formula(value)
        return formula is not None and all(t is not before for t in formula.tensors)

    def _note_changes(self, call: Call | None) -> None:
        """Note whether a call has changed what an object holds, since the last call began or ended."""
        if self.holdings is not None:
            before, self.state = self.state, self.holdings.state()
            if call is not None and self.state != before:
                call.mutates = True

    def _note_kept(self, call: Call, before: dict[str, Any]) -> None:
        """Mark the traced values that a call has left in its module: they are looked at later."""
        kept = {key: value for key, value in call.module.__dict__.items() if before.get(key) is not value}
        for proxy in proxies(kept):
            if isinstance(proxy, TracedValue):
                KEPT.note(proxy.node, True)
                call.mutates = True

    def _computed(self, m: nn.Module) -> dict[str, Computed] | Unreadable:
        """What a layer that is read as a whole computes before every call; or why that is no constant."""
        names = parametrized.computed(m) if knows(m) or ends(m) else ()
        if not names:
            return {}
        stopped, refused = self.stopped, self.refused
        try:
            values = self._compute(m, names)
        except Exception as error:
            self.stopped, self.refused = stopped, refused
            which = f"{' and '.join(names)} of {self.paths[m] or 'the model'}"
            remedy = parametrized.removals(m, self.paths[m])
            remedy = remedy and f"; or {remedy}"
            return Unreadable(f"{which}, computed before every call, cannot be made a constant: {said(error)}{remedy}")
        return {name: self.constants.computed(value) for name, value in values.items()}

    def _compute(self, m: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
        """What a module computes before every call."""
        held, versions = state_of(m, names)
        values = parametrized.compute(m)
        now, written = state_of(m, names)
        if written != versions or not alike(held, now):
            mode = ", in training mode: call model.eval() first" if any(one.training for one in m.modules()) else ""
            raise RuntimeError(f"to compute it changes the layer{mode}")
        return values

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        library = is_torch(parametrized.own_class(m))
        return (
            type(m) in self.opaque
            or isinstance(m, torch.jit.ScriptModule)
            or m in self.hooked
            or knows(m)
            or (library and not isinstance(m, nn.Sequential) and not generated(m))
        )

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        """Called for every parameter, buffer and child that a forward looks up: notes who reaches into whom."""
        if isinstance(attr_val, fx.Proxy):
            return attr_val  # of a buffer that the forward has written to
        path = self.names.get(id(attr_val)) if isinstance(attr_val, Tensor) else self.paths.get(attr_val)
        tied = bool(self.stack) and self.stack[-1].module._parameters.get(attr) is attr_val  # also held elsewhere
        if path and self.stack and path.rpartition(".")[0] != self.stack[-1].path and not tied:
            self.reached.setdefault(path, set()).add(self.stack[-1])
            self.fetched[path, self.stack[-1]] += 1
        return attr_val

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return TracedValue(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Called for every condition on a traced value."""
        return self.observer.condition(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Called where a traced value is looped over or unpacked into a call."""
        count = self.observer.length(obj, "a loop over a value of which nothing tells how long it is")
        return (obj[index] for index in range(count))  # type: ignore[index]

    def refuse(self, error: Exception) -> Exception:
        """An error that stops the trace, also where the forward catches it."""
        if self.refused is None and self.stack:
            self.refused, self.stopped = error, self.stack[-1]
        return error

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *more: Any, **named: Any
    ) -> fx.Proxy:
        first = isinstance(target, OpOverload) and gives_more(target)
        if isinstance(target, OpOverload):
            kind, target, args, kwargs = in_torch(target, args, kwargs)
        if operations.moves(target):
            raise RuntimeError(f"{operations.name_of(target)} gives a value other memory")
        made = super().create_proxy(kind, target, args, kwargs, *more, **named)
        if operations.reshapes(target) and args and isinstance(args[0], fx.Proxy):
            args[0].node = made.node  # whoever else holds this value holds it in its new shape
        # of statistics behind it, exported programs in eval mode make no use
        return (made, None, None) if first and not isinstance(target, OpOverload) else made  # type: ignore[return-value]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        INDEX.note(node, self.count)
        CONTEXTS.note(node, self.contexts.now)
        AUTOCAST.note(node, torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))
        call = self.stack[-1] if self.stack else None
        CALL.note(node, call)
        AT.note(node, self._place() if call is not None and not call.leaf else None)
        UNFOLLOWED.note(
            node,
            node.target in self.whole
            or isinstance(node.target, torch.jit.ScriptFunction)
            or (
                node.op == "call_module"
                and call is not None
                and (
                    call.module in self.hooked
                    or isinstance(call.module, torch.jit.ScriptModule)
                    or (type(call.module) in self.opaque and not knows(call.module))
                )
            ),
        )
        self.count += 1
        for one in operations.writes(node) if not UNFOLLOWED.of(node) else ():
            if isinstance(VALUE.get(one), Tensor):
                self.constants.note_written(VALUE.of(one), operations.name_of(node.target))
        if node.op == "call_module" and call is not None:
            self.constants.note_assigned(node, call)
            COMPUTED.note(node, self._computed(call.module))
        if self.stack and node.op != "get_attr":
            self.stack[-1].steps.append(node)
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, nn.Module) and a in self.paths:
            held = self.create_node("get_attr", self.paths[a], (), {})
            HELD.note(held, a)
            return held
        if isinstance(a, type(torch.FloatTensor)):  # `x.type(torch.FloatTensor)`
            return f"{a.__module__}.{a.__name__}"
        if not isinstance(a, Tensor):
            made: Any = super().create_arg(a)
            if isinstance(a, torch.ScriptObject):
                HELD.note(made, a)
            return made
        if id(a) in self.constants.assigned:
            raise RuntimeError("it computes with weights that it assigns to")
        self.constants.touched.add(id(a))
        node = self.tensor_nodes.get(id(a))
        if node is None:
            name = self.names.get(id(a))
            if name is None:
                name = f"constant_{len(self.tensor_nodes)}"
                setattr(self.root, name, a)
            with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
                node = self.create_node("get_attr", name, (), {})
            VALUE.note(node, a)
            if id(a) not in self.names:
                FORMULA.note(node, self.constants.formula(a))
                RECOMPUTE.note(node, functools.partial(self.constants.exact, a))
            self.tensor_nodes[id(a)] = node
        return node


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor argument until there is a graph to make its placeholder in."""

    name: str
    given: Given | Thing | None = None  # what a run gave there
