"""The parameters of a method that is written anew, and guards for what it was traced with."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from structrep.deployed.answers import matches
from structrep.errors import Unreadable
from structrep.graph.calls import Call
from structrep.graph.facts import STAND_IN, UNKNOWN
from structrep.graph.observed import Given, Observed, Part, Thing
from structrep.graph.structures import is_traced
from structrep.guard.callers import asks
from structrep.rewrite import guards
from structrep.rewrite.guards import Guard
from structrep.rewrite.structures import places


class Parameters:
    """The parameters of a method, named and ordered as its own are.

    Attributes:
        given: the values that come in through them, and where these are in the graph.
        guards: that arguments are the constants, and of the structures, that they were.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.given: dict[fx.Node, fx.Node] = {}
        self.guards: list[Guard] = []

    def write(self, graph: fx.Graph, observed: Observed) -> None:
        """Write them into a graph.

        Args:
            observed: what the parts of the model are given as it runs.

        Raises:
            Unreadable: they cannot be written as code, or are given others as the model runs.
        """
        signature = inspect.signature(self.call.function)
        bound = signature.bind(*self.call.args, **self.call.kwargs)
        hints = _plain_hints(self.call.code)
        self._check_calls(bound, observed)
        for name, parameter in signature.parameters.items():
            kind = parameter.kind
            star = "*" if kind is parameter.VAR_POSITIONAL else "**" * (kind is parameter.VAR_KEYWORD)
            default = () if star or parameter.default is parameter.empty else (parameter.default,)
            if default and not _is_literal(default[0]):
                raise Unreadable(f"the default of argument {name} is no literal: {default[0]!r}")
            node = graph.placeholder(star + name, hints.get(name) if not star else None, *default)
            if name in bound.arguments:
                self._accept(bound.arguments[name], node, name, default == (None,))
            elif star:
                self._expect(() if star == "*" else {}, name)
            elif default:
                self._expect(*default, name)

    def _check_calls(self, traced: inspect.BoundArguments, observed: Observed) -> None:
        """Raise where a run has shown that the model calls this with other arguments than it was traced with."""
        path, method = self.call.path, self.call.method
        whole = inspect.BoundArguments(traced.signature, traced.arguments.copy())
        whole.apply_defaults()
        plain = not isinstance(self.call.module, fx.GraphModule)
        for form in observed.forms(path, method) if plain else ():
            if form is None:
                raise Unreadable(f"{path} is given more than tensors and plain values as the model runs")
            for name, value in form.given.items():
                if name not in whole.arguments or not _fits(value, whole.arguments[name]):
                    raise Unreadable(f"{path} is called with another {name} as the model runs than it was traced with")

    def _accept(self, value: Any, node: fx.Node, name: str, optional: bool) -> None:
        if optional and is_traced(value):
            self.guards.append(guards.given(name))
        elif isinstance(value, fx.Proxy) and self._is_asked_what_it_is(value.node):
            self.guards.append(guards.tensor(name))
        self._expect(value, name)
        self.given |= {proxy.node: access for proxy, access in places(value, node)}

    def _is_asked_what_it_is(self, node: fx.Node) -> bool:
        """Whether an argument of the model was taken for a tensor by code that may do something else with others."""
        number = isinstance(STAND_IN.get(node), (int, float))
        whole = self.call.parent is None and not isinstance(self.call.module, fx.GraphModule)
        return whole and not number and not UNKNOWN.known(node) and asks(self.call, node, first=True)

    def _expect(self, value: Any, name: str) -> None:
        """Guard an argument: the merged forward holds for the traced constants and structure alone."""
        template = _template(value)
        if template is not ... and not isinstance(self.call.module, fx.GraphModule):  # which was itself made for them
            made = guards.argument(name, template)
            self.guards += [made] if made is not None else []


def _is_literal(value: Any) -> bool:
    """Whether a value's repr is code for it."""
    if type(value) in (list, tuple):
        return all(map(_is_literal, value))
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


_SCRIPTED: dict[Any, Any] = {  # types that `torch.jit.script` has to be told of arguments, as it wants them spelt
    **{one: one for one in (bool, int, float, str)},
    **{one | None: typing.Union[one, None] for one in (bool, int, float, str, Tensor)},  # noqa: UP007
    **dict.fromkeys((list[bool], typing.List[bool]), typing.List[bool]),  # noqa: UP006
    **dict.fromkeys((list[int], typing.List[int]), typing.List[int]),  # noqa: UP006
    **dict.fromkeys((list[float], typing.List[float]), typing.List[float]),  # noqa: UP006
    **dict.fromkeys((list[Tensor], typing.List[Tensor]), typing.List[Tensor]),  # noqa: UP006
}


def _plain_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The types that `torch.jit.script` has to be told of a function's arguments."""
    try:
        hints = typing.get_type_hints(inspect.unwrap(function))
    except Exception:  # a name that is only there for a type checker
        return {}
    return {name: found for name, hint in hints.items() if (found := _scripted(hint)) is not None}


def _scripted(hint: Any) -> Any:
    try:
        return _SCRIPTED.get(hint)
    except TypeError:  # what cannot be a key
        return None


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
    return matches(seen, traced)


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
