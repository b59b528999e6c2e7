"""Values that a module gives in the middle of a merge, and other forwards that would still look at them.

`forward` may run one block after another, and a convolution at the end of the first merge with one at the start of the
second. Another method, say `forward_intermediates`, may give back what stands between. So for every merge the methods
of the modules around are looked through whose name says that they are forwards too: those that run a part of the merge,
by their source, are followed. Left out are those for a converted model (`forward_fuse`, `forward_deploy`), which run a
convolution and leave out its norm because that is merged by then.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import textwrap
from collections import defaultdict
from types import FunctionType
from typing import Any

from torch import fx, nn

from structrep.errors import Shared
from structrep.trace import Call, Traced, follow_method


class Borders:
    """What a model's methods see of the values between its modules."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.given: dict[fx.Node, list[Call]] = defaultdict(list)  # value -> the calls that give it back
        for trace in traced.traces:
            for call in trace.calls:
                if isinstance(call.result, fx.Proxy):
                    self.given[call.result.node].append(call)
        self.others: dict[type, dict[str, FunctionType]] = {}
        self.followed: dict[tuple[nn.Module, str], list[Call] | None] = {}

    def check(self, inside: set[fx.Node], root: fx.Node, owner: Call) -> None:
        """Raise if some value that would vanish is one that another forward gives back or looks at.

        Raises:
            Shared: it is, or may be.
        """
        for node in inside - {root}:
            for call in self.given.get(node, ()):
                if call is owner or owner not in call.chain():
                    continue
                if call.method != "forward":
                    if _is_forward(call.method):
                        raise Shared(f"{call.path or 'the model'}.{call.method} gives back a value inside the merge")
                    continue
                for around in owner.chain():
                    self._check_methods(around, call)

    def _check_methods(self, around: Call, call: Call) -> None:
        """Raise if another forward of a module around looks at what a call of one of its parts gives."""
        part = call.path[len(around.path) :].lstrip(".").partition(".")[0]
        cls = type(around.module)
        if cls not in self.others:
            self.others[cls] = _other_forwards(cls)
        for name, function in self.others[cls].items():
            runs = _runs(function)
            if (around.module, name) in self.traced.calls or (runs is not None and part not in runs):
                continue
            calls = self._calls(around, name)
            usual = [_readers(one.result) for one in self.traced.calls[call.module, call.method]]
            seen = calls is None or any(
                one.path == call.path
                and one.method == "forward"
                and not any(_readers(one.result) <= readers for readers in usual)
                for one in calls
            )
            if seen:
                raise Shared(
                    f"{type(around.module).__name__}.{name} may look at what {call.path} gives, which would no longer "
                    f"be there"
                )

    def _calls(self, around: Call, method: str) -> list[Call] | None:
        key = (around.module, method)
        if key not in self.followed:
            self.followed[key] = follow_method(around.module, around.path, method)
        return self.followed[key]


def _readers(value: Any) -> set[tuple[str, str, str]]:
    """What reads a value, as it is called and where."""
    node = value.node if isinstance(value, fx.Proxy) else value
    if not isinstance(node, fx.Node):
        return {("given back", "", "")}
    return {(u.op, str(u.target), u.meta["call"].path if u.meta["call"] else "") for u in node.users}


def _is_forward(name: str) -> bool:
    converted = ("fuse", "deploy", "reparam", "merge", "switch")
    return name.startswith("forward_") and not any(word in name for word in converted)


def _other_forwards(cls: type) -> dict[str, FunctionType]:
    """Methods that are forwards by their name, as they are inherited."""
    found: dict[str, FunctionType] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] != "torch":
            named = {name: f for name, f in vars(base).items() if _is_forward(name)}
            found |= {name: function for name, function in named.items() if isinstance(function, FunctionType)}
    return found


@functools.lru_cache(1024)
def _runs(function: FunctionType) -> frozenset[str] | None:
    """The attributes of its module that the code of a method calls, loops over to call, or hands on; None if it cannot
    be read."""
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    itself = arguments[0] if arguments else ""
    bound: dict[str, set[str]] = defaultdict(set)

    def mentioned(expression: ast.AST) -> set[str]:
        found: set[str] = set()
        for part in ast.walk(expression):
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == itself:
                found.add(part.attr)
            elif isinstance(part, ast.Name):
                found |= bound[part.id]
        return found

    for _ in range(2):  # what is bound may come of what is bound further down
        for node in ast.walk(tree):
            if isinstance(node, (ast.For, ast.comprehension)):
                targets, value = [node.target], node.iter
            elif isinstance(node, ast.Assign):
                targets, value = node.targets, node.value
            else:
                continue
            for name in (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)):
                bound[name] |= mentioned(value)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not (isinstance(node.func, ast.Attribute) and hasattr(nn.ModuleList, node.func.attr)):
                found |= mentioned(node.func)
            if not (isinstance(node.func, ast.Name) and hasattr(builtins, node.func.id)):
                found |= {name for argument in node.args for name in mentioned(argument)}
    return frozenset(found)
