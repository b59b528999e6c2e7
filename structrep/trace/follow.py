"""From a model to its graphs: what stops a trace is kept whole, and its parts are traced apart."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Set
from types import FunctionType
from typing import Any

import torch
from torch import nn

from structrep import process
from structrep.algebra import ConvMap
from structrep.errors import StructrepError, Untraceable, said
from structrep.graph.calls import Trace, Traced
from structrep.graph.observed import Arguments, Observed
from structrep.graph.operations import rearrangers, rearranging_layers
from structrep.graph.run import Partial, infer_shapes
from structrep.graph.structures import alike, holds_tensor, snapshot
from structrep.modules import parametrized
from structrep.modules.arguments import Example
from structrep.modules.copies import is_compiled, scripted, shallow_copy
from structrep.modules.mentions import taken_apart
from structrep.modules.states import Holdings
from structrep.read.modules import PROBED, knows
from structrep.trace.escapes import clear_frames, escaped
from structrep.trace.folding import fold_constants
from structrep.trace.held import untraced
from structrep.trace.inputs import bind
from structrep.trace.observing import Unanswered
from structrep.trace.patches import NotKept, stopping_function
from structrep.trace.policy import Policy
from structrep.trace.tracer import CallTracer, Root


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
        traced = _trace(*given, watched=None)  # to look for who changes something is dear, and few do
        return _trace(*given, watched=traced.changes) if traced.changes else traced


def _trace(
    model: nn.Module,
    example_inputs: Example | None,
    probed: Mapping[str, ConvMap],
    layers: Iterable[str],
    observed: Observed,
    *,
    watched: Mapping[tuple[str, str], frozenset[int]] | None,
) -> Traced:
    twin = shallow_copy(model)
    for path, map_ in probed.items():
        twin.get_submodule(path).__dict__[PROBED] = map_
    paths = {module: path for path, module in twin.named_modules()}
    traced = untraced(twin, paths, observed)
    traced.watched = watched
    below = Below(traced, paths)
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


class Below:
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
            self.traced.untraced.setdefault(path, scripted(module))
            return
        if method == "forward" and not _runs(module):  # a container such as ModuleList
            self.left |= dict.fromkeys(_parts(module))
            return
        if setting := parametrized.attribute_setter(module):
            reason = f"{setting} may set what {type(module).__name__}.forward reads"
            self.traced.untraced[path] = Untraceable(reason)
            self._apart(module, method)
            return
        tracer = follow(self.traced, module, self.paths, given, method, holdings=Holdings(module))
        if tracer.recorder.stopped is not None:
            self._apart(module, method)
            return
        calls, policy = tracer.recorder.calls, tracer.policy
        root = calls[0]
        self.traced.traces.append(Trace(path, tracer.graph, root, calls, policy.opaque, policy.whole))
        if given is None and module is not self.traced.model:
            self.traced.guessed.add(root)
        self.seen.update(call.module for call in calls if call.module not in policy.hooked)
        for call in calls[1:]:
            if isinstance(call.module, torch.jit.ScriptModule) and not knows(call.module):
                self.traced.untraced[call.path] = scripted(call.module)
            if call.leaf and call.module in policy.hooked:
                self.left[call.module] = None
            elif call.leaf and type(call.module) in policy.opaque:
                self._apart(call.module, "forward")
        self.left |= dict.fromkeys(_never_called(module, tracer.recorder.called))

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
    """Whether a module is more than a layer of torch's, if only by what it computes its numbers of."""
    lone = parametrized.torch_class(module) is not None and not any(True for _ in module.children())
    return not (knows(module) or lone) or _settles(module)


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
    """The topmost modules of which a trace has called no part: heads for training, branches for other arguments.

    A part without numbers tells nothing of who called it: one activation often serves all blocks."""
    return _without(module, called, {one for one in called if _has_numbers(one)})


def _without(module: nn.Module, called: Set[nn.Module], telling: Set[nn.Module]) -> Iterator[nn.Module]:
    for child in module.children():
        if not isinstance(child, torch.jit.ScriptModule) and not telling.isdisjoint(child.modules()):
            yield from _without(child, called, telling)
    yield from (part for part in _parts(module) if part not in called and telling.isdisjoint(part.modules()))


