"""From a module to graphs that can be read: torch.fx, with what stock fx does not do.

* Parameters and buffers stay real tensors. What depends on them alone (DO-Conv, DiracNet, weight norm, a frozen norm's
  scale) is computed as the trace runs and arrives as a constant; how it was computed is kept as its `Origin`.
* The trace runs on a throwaway copy that shares the model's storage but none of its objects, so the user's module never
  notices, whatever its forward writes to itself.
* Where a forward cannot be followed, the innermost function or module type that stopped it is kept whole and tracing
  tries again; the children of a module that was kept whole are traced apart.
* Every module call is recorded, so that a module's own forward can be cut out of the flat graph again.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import operator
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode

from structrep import process
from structrep.algebra import ConvMap
from structrep.answers import length, spared
from structrep.aten import gives_more, in_torch
from structrep.deployed.answers import numbers
from structrep.errors import BadInput, StructrepError, Unreadable, Untraceable, said
from structrep.graph import constants, dtypes, operations
from structrep.graph.calls import Call, Entry, Method, Origin, Trace, Traced, storage
from structrep.graph.contexts import Context, Contexts
from structrep.graph.observed import Arguments, Given, Observed, Part, Thing
from structrep.graph.queries import asks_kind
from structrep.graph.reads import PLACEHOLDER, Read
from structrep.graph.run import computed, infer_shapes
from structrep.graph.structures import (
    alike,
    held,
    holds_still,
    holds_tensor,
    is_torch,
    is_traced,
    mapped,
    proxies,
    snapshot,
)
from structrep.intercept import (
    compiled_inlined,
    keep_whole,
    show_tensors,
    stopping_function,
    take_traced_sizes,
    unwatched,
)
from structrep.modules import parametrized
from structrep.modules.copies import ATOMS, _scripted, is_compiled, shallow_copy
from structrep.modules.mentions import taken_apart
from structrep.modules.paths import branches
from structrep.modules.source import written_first
from structrep.modules.states import Holdings
from structrep.precision import Shadows, as_stored, doubled
from structrep.precision import exact as on_float64
from structrep.questions import INPUTS, OF_MODULES, Questions, is_object
from structrep.read.endings import ends
from structrep.read.modules import PROBED, generated, knows
from structrep.read.modules import settings as settings_of_modules
from structrep.terms.layer import Computed, Formula

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]


def trace(
    model: nn.Module,
    example_inputs: Example | None = None,
    probed: Mapping[str, ConvMap] | None = None,
    layers: Iterable[str] = (),
    observed: Observed | None = None,
) -> Traced:
    """Follow the model's forward, and where that stops, its parts.

    Args:
        observed: what a run of the model was seen to give to its parts.
        probed: layers by path that are taken to be those maps.
        layers: layers by path that are traces of their own, if nothing that is followed calls them.

    Raises:
        BadInput: the model rejects the example inputs.
    """
    with process.alone():
        given = model, example_inputs, probed or {}, list(layers), observed or Observed()
        traced = _trace(*given, watched=False)  # to look for who changes something is dear, and few do
        return _trace(*given, watched=True) if traced.changed else traced


def _trace(
    model: nn.Module,
    example_inputs: Example | None,
    probed: Mapping[str, ConvMap],
    layers: Iterable[str],
    observed: Observed,
    *,
    watched: bool,
) -> Traced:
    twin = shallow_copy(model)
    for path, map_ in probed.items():
        twin.get_submodule(path).__dict__[PROBED] = map_
    paths = {module: path for path, module in twin.named_modules()}
    traced = _untraced(twin, paths, observed)
    traced.watched = watched
    below = _Below(traced, paths)
    below.trace(twin, example_inputs)
    below.trace_rest(map(twin.get_submodule, layers))
    for one in traced.traces:
        for call in one.calls:
            traced.calls[call.module, call.method].append(call)
    for (_, method), calls in traced.calls.items():
        callers = [call.parent for call in calls]
        sites = {(caller.module, caller.method) for caller in callers if caller}
        for call in calls:
            call.inlined = method != "forward" and (
                len(sites) > 1 or len(set(callers)) < len(calls) or holds_tensor((call.args, call.kwargs))
            )
    return traced


class _Below:
    """Traces a module; where a part of it is kept whole, what that part calls is traced apart."""

    def __init__(self, traced: Traced, paths: dict[nn.Module, str]) -> None:
        self.traced, self.paths = traced, paths
        self.modules = {path: module for module, path in paths.items()}
        self.seen: set[nn.Module] = set()
        self.done: set[tuple[str, str, int]] = set()  # of what a method was given, which was followed
        self.left: dict[nn.Module, None] = {}  # parts that nothing was seen to call, up to now

    def trace(self, module: nn.Module, given: Example | Arguments | None = None, method: str = "forward") -> None:
        path = self.paths[module]
        self.seen.add(module)
        if isinstance(module, torch.jit.ScriptModule):
            self.traced.untraced.setdefault(path, _scripted(module))
            return
        if method == "forward" and not _runs(module):  # a container such as ModuleList
            self.left |= dict.fromkeys(_parts(module))
            return
        if setting := parametrized.may_set(module):
            reason = f"{setting} may set what {type(module).__name__}.forward reads"
            self.traced.untraced[path] = Untraceable(reason)
            self._apart(module, method)
            return
        tracer = _follow(self.traced, module, self.paths, given, method)
        if tracer.stopped is not None:
            self._apart(module, method)
            return
        root = tracer.calls[0]
        self.traced.traces.append(Trace(path, tracer.graph, root, tracer.calls, tracer.opaque, tracer.whole))
        if given is None and module is not self.traced.model:
            self.traced.guessed.add(root)
        self.seen.update(call.module for call in tracer.calls if call.module not in tracer.hooked)
        for call in tracer.calls[1:]:
            if isinstance(call.module, torch.jit.ScriptModule) and not knows(call.module):
                self.traced.untraced[call.path] = _scripted(call.module)
            if call.leaf and call.module in tracer.hooked:
                self.left[call.module] = None
            elif call.leaf and type(call.module) in tracer.opaque:
                self._apart(call.module, "forward")
        self.left |= dict.fromkeys(_never_called(module, tracer.called))

    def trace_rest(self, layers: Iterable[nn.Module] = ()) -> None:
        """Trace what nothing that was followed calls, each part in the ways that it was seen to be called, if any."""
        while self.left:
            module = next(iter(self.left))
            del self.left[module]
            if module not in self.seen and _has_parts(module):
                self._trace_as_called(module, "forward", self.traced.observed.forms(self.paths[module], "forward"))
        for layer in layers:
            if layer not in self.seen:
                self.trace(layer)

    def _apart(self, module: nn.Module, method: str) -> None:
        """Trace the parts of a module whose code is not followed."""
        self.traced.whole.add(self.paths[module])
        for (path, name), forms in self.traced.observed.called_by(self.paths[module], method):
            part = self.modules.get(path)
            self.traced.handled.setdefault(path, self.paths[module])
            if part is not None and _has_parts(part):
                self._trace_as_called(part, name, forms)
        self.left |= dict.fromkeys(_parts(module))

    def _trace_as_called(self, module: nn.Module, method: str, forms: list[Arguments | None]) -> None:
        path = self.paths[module]
        if None in forms:  # it is given what may be anything
            reason = f"{type(module).__name__}.{method} cannot be followed: it is given more than values"
            self.traced.untraced.setdefault(path, Untraceable(reason))
            self.seen.add(module)
            self._apart(module, method)
            return
        for form in forms or [None]:
            if (path, method, id(form)) not in self.done and (method == "forward" or (form and form.tensors)):
                self.done.add((path, method, id(form)))
                self.trace(module, form, method)


def _has_parts(module: nn.Module) -> bool:
    """Whether a module is more than a layer that is read as a whole, if only by what it computes its numbers of."""
    return not knows(module) or _settles(module)


def _settles(module: nn.Module) -> bool:
    """Whether a module is a layer that computes its numbers, and may hold them instead wherever it is called."""
    return knows(module) and bool(parametrized.computed(module)) and not parametrized.hooks(module)


def _runs(module: nn.Module) -> bool:
    """Whether a module has a forward of its own, of its class or assigned to it."""
    if is_compiled(module):
        return False
    found = vars(module).get("forward", getattr(type(module), "forward", None))
    return found is not None and getattr(found, "__func__", found) is not nn.Module.forward


def _never_called(module: nn.Module, called: set[nn.Module]) -> Iterator[nn.Module]:
    """The topmost modules of which a trace has called no part: heads for training, branches for other arguments."""
    for child in module.children():
        if not isinstance(child, torch.jit.ScriptModule) and not called.isdisjoint(child.modules()):
            yield from _never_called(child, called)
    yield from (part for part in _parts(module) if called.isdisjoint(part.modules()))


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module; the children of those that its code takes apart."""
    apart = taken_apart(module)
    for name, child in module.named_children():
        if name in apart and not _settles(child):
            yield from child.children()
        else:
            yield child


