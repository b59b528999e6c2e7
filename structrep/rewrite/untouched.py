"""Forwards that stay as they are, though layers of theirs give up their parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import fx, nn

from structrep.errors import Unreadable
from structrep.graph.calls import Call, Traced
from structrep.graph.facts import AT, CALL, FORMULA, VALUE
from structrep.modules.positions import definition, place
from structrep.modules.presence import path_to
from structrep.rewrite.guards import Guard
from structrep.rewrite.node_changes import NodeChanges

_SAME = {"shape", "size", "ndim", "dim", "dtype", "device"}  # of a weight that is filled with other numbers


class Untouched:
    """A forward that stays as it is: a layer of its own is given other numbers, or its norms are given parameters that
    are there no more.

    Raises:
        Unreadable: its text does more with these than to hand them on.
    """

    does_otherwise = False

    def __init__(self, traced: Traced, changes: NodeChanges, call: Call) -> None:
        self.constants: dict[str, Any] = {}
        self.merged: dict[Any, Any] = {}
        self.traced, self.call = traced, call
        read = definition(call.bytecode) if call.bytecode is not None else None
        nodes = list(call.nodes())
        filled = [node for node in nodes if node in changes.refilled]
        ended = [node for node in nodes if node in changes.ended]
        if read is None or not isinstance(read[0], ast.FunctionDef) or not changes.dead.isdisjoint(nodes):
            raise Unreadable("more changes than parameters")
        tree, parents, _ = read
        itself = tree.args.args[0].arg if tree.args.args else ""
        held = {name: True for node in filled for name in ("weight", *self._held(node, self._text(node)))}
        for text in map(self._text, filled):
            given = [*text.args, *(keyword.value for keyword in text.keywords)]
            if not any(path_to(one, itself) == "bias" for one in given):
                raise Unreadable("a convolution is given no self.bias")
            held["bias"] = True
        held |= {name: False for node in ended for name in self._held(node, self._text(node))}
        taken = {one for node in filled for one in ast.walk(self._text(node))}
        for one in ast.walk(tree):
            name = path_to(one, itself) if isinstance(one, ast.Attribute) else None
            if name not in held:
                continue
            around = parents[one]
            hands_on = (isinstance(around, ast.Call) and one in around.args) or isinstance(around, ast.keyword)
            asks = isinstance(around, ast.Attribute) and around.attr in _SAME
            if not (hands_on and (one in taken or not held[name])) and not (asks and held[name]):
                raise Unreadable(f"line {getattr(one, 'lineno', 0)} does more with self.{name} than to hand it on")

    def _text(self, node: fx.Node) -> ast.Call:
        """The call of torch's that a node is."""
        call = self.call
        at = AT.of(node) if CALL.of(node) is call else None
        text = place(call.bytecode, at) if at is not None and call.bytecode is not None else None
        space = call.code.__globals__ if isinstance(call.code, FunctionType) else {}
        if not isinstance(text, ast.Call) or not _is_torchs(text.func, space):
            raise Unreadable("a layer is applied by code of its own")
        return text

    def _held(self, node: fx.Node, text: ast.Call) -> Iterator[str]:
        """The names of the parameters that a node is given, which are the module's own."""
        prefix = f"{self.call.path}." if self.call.path else ""
        for given in node.all_input_nodes:
            if VALUE.known(given):
                path = self.traced.names.get(id(VALUE.of(given)), "")
                name = path.removeprefix(prefix)
                if FORMULA.get(given) or not path.startswith(prefix) or "." in name:
                    raise Unreadable(f"line {text.lineno} has parameters that are computed, or another module's")
                yield name

    def holding(self, module: nn.Module) -> set[Guard]:
        """None, for it was told nothing."""
        return set()


def _is_torchs(function: ast.expr, space: dict[str, Any]) -> bool:
    """Whether code calls a function of torch's by the name of its module."""
    owner = function
    while isinstance(owner, ast.Attribute):
        owner = owner.value
    held = space.get(owner.id) if isinstance(owner, ast.Name) and owner is not function else None
    return isinstance(held, ModuleType) and held.__name__.partition(".")[0] == "torch"
