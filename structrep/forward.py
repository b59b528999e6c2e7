"""The forward of one module, cut out of the flat graph of a model.

The recorded calls say which nodes a module's own code made and which its children did. Nodes that edits touch are
written out, with the edits made; untouched children stay calls of children.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from types import CodeType
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from structrep.errors import Unreadable
from structrep.generated import Method
from structrep.observe import Given, Part, Thing
from structrep.readers import Layer, Same, aliases, asks_kind, counts_sizes, mutates, only_asserted, read_node, writers
from structrep.trace import Call, Traced, storage
from structrep.values import is_traced

_ITSELF = "structrep_itself"  # an attribute path for the module itself, for which graphs have none


@dataclass
class Edits:
    """What changes in forwards, by node of the flat graph."""

    dead: set[fx.Node] = field(default_factory=set)
    replaced: dict[fx.Node, tuple[fx.Node, str]] = field(default_factory=dict)  # root -> base and path of the new layer
    bypassed: dict[fx.Node, fx.Node] = field(default_factory=dict)  # root -> base
    refilled: dict[fx.Node, tuple[fx.Node, str]] = field(default_factory=dict)  # a functional call in a convolution's
    # own forward -> base and path of that convolution, which keeps its place and holds `weight` and `bias`
    ended: set[fx.Node] = field(default_factory=set)  # functional norms that give up their weight and bias
    owners: dict[Call, set[Call]] = field(default_factory=dict)  # whose forward changes -> calls to write out inside it


class Forward:
    """The forward of one module (or another of its methods), cut out of the flat graph, with the edits made.

    Raises:
        Unreadable: the forward takes values from elsewhere than its arguments.
    """

    def __init__(self, traced: Traced, edits: Edits, call: Call, written_out: set[Call]) -> None:
        self.traced = traced
        self.edits = edits
        self.call = call
        self.written_out = written_out
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.constants: dict[str, Tensor] = {}
        self.rebuilt: dict[int, Any] = {}
        self._arguments()
        self._body(call)
        self.graph.output(self._rebuild(call.result))
        for node in reversed(self.graph.nodes):
            unused = node.target in (operator.getitem, getattr, "view", "reshape") or node.meta.get("constant")
            if not node.users and unused:
                self.graph.erase_node(node)
        code = self.graph.python_code("self")
        source = code.src.strip().replace("def forward(", f"def {call.method}(", 1) + "\n"
        source = source.replace(f"self.{_ITSELF}", "self")
        function = next(c for c in compile(source, call.method, "exec").co_consts if isinstance(c, CodeType))
        unused = {"device"} if "device(type=" not in source else set()  # written code always knows some names
        if clash := sorted((code.globals.keys() - unused) & set(function.co_varnames[: function.co_argcount])):
            raise Unreadable(f"an argument named {clash[0]} clashes with what written code uses")
        names = {name: value for name, value in code.globals.items() if name in function.co_names}
        self.method = Method.of(call.method, source, names)
        try:
            self.method.compile(f"<{call.method}>")
        except (SyntaxError, NameError) as error:
            raise Unreadable(f"{call.path or 'the model'}: its new forward is no valid code: {error}") from error

    def _arguments(self) -> None:
        """Placeholders named and ordered as the module's own forward has them; constants stay as traced."""
        signature = inspect.signature(self.call.function)
        bound = signature.bind(*self.call.args, **self.call.kwargs)
        self._check_calls(bound)
        for name, parameter in signature.parameters.items():
            star = (
                "*" if parameter.kind is parameter.VAR_POSITIONAL else "**" * (parameter.kind is parameter.VAR_KEYWORD)
            )
            default = () if star or parameter.default is parameter.empty else (parameter.default,)
            if default and not _is_literal(default[0]):
                raise Unreadable(f"the default of argument {name} is no literal: {default[0]!r}")
            node = self.graph.placeholder(star + name, None, *default)
            if name in bound.arguments:
                self._accept(bound.arguments[name], node, name, default == (None,))
            elif star:
                self._expect(node, () if star == "*" else {}, name)
            elif default:
                self._expect(node, *default, name)

    def _check_calls(self, traced: inspect.BoundArguments) -> None:
        """Raise where a run has shown that the model calls this with other arguments than it was traced with."""
        path, method = self.call.path, self.call.method
        whole = inspect.BoundArguments(traced.signature, traced.arguments.copy())
        whole.apply_defaults()
        for form in (
            self.traced.observed.forms(path, method) if not isinstance(self.call.module, fx.GraphModule) else ()
        ):
            if form is None:
                raise Unreadable(f"{path} is given more than tensors and plain values as the model runs")
            for name, value in form.given.items():
                if name not in whole.arguments or not _fits(value, whole.arguments[name]):
                    raise Unreadable(f"{path} is called with another {name} as the model runs than it was traced with")

    def _accept(self, value: Any, node: fx.Node, name: str, optional: bool) -> None:
        if is_traced(value):
            if optional:
                self.graph.call_function(expect_given, (name, node))
            self._expect(node, value, name)
            for proxy, access in _places(value, node, self.graph):
                self.env[proxy.node] = access
        else:
            self._expect(node, value, name)

    def _expect(self, node: fx.Node, value: Any, name: str) -> None:
        """The merged forward holds for the traced constants and structure of this argument only."""
        template = _template(value)
        if template is not ... and not isinstance(self.call.module, fx.GraphModule):  # which was itself made for them
            self.graph.call_function(expect, (name, node, template))

    def _body(self, call: Call) -> None:
        if call.mutates:
            raise Unreadable(
                f"{call.path or 'the model'} changes its arguments or itself as it runs, beside its result"
            )
        for step in call.steps:
            if isinstance(step, fx.Node):
                self._copy(step)
            elif step in self.written_out or step.leaf or step.method != "forward":
                self._body(step)
            else:
                self._collapse(step)

    def _copy(self, node: fx.Node) -> None:
        if node.meta["autocast"]:
            raise Unreadable(f"{self.call.path or 'the model'} runs part of its forward under autocast")
        if node in self.edits.refilled:
            self.env[node] = self._refilled(node, *self.edits.refilled[node])
        elif node in self.edits.replaced:
            base, path = self.edits.replaced[node]
            self.env[node] = self.graph.call_module(self._relative(path), (self._load(base),))
        elif node in self.edits.bypassed:
            self.env[node] = self._load(self.edits.bypassed[node])
        elif isinstance(same := self._unchanged(node), fx.Node):
            self.env[node] = self._load(same)
        elif asks_kind(node) and not self._has(cast(fx.Node, node.args[0])):
            self.env[node] = self.graph.call_function(getattr, (next(iter(self.env.values())), node.args[1]))
        elif node in self.edits.dead:
            return
        elif (only_asserted(node) or counts_sizes(node)) and not all(self._has(n) for n in node.all_input_nodes):
            return  # of sizes that are no longer there; whoever would need them says so
        else:
            target = self._relative(str(node.target)) if node.op == "call_module" else node.target
            load = self._load_input if node in self.edits.ended else self._load
            args, kwargs = fx.node.map_arg(node.args, load), fx.node.map_arg(node.kwargs, load)
            self.env[node] = self.graph.create_node(node.op, target, args, kwargs)
            self.env[node].meta["constant"] = "value" in node.meta

    def _refilled(self, node: fx.Node, base: fx.Node, path: str) -> fx.Node:
        """The same call, with the parameters that its module will have."""
        weight, bias = (
            self.graph.get_attr(self._relative(".".join(filter(None, (path, name))))) for name in ("weight", "bias")
        )
        rest = fx.node.map_arg(node.args[3:], self._load)
        named = {k: v for k, v in node.kwargs.items() if k not in ("input", "weight", "bias")}
        kwargs = fx.node.map_arg(named, self._load)
        assert callable(node.target)
        return self.graph.call_function(node.target, (self._load(base), weight, bias, *rest), kwargs)

    def _unchanged(self, node: fx.Node) -> fx.Node | None:
        """What an arithmetic operation such as `x + 0` gives back as it is."""
        if (
            node.op != "call_function"
            or node in self.edits.dead
            or getattr(node.target, "__module__", "") != "_operator"
        ):
            return None
        reading = read_node(node)
        if not isinstance(reading, Same):
            return None
        if mutates(node) is reading.source:
            return reading.source
        # An operation that changes nothing still gives a value of its own, and either may be written to.
        same = aliases(node) | aliases(reading.source)
        written = any(not isinstance(read_node(writer), Same) for writer in writers(same))
        alone = _is_new(reading.source) if written else len(reading.source.users) == 1
        return reading.source if alone else None

    def _collapse(self, call: Call) -> None:
        """A child's call, as it stands in its parent's forward."""
        args, kwargs = self._rebuild(call.args), self._rebuild(call.kwargs)
        node = self.graph.call_module(self._relative(call.path), args, kwargs)
        for before, after in call.written:
            self.env[after] = self._load(before)
        for proxy, access in _places(call.result, node, self.graph):
            self.env[proxy.node] = access

    def _relative(self, path: str) -> str:
        """The path of a module or tensor, as the module whose forward this is has it."""
        prefix = f"{self.call.path}." if self.call.path else ""
        return path[len(prefix) :] if path.startswith(prefix) else self._other_name(path)

    def _other_name(self, path: str) -> str:
        """What is held in several places, an activation that all blocks share for instance, is known by the first."""
        parent, _, name = path.rpartition(".")
        holder = self.traced.model.get_submodule(parent)
        held: Any = getattr(holder, name, None)
        module = self.call.module
        known = (
            *module.named_modules(remove_duplicate=False),
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        found: str | None = next((other for other, value in known if value is held and held is not None), None)
        if found is None:
            raise Unreadable(f"{self.call.path} uses {path}, which is not below it")
        return found

    def _has(self, node: fx.Node) -> bool:
        return node in self.env or node.op == "get_attr"

    def _load(self, node: fx.Node) -> Any:
        if isinstance(node.meta.get("held"), nn.Module):
            return self.graph.get_attr(_ITSELF if node.target == self.call.path else self._relative(str(node.target)))
        if node.op == "get_attr":
            return self._constant(node.meta["value"])
        if node not in self.env:
            raise Unreadable(
                f"{self.call.path or 'the model'} uses {node.name}, which does not come in through its arguments"
            )
        return self.env[node]

    def _load_input(self, node: fx.Node) -> Any:
        """What depends on the input; None for the rest."""
        return None if "value" in node.meta else self._load(node)

    def _constant(self, tensor: Tensor) -> Any:
        """A tensor attribute by its name; what was computed from some is computed again; anything else is kept as it
        is."""
        if id(tensor) not in self.rebuilt:
            self.rebuilt[id(tensor)] = self._recompute(tensor)
            self.rebuilt[id(tensor)].meta["constant"] = True
        return self.rebuilt[id(tensor)]

    def _recompute(self, tensor: Tensor) -> Any:
        if id(tensor) in self.traced.names:
            return self.graph.get_attr(self._relative(self.traced.names[id(tensor)]))
        origin = self.traced.origins.get(id(tensor))
        plain = origin is not None and getattr(origin.function, "__name__", "__get__") != "__get__"
        if origin is not None and plain and storage(tensor) not in self.traced.written:
            spec: Any
            leaves, spec = pytree.tree_flatten((origin.args, origin.kwargs))
            args, kwargs = pytree.tree_unflatten(
                [self._constant(x) if isinstance(x, Tensor) else x for x in leaves], spec
            )
            name = origin.function.__name__
            if getattr(Tensor, name, None) is origin.function:
                return self.graph.call_method(name, args, kwargs)
            return self.graph.call_function(origin.function, args, kwargs)
        name = f"constant_{len(self.constants)}"
        self.constants[name] = tensor
        return self.graph.get_attr(name)

    def _rebuild(self, value: Any) -> Any:
        """A structure of traced values, as an argument of the new graph."""
        if isinstance(value, fx.Proxy):
            return self._load(value.node)
        if isinstance(value, Tensor):
            return self._constant(value)
        if isinstance(value, slice):
            return slice(*(self._rebuild(v) for v in (value.start, value.stop, value.step)))
        if is_dataclass(value) and not isinstance(value, type):
            if not isinstance(value, dict) and (
                hasattr(value, "__post_init__") or not all(f.init for f in fields(value))
            ):
                raise Unreadable(f"a {type(value).__name__} is more than its fields, and cannot be written as code")
            given = {f.name: self._rebuild(getattr(value, f.name)) for f in fields(value)}
            return self.graph.call_function(type(value), (), given)
        if isinstance(value, (tuple, list)) and not _is_plain(type(value)):
            raise Unreadable(f"a {type(value).__name__} may be more than its items, and cannot be written as code")
        if isinstance(value, tuple):
            parts = [self._rebuild(item) for item in value]
            return self.graph.call_function(type(value), tuple(parts)) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, list):
            return [self._rebuild(item) for item in value]
        if type(value) is dict:
            return {key: self._rebuild(item) for key, item in value.items()}
        if is_traced(value):
            raise Unreadable(
                f"{self.call.path or 'the model'} passes a {type(value).__name__}, which cannot be written as code"
            )
        return value


