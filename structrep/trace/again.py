"""A method, or a call, followed once more: by itself, or told otherwise."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from structrep.graph.calls import Call, Method, Trace, Traced
from structrep.graph.facts import CALL, FORMULA
from structrep.graph.structures import is_traced
from structrep.modules.copies import shallow_copy
from structrep.trace.folding import fold_constants
from structrep.trace.follow import follow, unchanged
from structrep.trace.held import untraced
from structrep.trace.inputs import Placeholder
from structrep.trace.policy import Policy
from structrep.trace.tracer import CallTracer, Root


def follow_method(module: nn.Module, path: str, method: str, flags: Mapping[str, Any]) -> Method | None:
    """What a method of a module does, called with some flags (... is a tensor), on a copy; None if it cannot be
    followed, or only on one of several ways."""
    twin = shallow_copy(module)
    paths = {part: ".".join(filter(None, (path, name))) for name, part in twin.named_modules()}
    scratch = untraced(twin, paths)
    tracer = follow(scratch, twin, paths, None, method, flags)
    calls = tracer.recorder.calls
    if tracer.recorder.stopped is not None or next(calls[0].observed(), None) is not None:
        return None
    reached: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for where, users in scratch.reached.items():
        reached[where] |= {(user.path, user.method) for user in users}
    for node in tracer.graph.nodes:
        if node.op == "get_attr" and any(CALL.of(user) is calls[0] for user in node.users):
            made_of = FORMULA.of(node).tensors if FORMULA.get(node) else ()
            for name in (str(node.target), *(scratch.names.get(id(tensor), "") for tensor in made_of)):
                reached[name].add((calls[0].path, calls[0].method))
    introspected: dict[str, set[tuple[str, str, str, int]]] = defaultdict(set)
    for where, one in tracer.parts.all():
        if not one.apart:
            introspected[where].add(one.question)
    return Method(calls, reached, introspected)


def retrace(traced: Traced, call: Call, answers: Mapping[tuple[str, str], Any]) -> tuple[Traced, Call] | None:
    """A call once more, on a copy of its module, with other answers to what it asks; None if it cannot be followed.

    Args:
        answers: by `Call.reads`' keys.
    """
    root = next(one for one in call.chain() if one.parent is None)
    of = next((one for one in traced.traces if one.root is root), None)
    if of is None:
        return None
    twin = shallow_copy(call.module)
    paths = {part: ".".join(filter(None, (call.path, name))) for name, part in twin.named_modules()}
    again = untraced(_placed(twin, call.path), paths)
    count = itertools.count()
    arguments = pytree.tree_map(
        lambda leaf: Placeholder(f"input_{next(count)}") if isinstance(leaf, fx.Proxy) else leaf,
        (call.args, call.kwargs),
    )
    if is_traced(arguments):
        return None
    policy = Policy(twin, of.opaque, of.whole)
    tracer = CallTracer(twin, call.method, arguments, paths, again, policy, answers=answers, contexts=call.contexts)
    try:
        with torch.no_grad(), unchanged(twin), tracer.watching():
            tracer.trace(Root(twin))
    except Exception:  # whatever the forward does when it is told otherwise
        return None
    if tracer.recorder.refused is not None:
        return None
    fold_constants(tracer, traced.model)
    calls = tracer.recorder.calls
    again.traces.append(Trace(call.path, tracer.graph, calls[0], calls, of.opaque, of.whole))
    for one in calls:
        again.calls[one.module, one.method].append(one)
    known = {(one.path, one.method): one.inlined for calls in traced.calls.values() for one in calls}
    for one in calls:
        one.inlined = known.get((one.path, one.method), False)
    again.origins, again.written = tracer.origins.known, tracer.origins.written
    return again, calls[0]


def _placed(module: nn.Module, path: str) -> nn.Module:
    """Something that has a module at a path."""
    for name in reversed(path.split(".") if path else ()):
        holder = nn.Module()
        holder.add_module(name, module)
        module = holder
    return module