def follow_method(module: nn.Module, path: str, method: str, flags: Mapping[str, Any]) -> Method | None:
    """What a method of a module does, called with some flags (... is a tensor), on a copy; None if it cannot be
    followed."""
    twin = shallow_copy(module)
    paths = {part: ".".join(filter(None, (path, name))) for name, part in twin.named_modules()}
    scratch = _untraced(twin, paths)
    tracer = _follow(scratch, twin, paths, None, method, flags)
    if tracer.stopped is not None:
        return None
    held = {
        str(node.target)
        for node in tracer.graph.nodes
        if node.op == "get_attr" and any(user.meta["call"] is tracer.calls[0] for user in node.users)
    }
    return Method(tracer.calls, held | tracer.reached.keys())


def retrace(traced: Traced, call: Call, answers: Mapping[tuple[str, str], Any]) -> tuple[Traced, Call] | None:
    """A call once more, on a copy of its module, with other answers to what it asks; None if it cannot be followed.

    Args:
        answers: by `Call.reads`' keys.
    """
    root = next(one for one in call.chain() if one.parent is None)
    of = next((one for one in traced.traces if one.root is root), None)
    if of is None:
        return None
    twin = shallow_copy(call.module)
    paths = {part: ".".join(filter(None, (call.path, name))) for name, part in twin.named_modules()}
    again = _untraced(_placed(twin, call.path), paths)
    tracer = _Tracer(twin, call.method, paths, again, of.opaque, of.whole, answers, call.contexts)
    count = itertools.count()
    tracer.arguments = pytree.tree_map(
        lambda leaf: _Slot(f"input_{next(count)}") if isinstance(leaf, fx.Proxy) else leaf, (call.args, call.kwargs)
    )
    if is_traced(tracer.arguments):
        return None
    try:
        with torch.no_grad(), _unchanged(twin), tracer.watching():
            tracer.trace(_Root(twin))
    except Exception:  # whatever the forward does when it is told otherwise
        return None
    if tracer.refused is not None:
        return None
    _fold_constants(tracer)
    again.traces.append(Trace(call.path, tracer.graph, tracer.calls[0], tracer.calls, of.opaque, of.whole))
    for one in tracer.calls:
        again.calls[one.module, one.method].append(one)
    known = {(one.path, one.method): one.inlined for calls in traced.calls.values() for one in calls}
    for one in tracer.calls:
        one.inlined = known.get((one.path, one.method), False)
    again.origins, again.written = tracer.constants.origins, tracer.constants.written
    return again, tracer.calls[0]