def _has_numbers(module: nn.Module) -> bool:
    return any(True for _ in itertools.chain(module.parameters(), module.buffers()))


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module; the children of those that its code takes apart."""
    apart = taken_apart(module)
    for name, child in module.named_children():
        if name in apart and not _settles(child):
            yield from child.children()
        else:
            yield child


def follow(
    traced: Traced,
    module: nn.Module,
    paths: dict[nn.Module, str],
    given: Example | Arguments | None,
    method: str = "forward",
    flags: Mapping[str, Any] | None = None,
    holdings: Holdings | None = None,
) -> CallTracer:
    """Trace, keeping whole one more function or module type after each failure, until all goes through or the root
    itself stops it.

    Args:
        holdings: of the module, if it is to be noted which of them change as it runs.
    """
    opaque = rearranging_layers()
    whole = {one: ("", Untraceable(f"{one.__name__} is kept whole")) for one in rearrangers()}
    followed: set[FunctionType] = set()
    assumed: dict[type, tuple[str, Untraceable]] = {}  # types that were followed on one of several ways
    while True:
        policy = Policy(module, opaque, whole.keys(), followed, assumed.keys())
        state = holdings.state() if holdings else ()
        arguments, values = bind(module, method, given, flags or {}, paths)
        run = Partial(values) if values else None
        places = (traced.watched or {}).get((paths[module], method))
        look = functools.partial(holdings.state, places) if holdings and places else None
        tracer = CallTracer(module, method, arguments, paths, traced, policy, run=run, look=look)
        recorder = tracer.recorder
        try:
            with torch.no_grad(), unchanged(module), tracer.watching():
                tracer.trace(Root(module))
                clear_frames(recorder.refused)
                recorder.note_escaped(escaped(tracer.values, recorder.calls))
            if recorder.refused is not None:
                raise recorder.refused  # caught by the forward itself, which would do something else with a real value
            recorder.stopped = recorder.catcher
            if recorder.stopped is not None:
                raise RuntimeError("it catches an error of a part that had begun")
        except StructrepError:
            raise
        except Exception as error:
            _note_reach(traced, tracer)
            if not recorder.calls:
                raise
            call = recorder.stopped or recorder.calls[0]
            recorder.stopped = call
            if isinstance(error, NotKept) and error.function in whole:
                followed.add(error.function)
                del whole[error.function]
                continue
            function = stopping_function(error.__traceback__, inspect.unwrap(call.code))
            if function is not None and function not in whole and function not in followed:
                reason = Untraceable(f"{function.__qualname__} cannot be followed: {said(error)}")
                whole[function] = (call.path, reason)
                continue
            what = f"{type(call.module).__name__}.{call.method}"
            if isinstance(recorder.refused, Unanswered) and type(call.module) not in assumed:
                reason = Untraceable(f"{what} is followed where this does not hold: {recorder.refused}")
                assumed[type(call.module)] = call.path, reason
                continue
            reason = Untraceable(f"{what} cannot be followed: {said(error)}")
            assumed.pop(type(call.module), None)
            traced.untraced.setdefault(call.path, reason)
            if call.module is module or type(call.module) in opaque:
                recorder.stopped = recorder.calls[0]
                _note_introspections(traced, tracer)
                return tracer
            opaque = opaque | {type(call.module)}
            continue
        traced.unfollowed.update(whole)
        traced.assumed.update(assumed.values())
        if holdings and (changed := holdings.changes(state)):
            key = paths[module], method
            traced.changes[key] = traced.changes.get(key, frozenset()) | changed
        if values:
            with unchanged(module):
                infer_shapes(tracer.graph, values)
        fold_constants(tracer)
        traced.origins.update(tracer.origins.known)
        traced.written |= tracer.origins.written
        _note_reach(traced, tracer)
        _note_introspections(traced, tracer)
        return tracer


def _note_introspections(traced: Traced, tracer: CallTracer) -> None:
    for path, one in tracer.parts.all():
        traced.introspections[path].append(one)


def _note_reach(traced: Traced, tracer: CallTracer) -> None:
    """Note who reaches into whom."""
    touched = {tracer.names[one] for one in tracer.constants.touched if one in tracer.names}
    for path, calls in tracer.reach.calls.items():
        used = tracer.reach.users(path, touched)
        if used:
            traced.reached.setdefault(path, set()).update(used)
        traced.told.setdefault(path, set()).update(calls - used)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Give modules back the attributes they had: a forward may write traced values to itself, and be traced again."""
    before = {module: snapshot(module.__dict__) for module in model.modules()}
    try:
        yield
    finally:
        for module, attributes in before.items():
            if not alike(attributes, module.__dict__):
                module.__dict__.clear()
                module.__dict__.update(attributes)
