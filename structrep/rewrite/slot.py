"""A block whose own text already asks for the merged layer: `if self.reparam_conv is not None: return
self.act(self.reparam_conv(x))`. Putting the layer there is all that there is to do, if the block then computes what its
forward with the merge would."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Set
from types import FunctionType, NoneType
from typing import Any

from torch import fx, nn

from structrep.deployed.methods import Whole
from structrep.graph.calls import Call
from structrep.graph.reads import PLACEHOLDER, Read
from structrep.graph.structures import is_traced
from structrep.modules.mentions import mentions
from structrep.modules.positions import definition
from structrep.modules.presence import path_to
from structrep.read.nodes import hands_on
from structrep.rewrite import guards
from structrep.rewrite.forward import Forward
from structrep.rewrite.guards import Guard
from structrep.trace.instructions import namespace_reads


class Slot:
    """A forward that stays as it is, for it runs the layer that is put where it asks for one."""

    does_otherwise = True

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.constants: dict[str, Any] = {}
        self.merged: dict[Any, Any] = {}

    def holding(self, module: nn.Module) -> set[Guard]:
        """What the forward was told that still holds."""
        return self.forward.holding(module)


def is_asked_for(call: Call, name: str) -> bool:
    """Whether the text of a method asks its module for something of a name, of which there is none yet."""
    read = definition(call.bytecode) if call.bytecode is not None else None
    if read is None or not read[0].args.args:
        return False
    return name in _asked_for(read[0])


@functools.lru_cache(4096)
def _asked_for(tree: ast.FunctionDef | ast.Lambda) -> frozenset[str | None]:
    itself = tree.args.args[0].arg
    return frozenset(path_to(node, itself) for node in ast.walk(tree) if isinstance(node, ast.Attribute))


def slot(forward: Forward, name: str, dead: Set[nn.Module]) -> Slot | None:
    """The slot that a method has for a layer of a name; None if it does something else with it than what is written.

    Args:
        dead: the modules that nothing calls any more.
    """
    module = forward.call.module
    own = [call for call in forward.call.all_calls() if call.module is module]
    if forward.guards or not all(_is_of_parts(read) for call in own for read in call.reads.values()):
        return None  # which the layer's own way does not ask for
    codes = [
        (code.__code__, code.__globals__, code)
        for code in (call.code for call in own)
        if isinstance(code, FunctionType)
    ]
    if any(guards.unlike("it", read.told) is not None for read in namespace_reads(codes)):
        return None
    if any(_is_setting(module, path.partition(".")[0]) for path in mentions(type(module), forward.call.method) or "*"):
        return None  # which that way may ask for alone
    parts = {key: None if part in dead else part for key, part in module._modules.items()}
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__ = {**{k: v for k, v in vars(module).items() if k != name}, "_modules": {**parts, name: nn.Identity()}}
    constants = {key: value for key, value in forward.call.arguments().items() if not is_traced(value)}
    try:
        graph = Whole().trace(twin, constants)
    except Exception:  # whatever the user's own code raises, with a value that is none
        return None
    idle = set[fx.Node]()
    env, changed = forward.body.env, forward.body.changes.changed
    for old, new in env.items():
        source = hands_on(old) if old not in changed and isinstance(new, fx.Node) else None
        if source is not None and env.get(source) in new.all_input_nodes[:1]:
            idle.add(new)
    return Slot(forward) if _Same(idle).all(_result(forward.body.graph), _result(graph)) else None


def _is_of_parts(read: Read) -> bool:
    """Whether a question is about parts of a module: whether there is one, which class it has, how many there are."""
    if not isinstance(read.holder, nn.Module):
        return False
    there = read.text.endswith(" is None)") or (read.text.startswith(".") and read.told is None)
    return there or read.text == ".training" or read.text.startswith((f"structrep_is({PLACEHOLDER}", "len("))


def _is_setting(module: nn.Module, name: str) -> bool:
    """Whether a module has something by a name that is neither a part, a tensor, a method nor None."""
    held = module._modules.keys() | module._parameters.keys() | module._buffers.keys() | {"training"}
    return name not in held and not isinstance(inspect.getattr_static(module, name, None), (FunctionType, NoneType))


def _result(graph: fx.Graph) -> Any:
    return next(node.args[0] for node in reversed(graph.nodes) if node.op == "output")


class _Same:
    """Whether two graphs compute the same, as far as their results tell.

    Args:
        idle: nodes of the first that hand on what they are given.
    """

    def __init__(self, idle: Set[fx.Node]) -> None:
        self.idle = idle
        self.targets = {node.target for node in idle if node.op == "call_module"}
        self.pairs: dict[fx.Node, fx.Node] = {}

    def all(self, one: Any, other: Any) -> bool:
        pending = [(one, other)]
        for one, other in pending:
            while isinstance(one, fx.Node) and one in self.idle:
                one = one.all_input_nodes[0]
            while isinstance(other, fx.Node) and other.op == "call_module" and other.target in self.targets:
                other = other.all_input_nodes[0]
            if isinstance(one, fx.Node) and isinstance(other, fx.Node):
                if one in self.pairs:
                    if self.pairs[one] is not other:
                        return False
                    continue
                self.pairs[one] = other
                if (one.op, one.target) != (other.op, other.target):
                    return False
                pending += [(one.args, other.args), (one.kwargs, other.kwargs)]
            elif isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
                if len(one) != len(other):
                    return False
                pending += zip(one, other, strict=True)
            elif isinstance(one, dict) and isinstance(other, dict):
                if one.keys() != other.keys():
                    return False
                pending += [(one[key], other[key]) for key in one]
            elif type(one) is not type(other) or one != other:
                return False
        return True