def _placed(module: nn.Module, path: str) -> nn.Module:
    """Something that has a module at a path."""
    for name in reversed(path.split(".") if path else ()):
        holder = nn.Module()
        holder.add_module(name, module)
        module = holder
    return module


def _follow(
    traced: Traced,
    module: nn.Module,
    paths: dict[nn.Module, str],
    given: Example | Arguments | None,
    method: str = "forward",
    flags: Mapping[str, Any] | None = None,
) -> _Tracer:
    """Trace, keeping whole one more function or module type after each failure, until all goes through or the root
    itself stops it."""
    opaque: set[type[nn.Module]] = set()
    whole: dict[FunctionType, tuple[str, Untraceable]] = {}
    while True:
        tracer = _Tracer(module, method, paths, traced, opaque, whole.keys())
        holdings = Holdings(module)
        state = holdings.state()
        if traced.watched:
            tracer.holdings, tracer.state = holdings, state
        inputs = tracer.bind(given, flags or {})
        try:
            with torch.no_grad(), _unchanged(module), tracer.watching():
                tracer.trace(_Root(module))
            if tracer.refused is not None:
                raise tracer.refused  # caught by the forward itself, which would do something else with a real value
        except StructrepError:
            raise
        except Exception as error:
            _note_reach(traced, tracer)
            if not tracer.calls:
                raise
            call = tracer.stopped or tracer.calls[0]
            tracer.stopped = call
            function = stopping_function(error.__traceback__, inspect.unwrap(call.code))
            if function is not None and function not in whole:
                reason = Untraceable(f"{function.__qualname__} cannot be followed: {said(error)}")
                whole[function] = (call.path, reason)
                continue
            reason = Untraceable(f"{type(call.module).__name__}.{call.method} cannot be followed: {said(error)}")
            traced.untraced.setdefault(call.path, reason)
            if call.module is module or type(call.module) in opaque:
                tracer.stopped = tracer.calls[0]
                return tracer
            opaque = opaque | {type(call.module)}
            continue
        traced.unfollowed.update(whole)
        traced.changed |= holdings.state() != state
        if inputs:
            with _unchanged(module):
                infer_shapes(tracer.graph, inputs)
        _fold_constants(tracer)
        traced.origins.update(tracer.constants.origins)
        traced.written |= tracer.constants.written
        _note_reach(traced, tracer)
        return tracer


def _note_reach(traced: Traced, tracer: _Tracer) -> None:
    """Note who reaches into whom."""
    for path, calls in tracer.reached.items():
        used = {call for call in calls if tracer.fetched[path, call] > tracer.asked[path, call]}
        if used:
            traced.reached.setdefault(path, set()).update(used)
        traced.told.setdefault(path, set()).update(calls - used)


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Give modules back the attributes they had: a forward may write traced values to itself, and be traced again."""
    before = {module: snapshot(module.__dict__) for module in model.modules()}
    try:
        yield
    finally:
        for module, attributes in before.items():
            if not alike(attributes, module.__dict__):
                module.__dict__.clear()
                module.__dict__.update(attributes)


ROUNDINGS = 4  # of a dtype, by which what it computes may differ from what float64 does


def _fold_constants(tracer: _Tracer) -> None:
    """Note the value of every node that asks its inputs for no more than a device or a dtype.

    `torch.eye(n, device=x.device)` is a constant; inputs are taken to be where the parameters are, and of their dtype.
    """
    owner = _owner(tracer.module)
    asks = any(asks_kind(node) or node.target == "type_as" for node in tracer.graph.nodes)
    for node in tracer.graph.nodes:
        if owner is None or not asks:
            _fold(node, tracer.constants.unsteady)
            continue
        if not asks_kind(node):
            _fold(node, tracer.constants.unsteady)
        elif node.args[1] == "device" or node.args[0].meta["kind"] is owner.dtype:
            node.meta["value"] = getattr(owner, node.args[1])
        dtypes.note(node, owner.dtype)
        if node.target == "type_as" and len(node.args) == 2:
            node.meta["same_kind"] = node.args[1].meta["kind"] is owner.dtype


def _fold(node: fx.Node, unsteady: Container[Any]) -> None:
    """Note the value of a node whose inputs' values are known."""
    if node.op == "get_attr" and isinstance(node.meta.get("value"), Tensor):
        formula = node.meta.get("formula")
        made = (node.meta["value"], *(formula.tensors if formula else ()))
        node.meta["unsteady"] = any(storage(one) in unsteady for one in made)
    if node.op not in ("call_function", "call_method"):
        return
    inputs = node.all_input_nodes
    if not inputs or not all("value" in n.meta for n in inputs):
        return
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    drawn_or_written = operations.draws(node.target, node.args, node.kwargs) or operations.writes(node)
    if drawn_or_written or node.target is torch._assert:
        return
    drawn = torch.get_rng_state()
    with torch.no_grad(), contextlib.suppress(Exception):
        value = computed(node, lambda n: n.meta["value"])
        if not torch.equal(drawn, torch.get_rng_state()):
            return  # other numbers at every call
        node.meta["value"] = value
        node.meta["unsteady"] = any(n.meta.get("unsteady") for n in inputs)
        node.meta["recompute"] = functools.partial(_recomputed, node)
        formulas = [n.meta["formula"] for n in inputs if n.meta.get("formula")]
        stored = [n.meta["value"] for n in inputs if n.op == "get_attr" and "formula" not in n.meta]
        node.meta["formula"] = Formula(
            frozenset({str(name).strip("_")}).union(*(f.calls for f in formulas)),
            tuple({id(t): t for t in (*stored, *(t for f in formulas for t in f.tensors))}.values()),
        )


