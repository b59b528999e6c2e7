"""How code around a part may call it otherwise than it was traced: nothing is written anew for guessed arguments.

A part of a module whose forward cannot be followed is traced apart, with what it was seen to be given as the model ran,
or without a run as its signature has it. What else it may be given is asked of the source of the modules around.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from inspect import Parameter
from typing import Any

from torch import fx, nn

from structrep.graph.calls import Call, Traced
from structrep.graph.facts import STAND_IN, UNFOLLOWED
from structrep.graph.structures import is_traced
from structrep.modules.call_sites import COMPUTED, Site, asks_what, sites


class Callers:
    """The calls of methods that are traced apart from those who call them, and what others there may be."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.doubts: dict[tuple[str, str], str | None] = {}

    def doubt(self, path: str, method: str) -> str | None:
        """Why a method cannot be written anew for the arguments that it was traced with; None if it can."""
        if (path, method) not in self.doubts:
            calls = self.traced.calls[self.traced.model.get_submodule(path), method]
            reasons = (reason for call in calls if not call.leaf for reason in self._reasons(call))
            self.doubts[path, method] = next(reasons, None)
        return self.doubts[path, method]

    def _reasons(self, call: Call) -> Iterator[str]:
        (*_, root) = call.chain()
        if call is root and root.module is not self.traced.model:
            yield from self._of_root(root)
        elif call is not root and root.module is not self.traced.model and self.doubt(root.path, root.method):
            yield from self._inside(call, root)
        parent = call.parent
        if parent is not None and not all(one.asserted for one in parent.specializations):
            calls = sites(type(parent.module), _way(call, parent), tuple(_parameters(call)), call.method == "forward")
            yield from self._others(call, calls)  # there may be calls on a way that the example does not take
        if not self.traced.observed.calls:
            yield from self._of_results(call)
        if call.method != "forward":
            yield from self._of_method(call)

    def _of_root(self, root: Call) -> Iterator[str]:
        """What calls a part that is traced apart, by their source."""
        parameters, sure = _parameters(root), root not in self.traced.guessed
        calls = [site for around in self._around(root) for site in sites(*around, sure=sure)]
        if root not in self.traced.guessed:  # there may be calls that the run did not come to
            yield from self._others(root, calls)
            return
        given = dict.fromkeys(name for site in calls for name in site or ())
        if None in calls:
            given |= dict.fromkeys(parameters)
        assumed = _assumed(root)
        yield from (_unknown(root, name) for name in given if name not in assumed)
        if calls:
            first = next(iter(assumed), None)
            yield from (_unknown(root, name) for name in assumed if asks(root, assumed[name], name == first))

    def _of_results(self, call: Call) -> Iterator[str]:
        """Arguments that a function gives which is not followed, and so may give no tensor."""
        for name, value in call.arguments().items():
            unfollowed = isinstance(value, fx.Proxy) and UNFOLLOWED.get(value.node)
            if unfollowed and value.node.op == "call_function" and asks(call, value.node, first=False):
                yield _unknown(call, name)

    def _inside(self, call: Call, root: Call) -> Iterator[str]:
        """What a part that may be called otherwise may give to one of its own parts then."""
        parent = call.parent
        assert parent is not None
        parameters = _parameters(call)
        calls = sites(type(parent.module), _way(call, parent), tuple(parameters), call.method == "forward")
        assumed = list(_assumed(root).values())
        for name, value in _arguments(call).items():
            if is_traced(value):
                if isinstance(value, fx.Proxy) and value.node in assumed[1:] and asks(call, value.node, first=False):
                    yield _unknown(call, name)
                continue
            given = [_given(site, name, parameters) for site in calls] or [_given({}, name, parameters)]
            if not all(_equal(one, value) for one in given):
                yield _unknown(call, name)

    def _of_method(self, call: Call) -> Iterator[str]:
        """What code that is not followed calls of a method that is followed where other code calls it."""
        for path in self.traced.whole:
            if path != call.path and f"{call.path}.".startswith(f"{path}." if path else ""):
                cls = type(self.traced.model.get_submodule(path))
                calls = sites(cls, (call.method,), tuple(_parameters(call)), near=False)
                if self.traced.observed.calls:
                    yield from self._others(call, calls)
                    continue
                for site in calls:
                    for name, value in _arguments(call).items():
                        if not is_traced(value) and not _equal(_given(site, name, _parameters(call)), value):
                            yield _unknown(call, name)

    def _others(self, call: Call, calls: list[Site | None]) -> Iterator[str]:
        """Arguments that calls of a part give by their source, and that it was not seen to be given."""
        parameters = _parameters(call)
        bodies = [one for one in self.traced.calls[call.module, call.method] if not one.leaf]
        for name in parameters:
            given = [_given(site, name, parameters) for site in calls if site is not None]
            traced = [_arguments(one).get(name) for one in bodies]
            odd = [one for one in given if not any(_fits(one, value) for value in traced)]
            if len(odd) == len(given):
                odd = [one for one in odd if one is not ...]  # what the run has given is what the code gives
            if odd:
                what = "something else" if odd[0] in (..., COMPUTED) else repr(odd[0])
                yield f"{call.path} may be called with {what} for {name}, and was not as the model ran"

    def _around(self, root: Call) -> Iterator[tuple[type, tuple[str, ...], tuple[str, ...], bool]]:
        """The classes of the modules around a part that have code, the names from there, the part's parameters, and
        whether it is the nearest of them."""
        parameters = tuple(_parameters(root))
        for path, module in self.traced.model.named_modules(remove_duplicate=False):
            way = tuple(path.split(".")) if module is root.module else ()
            near = True
            for depth in reversed(range(len(way))):
                cls = type(self.traced.model.get_submodule(".".join(way[:depth])))
                if getattr(cls, "forward", None) is not nn.Module.forward:
                    yield cls, way[depth:], parameters, near
                    near = False


