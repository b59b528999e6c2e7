"""Values that a module gives in the middle of a merge, and other forwards that would still look at them.

`forward` may run one block after another, and a convolution at the end of the first merge with one at the start of the
second. Another method, say `forward_intermediates`, may give back what stands between. So for every merge the methods
of the modules around are looked through whose name says that they are forwards too: those that run a part of the merge,
by their source, are followed; and so are forwards with a flag that is not as it is by default
(`forward(x, pre_logits=True)`), or given a tensor for what is None by default (`forward(x, mask)`). So are methods of
any name that code which cannot be followed calls of a part. Left out are those for a converted model (`forward_fuse`,
`forward_deploy`), which run a convolution and leave out its norm because that is merged by then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from inspect import Parameter, signature
from types import FunctionType
from typing import Any, TypeAlias

from torch import fx, nn

from structrep.errors import Shared
from structrep.graph.calls import Call, Method, Traced, site
from structrep.graph.facts import CALL, FORMULA, INDEX
from structrep.graph.names import path_of
from structrep.modules.call_sites import methods_called
from structrep.modules.mentions import mentions
from structrep.modules.source import functions
from structrep.modules.uses import uses
from structrep.trace.again import follow_method


@dataclass(frozen=True)
class Variant:
    """A way to run a module: a method, and the argument that is not as it is by default, a flag that is turned, or a
    tensor (...) instead of None; None instead of a tensor."""

    method: str
    flags: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        given = (f"{name}={'a tensor' if value is ... else value}" for name, value in self.flags)
        return f"{self.method}({', '.join(given)})" if self.flags else self.method


# how modules are run in other ways; None for what cannot be followed
MethodsByVariant: TypeAlias = dict[tuple[nn.Module, Variant], Method | None]


class Borders:
    """What a model's methods see of the values between its modules.

    Args:
        followed: what is known of that already, from another search of the same traces; it grows.
    """

    def __init__(self, traced: Traced, followed: MethodsByVariant) -> None:
        self.traced, self.followed = traced, followed
        self.given: dict[fx.Node, list[Call]] = defaultdict(list)  # value -> the calls that give it back
        for trace in traced.traces:
            for call in trace.calls:
                if isinstance(call.result, fx.Proxy):
                    self.given[call.result.node].append(call)
        whole = {type(traced.model.get_submodule(path)) for path in traced.whole}
        called = frozenset().union(*map(methods_called, whole))  # by code that cannot be followed
        self.called = {name for name in called if not (name.startswith("__") or hasattr(nn.Module, name))}
        self.others: dict[type, list[Variant]] = {}
        self.variants: dict[nn.Module, list[Variant]] = {}
        self.mentioned: dict[tuple[type, str], frozenset[str] | None] = {}
        self.below: dict[nn.Module, dict[nn.Module, frozenset[str]]] = {}  # a module's parts, by children they are in
        self.used: dict[
            tuple[nn.Module, str], list[set[nn.Module]]
        ] = {}  # parts that a method uses, and all below each

    def check(self, inside: set[fx.Node], root: fx.Node | None, owner: Call) -> None:
        """Raise if a value that would vanish, all but the root's, is one that another forward gives back or looks at.

        Raises:
            Shared: it is, or may be.
        """
        held = self._held(inside)
        for around in owner.chain() if held else ():
            self._check_parameters(around, held)
        for node, call in self._given_back(inside, root, owner):
            if call.method != "forward":
                if _is_forward(call.method):
                    raise Shared(f"{call.path or 'the model'}.{call.method} gives back a value inside the merge")
                continue
            for around, variant in self._lookers(owner, call, node is root, inside, inside - {root}):
                if root is None or not _is_flag(around, variant):
                    raise Shared(
                        f"{type(around.module).__name__}.{variant} may look at what {call.path} gives, which would no "
                        f"longer be there"
                    )

    def check_absorbed(
        self, changed: set[fx.Node], between: set[fx.Node], takers: Iterable[fx.Node], owner: Call
    ) -> None:
        """Raise if another forward looks at what stands between a scale and the layers that take it, or gives these
        something else.

        Args:
            changed, between: what will be another there; without the scale and the layers.
            takers: the layers behind it.

        Raises:
            Shared: it does, or may.
        """
        self.check(changed, None, owner)
        sources = {node for taker in takers for node in taker.all_input_nodes}
        for taker in sorted(takers, key=INDEX.of):
            for call in self.given[taker]:
                if call.leaf and call is not owner and owner in call.chain():
                    for around, variant in self._lookers(owner, call, True, between | sources, between):
                        raise Shared(
                            f"{type(around.module).__name__}.{variant} may give {call.path} something else than it is "
                            f"given here"
                        )

    def check_text(self, owner: Call, merged: Set[fx.Node]) -> None:
        """Raise if another forward of a module runs what is merged, by text of its own: that is not changed with the
        text of the call.

        Args:
            merged: all nodes of a merge.

        Raises:
            Shared: it does, or may.
        """
        paths = {str(node.target) for node in merged if node.op == "call_module"} | self._held(merged)
        prefix = f"{owner.path}." if owner.path else ""
        own = {path.removeprefix(prefix).partition(".")[0] for path in paths if path.startswith(prefix)}
        for variant in self._other_forwards(owner) if own else ():
            seen = self.mentioned[type(owner.module), variant.method]
            if variant.method == "forward" or variant.flags or (seen is not None and own.isdisjoint(seen)):
                continue
            method = self._follow(owner, variant)
            if method is None or _runs_by_itself(method, owner, paths):
                raise Shared(
                    f"{type(owner.module).__name__}.{variant} may run {' or '.join(sorted(own))} by its own text, "
                    f"which would not change with that of {owner.method}: let one of them call the other"
                )

    def flagged(self, inside: set[fx.Node], root: fx.Node, owner: Call) -> set[Call]:
        """The calls of parts whose forwards, with a flag that none of their callers turns, look into what may be merged
        otherwise."""
        return {
            around
            for node, call in self._given_back(inside, root, owner)
            if call.method == "forward"
            for around, variant in self._lookers(owner, call, node is root, inside, inside - {root})
            if _is_flag(around, variant)
        }

    def _given_back(self, inside: set[fx.Node], root: fx.Node | None, owner: Call) -> Iterator[tuple[fx.Node, Call]]:
        """Values that calls inside an owner give back, the root's by its layer alone, in the order of the graph.

        So the reason is the same every time."""
        for node in sorted(inside & self.given.keys(), key=INDEX.of):
            for call in self.given[node]:
                if call is not owner and owner in call.chain() and (node is not root or call.leaf):
                    yield node, call

    def _held(self, nodes: Iterable[fx.Node]) -> set[str]:
        """The paths of the tensors that nodes are given, or that those are computed from."""
        read = [n for node in nodes for n in node.all_input_nodes if n.op == "get_attr"]
        made = (tensor for n in read if FORMULA.get(n) for tensor in FORMULA.of(n).tensors)
        computed_from = {name for tensor in made if (name := self.traced.names.get(id(tensor))) is not None}
        return computed_from | {str(n.target) for n in read if not FORMULA.get(n)}

    def _check_parameters(self, around: Call, held: set[str]) -> None:
        """Raise if another forward of a module around uses parameters that a merge takes from it."""
        prefix = f"{around.path}." if around.path else ""
        own = {name: name.removeprefix(prefix).split(".") for name in held if name.startswith(prefix)}
        for variant in self._other_forwards(around) if own else ():
            seen = self.mentioned[type(around.module), variant.method]
            direct = {name for name, way in own.items() if len(way) == 1}
            used = own.keys() if seen is None else {name for name, way in own.items() if way[0] in seen}
            if variant.method == "forward" or not used:
                continue
            method = self._follow(around, variant)
            if method is None:
                uses = used & direct if not variant.flags else set()
            else:
                uses = {name for name in own if self._uses_otherwise(name, method)}
            if uses:
                raise Shared(f"{type(around.module).__name__}.{variant} uses {' or '.join(sorted(uses))} too")

    def _lookers(
        self, owner: Call, call: Call, last: bool, inside: set[fx.Node], within: set[fx.Node]
    ) -> Iterator[tuple[Call, Variant]]:
        """The other forwards of modules around that look at what a call of a part gives, or give it something else.

        Args:
            within: what of the merge other values are inside of, by which they have to go and come alike.
        """
        for around in owner.chain():
            variants = self._other_forwards(around)
            parts = self._parts(around.module, call.module) if variants else frozenset()
            for variant in variants:
                seen = self.mentioned[type(around.module), variant.method]
                if seen is not None and not parts & seen:
                    continue
                if variant.flags and any(CALL.of(node) is around and node.op != "call_module" for node in inside):
                    continue  # its forward is written anew, and then takes no other flags
                if variant.flags and variant.flags[0][1] is ... and around is not call.parent:
                    continue  # what it is given can only matter where the value passes
                method = self._follow(around, variant)
                if method is None and (
                    variant.flags or (seen is not None and self._runs_it_whole(around, variant, inside))
                ):
                    continue
                if method is None or self._differs(method, call, last, inside, within):
                    yield around, variant

    def _parts(self, module: nn.Module, part: nn.Module) -> frozenset[str]:
        """Names of a module's children that hold a part of it."""
        if module not in self.below:
            found: dict[nn.Module, set[str]] = defaultdict(set)
            for name, child in module._modules.items():
                for below in child.modules() if child is not None else ():
                    found[below].add(name)
            self.below[module] = {below: frozenset(names) for below, names in found.items()}
        return self.below[module].get(part, frozenset())

    def _differs(self, method: Method, call: Call, last: bool, inside: set[fx.Node], within: set[fx.Node]) -> bool:
        """Whether a method uses a part of a merge otherwise than `forward` does."""
        usual = self.traced.calls[call.module, call.method]
        calls = method.forwards.get(call.path, [])
        given = any(isinstance(p, fx.Proxy) and p.node in inside for p in call.args)
        asked = {one.question for one in self.traced.introspections.get(call.path, ())}
        return (
            any(self._reaches_otherwise(path, method) for path in method.reached if path.startswith(f"{call.path}."))
            or (call.leaf and not method.introspected.get(call.path, set()) <= asked)
            or (not last and any(not any(_goes_as(one, own, within) for own in usual) for one in calls))
            or (given and any(not any(_comes_as(one, own, inside, within) for own in usual) for one in calls))
        )

    def _uses_otherwise(self, name: str, method: Method) -> bool:
        """Whether a method takes a parameter, or runs what holds it, where `forward` does not."""
        path = name.rpartition(".")[0]
        runs = path in method.forwards and not any(path == call.path for call in self._called(path))
        return runs or (name in method.reached and self._reaches_otherwise(name, method))

    def _called(self, path: str) -> list[Call]:
        """The calls of a layer that a run is seen to make."""
        calls = self.traced.calls.get((self.traced.model.get_submodule(path), "forward"), [])
        return [one for one in calls if self.traced.guessed.isdisjoint(one.chain())]

    def _reaches_otherwise(self, path: str, method: Method) -> bool:
        """Whether a method uses what is at a path where `forward` does not: a part of it that both run may."""
        return not method.reached[path] <= {(one.path, one.method) for one in self.traced.reached.get(path, ())}

    def _runs_it_whole(self, around: Call, variant: Variant, inside: set[fx.Node]) -> bool:
        """Whether a method, by its source, uses none of what a merge is in but as a whole."""
        key = around.module, variant.method
        if key not in self.used:
            found = uses(around.module, functions(type(around.module))[variant.method])
            self.used[key] = [set(part.modules()) for part in {part for use in found for part in use.parts}]
        merged = {CALL.of(node).module for node in inside}
        return all(merged <= below or merged.isdisjoint(below) for below in self.used[key])

    def _other_forwards(self, around: Call) -> list[Variant]:
        """Other ways to run a module than those that were traced."""
        cls = type(around.module)
        if cls not in self.others:
            known = functions(cls)
            names = [name for name in known if name == "forward" or _is_forward(name) or name in self.called]
            self.mentioned |= {(cls, name): mentions(cls, name) for name in names}
            self.others[cls] = [one for name in names for one in _variants(name, known[name])]
        if around.module not in self.variants:
            # what forward runs with its defaults is looked at with others; what it does not run, with its defaults
            calls = self.traced.calls
            self.variants[around.module] = [
                one for one in self.others[cls] if bool(one.flags) == ((around.module, one.method) in calls)
            ]
            if around in self.traced.guessed:
                plain = [name for name, one in signature(around.function).parameters.items() if _is_required(one)]
                self.variants[around.module] += [Variant("forward", ((name, None),)) for name in plain[1:]]
        return self.variants[around.module]

    def _follow(self, around: Call, variant: Variant) -> Method | None:
        key = (around.module, variant)
        if key not in self.followed:
            self.followed[key] = follow_method(around.module, around.path, variant.method, dict(variant.flags))
        return self.followed[key]


