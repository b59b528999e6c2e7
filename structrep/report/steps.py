"""What a model computes, as steps to draw: each operation, where it is written, and which merge it is part of."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import networkx as nx
from torch import fx

from structrep.errors import Refusal
from structrep.graph.calls import Call, Traced
from structrep.graph.facts import CALL, VALUE
from structrep.graph.queries import asks_dtype, counts_sizes, only_asserted
from structrep.guard.sharing import Replicas
from structrep.match.isolation import named
from structrep.match.merge import Merge
from structrep.read.nodes import read_node
from structrep.records.plan import MergeRecord, RefusalRecord
from structrep.terms.layer import Blend, Concat, Identity, Layer, Reading, Sum

MOST = 40  # boxes in one picture


@dataclass(frozen=True)
class Place:
    """One call of a module, or of a method of a module; equal in a model and in what it was merged to."""

    path: str
    method: str = "forward"
    nth: int = 0  # of its calls
    module_class: str = field(default="", compare=False)

    def __str__(self) -> str:
        method = "" if self.method == "forward" else f"{'.' if self.path else ''}{self.method}()"
        return f"{self.path}{method}{f', call {self.nth + 1}' if self.nth else ''}"


Way = tuple[Place, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """One operation on values that depend on the input."""

    text: str
    kind: str  # "conv", "norm", "+" ...: what it counts as
    count: int  # how many of those it is: a sum of three values is two additions
    path: str  # of the module that it is, or is written in
    way: Way  # the calls around it from the outermost, and its own if it is a layer
    merge: int | None = None  # which of the plan's
    refused: tuple[int, ...] = ()  # which of the plan's refusals are about it


Graph: TypeAlias = nx.DiGraph  # of steps in the order in which they run, from what gives a value to what is given it


def training(replicas: Replicas, merges: Iterable[Merge], refusals: Iterable[RefusalRecord]) -> Graph:
    """The steps of a training-time model."""
    merged: dict[fx.Node, int] = {}
    for index, merge in enumerate(merges):
        absorbed = (node for one in merge.absorbed for node in one.nodes)
        for node in (*merge.nodes, *absorbed):
            merged.setdefault(node, index)
    return _graph(replicas.traced, lambda node: merged.get(_original(node, replicas)), refusals)


def deployed(traced: Traced, merges: Iterable[MergeRecord], refusals: Iterable[RefusalRecord]) -> Graph:
    """The steps of a deploy model."""
    merged = {"" if merge.where == "(root)" else merge.where: index for index, merge in enumerate(merges)}

    def place(node: fx.Node) -> int | None:
        paths = (call.path for call in CALL.of(node).chain())
        return next((merged[path] for path in paths if path in merged), None)

    return _graph(traced, place, refusals)


def _original(node: fx.Node, replicas: Replicas) -> fx.Node:
    """The node that does the same in the first call, for one in a later call that does what the first did."""
    for outer in CALL.of(node).homes():
        first, *others = replicas.bodies(outer)
        if outer in others and replicas.alike([first, *others]):
            return _original(list(first.nodes())[list(outer.nodes()).index(node)], replicas)
    return node


def _graph(traced: Traced, merge_of: Callable[[fx.Node], int | None], refusals: Iterable[RefusalRecord]) -> Graph:
    about: dict[str, list[int]] = {}
    for index, refusal in enumerate(refusals):
        for path in refusal.layers or (refusal.where,):
            about.setdefault(path, []).append(index)
    graph: Graph = nx.DiGraph()
    steps: dict[fx.Node, list[Step]] = {}  # what gives a node's value; several if a layer that does nothing joins them
    for trace in traced.traces:
        around = _way(traced, trace.root)
        given = [node for node in trace.nodes if node.op == "placeholder" and node.users]
        for node in trace.nodes:
            unused = node.op == "placeholder" and node not in given
            if node.op in ("get_attr", "output") or VALUE.known(node) or unused or _asks(node):
                continue
            sources = [step for source in node.all_input_nodes for step in steps.get(source, ())]
            reading = _read(node)
            if isinstance(reading, Identity):
                steps[node] = sources
                continue
            if node.op == "placeholder":
                step = Step(str(node.target) if len(given) > 1 else "input", "input", 1, trace.path, around)
            else:
                step = _step(traced, node, reading, merge_of(node), about)
            graph.add_node(step)
            graph.add_edges_from((source, step) for source in sources)
            steps[node] = [step]
    return graph


def _asks(node: fx.Node) -> bool:
    """Whether a node is a question about a value, and no value."""
    return node.op != "placeholder" and (counts_sizes(node) or asks_dtype(node) or only_asserted(node))


def _read(node: fx.Node) -> Reading | None:
    try:
        return read_node(node)
    except Refusal:
        return None


def _step(
    traced: Traced, node: fx.Node, reading: Reading | None, merge: int | None, about: Mapping[str, list[int]]
) -> Step:
    call: Call = CALL.of(node)
    name = type(call.module).__name__ if node.op == "call_module" else named(node).strip("_")
    text, kind, count = name, name, 1
    if isinstance(reading, Layer) and reading.kind != "view":
        text, kind = str(reading), reading.kind
    elif isinstance(reading, Sum):
        minus = any(sign < 0 for _, sign in reading.parts)
        text, kind, count = "−" if minus else "+", "+", len(reading.parts) - 1
    elif isinstance(reading, Blend):
        text, kind = "blend", "+"
    elif isinstance(reading, Concat):
        text, kind = "concat", "concat"
    elif name.lower().startswith("conv"):  # one that a hook or its settings keep from being read
        kind = "conv"
    marked = node.op == "call_module" or reading is not None
    refused = tuple(about.get(call.path, ())) if marked else ()
    return Step(text, kind, count, call.path, _way(traced, call), merge, refused)


def _way(traced: Traced, call: Call) -> Way:
    places = [
        Place(one.path, one.method, traced.calls[one.module, one.method].index(one), type(one.module).__name__)
        for one in call.chain()
        if one.path or one.method != "forward"
    ]
    return tuple(reversed(places))


Sides = tuple[list[Step], list[Step]]


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a model, before and after the merges, of which some parts are drawn as one each.

    Args:
        name: its path, or those of its first and last part.
        module_class: of the module that it is.
        sides: its steps at training time and at deploy time.
        depth: how many calls are around each of its parts.
    """

    name: str
    module_class: str
    sides: Sides
    depth: int = 0

    @property
    def size(self) -> int:
        return max(map(len, self.sides))

    def parts(self) -> dict[Hashable, Part]:
        """Its parts, as many as fit into a picture: the largest are opened as long as they and their like can be; if
        there are too many in the first place, stretches of them."""
        found = self._at(self.depth + 1)
        if _boxes(found) > MOST and len(stretches := self._stretches(found)) > 1:
            return stretches
        while (largest := max((part.size for part in found.values()), default=0)) > 1:
            opened: dict[Hashable, Part] = {}
            for key, part in found.items():
                alike = part.size > 1 and 2 * part.size >= largest
                opened |= part._at(part.depth + 1) if alike else {key: part}
            if _boxes(opened) > MOST:
                break
            found = opened
        return found

    def within(self, path: str) -> Part:
        """The part that a module is, or what a list of modules holds."""

        def depth(step: Step) -> int | None:
            inside = (place for place, one in enumerate(step.way) if f"{one.path}.".startswith(f"{path}."))
            first = next(inside, None)
            return None if first is None else first + (step.way[first].path == path)

        sides = [[step for step in side if depth(step) is not None] for side in self.sides]
        return Part(
            path, "", (sides[0], sides[1]), min((depth(step) or 0 for side in sides for step in side), default=0)
        )

    def _at(self, depth: int) -> dict[Hashable, Part]:
        found: dict[Hashable, Part] = {}
        for side, steps in enumerate(self.sides):
            for step in steps:
                whole = len(step.way) >= depth
                place = step.way[depth - 1] if whole else Place(step.path or step.text)
                key: Hashable = step.way[:depth] if whole else step
                found.setdefault(key, Part(str(place), place.module_class, ([], []), depth)).sides[side].append(step)
        return found

    def _stretches(self, parts: dict[Hashable, Part]) -> dict[Hashable, Part]:
        """Its parts in stretches, about as many as there are parts in each."""
        ahead = [part for part in parts.values() if part.sides[0]]  # the others are new after the merge
        length = math.ceil(math.sqrt(len(ahead)))
        stretch = {id(part): index // length for index, part in enumerate(ahead)}
        of_step = {step: stretch[id(part)] for part in ahead for step in part.sides[0]}
        names = [[part.name for part in ahead[start : start + length]] for start in range(0, len(ahead), length)]
        found: dict[Hashable, Part] = {
            index: Part(f"{run[0]} … {run[-1]}" if len(run) > 1 else run[0], f"{len(run)} parts", ([], []), self.depth)
            for index, run in enumerate(names)
        }
        current = 0
        keys = {step: id(part) for part in parts.values() for step in part.sides[1]}
        for step in self.sides[0]:
            found[of_step[step]].sides[0].append(step)
        for step in self.sides[1]:
            current = max(current, stretch.get(keys[step], 0))  # what is new stands with what is before it
            found[current].sides[1].append(step)
        return found


def _boxes(parts: Mapping[Hashable, Part]) -> int:
    return max(sum(bool(part.sides[side]) for part in parts.values()) for side in (0, 1))
