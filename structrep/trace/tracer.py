"""The tracer that makes the nodes of a call, and what watches the code that runs meanwhile.

* `recorder` has the calls, for each node to say which made it; `contexts` what they run in.
* `constants` sees what is computed of weights alone; `origins` knows how.
* `attributes` and `environment` see what code looks up and asks; `reads` notes it in the call that asks, `parts`
  what is about parts, `reach` who uses what is not its own.
* `observer` answers where code asks what hangs on the input.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from structrep import process
from structrep.errors import Unreadable, said
from structrep.graph import operations
from structrep.graph.calls import Traced, storage
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
    RECOMPUTE,
    STAND_IN,
    UNFOLLOWED,
    UNKNOWN,
    VALUE,
)
from structrep.graph.observed import Thing
from structrep.graph.run import Partial
from structrep.graph.structures import is_traced, mapped, proxies
from structrep.modules import parametrized
from structrep.modules.copies import is_compiled
from structrep.read.endings import ends
from structrep.read.modules import knows
from structrep.terms.layer import Computed
from structrep.trace.aten import gives_more, in_torch
from structrep.trace.attributes import Attributes
from structrep.trace.constants import Constants, compute
from structrep.trace.environment import Environment
from structrep.trace.inputs import Placeholder
from structrep.trace.introspection import Introspections
from structrep.trace.observing import Observer
from structrep.trace.origins import Origins
from structrep.trace.patches import (
    compiled_inlined,
    keep_scripted,
    keep_whole,
    see_through_checkpoints,
    show_tensors,
    take_traced_sizes,
)
from structrep.trace.policy import Policy
from structrep.trace.proxies import INFOS, TracedInfo, TracedValue
from structrep.trace.reach import Reach
from structrep.trace.reads import Reads
from structrep.trace.recorder import Recorder


class Root(nn.Module):
    """What torch.fx is given to trace, so that the module itself is called like any other."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> None: ...


