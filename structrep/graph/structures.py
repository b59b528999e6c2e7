"""Structures of traced values: what is inside them, how they were, what they stand for."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from structrep.graph import operations
from structrep.graph.facts import CALL, STAND_IN, UNFOLLOWED, UNKNOWN, VALUE
from structrep.graph.operations import does, torch_name
from structrep.graph.table import QUESTIONS, Is
from structrep.modules.source import written_in


def proxies(value: Any) -> Iterator[fx.Proxy]:
    """All proxies inside containers, dataclasses and model outputs."""
    if isinstance(value, fx.Proxy):
        yield value
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from proxies(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from proxies(item)
    elif isinstance(value, slice):
        yield from proxies((value.start, value.stop, value.step))
    elif hasattr(type(value), "__dataclass_fields__"):  # `is_dataclass` would ask the value: a question of the user's
        for f in fields(value):
            yield from proxies(getattr(value, f.name))
    elif is_record(value):
        for item in vars(value).values():
            yield from proxies(item)


def is_record(value: Any) -> bool:
    """Whether a value is an object of somebody's own class that holds others by name."""
    library = written_in(type(value)).partition(".")[0]
    own = library not in ("torch", "builtins", "functools", "collections", "numpy", "structrep")
    return own and hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType, FunctionType, nn.Module))


def mapped(function: Callable[[Any], Any], value: Any, depth: int = 0) -> Any:
    """A structure like another, with what a function makes of each of its ends.

    Raises:
        TypeError: an object in it cannot be copied, or has no end.
    """
    if depth > _DEEPEST:
        raise TypeError(f"a {type(value).__name__} has no end")

    def inner(one: Any) -> Any:
        return mapped(function, one, depth + 1)

    if isinstance(value, (list, tuple)):
        items = [inner(item) for item in value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*items)
        return tuple(items) if isinstance(value, tuple) else items  # a torch.Size of what stands for sizes
    if isinstance(value, slice):
        return slice(inner(value.start), inner(value.stop), inner(value.step))
    if isinstance(value, Mapping):
        twin: Any = _copied(value)
        for key, item in value.items():
            twin[key] = inner(item)
        return twin
    if _has_fields(value):
        twin = _copied(value)
        for f in fields(value):
            object.__setattr__(twin, f.name, inner(getattr(value, f.name)))
        return twin
    return function(value)


_DEEPEST = 16  # levels of a structure


def _has_fields(value: Any) -> bool:
    """Whether a value is a dataclass of somebody else's."""
    kind = type(value)  # not the value itself, for which a trace may answer
    return hasattr(kind, "__dataclass_fields__") and written_in(kind).partition(".")[0] != "structrep"


def _copied(value: Any) -> Any:
    try:
        return copy.copy(value)
    except Exception as error:
        raise TypeError(f"a {type(value).__name__} cannot be copied") from error


def form_of(value: Any, mark: Callable[[Any], Any]) -> Any:
    """A structure as a key, with the mark of each of its ends.

    Raises:
        TypeError: a mark is no key.
    """

    def inner(one: Any) -> Any:
        return form_of(one, mark)

    if isinstance(value, (list, tuple)):
        return type(value), *map(inner, value)
    if isinstance(value, slice):
        return slice, inner((value.start, value.stop, value.step))
    if isinstance(value, Mapping):
        return type(value), frozenset((key, inner(item)) for key, item in value.items())
    if _has_fields(value):
        return type(value), *(inner(getattr(value, f.name)) for f in fields(value))
    found = mark(value)
    hash(found)
    return found


def held(value: Any) -> list[tuple[Any, dict[str, Any]]]:
    """The dataclasses in a structure, and what they hold now: others may write to them later."""
    if isinstance(value, (list, tuple)):
        return [one for item in value for one in held(item)]
    if isinstance(value, dict):
        return [one for item in value.values() for one in held(item)]
    return [(value, {f.name: snapshot(getattr(value, f.name)) for f in fields(value)})] if _has_fields(value) else []


def is_traced(value: Any) -> bool:
    """Whether a structure holds anything that depends on the input."""
    return next(proxies(value), None) is not None


def holds_tensor(value: Any) -> bool:
    """Whether a structure holds a tensor that does not depend on the input."""
    return any(isinstance(leaf, Tensor) and not isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(value))