def _is_new(node: fx.Node) -> bool:
    """Whether a node gives what a convolution or Linear has made, perhaps normed, and nothing else can look at."""
    while sum(not only_asserted(user) for user in node.users) == 1 and not node.meta.get("kept"):
        reading = read_node(node)
        if isinstance(reading, Layer) and reading.kind in ("conv", "linear"):
            return True
        if reading is None or not isinstance(reading, (Layer, Same)) or reading.source is None:
            return False
        node = reading.source
    return False


def _is_plain(cls: type) -> bool:
    """Whether a list or tuple type has no code of its own."""
    return cls in (list, tuple, torch.Size) or (cls.__mro__[1] is tuple and hasattr(cls, "_fields"))


def _is_literal(value: Any) -> bool:
    """Whether a value's repr is code for it."""
    if type(value) in (list, tuple):
        return all(map(_is_literal, value))
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


def expect_given(name: str, value: object) -> None:
    """Raise where a merged forward is called without an argument that it was traced with."""
    if value is None:
        raise ValueError(f"this forward was reparameterized for a given {name} and was called with {name}=None")


def expect(name: str, value: object, traced: object) -> None:
    """Raise where a merged forward is called with other constants, or another structure, than it was traced with."""
    if not _matches(value, traced):
        raise ValueError(f"this forward was reparameterized for {name}={traced!r} and was called with {name}={value!r}")


