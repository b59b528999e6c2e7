"""What holds for the example inputs alone: a forward that is written anew would do it for all."""

from __future__ import annotations

import ast
from collections.abc import Set

import torch
from torch import fx

from structrep.errors import ExampleOnly, Unreadable
from structrep.graph.calls import Call
from structrep.graph.facts import RELIED, VALUE
from structrep.graph.specializations import Specialization
from structrep.graph.structures import holds_tensor, proxies
from structrep.modules.positions import branches, definition, place
from structrep.trace.followed import Followed


def demand_same_for_all(followed: Followed, gone: Set[fx.Node]) -> None:
    """Raise where a forward does what it does for the example alone, or what no code of our own can say.

    Args:
        gone: values that will not be there.

    Raises:
        Unreadable: it runs what only the user's code can name.
        ExampleOnly: it does so by what it, or what is written out in it, was told, was given, or is given back.
    """
    call = followed.call
    own = call.path, call.method
    for one in followed.calls():
        if any(isinstance(step, fx.Node) and isinstance(step.target, torch.jit.ScriptFunction) for step in one.steps):
            raise Unreadable(
                f"{one.path or 'the model'} calls a function of TorchScript, which has no name in written code"
            )
        lost = any(isinstance(step, fx.Node) and RELIED.get(step) in gone for step in one.steps)
        for told in one.specializations:
            if not told.asserted or lost:  # of what is gone nothing is asserted
                raise _alone(one, told, (one.path, one.method))
    for step in followed.steps():
        found = next(step.observed(), None) if isinstance(step, Call) else None
        if isinstance(step, Call) and found is not None and _gives_others(step):
            raise _alone(*found, own)
    _demand_one_value(call)
    given = call.args, call.kwargs
    if call.counted and (holds_tensor(given) or any(VALUE.known(one.node) for one in proxies(given))):
        (*_, root) = call.chain()
        asker, told = next(root.observed())
        raise ExampleOnly(
            f"{call.path or 'the model'} is given a constant, which may be another one: {type(asker.module).__name__}."
            f"{asker.method} asks {told}, which holds for the example alone",
            own,
        )


def _demand_one_value(call: Call) -> None:
    """Raise where arguments that were one value may be two: written code would know it by one name."""
    nodes = [one.node for one in proxies((call.args, call.kwargs))]
    parent, twice = call.parent, len(nodes) - len(set(nodes))
    if not twice or parent is None or parent.bytecode is None:
        return
    made = place(parent.bytecode, call.at) if call.at is not None else None
    if isinstance(made, ast.Call):
        names = [one.id for one in (*made.args, *(k.value for k in made.keywords)) if isinstance(one, ast.Name)]
        if len(names) - len(set(names)) == twice:
            return  # by the same name
    if call.counted or call.at is None or branches(parent.bytecode):
        reason = f"{call.path} is given one value for several arguments, which may be several values another time"
        raise ExampleOnly(reason, (call.path, call.method))


def _alone(call: Call, told: Specialization, where: tuple[str, str]) -> ExampleOnly:
    asks = f"{type(call.module).__name__}.{call.method} asks {told}"
    return ExampleOnly(f"{asks}, which holds for the example alone: it cannot be written anew", where)


def _gives_others(call: Call) -> bool:
    """Whether a call may give back, for another input, something else than one tensor."""
    found = definition(call.bytecode) if call.bytecode is not None else None
    if found is None or not isinstance(call.result, fx.Proxy) or VALUE.known(call.result.node):
        return True
    tree = found[0]
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    others = (ast.Tuple, ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.GeneratorExp, ast.Constant)
    return any(one is None or isinstance(one, others) for one in returned)