def _recomputed(node: fx.Node) -> Any:
    """The value of a node, its constants computed in float64."""
    given = [doubled(constants.exact(n) if "recompute" in n.meta else n.meta["value"]) for n in node.all_input_nodes]
    with torch.no_grad(), Shadows() as shadows:
        own = map(as_stored, given, (n.meta["value"] for n in node.all_input_nodes))
        found = computed(node, dict(zip(node.all_input_nodes, own, strict=True)).__getitem__)
        found = shadows.of(found) if isinstance(found, Tensor) else found
    return _nearer(found, node.meta["value"], given)


def _nearer(found: Any, stored: Any, given: Iterable[Any]) -> Any:
    """What float64 makes of a formula, if it is what was stored but for rounding: a step, `round(x)`, may be another.

    Args:
        given: the numbers on the way, whose size tells what rounding is.
    """
    if not (isinstance(found, Tensor) and isinstance(stored, Tensor) and stored.is_floating_point()):
        return stored
    if found.shape != stored.shape or not stored.numel():
        return stored
    numbers = [one.detach() for one in (found, *given) if isinstance(one, Tensor) and one.numel()]
    # of masks, of float8 and of numbers without a sign torch has no absolute value
    numbers = [one.double() if one.itemsize == 1 or not one.dtype.is_signed else one for one in numbers]
    sizes = [one.abs().max() for one in numbers]
    rounding = ROUNDINGS * torch.finfo(stored.dtype).eps * max(float(size) for size in sizes)
    off = float((doubled(found) - doubled(stored)).abs().max())
    return doubled(found) if off <= rounding else stored


def _owner(module: nn.Module) -> Tensor | None:
    return next((t for t in module.parameters() if t.is_floating_point()), None)