def snapshot(value: Any) -> Any:
    """A structure as it is now: whoever holds its lists, dicts and traced values may write to them later."""
    if isinstance(value, fx.Proxy):
        return value.tracer.again(value.node)  # type: ignore[attr-defined]  # also of an attribute, which is a node only once it is used
    if type(value) in (list, tuple):
        return type(value)(snapshot(item) for item in value)
    if type(value) is dict:
        return {key: snapshot(item) for key, item in value.items()}
    return value


def alike(before: Any, after: Any) -> bool:
    """Whether a structure still holds the very values that its snapshot does."""
    if type(before) in (list, tuple):
        return len(before) == len(after) and all(map(alike, before, after))
    if type(before) is dict:
        return list(before) == list(after) and all(alike(before[key], after[key]) for key in before)
    return before is after or (isinstance(before, fx.Proxy) and isinstance(after, fx.Proxy))


def holds_still(value: Any, before: dict[str, Any]) -> bool:
    """Whether a dataclass holds what it did."""
    return all(alike(one, getattr(value, name)) for name, one in before.items())


class Unknown(Exception):
    """What type a traced value will be of."""


_PROBE = torch.empty(0)


def stand_in(node: fx.Node) -> Any:
    """A value of the type that a node's will have: a size, a number, a tuple, or (as most are) a tensor.

    Raises:
        Unknown: it may be of several.
    """
    pending = [node]
    while pending:  # no recursion: a chain of operations may be longer than Python's stack
        last = pending[-1]
        if STAND_IN.known(last):
            pending.pop()
            continue
        try:
            found = _of_itself(last)
            if found is ...:
                inputs = [n for n in last.all_input_nodes if not VALUE.known(n)]
                if left := [n for n in inputs if not STAND_IN.known(n)]:
                    pending += left
                    continue
                found = _of_inputs(last, [STAND_IN.of(n) for n in inputs])
        except Unknown as reason:
            found = Unknown(*reason.args)
        STAND_IN.note(last, found)
    if isinstance(STAND_IN.of(node), Unknown):
        raise Unknown(*STAND_IN.of(node).args)
    return STAND_IN.of(node)


def _of_itself(node: fx.Node) -> Any:
    """What a node stands for, whatever it is given; ... if it goes by that."""
    name = torch_name(node)
    if UNKNOWN.known(node):
        raise Unknown(f"a {UNKNOWN.of(node).__name__}")
    if UNFOLLOWED.get(node):
        raise Unknown(f"what {node.target} gives")
    if node.op == "call_module":
        module = CALL.of(node).module
        if not _gives_a_tensor(module):
            raise Unknown(f"what {type(module).__name__} gives")
        return _PROBE
    if node.op == "call_method" and name in QUESTIONS:
        return 0 if name in ("size", "stride") and (len(node.args) > 1 or node.kwargs) else QUESTIONS[name].like
    if node.target is getattr:
        asked = QUESTIONS.get(str(node.args[1]))
        return asked.like if asked else _PROBE
    return ...


def _of_inputs(node: fx.Node, inputs: list[Any]) -> Any:
    """What a node stands for that is given such values."""
    unknown = next((one for one in inputs if isinstance(one, Unknown)), None)
    if unknown is not None:
        raise Unknown(*unknown.args)
    name = torch_name(node)
    if node.target is operator.getitem and inputs and isinstance(inputs[0], tuple):
        sliced = isinstance(node.args[1], slice)
        return inputs[0] if sliced else 0 if isinstance(inputs[0], torch.Size) else _PROBE
    if not node.op.startswith("call") or name == "getitem":
        return _PROBE
    if written_in(node.target) != "_operator":
        kind = operations.gives(node.target, node.args, node.kwargs)
        if kind not in ("tensor", "several"):
            raise Unknown(f"what {name or node.target} gives")
        return () if kind == "several" else _PROBE
    if not inputs or any(isinstance(one, Tensor) for one in inputs):
        return _PROBE
    if does(node, Is.COMPARES):
        return False
    return 0.0 if node.target is operator.truediv or any(isinstance(one, float) for one in inputs) else 0


def is_torch(cls: type) -> bool:
    """Whether a class is one of torch's layers."""
    return written_in(cls).startswith(("torch.nn", "torch.ao.nn"))


def _gives_a_tensor(module: nn.Module) -> bool:
    """Whether a module is one of torch's that give one tensor."""
    several = isinstance(module, nn.MultiheadAttention) or getattr(module, "return_indices", False)
    file = written_in(type(module)).rpartition(".")[2]
    return is_torch(type(module)) and file not in ("rnn", "adaptive") and not several