def _matches(value: Any, traced: Any) -> bool:
    if traced is ...:
        return True
    if isinstance(traced, (list, tuple)):
        alike = isinstance(value, (list, tuple)) and len(value) == len(traced)
        return alike and all(map(_matches, value, traced))
    if isinstance(traced, dict):
        return (
            isinstance(value, dict)
            and value.keys() == traced.keys()
            and all(_matches(value[k], traced[k]) for k in traced)
        )
    return value is traced or (value is not None and traced is not None and bool(value == traced))


def _fits(seen: Any, traced: Any) -> bool:
    """Whether an argument that a part was seen to be given is one that it was traced with."""
    if isinstance(seen, Given):
        plain = type(traced) in (int, float) and traced == seen.number
        return plain or isinstance(traced, fx.Proxy) or (seen.number is None and isinstance(traced, Tensor))
    if isinstance(seen, (list, tuple)):
        alike = isinstance(traced, (list, tuple)) and len(seen) == len(traced)
        return isinstance(traced, fx.Proxy) or (alike and all(map(_fits, seen, traced)))
    if isinstance(seen, dict) and isinstance(traced, dict):
        return seen.keys() == traced.keys() and all(_fits(seen[key], traced[key]) for key in seen)
    if isinstance(seen, (Part, Thing)) or is_traced(traced):
        return seen is not None
    return _matches(seen, traced)


