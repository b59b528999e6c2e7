"""Code that says whether what a forward was told still holds, and raises where it does not.

Written so that `torch.jit.script` takes it where it would take the question itself; what it would not take stands
behind `if not torch.jit.is_scripting()`.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType, MappingProxyType
from typing import Any

from torch import nn

from structrep.deployed.answers import literal
from structrep.deployed.contents import described, is_named, is_numpys, is_open
from structrep.errors import Unreadable
from structrep.graph.calls import Call
from structrep.modules.positions import definition
from structrep.modules.settable import may_set
from structrep.rewrite.conditions import answer


@dataclass(frozen=True)
class Guard:
    """A question that has to have the same answer still.

    Args:
        asked: the question, as code.
        told: the answer, as a message shows it.
        unlike: code that is true where the answer is another.
        scripted: whether `torch.jit.script` takes that code.
    """

    asked: str
    told: str
    unlike: str
    scripted: bool
    message: tuple[str, str]  # what is said before and after what is found
    later: bool = False  # whether it is of the deploy model alone: what is merged is gone from there
    of_inputs: bool = False  # whether it asks for what a method is given, not for its module
    shows: bool = True  # whether the message says what is found: a tensor would fill pages

    def passes(self, module: nn.Module, names: Mapping[str, Any]) -> bool:
        """Whether a module would pass."""
        if self.of_inputs:
            return True
        try:
            return not eval(self.unlike, {**names, "self": module})
        except Exception:  # what is asked for is not there
            return False

    def lines(self) -> list[str]:
        before, after = self.message
        if not self.shows:
            return [f"if {self.unlike}:", f"    raise ValueError({before + after!r})"]
        behind = f" + {after!r}" if after else ""
        return [f"if {self.unlike}:", f"    raise ValueError({before!r} + str({self.asked}){behind})"]


def guard(asked: str, named: str, told: Any, method: str, scripted: bool) -> Guard | None:
    """A guard for an answer; None if any answer would do.

    Args:
        asked, named: the question, as code and as a message says it.
        method: whose forward asks, as a message says it.
        scripted: whether `torch.jit.script` takes the question.
    """
    remedy = ": convert the model again after setting it"
    found = f"structrep_described({asked}) != {described(told)!r}" if is_open(told) else unlike(asked, told)
    if found is None:
        return None
    text = literal(told)
    shown = described(told) if text == "..." else text
    before = f"{method} was reparameterized for {named}={shown}, and {named} is "
    plain = told is None or type(told) in (bool, int, float, str)
    return Guard(asked, shown, found, scripted and plain, (before, f" now{remedy}"))


def missing(asked: str, holder: str, name: str, method: str) -> Guard:
    """A guard for an attribute that there was none of."""
    before = f"{method} was reparameterized for a model without {asked}, and {asked} is "
    after = " now: convert the model again after setting it"
    return Guard(asked, "missing", f"hasattr({holder}, {name!r})", False, (before, after))


def argument(name: str, told: Any) -> Guard | None:
    """A guard for an argument that a forward was traced with."""
    found = unlike(name, told)
    if found is None:
        return None
    plain = told is None or type(told) in (bool, int, float, str)
    before = f"this forward was reparameterized for {name}={literal(told)} and was called with "
    before += "another" if told is None else f"{name}="
    after = ": convert the model again with example inputs, or in a model, that call it so"
    return Guard(name, literal(told), found, plain, (before, after), shows=told is not None)


def given(name: str) -> Guard:
    """A guard for an argument that is None by default, and was not."""
    before = f"this forward was reparameterized for a given {name} and was called with {name}="
    return Guard(name, "...", f"{name} is None", True, (before, ""))


def tensor(name: str) -> Guard:
    """A guard for an argument that was a tensor, of a forward that asks what it is."""
    before = f"this forward was reparameterized for a tensor as {name} and was called with {name}="
    return Guard(name, "a tensor", f"not isinstance({name}, torch.Tensor)", True, (before, ""))


def dims(condition: str, told: bool, method: str) -> Guard:
    """A guard for an answer that hangs on how many dims a method is given."""
    before = f"{method} was reparameterized for inputs of which `{condition}` is {told}, and it is "
    after = " of these: convert the model again with such example inputs"
    unlike = f"not ({condition})" if told else condition
    return Guard(f"({condition})", str(told), unlike, True, (before, after), of_inputs=True)


def alike(asked: str, other: str, method: str) -> Guard:
    """A guard for two answers that were the same."""
    before = f"{method} was reparameterized for a model whose {asked} and {other} are the same, and {asked} is "
    return Guard(asked, other, f"{asked} != {other}", False, (before, ": convert the model again after casting it"))


NUMBERS = "_numbers"  # behind the name by which a tensor is kept: of what it was


def same(asked: str, kept: str, holders: Iterable[str], method: str) -> Guard:
    """A guard for a tensor that was merged.

    Args:
        holders: the parts that hold it, which may be there no more.
    """
    before = f"{method} was reparameterized for the {asked} that was merged, and {asked} is "
    after = " now: convert the model again after setting it"
    there = " and ".join((*(f"{one} is not None" for one in holders), ""))
    unlike = f"{there}({asked} is not {kept} or structrep_written({asked}, {kept}{NUMBERS}))"
    return Guard(asked, "merged", unlike, False, (before, after))


def gone(asked: str, method: str) -> Guard:
    """A guard for a parameter or buffer that was merged, and is None since."""
    before = f"{method} was reparameterized for the {asked} that was merged, and {asked} is "
    after = " now: convert the model again after setting it"
    return Guard(asked, "merged", f"{asked} is not None", False, (before, after), later=True)


def kept(asked: str, method: str) -> Guard:
    """A guard for a parameter or buffer that was merged, and stays since it is asked whether it is there."""
    before = f"{method} was reparameterized for the {asked} that was merged, and {asked} is "
    return Guard(asked, "merged", f"{asked} is None", True, (before, " now: convert the model again after setting it"))


def never(question: str, method: str) -> Guard:
    """A guard for an answer that a forward cannot be followed with."""
    before = f"{method} was reparameterized for {question}=False, and cannot be followed where it is "
    return Guard(question, "False", question, True, (before, ""))


def check_settled(guards: Iterable[Guard], call: Call, others: bool) -> None:
    """Raise if a method may set, as it runs, what a guard at its start asks for.

    Args:
        others: whether others run who are given its module, and may set that too; else all that the method has asked
            is guarded, and the ways that it did not go for that are none.

    Raises:
        Unreadable: it may.
    """
    gone = _not_run(call) if not others else frozenset()
    for one in guards:
        for path in _paths(one.asked) if not one.of_inputs else ():
            if may_set(call.module, call.method, path, others, gone):
                raise Unreadable(f"{call.shown} may set {'.'.join(path)}, by which something is merged, as it runs")


def _not_run(call: Call) -> frozenset[ast.AST]:
    """The parts of a method on the ways that it does not go for what its module is set to."""
    found = definition(call.bytecode) if call.bytecode is not None else None
    if found is None or not isinstance(found[0], ast.FunctionDef) or not isinstance(call.code, FunctionType):
        return frozenset()
    tree, gone = found[0], list[ast.AST]()
    for one in (node for node in ast.walk(tree) if isinstance(node, ast.If)):
        told = answer(one.test, tree, call.code.__globals__, call.module)
        if told is not None:
            gone += one.orelse if told[1] else one.body
    return frozenset(node for one in gone for node in ast.walk(one))


@functools.lru_cache(4096)
def _paths(asked: str) -> list[list[str]]:
    """The attributes of its module that a question is about, each as the names of one of the other."""
    found: list[list[str]] = []
    tree = ast.parse(asked, mode="eval")
    inner = set[ast.AST]()
    for node in ast.walk(tree):
        path: list[str] = []
        while node not in inner:
            inner.add(node)
            if isinstance(node, ast.Attribute):
                path.insert(0, node.attr)
                node = node.value
            elif isinstance(node, ast.Subscript):
                node = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                path[:0] = [str(node.args[1].value)] if isinstance(node.args[1], ast.Constant) else []
                node = node.args[0]
            else:
                break
        found += [path] if path else []
    return found


def code(guards: Iterable[Guard]) -> list[str]:
    """Guards as lines of code."""
    once = list(dict.fromkeys(guards))
    scripted = [line for one in once if one.scripted for line in one.lines()]
    others = [f"    {line}" for one in once if not one.scripted for line in one.lines()]
    return scripted + (["if not structrep_is_scripting():", *others] if others else [])


def by_name(lines: list[str], itself: str) -> list[str]:
    """Code for a method that calls its module by another name than `self`."""
    if itself == "self" or not lines:
        return lines
    tree = ast.parse("\n".join(lines))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "self":
            node.id = itself
    return ast.unparse(tree).split("\n")


def unlike(asked: str, told: Any) -> str | None:
    """Code that is true where the answer to a question is another than it was; None if any would do."""
    if told is None or told is ...:
        return None if told is ... else f"{asked} is not None"
    if is_named(told):
        return f"structrep_described({asked}) != {described(told)!r}"
    text = literal(told)
    if text == "...":
        return None
    if isinstance(told, float) and math.isnan(told):
        return f"{asked} == {asked}"
    return f"not structrep_matches({asked}, {text})" if _is_loose(told) else f"{asked} != {text}"


def _is_loose(told: Any) -> bool:
    """Whether a structure has something that may be anything, or is told by its name."""
    if isinstance(told, (dict, MappingProxyType)):
        return any(map(_is_loose, told.values()))
    if isinstance(told, (list, tuple)):
        return any(map(_is_loose, told))
    return literal(told) == "..." or is_named(told) or is_numpys(told)