class _Root(nn.Module):
    """What torch.fx is given to trace, so that the module itself is called like any other."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> None: ...


class _Tracer(process.Tracer):
    def __init__(
        self,
        module: nn.Module,
        method: str,
        paths: dict[nn.Module, str],
        held: Traced,
        opaque: Set[type[nn.Module]],
        whole: Set[FunctionType],
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
        self.constants = _Constants(self)
        self.questions = Questions(paths, lambda: self.stack[-1] if self.stack else None, answers)
        self.contexts = Contexts(contexts)
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
            positional = tuple(_Slot(p.name) for p in required if p.kind is not p.KEYWORD_ONLY and not by_name)
            if not positional and any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
                positional = (_Slot("input"),)  # a wrapper that hands on what it is given
            named = {p.name: _Slot(p.name) for p in required if p.kind is p.KEYWORD_ONLY or by_name}
            more = {name: _Slot(name) if value is ... else value for name, value in flags.items()}
            self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = (positional, {**named, **more})
            return []
        args, kwargs = as_arguments(example)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise BadInput(f"the model's {self.method}{signature} does not take the example inputs: {error}") from error
        tensors: list[Tensor] = []

        def slot(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            tensors.append(leaf)
            return _Slot(f"input_{len(tensors)}")

        self.arguments = pytree.tree_map(slot, (bound.args, bound.kwargs))
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
            return _Slot(f"input_{len(values)}", leaf)

        self.arguments = mapped(slot, called.bound(signature))
        return values

    # --- torch.fx's hooks --------------------------------------------------------------------------------------------

    def arguments_of(self, root_fn: Any, is_module: bool, concrete_args: Any) -> tuple[Any, list[Any]]:
        def placed(leaf: Any) -> Any:
            if not isinstance(leaf, _Slot):
                return leaf
            proxy = self.create_proxy("placeholder", leaf.name, (), {})
            if isinstance(leaf.given, Thing):
                proxy.node.meta["unknown"] = leaf.given.kind
            elif leaf.given is not None and leaf.given.number is not None:
                proxy.node.meta["stand_in"] = leaf.given.number
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
        if m not in self.paths:  # held outside the module tree: a part of whoever calls it
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
        drawn = None if leaf else _chance()  # a leaf only makes a node
        try:
            result = run(*args, **kwargs)
            if isinstance(result, Iterator):
                raise RuntimeError("it gives an iterator, whose code runs later")
            if not leaf and _chance() != drawn:
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
        code = getattr(inspect.unwrap(self.stack[-1].code), "__code__", None)
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
            if isinstance(proxy, _Proxy):
                proxy.node.meta["kept"] = True
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
        held, versions = _state(m, names)
        values = parametrized.compute(m)
        now, written = _state(m, names)
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
        path = self.names.get(id(attr_val)) if isinstance(attr_val, Tensor) else self.paths.get(attr_val)
        tied = bool(self.stack) and self.stack[-1].module._parameters.get(attr) is attr_val  # also held elsewhere
        if path and self.stack and path.rpartition(".")[0] != self.stack[-1].path and not tied:
            self.reached.setdefault(path, set()).add(self.stack[-1])
            self.fetched[path, self.stack[-1]] += 1
        return attr_val

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Called for every condition on a traced value."""
        frame = inspect.currentframe()
        while frame is not None and frame.f_globals.get("__name__") in (__name__, fx.proxy.__name__):
            frame = frame.f_back
        if (told := self._dtype_asked(obj.node)) is not None:
            return self._note_dtype(obj, told)
        answer = spared(frame) if frame is not None else None
        if answer is None:
            raise self.refuse(TraceError("a condition that depends on the input"))
        holds = obj if answer else self.create_proxy("call_function", operator.not_, (obj,), {})
        self.create_proxy("call_function", torch._assert, (holds, "the forward raises for this input"), {})
        return answer

    def _dtype_asked(self, node: fx.Node) -> bool | None:
        """The answer to `x.dtype == torch.float32`; None to other questions. Inputs are taken to be of the dtype of the
        parameters."""
        owner = _owner(self.module)
        if node.target not in (operator.eq, operator.ne) or owner is None or len(node.args) != 2:
            return None
        for one in self.graph.nodes:
            dtypes.note(one, owner.dtype)
        found = [self._taken(one, owner.dtype) if isinstance(one, fx.Node) else one for one in node.args]
        if not all(isinstance(one, torch.dtype) for one in found):
            return None
        return (found[0] == found[1]) == (node.target is operator.eq)

    def _taken(self, node: fx.Node, own: torch.dtype) -> torch.dtype | None:
        """The dtype that a question gives: its value's, and where nothing tells that, the model's."""
        if node.target is not getattr or node.args[1] != "dtype":
            return None
        kind = node.args[0].meta["kind"] or own  # type: ignore[union-attr]
        return self.questions.answers.get(INPUTS, own) if kind is own else kind

    def _note_dtype(self, asked: fx.Proxy, told: bool) -> bool:
        """Note a condition on the dtype of an input, and assert what it is taken to be."""
        call = self.stack[-1]
        place = sum(isinstance(read.holder, fx.Node) for read in call.reads.values())
        key = f"{call.path}.{call.method}", f"dtype {place}"
        call.reads[key] = Read(asked.node, "", told)
        told = self.questions.answers.get(key, told)
        holds = self.create_proxy("call_function", operator.eq, (asked, told), {})
        holds.node.meta["asked"] = key
        said = "the forward was reparameterized for an input of another dtype: convert the model again for that"
        self.create_proxy("call_function", torch._assert, (holds, said), {}).node.meta["asked"] = key
        return told

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Called where a traced value is looped over or unpacked into a call."""
        count = length(obj.node)
        if count is None:
            raise self.refuse(TraceError("a loop over a value of which nothing tells how long it is"))
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
        node.meta["index"] = self.count
        node.meta["contexts"] = self.contexts.now
        node.meta["autocast"] = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        call = node.meta["call"] = self.stack[-1] if self.stack else None
        node.meta["at"] = self._place() if call is not None and not call.leaf else None
        node.meta["unfollowed"] = node.target in self.whole or (
            node.op == "call_module"
            and call is not None
            and (
                call.module in self.hooked
                or isinstance(call.module, torch.jit.ScriptModule)
                or (type(call.module) in self.opaque and not knows(call.module))
            )
        )
        self.count += 1
        for one in operations.writes(node) if not node.meta["unfollowed"] else ():
            if isinstance(one.meta.get("value"), Tensor):
                self.constants.note_written(one.meta["value"], operations.name_of(node.target))
        if node.op == "call_module" and call is not None:
            self.constants.note_assigned(node, call)
            node.meta["computed"] = self._computed(call.module)
        if self.stack and node.op != "get_attr":
            self.stack[-1].steps.append(node)
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, nn.Module) and a in self.paths:
            held = self.create_node("get_attr", self.paths[a], (), {})
            held.meta["held"] = a
            return held
        if isinstance(a, type(torch.FloatTensor)):  # `x.type(torch.FloatTensor)`
            return f"{a.__module__}.{a.__name__}"
        if not isinstance(a, Tensor):
            made: Any = super().create_arg(a)
            if isinstance(a, torch.ScriptObject):
                made.meta["held"] = a
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
            node.meta["value"] = a
            if id(a) not in self.names:
                node.meta["formula"] = self.constants.formula(a)
                node.meta["recompute"] = functools.partial(self.constants.exact, a)
            self.tensor_nodes[id(a)] = node
        return node


class _Proxy(fx.Proxy):
    """A traced value that can be written in place, and has the attributes that tensors have.

    Stock torch.fx makes `y += b` a new value and leaves aliases old, and its proxies have every attribute asked for.
    """

    def __getattr__(self, k: str) -> Any:
        if not hasattr(Tensor, k):
            raise AttributeError(f"'Tensor' object has no attribute {k!r}")
        if k in ("grad", "grad_fn"):
            raise self._refuse(TypeError(f"the .{k} of a value that depends on the input"))
        return _Attribute(self, k)

    def __len__(self) -> int:
        count = length(self.node)
        if count is None:
            raise self._refuse(RuntimeError("the length of a value that nothing tells"))
        return count

    def __hash__(self) -> int:
        raise self._refuse(TypeError("a value that depends on the input is used as a key"))

    def __eq__(self, other: object) -> Any:
        return self.tracer.create_proxy("call_function", operator.eq, (self, other), {})

    def __str__(self) -> str:
        raise self._refuse(TypeError("a value that depends on the input is written as text"))

    def __format__(self, spec: str) -> str:
        return repr(self)  # for the messages of assertions

    def __int__(self) -> int:
        raise self._refuse(TypeError("a number that depends on the input is needed"))

    __float__ = __index__ = __complex__ = __int__

    def _refuse(self, error: Exception) -> Exception:
        tracer = self.tracer
        assert isinstance(tracer, _Tracer)
        return tracer.refuse(error)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "real", "imag"):
            raise self._refuse(RuntimeError(f"it assigns to .{name} of a value that depends on the input"))
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _Attribute(fx.proxy.Attribute, _Proxy):
    """An attribute of a traced value; if it is called, a call of a method."""

    def __str__(self) -> str:
        if self.attr not in ("device", "dtype"):
            return super().__str__()
        assert isinstance(self.tracer, _Tracer)
        owner = _owner(self.tracer.module)  # inputs are taken to be where the parameters are, and of their dtype
        return super().__str__() if owner is None else str(getattr(owner, self.attr))


def _augmented(function: Callable[[Any, Any], Any]) -> Callable[[_Proxy, Any], _Proxy]:
    def write(self: _Proxy, other: Any) -> _Proxy:
        self.node = self.tracer.create_proxy("call_function", function, (self, other), {}).node
        return self  # whoever else holds this value holds the new one

    return write


for _function in operations.AUGMENTED:
    setattr(_Proxy, f"__{_function.__name__}__", _augmented(_function))


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor argument until there is a graph to make its placeholder in."""

    name: str
    given: Given | Thing | None = None  # what a run gave there