def _template(value: Any) -> Any:
    """A structure with `...` where anything may stand.

    Raises:
        Unreadable: it holds a constant that cannot be written as code.
    """
    if isinstance(value, (fx.Proxy, Tensor)):
        return ...
    if value is None or type(value) in (bool, int, float, str, torch.dtype, torch.device):
        return value
    if type(value) in (list, tuple):
        parts = [_template(item) for item in value]
        return parts if type(value) is list else tuple(parts)
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {key: _template(item) for key, item in value.items()}
    if is_traced(value):
        return ...
    raise Unreadable(f"a forward that is given a {type(value).__name__} cannot be written anew")


def _places(value: Any, node: fx.Node, graph: fx.Graph) -> Iterator[tuple[fx.Proxy, fx.Node]]:
    """Every traced value inside a structure, with the expression that takes it out of `node`."""
    if isinstance(value, fx.Proxy):
        yield value, node
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if is_traced(item):
                yield from _places(item, graph.call_function(operator.getitem, (node, index)), graph)
    elif isinstance(value, dict) and not is_dataclass(value):
        for key, item in value.items():
            if is_traced(item):
                yield from _places(item, graph.call_function(operator.getitem, (node, key)), graph)
    elif is_dataclass(value):
        for f in fields(value):
            item = getattr(value, f.name)
            if is_traced(item):
                yield from _places(item, graph.call_function(getattr, (node, f.name)), graph)
