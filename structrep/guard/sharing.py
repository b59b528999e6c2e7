"""Modules that are called more than once, held elsewhere, or asked for what they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from structrep.blocks import REPLACE_A_LAYER
from structrep.errors import Shared
from structrep.graph.calls import Call, Introspection, Traced, site
from structrep.graph.facts import ASSIGNED, CALL, COMPUTED, FORMULA, INDEX, SHAPE, VALUE
from structrep.graph.names import is_lone_layer, path_of
from structrep.guard.asked import Asking
from structrep.modules.holders import held_elsewhere
from structrep.modules.introspection import CLASS, TYPE
from structrep.modules.source import names_reached
from structrep.modules.wrappers import stands_in


def turns_around(layer: nn.Module) -> bool:
    """Whether a layer is a transposed convolution that is an ordinary one, its kernel turned around."""
    return isinstance(layer, nn.modules.conv._ConvTransposeNd) and set(layer.stride) == {1}


class Replicas:
    """Modules called more than once: a merge inside is done once for all calls, if all calls do the same."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.prints: dict[Call, tuple[object, ...]] = {}
        untraced = {path: traced.model.get_submodule(path) for path in traced.untraced}
        self.unread = {
            path: names_reached(module)
            for path, module in untraced.items()
            if not isinstance(module, torch.jit.ScriptModule)  # which reaches for nothing outside of itself
        }
        self.asking = Asking(traced)
        self.listed = held_elsewhere(traced.model)

    def bodies(self, of: Call) -> list[Call]:
        """All calls of the same forward that were followed."""
        return [call for call in self.traced.calls[of.module, of.method] if not call.leaf]

    def repeats(self, node: fx.Node) -> bool:
        """Whether a node was made by a later call that does what the first did."""
        return CALL.of(node) is not None and self.is_repeat(CALL.of(node))

    def is_repeat(self, call: Call) -> bool:
        """Whether a call is, or is part of, a later call that does what the first did, and is merged as that was."""
        for outer in call.homes():
            bodies = self.bodies(outer)
            if len(bodies) > 1 and outer is not bodies[0] and self.alike(bodies):
                return True
        return False

    def alike(self, bodies: list[Call]) -> bool:
        return len({self.fingerprint(body) for body in bodies}) == 1

    def check(self, inside: set[fx.Node], owner: Call, everywhere: Set[nn.Module] = frozenset()) -> None:
        """Raise unless every module of the merge is called just as often as its owner, each time in the same way.

        Args:
            everywhere: layers that are to vanish at each of their calls, in a merge each.
        """
        bodies = self.bodies(owner)
        if len(bodies) > 1 and not self.alike(bodies):
            raise Shared(f"{owner.path or 'the model'} is called {len(bodies)} times, and not always in the same way")
        nodes = sorted(inside, key=INDEX.of)  # the same reason every time
        touched = dict.fromkeys(call for node in nodes for call in CALL.of(node).chain() if owner in call.chain())
        anew = written_in_forwards(inside)
        self._check_computed(inside)
        for call in touched:
            self._check_asked(call, touched.keys(), anew, stays=is_lone_layer(inside))
        for call in (one for one in touched if one is not owner):
            self._check_reach(call, touched.keys(), anew, inside)
            if call.inlined or call.module in everywhere:
                continue  # written out in its caller, or in other merges where it is called again
            calls = self.traced.calls[call.module, call.method]
            if is_lone_layer(inside):  # a layer that is the same at every call, and is so still
                if call is calls[0]:
                    continue
                raise Shared(f"{call.path} is merged where it is called first")
            homes = {next((body for body in bodies if body in one.chain()), None) for one in calls}
            if len(calls) != len(bodies) or None in homes or len(homes) != len(bodies):
                what = f"{call.path or 'the model'} is used {len(calls)} times"
                if touched.keys() >= set(calls):
                    raise Shared(f"{what} in it, and a merge takes each layer once")
                raise Shared(f"{what}: merged here, its other uses would change")

    def _check_reach(self, call: Call, touched: Set[Call], anew: set[tuple[str, str]], inside: set[fx.Node]) -> None:
        """Raise where code that will stay uses what a merge takes from a module, other than by calling it.

        Args:
            anew: the paths and methods that will be written anew, without what vanishes.
        """
        if call.module in self.listed:
            raise Shared(f"{call.path} is also held in {self.listed[call.module]}, which is none of torch's")
        held = {**call.module._parameters, **call.module._buffers} if call.leaf else {}
        for name, tensor in held.items():
            for other in self.traced.reached.get(f"{call.path}.{name}", ()):
                if site(next(other.homes())) not in anew or self._needed(tensor, inside):
                    raise Shared(f"{other.path or 'the model'} uses {call.path}.{name} itself")
        if call.leaf and stands_in(call.module):  # which has no parameters of its own
            within = f"{call.path}."
            for path, users in self.traced.reached.items():
                outside = (one for one in users - touched if not f"{one.path}.".startswith(within))
                if path.startswith(within) and any(outside):
                    raise Shared(f"code around {call.path} uses {path} itself")
        for other in self.traced.reached.get(call.path, ()):
            if other not in touched:
                raise Shared(f"{other.path or 'the model'} reaches into {call.path}, which would no longer be there")
        if (caller := self.traced.handled.get(call.path)) is not None:
            raise Shared(f"{caller or 'the model'}, whose code cannot be followed, calls {call.path} itself")
        parent, _, name = call.path.rpartition(".")
        for path, names in self.unread.items():
            if name in names and path != parent and (not path or f"{parent}.".startswith(f"{path}.")):
                raise Shared(f"{path or 'the model'}, whose forward cannot be followed, mentions .{name} of a child")

    def _check_asked(self, call: Call, touched: Set[Call], anew: set[tuple[str, str]], stays: bool) -> None:
        """Raise where a question about a module that a merge changes has another answer then.

        Args:
            stays: whether all that is merged is a layer alone, which keeps its settings.
        """
        for one in self._answered_otherwise(call, touched, anew, stays):
            if one.asker is None or site(next(one.asker.homes())) not in anew:
                raise Shared(f"{one.said_of(call.path)}: a merge would change it")

    def asked_by(self, owner: Call, inside: set[fx.Node]) -> Iterator[tuple[Call, Introspection]]:
        """The questions of a call about parts of a merge that have another answer once that is done, with the calls of
        these."""
        touched = dict.fromkeys(call for node in inside for call in CALL.of(node).chain() if owner in call.chain())
        for call in touched:
            for one in self._answered_otherwise(call, touched.keys(), {site(owner)}, is_lone_layer(inside)):
                if one.asker is not None and next(one.asker.homes()) is owner:
                    yield call, one

    def _answered_otherwise(
        self, call: Call, touched: Set[Call], anew: set[tuple[str, str]], stays: bool
    ) -> Iterator[Introspection]:
        kept = call.module.__dict__ if stays and not turns_around(call.module) else {}
        swapped = call.leaf or isinstance(call.module, REPLACE_A_LAYER)  # perhaps
        for one in self.asking.found.get(call.path, ()):
            if one.what in kept or (one.apart and _moves_alone(call, touched)):
                continue
            typed = (one.what == CLASS and swapped) or (one.what == TYPE and (swapped or site(call) in anew))
            if call.leaf or typed:
                yield one

    def _check_computed(self, inside: set[fx.Node]) -> None:
        """Raise where what a layer of a merge computes before its calls is of use elsewhere."""
        for node in inside:
            for name, one in (COMPUTED.get(node) or {}).items():
                path = f"{path_of(node)}.{name}"
                made = (tensor for tensor in one.formula.tensors if isinstance(tensor, nn.Parameter))
                held = (
                    n for one in self.traced.traces for n in one.graph.find_nodes(op="get_attr") if n.target == path
                )
                if any(not inside.issuperset(n.users) for n in held) or any(self._needed(t, inside) for t in made):
                    raise Shared(f"{path}, or what it is computed of, is of use elsewhere too")

    def _needed(self, tensor: Tensor | None, inside: set[fx.Node]) -> bool:
        """Whether a constant made of a tensor is of use to a node that stays; later calls do as the first does."""
        for trace_ in self.traced.traces:
            for node in trace_.graph.find_nodes(op="get_attr"):
                formula = FORMULA.get(node)
                made = formula.tensors if formula else (VALUE.get(node),)
                if any(one is tensor for one in made) and not self.repeats(node) and _stays(node, inside):
                    return True
        return False

    def fingerprint(self, call: Call) -> tuple[object, ...]:
        """What a call does, in terms of its inputs."""
        if call not in self.prints:
            self.prints[call] = tuple(_marks(call))
        return self.prints[call]


