"""What holds for the example inputs alone: a forward that is written anew would do it for all."""

from __future__ import annotations

import ast
from collections.abc import Set

from torch import fx

from structrep.errors import Unreadable
from structrep.graph.answers import Answer
from structrep.graph.calls import Call
from structrep.graph.structures import holds_tensor
from structrep.modules.paths import definition
from structrep.rewrite.otherwise import inside, steps


def demand_same_for_all(call: Call, out: Set[tuple[str, str]]) -> None:
    """Raise where a forward does what it does for the example alone.

    Args:
        out: methods that are written out in it.

    Raises:
        Unreadable: it does, by what it, or what is written out in it, was told; by what it was given, or is given back.
    """
    for one in inside(call, out):
        for told in one.answers:
            if not told.asserted:
                raise _alone(one, told)
    for step in steps(call, out):
        told_inside = next(step.observed(), None) if isinstance(step, Call) else None
        if isinstance(step, Call) and told_inside is not None and _gives_others(step):
            raise _alone(step, told_inside)
    if call.counted and holds_tensor((call.args, call.kwargs)):
        (*_, root) = call.chain()
        told_around = next(root.observed())
        raise Unreadable(
            f"{call.path or 'the model'} is given a constant, which may be another one: {type(root.module).__name__} "
            f"asks {told_around}, which holds for the example alone"
        )


def _alone(call: Call, told: Answer) -> Unreadable:
    asks = f"{type(call.module).__name__}.{call.method} asks {told}"
    return Unreadable(f"{asks}, which holds for the example alone: it cannot be written anew")


def _gives_others(call: Call) -> bool:
    """Whether a call may give back, for another input, something else than one tensor."""
    found = definition(call.bytecode) if call.bytecode is not None else None
    if found is None or not isinstance(call.result, fx.Proxy):
        return True
    tree = found[0]
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    others = (ast.Tuple, ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.GeneratorExp, ast.Constant)
    return any(one is None or isinstance(one, others) for one in returned)