# What a tensor tells apart from its numbers.
_TOLD = {"dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "layout", "grad"}
_ASKED = {"dtype", "device", "is_cuda", "is_cpu", "is_mps", "is_xpu", "requires_grad"}
# How code is told of the shape of a tensor, of what its dtype says, and of its numbers.
_SHAPES = {"shape", "ndim", "size", "numel", "nelement", "dim", "ndimension", "__len__"}
_KINDS = {
    **{"element_size": "element_size()", "itemsize": "itemsize", "type": "type()", "is_complex": "is_complex()"},
    "is_floating_point": "is_floating_point()",
}
_NUMBERS = {
    **{
        "item": f"{PLACEHOLDER}.item()",
        "tolist": f"{PLACEHOLDER}.tolist()",
        "__bool__": f"bool({PLACEHOLDER})",
        "is_nonzero": f"bool({PLACEHOLDER})",
    },
    **{
        "__float__": f"float({PLACEHOLDER})",
        "__int__": f"int({PLACEHOLDER})",
        "__index__": f"int({PLACEHOLDER})",
        "__complex__": "",
    },
    **dict.fromkeys(("numpy", "__array__", "__contains__", "equal", "allclose"), ""),
}


class _Constants(TorchFunctionMode):
    """Watches what the trace computes for real: notes where constants come from, stops what must not be baked in."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        self.origins: dict[int, Origin] = {}
        self.written: set[int] = set()  # storages written in place: how they came about is no longer one expression
        self.unsteady: set[int] = set()  # storages that are other numbers at every call
        self.assigned: dict[int, tuple[Tensor, Call]] = {}  # id of a parameter -> what was assigned to its data, where
        self.touched: set[int] = set()  # ids of what was computed with
        self.used: dict[int, list[fx.Node]] = defaultdict(list)  # id of a parameter -> layers called that have it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_traced((args, kwargs)):
            return func(*args, **kwargs)
        if isinstance(func, OpOverload) and not gives_more(func):
            kind, func, args, kwargs = in_torch(func, args, kwargs)
            func = getattr(Tensor, func) if kind == "call_method" else func
        func = unwatched(func)
        name = getattr(func, "__name__", "")
        self._note_touched(func, pytree.tree_leaves((args, kwargs)))
        if name == "__set__" and id(args[0]) in self.tracer.names:  # `weight.data = ...`, at every call
            path, call = self.tracer.names[id(args[0])], self.tracer.stack[-1]
            self.tracer.reached.setdefault(path, set()).add(call)
            self.tracer.fetched[path, call] += 1
            self.assigned[id(args[0])] = args[1], next(call.homes())
            for node in self.used[id(args[0])]:
                node.meta["assigned"] = None  # it was called with other numbers than it is left with
        if name == "__get__" and func.__self__.__name__ in ("dtype", "device") and id(args[0]) in self.tracer.names:
            self.tracer.asked[self.tracer.names[id(args[0])], self.tracer.stack[-1]] += 1
        if operations.draws(func, args, kwargs):
            raise RuntimeError(f"torch.{name} draws new numbers at every call")
        written = [one for one in operations.written(func, args, kwargs) if isinstance(one, Tensor)]
        for one in written:
            self.note_written(one, name)
        drawn = None if operations.has_schema(func) else torch.get_rng_state()
        result = func(*args, **kwargs)
        if drawn is not None and not torch.equal(drawn, torch.get_rng_state()):
            raise RuntimeError(f"{name} draws new random numbers at every call")
        if name == "__get__" and func.__self__.__name__ in _ASKED:
            return self._ask(args[0], func.__self__.__name__, result)
        self._note_told(func.__self__.__name__ if name == "__get__" else name, args, kwargs, result)
        itself = any(result is one for one in pytree.tree_leaves((args, kwargs)))  # `x.to(x.dtype)`
        if isinstance(result, Tensor) and not written and not itself:
            self.origins[id(result)] = Origin(result, func, args, kwargs, self.tracer.contexts.now)
        return result

    def note_written(self, tensor: Tensor, name: str) -> None:
        """Note that a forward writes to a tensor.

        Raises:
            RuntimeError: the model computes with it, as a parameter.
        """
        self.written.add(storage(tensor))
        if not self._is_fresh(tensor):
            if storage(tensor) in self.tracer.stored:
                raise RuntimeError(f"{name} writes to a parameter during forward")
            self.unsteady.add(storage(tensor))
            self.tracer.stack[-1].mutates = True

    def _ask(self, tensor: Tensor, what: str, told: Any) -> Any:
        """The answer to what a tensor is asked apart from its numbers; of a computed one, of what it is made of."""
        while id(tensor) not in self.tracer.names and (origin := self.origins.get(id(tensor))) is not None:
            given = [one for one in pytree.tree_leaves((origin.args, origin.kwargs)) if isinstance(one, Tensor)]
            source = next((one for one in given if getattr(one, what) == told), None)
            if source is None:
                return told
            tensor = source
        path = self.tracer.names.get(id(tensor))
        return told if path is None else self.tracer.questions.ask(tensor, path, f".{what}", told)

    def _note_told(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], told: Any) -> None:
        """Note what code is told of the shape, the dtype or the numbers of tensors that the model holds, or of what it
        computes of them."""
        asks = name in _NUMBERS or name in _SHAPES or name in _KINDS
        for given in pytree.tree_leaves((args, kwargs)) if asks else ():
            formula = self.formula(given) if isinstance(given, Tensor) else None
            for one in formula.tensors if formula else (given,):
                path, entry = self.tracer.names.get(id(one)), self.tracer.entries.get(id(one))
                if path is None and entry is None:
                    continue
                if name in _SHAPES:
                    text, answer = f"{PLACEHOLDER}.shape", tuple(one.shape)
                elif name in _KINDS:
                    text, answer = f"{PLACEHOLDER}.{_KINDS[name]}", told
                elif one is given and len(args) == 1 and _NUMBERS[name]:
                    text, answer = _NUMBERS[name], told
                else:
                    text, answer = f"structrep_numbers({PLACEHOLDER})", numbers(one)
                if name in _KINDS and (len(args) > 1 or kwargs or one.dtype != given.dtype):
                    continue  # a cast; a source of another dtype
                if path is not None:
                    self.tracer.questions.ask(one, path, text, answer, counts=False)
                elif entry is not None:
                    holder = next(module for module, where in self.tracer.paths.items() if where == entry.holder)
                    asked = text.replace(PLACEHOLDER, f"{PLACEHOLDER}{entry.text}")
                    self.tracer.questions.ask(holder, entry.holder, asked, answer, counts=False)

    def _is_fresh(self, tensor: Tensor) -> bool:
        """Whether a tensor was made during this trace, and is no view of what the model holds."""
        while id(tensor) in self.origins:
            base = next((a for a in self.origins[id(tensor)].args if isinstance(a, Tensor)), None)
            if base is None or storage(base) != storage(tensor):
                return True
            tensor = base
        return False

    def _note_touched(self, func: Any, given: list[Any]) -> None:
        """Raise where a forward computes with weights that it assigns: it may do another thing at every call."""
        what = getattr(getattr(func, "__self__", None), "__name__", "")
        if getattr(func, "__name__", "") == "__set__" and what == "data":
            changed, given = given[0], given[1:]
            if id(changed) in self.touched:
                raise RuntimeError("it assigns to weights that it computes with")
        if what not in _TOLD:
            self.touched.update(id(one) for one in given if isinstance(one, Tensor))
        if any(id(one) in self.assigned for one in given if isinstance(one, Tensor) and what not in _TOLD):
            raise RuntimeError("it computes with weights that it assigns to")

    def note_assigned(self, node: fx.Node, call: Call) -> None:
        """Note how the forward that a layer is called in has computed its numbers, if it has, as `meta["assigned"]`."""
        held = [tensor for tensor in call.module._parameters.values() if tensor is not None]
        given = [self.assigned[id(tensor)] for tensor in held if id(tensor) in self.assigned]
        formulas = [self.formula(value) for value, home in given if home is next(call.homes())]
        found = [formula for formula in formulas if formula is not None]
        node.meta["assigned"] = None
        if found and len(found) == len(held) and not any(self.used[id(tensor)] for tensor in held):
            tensors = {id(tensor): tensor for formula in found for tensor in formula.tensors}
            calls = frozenset().union(*(formula.calls for formula in found))
            node.meta["assigned"] = Formula(calls, tuple(tensors.values()))
        for tensor in held:
            self.used[id(tensor)].append(node)

    def computed(self, tensor: Tensor) -> Computed:
        formula = self.formula(tensor) or Formula(frozenset(), (tensor,))
        return Computed(tensor, formula, functools.partial(self.exact, tensor))

    def exact(self, tensor: Tensor) -> Tensor:
        """A constant computed again, in float64; as it is where its storage was written to since."""
        known: dict[int, Tensor] = {}

        def again() -> Tensor:
            pending = [tensor]
            while pending:
                one = pending[-1]
                origin = self.origins.get(id(one))
                if storage(one) in self.written:
                    raise RuntimeError("it is no longer what it was")
                if origin is None or isinstance(one, nn.Parameter):
                    known[id(one)] = one.detach().to(on_float64(one.device))
                elif left := [given for given in origin.given if id(given) not in known]:
                    pending += left
                    continue
                elif id(one) not in known:
                    args, kwargs = pytree.tree_map(lambda v: known.get(id(v), v), (origin.args, origin.kwargs))
                    known[id(one)] = origin.function(*args, **kwargs)
                pending.pop()
            return known[id(tensor)]

        with torch.no_grad(), Shadows() as shadows:
            try:
                found = shadows.of(again())
            except Exception:  # code that wrote to what it had computed with
                return tensor
        nearer: Tensor = _nearer(found, tensor, known.values())
        return nearer

    def formula(self, tensor: Tensor) -> Formula | None:
        """All that a constant was computed with and from; None if it was not computed here."""
        calls: set[str] = set()
        tensors: dict[int, Tensor] = {}
        pending, seen = [tensor], set()
        while pending:
            one = pending.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            origin = self.origins.get(id(one))
            if origin is None or isinstance(one, nn.Parameter):
                tensors[id(one)] = one
            else:
                calls.add(getattr(origin.function, "__name__", "").strip("_"))
                pending += origin.given
        return Formula(frozenset(calls), tuple(tensors.values())) if calls else None


def _chance() -> tuple[Any, ...]:
    """The state of Python's own random numbers, and of numpy's."""
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is None:
        return (random.getstate(),)
    _, keys, *rest = numpy.get_state()
    return random.getstate(), keys.tobytes(), *rest


def _state(module: nn.Module, but: Collection[str]) -> tuple[Any, list[int]]:
    """What a module and all below it hold, but for some of its tensors, and how often tensors were written."""
    held = [{k: v for k, v in part.__dict__.items() if part is not module or k not in but} for part in module.modules()]
    tensors = (*module.parameters(), *module.buffers())
    return snapshot(held), [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def as_arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments.

    Raises:
        BadInput: neither a tensor, a tuple nor a mapping.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    raise BadInput(
        f"example_inputs is a {type(example).__name__}: give a tensor, a tuple of positional arguments or a mapping of "
        f"keyword arguments"
    )


def _named_tensors(paths: dict[nn.Module, str]) -> Iterator[tuple[str, Tensor]]:
    for module, path in paths.items():
        for name, value in (*module._parameters.items(), *module._buffers.items(), *module.__dict__.items()):
            if isinstance(value, Tensor):
                yield f"{path}.{name}" if path else name, value


def _untraced(twin: nn.Module, paths: dict[nn.Module, str], observed: Observed | None = None) -> Traced:
    names = {id(tensor): name for name, tensor in _named_tensors(paths)}
    entries = {id(tensor): entry for tensor, entry in _entries(paths) if id(tensor) not in names}
    return Traced(twin, names, entries, observed=observed or Observed())


DEEP = 4  # entries in entries that are looked into


def _entries(paths: dict[nn.Module, str]) -> Iterator[tuple[Tensor, Entry]]:
    """Plain tensors in dicts, lists, tuples and objects that modules hold."""
    for module, path in paths.items():
        own = ((name, value) for name, value in vars(module).items() if name not in OF_MODULES)
        pending: list[tuple[Any, tuple[tuple[str, Any], ...]]] = [
            (value, ((".", name),)) for name, value in own if type(value) not in ATOMS
        ]
        while pending:
            value, steps = pending.pop()
            if isinstance(value, Tensor):
                yield value, Entry(path, steps)
            elif len(steps) <= DEEP and not isinstance(value, nn.Module):
                pending += [(one, (*steps, step)) for step, one in _parts_of(value) if type(one) not in ATOMS]


def _parts_of(value: Any) -> Iterator[tuple[tuple[str, Any], Any]]:
    if isinstance(value, (list, tuple)):
        yield from ((("[", place), one) for place, one in enumerate(value))
    elif isinstance(value, Mapping):
        yield from ((("[", key), one) for key, one in value.items() if type(key) in (str, int))
    elif is_object(value) or isinstance(value, SimpleNamespace):
        yield from (((".", name), one) for name, one in getattr(value, "__dict__", {}).items())
