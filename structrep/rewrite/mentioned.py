"""What the text of an edited method may still ask its module for, on some path."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Set
from functools import cached_property
from typing import Any

from torch import nn

from structrep.modules.attributes import is_computed
from structrep.modules.introspection import beginning, given_away, methods_of
from structrep.modules.mentions import HOLDS_ALL
from structrep.modules.source import asks_by_name, attribute_of, functions, of_super, read_function

_ORDERED = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_TELL = {"str", "repr", "format", "len", "iter", "list", "tuple", "vars", "dir"}
_TELL_ALL = {"__repr__", "__str__", "__format__", "__len__", "__iter__"}
_ASK_NO_PART = {"isinstance", "super", "type", "id", "len", "bool"}


class Mentioned:
    """What code asks a module for: itself, and in methods that it calls.

    Args:
        edited: the methods of the module that are edited too, and say themselves what they ask for.

    Attributes:
        own: attributes of the module.
        below: attributes of anything else, such as of a part that a loop gives.
        picked: how computed names begin of own attributes, and of those of anything else.
        inside: own attributes that are lists or dicts of parts, and are handed to others.
        everything: whether it may ask for anything.
        counts: whether it may ask for all that there is at once, as `len(self._modules)` and `str(self)` do.
    """

    def __init__(self, module: nn.Module, edited: Set[str]) -> None:
        self.module, self.edited = module, edited
        self.parts = dict(module.named_children())
        self.own, self.below, self.inside = set[str](), set[str](), set[str]()
        self.picked: tuple[set[str], set[str]] = set(), set()
        self.everything = self.counts = False

    def add(self, nodes: Iterable[ast.AST], itself: str, parents: dict[ast.AST, ast.AST]) -> None:
        """Add what syntax asks for, and the methods that it calls."""
        cls: Any = type(self.module)
        kept: dict[str, Any] = {
            name: held.func for name in dir(cls) if isinstance(held := getattr(cls, name, None), cached_property)
        }
        known: dict[str, Any] = {**methods_of(cls), **kept}
        pending = self._add(nodes, itself, parents)
        seen = set(self.edited)
        while pending and not self.everything:
            name = pending.pop()
            self.everything |= hasattr(nn.Module, name) or (
                name not in known and (name in HOLDS_ALL or is_computed(self.module, name))
            )
            if name not in known or name in seen or self.everything:
                continue
            seen.add(name)
            read = read_function(known[name])
            if read is None or any(isinstance(one, ast.Name) and one.id == "super" for one in ast.walk(read[0])):
                self.everything = True
                continue
            tree, its = read
            around = {child: one for one in ast.walk(tree) for child in ast.iter_child_nodes(one)}
            pending |= self._add(ast.walk(tree), its, around)

    def _add(self, nodes: Iterable[ast.AST], itself: str, parents: dict[ast.AST, ast.AST]) -> set[str]:
        """The same of syntax alone; gives the attributes that it asks the module for."""
        found: set[str] = set()
        for node in nodes:
            around = parents.get(node)
            if attribute_of(node, itself):
                assert isinstance(node, ast.Attribute)
                found.add(node.attr)
                self.counts |= (node.attr in HOLDS_ALL and not _is_entry(around)) or node.attr in _TELL_ALL
                shown = isinstance(around, ast.FormattedValue) or _called(around) in ("str", "repr", "format")
                self.counts |= shown and isinstance(self.parts.get(node.attr), nn.Module)
                if isinstance(self.parts.get(node.attr), (nn.ModuleList, nn.ModuleDict)):
                    self.inside |= {node.attr} if self._is_handed(node, parents) else set()
            elif isinstance(node, ast.Attribute):
                self.below.add(node.attr)
                self.counts |= node.attr in HOLDS_ALL and not _is_entry(around)
                self.counts |= of_super(node) and node.attr != "forward" and hasattr(nn.Module, node.attr)
            elif isinstance(node, ast.Call) and asks_by_name(node):
                of_itself, name = isinstance(node.args[0], ast.Name) and node.args[0].id == itself, node.args[1]
                if not isinstance(name, ast.Constant):
                    self.picked[not of_itself].add(beginning(name))
                else:
                    (found if of_itself else self.below).add(str(name.value))
            elif isinstance(node, ast.Name) and node.id == itself and not isinstance(around, ast.Attribute):
                asks = _called(around)
                by_name = isinstance(around, ast.Call) and asks_by_name(around) and around.args[0] is node
                handed = asks not in _ASK_NO_PART and not by_name  # to whoever may ask for anything
                self.counts |= asks in _TELL or (handed and not asks)
                self.everything |= handed
        self.own |= found
        return found

    def _is_handed(self, node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
        """Whether a list of parts, or what is in it, is handed to others than the module's own methods."""
        methods = functions(type(self.module))
        away = given_away(node, parents)
        return any(one.method not in methods and one.helper not in _ASK_NO_PART for one in away)

    def paths(self) -> Iterator[str]:
        """The paths of all modules and tensors that it may ask for."""
        pending = [("", self.module, self.everything)]
        while pending:
            at, one, every = pending.pop()
            if at and not every:  # a method of its own may ask for all that it has
                methods = (name for name in functions(type(one)) if name != "forward" and not hasattr(nn.Module, name))
                every = not self.below.isdisjoint(methods)
            named = self.below if at else self.own
            starts = tuple(self.picked[bool(at)])
            parts = dict(one._modules.items())  # of a ScriptModule no dict
            tensors = (name for held in (one._parameters, one._buffers) for name, _ in held.items())
            for name in (*parts, *tensors):
                if every or name in named or name.startswith(starts) or isinstance(one, _ORDERED):
                    path = f"{at}.{name}" if at else name
                    yield path
                    if (part := parts.get(name)) is not None:
                        pending.append((path, part, every or path in self.inside))


def _called(node: ast.AST | None) -> str:
    """The name of the function that a call is of; "" of other syntax."""
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _is_entry(around: ast.AST | None) -> bool:
    """Whether all that is done with a dict is to ask for one entry, or whether it is there, which is no such dict
    itself."""
    if isinstance(around, ast.Subscript):
        return not (isinstance(around.slice, ast.Constant) and around.slice.value in HOLDS_ALL)
    return isinstance(around, ast.Compare) or (isinstance(around, ast.Attribute) and around.attr == "get")
