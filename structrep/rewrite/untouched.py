"""Forwards that stay as they are, though layers of theirs give up their parameters."""

from __future__ import annotations

import ast
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from structrep.errors import Unreadable
from structrep.graph.calls import Call, Traced
from structrep.graph.facts import AT, CALL, FORMULA, VALUE
from structrep.modules.positions import definition, place
from structrep.modules.presence import path_to
from structrep.rewrite.guards import Guard
from structrep.rewrite.node_changes import NodeChanges


class Untouched:
    """A forward that stays as it is: its norms are given parameters that are there no more.

    Raises:
        Unreadable: its text does more with these than to hand them on.
    """

    def __init__(self, traced: Traced, changes: NodeChanges, call: Call) -> None:
        self.constants: dict[str, Any] = {}
        self.merged: dict[Any, Any] = {}
        read = definition(call.bytecode) if call.bytecode is not None else None
        nodes = list(call.nodes())
        ended = [node for node in nodes if node in changes.ended]
        if read is None or not isinstance(read[0], ast.FunctionDef) or not ended or not changes.dead.isdisjoint(nodes):
            raise Unreadable("more changes than parameters")
        prefix = f"{call.path}." if call.path else ""
        held: set[str] = set()
        for node in ended:
            at = AT.of(node) if CALL.of(node) is call else None
            text = place(call.bytecode, at) if at is not None and call.bytecode is not None else None
            space = call.code.__globals__ if isinstance(call.code, FunctionType) else {}
            if not isinstance(text, ast.Call) or not _is_torchs(text.func, space):
                raise Unreadable("a norm is applied by code of its own")
            for given in node.all_input_nodes:
                if VALUE.known(given):
                    path = traced.names.get(id(VALUE.of(given)), "")
                    name = path.removeprefix(prefix)
                    if FORMULA.get(given) or not path.startswith(prefix) or "." in name:
                        raise Unreadable("a norm has parameters that are computed, or another module's")
                    held.add(name)
        tree, parents, _ = read
        itself = tree.args.args[0].arg if tree.args.args else ""
        for one in ast.walk(tree):
            if isinstance(one, ast.Attribute) and path_to(one, itself) in held:
                around = parents[one]
                if not (isinstance(around, ast.Call) and one in around.args) and not isinstance(around, ast.keyword):
                    raise Unreadable(f"line {one.lineno} does more with self.{one.attr} than to hand it on")

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
