"""The body of a forward that is written anew: the steps of its trace, with the changes made."""

from __future__ import annotations

import enum
import operator
import textwrap
from collections.abc import Mapping, Set
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from structrep.deployed.answers import Held
from structrep.errors import Unreadable
from structrep.graph.aliases import aliases, writers
from structrep.graph.calls import Call
from structrep.graph.facts import ASSERTED, AUTOCAST, CONSTANT, CONTEXTS, HELD, STORED, VALUE
from structrep.graph.operations import does, writes
from structrep.graph.queries import asks_dtype, counts_sizes, only_asserted
from structrep.graph.table import Is
from structrep.match.sum_order import as_traced
from structrep.modules.source import written_in
from structrep.read.nodes import read_node
from structrep.rewrite.blocks import Blocks, indented
from structrep.rewrite.constants import ConstantLoader
from structrep.rewrite.node_changes import NodeChanges
from structrep.rewrite.otherwise import Key
from structrep.rewrite.reads_again import ReadsAgain
from structrep.rewrite.spelling import Spelling
from structrep.rewrite.structures import built, places
from structrep.terms.layer import Identity, Layer
from structrep.trace.followed import Followed

_ITSELF = "structrep_itself"  # an attribute path for the module itself, for which graphs have none


_LITERALS = (
    *(bool, int, float, complex, str, bytes, type(None), type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


class _Name:
    """What stands for a value in a graph that becomes text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _name_values(graph: fx.Graph) -> dict[str, Held]:
    """Give names to the values in a graph that no text says: numbers of numpy, arrays, subclasses of Python's numbers.

    Returns:
        The values by those names.
    """
    held: dict[str, Held] = {}

    def named(value: Any) -> Any:
        numbers = isinstance(value, (bool, int, float, complex, str, bytes)) and not isinstance(value, enum.Enum)
        plain = type(value) in _LITERALS or (not numbers and type(value).__module__ not in ("numpy", "array"))
        if plain:
            return value
        name = f"structrep_value_{len(held)}"
        held[name] = Held(value)
        return _Name(f"{name}.value")

    for node in graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate(node.args, named), fx.node.map_aggregate(node.kwargs, named)
    return held


class Body:
    """The graph of a forward, in which nodes that changes touch are others; untouched children stay calls of children.

    Args:
        settled: questions about inputs that need not be asserted.
        graph, given: with its parameters: the graph, and what comes in through them.

    Attributes:
        env: what the values of the trace are in the graph.
    """

    def __init__(
        self,
        followed: Followed,
        changes: NodeChanges,
        spelling: Spelling,
        reads_again: ReadsAgain,
        settled: Set[Key],
        graph: fx.Graph,
        given: Mapping[fx.Node, fx.Node],
    ) -> None:
        self.followed, self.call, self.changes, self.settled = followed, followed.call, changes, settled
        self.spelling, self.reads_again = spelling, reads_again
        self.graph = graph
        self.env: dict[fx.Node, Any] = dict(given)
        self.blocks = Blocks(graph, followed.call)
        self.constants = ConstantLoader(graph, followed.traced, spelling, reads_again, self.blocks)

    def write(self) -> None:
        """Write the graph.

        Raises:
            Unreadable: the forward takes values from elsewhere than its arguments, or does what no code can say.
        """
        self._write(self.call)
        self.blocks.enter(self.call.contexts)
        self.graph.output(self._built(self.call.result))
        for node in reversed(self.graph.nodes):
            unused = node.target in (operator.getitem, getattr) or does(node, Is.RESHAPES) or CONSTANT.get(node)
            if not node.users and unused:
                self.graph.erase_node(node)

    def code(self) -> tuple[str, str, dict[str, Any]]:
        """The first line of the method, the rest of it, and the names that these use."""
        held = _name_values(self.graph)
        code = self.graph.python_code("self")
        source = code.src.strip().replace("def forward(", f"def {self.call.method}(", 1) + "\n"
        head, _, rest = source.replace(f"self.{_ITSELF}", "self").partition("\n")
        return head, indented(textwrap.dedent(rest)), code.globals | held

    def _write(self, call: Call) -> None:
        """Write what a call does."""
        if call.mutates:
            raise Unreadable(
                f"{call.path or 'the model'} changes its arguments or itself as it runs, beside its result"
            )
        for step in call.steps:
            if isinstance(step, fx.Node):
                self._write_node(step)
            elif self.followed.writes_out(step):
                self._write(step)
            else:
                self._write_call(step)

    def _write_node(self, node: fx.Node) -> None:
        if AUTOCAST.of(node):
            raise Unreadable(f"{self.call.path or 'the model'} runs part of its forward under autocast")
        self.blocks.enter(CONTEXTS.of(node))
        if node in self.changes.refilled:
            self.env[node] = self._refilled(node, *self.changes.refilled[node])
        elif node in self.changes.replaced:
            base, path = self.changes.replaced[node]
            self.env[node] = self.graph.call_module(self.spelling.relative(path), (self._load(base),))
        elif node in self.changes.bypassed:
            self.env[node] = self._load(self.changes.bypassed[node])
        elif (same := self._unchanged(node)) is not None:
            self.env[node] = self._load(same)
        elif asks_dtype(node) and not self._has(cast(fx.Node, node.args[0])):
            self.env[node] = self.graph.call_function(getattr, (next(iter(self.env.values())), node.args[1]))
        elif node in self.changes.dead or ASSERTED.get(node) in self.settled:
            return
        elif (only_asserted(node) or counts_sizes(node)) and not all(self._has(n) for n in node.all_input_nodes):
            return  # of sizes that are no longer there; whoever would need them says so
        else:
            op, target, args = as_traced(node, self.changes.reordered)
            target = self.spelling.relative(str(target)) if op == "call_module" else target
            load = self._load_input if node in self.changes.ended else self._load
            args = fx.node.map_arg(self.reads_again.put(args, node, ("args",)), load)
            kwargs = fx.node.map_arg(self.reads_again.put(dict(node.kwargs), node, ("kwargs",)), load)
            self.env[node] = self.graph.create_node(op, target, args, kwargs)
            CONSTANT.note(self.env[node], VALUE.known(node))

    def _refilled(self, node: fx.Node, base: fx.Node, path: str) -> fx.Node:
        """The same call, with the parameters that its module will have."""
        weight, bias = (
            self.graph.get_attr(self.spelling.relative(".".join(filter(None, (path, name)))))
            for name in ("weight", "bias")
        )
        rest = fx.node.map_arg(node.args[3:], self._load)
        named = {k: v for k, v in node.kwargs.items() if k not in ("input", "weight", "bias")}
        kwargs = fx.node.map_arg(named, self._load)
        assert callable(node.target)
        return self.graph.call_function(node.target, (self._load(base), weight, bias, *rest), kwargs)

    def _unchanged(self, node: fx.Node) -> fx.Node | None:
        """What an arithmetic operation such as `x + 0` gives back as it is."""
        asked = self.reads_again.is_of(node)
        if node.op != "call_function" or asked or node in self.changes.dead or written_in(node.target) != "_operator":
            return None
        reading = read_node(node)
        if not isinstance(reading, Identity):
            return None
        if reading.source in writes(node):
            return reading.source
        # An operation that changes nothing still gives a value of its own, and either may be written to.
        same = aliases(node) | aliases(reading.source)
        written = any(not isinstance(read_node(writer), Identity) for writer in writers(same))
        alone = _is_new(reading.source) if written else len(reading.source.users) == 1
        return reading.source if alone else None

    def _write_call(self, call: Call) -> None:
        """Write a child's call, as it stands in its parent's forward."""
        self.blocks.enter(call.contexts)
        args = self._built(self.reads_again.put(call.args, call, ("args",)))
        kwargs = self._built(self.reads_again.put(call.kwargs, call, ("kwargs",)))
        node = self.graph.call_module(self.spelling.relative(call.path), args, kwargs)
        for before, after in call.written:
            self.env[after] = self._load(before)
        for proxy, access in places(call.result, node):
            self.env[proxy.node] = access

    def _built(self, value: Any) -> Any:
        return built(value, self.graph, self._loaded, self.call.path)

    def _loaded(self, value: fx.Proxy | Tensor) -> Any:
        return self._load(value.node) if isinstance(value, fx.Proxy) else self.constants.load(value)

    def _has(self, node: fx.Node) -> bool:
        return node in self.env or node.op == "get_attr"

    def _load(self, node: fx.Node) -> Any:
        where = self.call.path or "the model"
        if isinstance(HELD.get(node), nn.Module):
            itself = node.target == self.call.path
            return self.graph.get_attr(_ITSELF if itself else self.spelling.relative(str(node.target)))
        if node.op == "get_attr" and not VALUE.known(node):
            raise Unreadable(f"{where} uses a {type(HELD.get(node)).__name__} that is no part of it")
        if node.op == "get_attr":
            return self.constants.load(VALUE.of(node))
        if node not in self.env:
            raise Unreadable(f"{where} uses {node.name}, which does not come in through its arguments")
        return self.env[node]

    def _load_input(self, node: fx.Node) -> Any:
        """What depends on the input; None for the rest."""
        return None if VALUE.known(node) else self._load(node)


def _is_new(node: fx.Node) -> bool:
    """Whether a node gives what a convolution or Linear has made, perhaps normed, and nothing else can look at."""
    while sum(not only_asserted(user) for user in node.users) == 1 and not STORED.get(node):
        reading = read_node(node)
        if isinstance(reading, Layer) and reading.kind in ("conv", "linear"):
            return True
        if reading is None or not isinstance(reading, (Layer, Identity)) or reading.source is None:
            return False
        node = reading.source
    return False