def _way(call: Call, parent: Call) -> tuple[str, ...]:
    """The names from the module whose code calls a method to that method."""
    below = call.path.removeprefix(f"{parent.path}." if parent.path else "").split(".")
    return tuple(below) if call.method == "forward" else (*below, call.method)


def _parameters(call: Call) -> dict[str, Parameter]:
    return dict(inspect.signature(call.function).parameters)


def _arguments(call: Call) -> dict[str, Any]:
    """What a call was given, and the defaults of the rest, by parameter."""
    whole = inspect.BoundArguments(inspect.signature(call.function), OrderedDict(call.arguments()))
    whole.apply_defaults()
    return dict(whole.arguments)


def _assumed(root: Call) -> dict[str, fx.Node]:
    """The parameters that were taken to be tensors."""
    return {name: value.node for name, value in root.arguments().items() if isinstance(value, fx.Proxy)}


def asks(call: Call, node: fx.Node, first: bool) -> bool:
    """Whether a call, or what it hands an argument on to, may do something else if that is None, or no tensor.

    Args:
        first: it is what the part computes with; code that cannot be read is taken to ask for other arguments only.
    """
    for one in call.all_calls():
        for name, value in one.arguments().items():
            if isinstance(value, fx.Proxy) and value.node is node:
                asks = asks_what(one.code, name)
                if asks or (asks is None and not first):
                    return True
    return False


def _given(site: Site | None, name: str, parameters: dict[str, Parameter]) -> Any:
    """What a call gives for a parameter; ... where its source does not say."""
    if site is None:
        return ...
    kind = parameters[name].kind
    if kind is Parameter.VAR_POSITIONAL:
        return ()
    if kind is Parameter.VAR_KEYWORD:
        return {} if site.keys() <= parameters.keys() else ...
    return site.get(name, parameters[name].default)


def _equal(given: Any, traced: Any) -> bool:
    return type(given) is type(traced) and bool(given == traced)


def _unknown(call: Call, name: str) -> str:
    return f"what {call.path} is given for {name} is not known: example inputs would tell"


def _fits(given: Any, traced: Any) -> bool:
    """Whether an argument that a call gives by its source is one that a method was traced with, or may be."""
    if given is Parameter.empty:
        return True
    if isinstance(traced, fx.Proxy):
        number = isinstance(STAND_IN.get(traced.node), (int, float))
        return given is ... or given is COMPUTED or (number and type(given) in (int, float))
    if is_traced(traced):
        return given is not None
    return _equal(given, traced)