def _is_flag(around: Call, variant: Variant) -> bool:
    """Whether a part is run in a way by a flag of its forward alone, which can be guarded."""
    turned = any(isinstance(value, bool) for _, value in variant.flags)
    return variant.method == "forward" and turned and around.parent is not None


def _runs_by_itself(method: Method, owner: Call, parts: Set[str]) -> bool:
    """Whether a method calls parts, or takes tensors, otherwise than by a call of an owner's method."""
    calls = {path: [one for one in found if not _is_inside(one, owner)] for path, found in method.forwards.items()}
    users = {user for path, found in method.reached.items() if _is_in(path, parts) for user in found}
    return any(calls[path] for path in calls if _is_in(path, parts)) or any(
        calls.get(path) if path != owner.path else name != owner.method for path, name in users
    )


def _is_inside(call: Call, owner: Call) -> bool:
    return any(site(one) == site(owner) for one in call.chain())


def _is_in(path: str, parts: Set[str]) -> bool:
    """Whether a path is of one of some parts, or of something in it."""
    return any(path == one or path.startswith(f"{one}.") for one in parts)


def _is_required(parameter: Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        Parameter.VAR_POSITIONAL,
        Parameter.VAR_KEYWORD,
    )


def _variants(name: str, function: FunctionType) -> Iterator[Variant]:
    """A method by its defaults, with each of its flags turned, and with a tensor for each None."""
    yield Variant(name)
    for parameter in signature(function).parameters.values():
        if isinstance(parameter.default, bool):
            yield Variant(name, ((parameter.name, not parameter.default),))
        elif parameter.default is None:
            yield Variant(name, ((parameter.name, ...),))