def _stays(constant: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a constant, or one that is computed of it, is of use to a node that is no constant and not of a merge."""
    known, pending = {constant}, [constant]
    for node in pending:
        users = node.users.keys() - inside - known
        if not all(map(VALUE.known, users)):
            return True
        known |= users
        pending += users
    return False


def _moves_alone(layer: Call, touched: Set[Call]) -> bool:
    """Whether a layer is the only one of a merge with a stride and a padding, which the merged one has then."""
    return not any(one is not layer and one.leaf and hasattr(one.module, "stride") for one in touched)


def written_in_forwards(nodes: Iterable[fx.Node]) -> set[tuple[str, str]]:
    """The methods that some nodes are written in, which change if these vanish; a layer that is called is swapped,
    unless its caller computes its numbers."""
    return {site(next(CALL.of(n).homes())) for n in nodes if n.op != "call_module" or ASSIGNED.of(n)}


def _constant(node: fx.Node) -> str:
    """What tells a constant from others: its name, or how it was computed, and its numbers, if that is done at every
    call: `self.conv.bias.view(1, -1, 1, 1)`."""
    formula, value = FORMULA.get(node), VALUE.get(node)
    if not formula or not isinstance(value, Tensor) or value.is_meta:
        return f"={node.target}"
    numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    made = (sorted(formula.calls), [id(tensor) for tensor in formula.tensors], value.dtype, value.shape)
    return f"={made} {hash(numbers)}"


def _marks(call: Call) -> Iterator[object]:
    """What a call was given, did and gave, values numbered in order of appearance: equal programs give equal marks."""
    numbers: dict[fx.Node, str] = {}

    def mark(value: fx.Node) -> str:
        return _constant(value) if value.op == "get_attr" else numbers.setdefault(value, f"%{len(numbers)}")

    def structure(value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            return mark(value.node)
        if isinstance(value, (list, tuple)):
            return [type(value).__name__, *map(structure, value)]
        if isinstance(value, dict):
            return {key: structure(item) for key, item in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            return [type(value).__name__, *(structure(getattr(value, f.name)) for f in fields(value))]
        return (
            value if isinstance(value, (bool, int, float, str, type(None))) else f"{type(value).__name__} {id(value)}"
        )

    yield repr(structure((call.args, call.kwargs)))
    for node in call.nodes():
        args, kwargs = fx.node.map_arg(node.args, mark), fx.node.map_arg(node.kwargs, mark)
        dims = len(SHAPE.of(node)) if SHAPE.known(node) else None  # a merge may go by it
        yield (node.op, str(node.target), repr(args), repr(kwargs), mark(node), dims)
    yield repr(structure(call.result))