class CallTracer(process.Tracer):
    """Makes the graph of one call of a method.

    Args:
        arguments: what it is called with, by position and by name, with placeholders for what may be another.
        paths: of the modules that the trace sees.
        held: the tensors of the model, by their names.
        policy: what is followed.
        answers: what reads are answered otherwise than it is, by `Call.reads`' keys.
        contexts: that the call is made in.
        run: of the example.
        look: gives what objects hold of which it is noted which call changes them.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        paths: dict[nn.Module, str],
        held: Traced,
        policy: Policy,
        *,
        answers: Mapping[tuple[str, str], Any] | None = None,
        contexts: tuple[Context, ...] = (),
        run: Partial | None = None,
        look: Callable[[], tuple[Any, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.module, self.method, self.arguments = module, method, arguments
        self.paths, self.names, self.policy = paths, held.names, policy
        self.contexts, self.origins = Contexts(contexts), Origins()
        self.recorder = Recorder(paths, self.contexts, self.origins, look)
        self.reach = Reach(held.names, paths, self.recorder)
        self.reads = Reads(lambda: self.recorder.current, answers)
        self.parts = Introspections(paths, self.reads.current, self.reach.look_up)
        self.environment = Environment(self.reads)
        self.attributes = Attributes(self.reads, self.parts, self.environment.hooks)
        watched = self.recorder, self.reach, self.origins, self.reads
        self.constants = Constants(*watched, held.entries, module.parameters(), module.buffers())
        self.observer = Observer(self, run)
        self.count = 0
        self.tensor_nodes: dict[int, fx.Node] = {}
        self.values: list[ref[fx.Proxy]] = []

    # --- torch.fx's hooks --------------------------------------------------------------------------------------------

    def arguments_of(self, root_fn: Any, is_module: bool, concrete_args: Any) -> tuple[Any, list[Any]]:
        def placed(leaf: Any) -> Any:
            if not isinstance(leaf, Placeholder):
                return leaf
            proxy = self.create_proxy("placeholder", leaf.name, (), {})
            if isinstance(leaf.given, Thing):
                UNKNOWN.note(proxy.node, leaf.given.cls)
            elif leaf.given is not None and leaf.given.number is not None:
                STAND_IN.note(proxy.node, leaf.given.number)
            return proxy

        args, kwargs = mapped(placed, self.arguments)

        def enter() -> list[fx.Proxy]:
            function = getattr(self.module, self.method)
            if self.method in self.module.__dict__ and self.method != "forward":
                function = function.args[-1]  # the method itself, not what watches it
            run = functools.partial(self._run_root, function)
            before = list(_held_by(self.module))
            result = self.recorder.record(self.module, run, args, kwargs, False, self.method, function)
            self.constants.unsteady.update(
                storage(old) for module, name, old in before if self.recorder.replaces(module, name, old)
            )
            return list(proxies(result))

        return enter, []

    def _run_root(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.method == "forward" and self.module._forward_pre_hooks:
            compute(self.module, parametrized.computed(self.module))
        return function(*args, **kwargs)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.observer.busy or m not in self.paths:  # held outside the module tree: a part of whoever calls it
            return forward(*args, **kwargs)
        caller = self.recorder.current
        if is_compiled(m):
            forward = m.get_submodule("_orig_mod")  # as if it were not: what is merged inside is compiled when it runs
        elif type(m).__call__ is not nn.Module.__call__ and caller is not None:
            self.recorder.stopped = caller
            raise RuntimeError(f"{type(m).__name__} does more than its forward when it is called")
        leaf = caller is not None and self.policy.keeps(m)
        if leaf and not is_traced((args, kwargs)):
            leaf = False  # it depends on constants alone
        if leaf and not isinstance(m, torch.jit.ScriptModule):
            inspect.signature(m.forward).bind(*args, **kwargs)  # or it raises what the call does
        function = (lambda *a, **k: self.create_proxy("call_module", self.paths[m], a, k)) if leaf else forward
        return self.recorder.record(m, function, args, kwargs, leaf, "forward", m.forward)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """All that has to be watched or changed while the trace runs."""
        methods = [m for m in self.module.modules() if m in self.paths and not self.policy.keeps(m)]
        with (
            self.recorder.methods(methods),
            process.alone(),
            parametrized.uncached(),
            compiled_inlined(),
            self.constants,
        ):
            take_traced_sizes(self.module, self.create_proxy)
            keep_whole(self.policy.whole, self.create_proxy)
            keep_scripted(self.create_proxy)
            see_through_checkpoints()
            show_tensors(self.module, self.attributes.is_instance)
            self.attributes.watch(self.module)
            self.environment.watch(self.module)
            self.contexts.watch()
            yield

    def _computed(self, m: nn.Module) -> dict[str, Computed] | Unreadable:
        """What a layer that is read as a whole computes before every call; or why that is no constant."""
        names = parametrized.computed(m) if knows(m) or ends(m) else ()
        if not names:
            return {}
        stopped, refused = self.recorder.stopped, self.recorder.refused
        try:
            values = compute(m, names)
        except Exception as error:
            self.recorder.stopped, self.recorder.refused = stopped, refused
            which = f"{' and '.join(names)} of {self.paths[m] or 'the model'}"
            remedy = parametrized.removals(m, self.paths[m])
            remedy = remedy and f"; or {remedy}"
            return Unreadable(f"{which}, computed before every call, cannot be made a constant: {said(error)}{remedy}")
        return {name: self.origins.computed(value) for name, value in values.items()}

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        """Called for every parameter, buffer and child that a forward looks up."""
        if not isinstance(attr_val, fx.Proxy):  # as of a buffer that the forward has written to
            self.reach.look_up(attr, attr_val)
        return attr_val

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = self.again(node)
        self.values.append(ref(made))
        return made

    def again(self, node: fx.Node) -> fx.Proxy:
        """A value once more, which no code of the user's gets hold of."""
        return (TracedInfo if node.target in INFOS else TracedValue)(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Called for every condition on a traced value."""
        return self.observer.condition(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Called where a traced value is looped over or unpacked into a call."""
        count = self.observer.length(obj, "a loop over a value of which nothing tells how long it is")
        return (obj[index] for index in range(count))  # type: ignore[index]

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
        call = self.recorder.current
        CALL.note(node, call)
        AT.note(node, self.recorder.place() if call is not None and not call.leaf else None)
        UNFOLLOWED.note(node, self.policy.hides(node, None if call is None else call.module))
        self.count += 1
        for one in operations.writes(node) if not UNFOLLOWED.of(node) else ():
            if isinstance(VALUE.get(one), Tensor):
                self.constants.note_written(VALUE.of(one), operations.name_of(node.target))
        if node.op == "call_module" and call is not None:
            self.constants.note_assigned(node, call)
            COMPUTED.note(node, self._computed(call.module))
        if call is not None and node.op != "get_attr":
            call.steps.append(node)
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, nn.Module) and a in self.paths:
            held = self.create_node("get_attr", self.paths[a], (), {})
            HELD.note(held, a)
            return held
        if type(a).__module__ == "numpy" and not hasattr(a, "__len__"):  # one of its numbers
            return super().create_arg(a.item())
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
                FORMULA.note(node, self.origins.formula(a))
                RECOMPUTE.note(node, functools.partial(self.origins.exact, a))
            self.tensor_nodes[id(a)] = node
        return node


def _held_by(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The parameters and buffers of a module and all below it, by who holds them and under which name."""
    for part in (one for one in module.modules() if not isinstance(one, torch.jit.ScriptModule)):
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                yield part, name, tensor