def _goes_as(call: Call, usual: Call, inside: Set[fx.Node]) -> bool:
    """Whether what a call gives is read by nothing else than what another call of the part gives, and so on for what
    is made of it inside."""
    one, other = (of.result.node if isinstance(of.result, fx.Proxy) else of.result for of in (call, usual))
    if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
        return not isinstance(other, fx.Node)
    return _is_read_as(one, other, inside)


def _is_read_as(one: fx.Node, other: fx.Node, inside: Set[fx.Node]) -> bool:
    """The same of values; deep by no more than what is inside."""
    return all(
        any(
            _named(own) == _named(user) and (own not in inside or _is_read_as(user, own, inside)) for own in other.users
        )
        for user in one.users
    )


def _comes_as(call: Call, usual: Call, inside: Set[fx.Node], within: Set[fx.Node]) -> bool:
    """Whether what a call is given is made as that which another call of the part is given, as far as that is inside,
    and so on for what is within; of a call elsewhere, as far as that is told by what makes it."""
    ones, others = ([p.node for p in of.args if isinstance(p, fx.Proxy)] for of in (call, usual))
    pending, seen = [(ones, [one for one in others if one in inside] or others)], set[fx.Node]()
    for mine, theirs in pending:
        for node in (one for one in theirs if one not in seen):
            seen.add(node)
            found = next((one for one in mine if _named(one) == _named(node)), None)
            if found is None:
                return False
            if node in within:
                pending.append((found.all_input_nodes, [one for one in node.all_input_nodes if one in inside]))
    return True


def _named(node: fx.Node) -> tuple[str, str, str]:
    return node.op, str(node.target), path_of(node)


def _is_forward(name: str) -> bool:
    converted = ("fuse", "deploy", "reparam", "merge", "switch")
    return name.startswith("forward_") and not any(word in name for word in converted)
