"""Structures of traced values in a graph that is written: put together, and taken apart."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx

from structrep.errors import Unreadable
from structrep.graph.structures import is_traced


def built(value: Any, graph: fx.Graph, load: Callable[[fx.Proxy | Tensor], Any], whose: str) -> Any:
    """A structure of traced values, as an argument of a graph.

    Args:
        load: what a value or a constant is in the graph.
        whose: the path of the module that hands it on.

    Raises:
        Unreadable: it cannot be written as code.
    """

    def inner(one: Any) -> Any:
        return built(one, graph, load, whose)

    if isinstance(value, (fx.Proxy, Tensor)):
        return load(value)
    if isinstance(value, slice):
        return slice(*map(inner, (value.start, value.stop, value.step)))
    if is_dataclass(value) and not isinstance(value, type):
        plain = not hasattr(value, "__post_init__") and all(f.init for f in fields(value))
        if not plain and not isinstance(value, dict):
            raise Unreadable(f"a {type(value).__name__} is more than its fields, and cannot be written as code")
        return graph.call_function(type(value), (), {f.name: inner(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, (tuple, list)) and not _is_plain(type(value)):
        raise Unreadable(f"a {type(value).__name__} may be more than its items, and cannot be written as code")
    if isinstance(value, tuple):
        parts = tuple(map(inner, value))
        return graph.call_function(type(value), parts) if hasattr(value, "_fields") else parts
    if isinstance(value, list):
        return list(map(inner, value))
    if type(value) in (dict, OrderedDict):
        made = {key: inner(item) for key, item in value.items()}
        return made if type(value) is dict else graph.call_function(OrderedDict, (list(made.items()),))
    if is_traced(value):
        raise Unreadable(f"{whose or 'the model'} passes a {type(value).__name__}, which cannot be written as code")
    return value


def places(value: Any, node: fx.Node) -> Iterator[tuple[fx.Proxy, fx.Node]]:
    """Every traced value inside a structure that a node gives, with the expression that takes it out of there."""
    graph = node.graph
    if isinstance(value, fx.Proxy):
        yield value, node
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if is_traced(item):
                yield from places(item, graph.call_function(operator.getitem, (node, index)))
    elif isinstance(value, dict) and not is_dataclass(value):
        for key, item in value.items():
            if is_traced(item):
                yield from places(item, graph.call_function(operator.getitem, (node, key)))
    elif is_dataclass(value):
        for f in fields(value):
            item = getattr(value, f.name)
            if is_traced(item):
                yield from places(item, graph.call_function(getattr, (node, f.name)))


def _is_plain(cls: type) -> bool:
    """Whether a list or tuple type has no code of its own."""
    return cls in (list, tuple, torch.Size) or (cls.__mro__[1] is tuple and hasattr(cls, "_fields"))
