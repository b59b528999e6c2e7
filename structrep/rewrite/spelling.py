"""The spelling of what the code of a method asks for: parts and tensors from `self`, all else by a name of its own."""

from __future__ import annotations

import itertools
import sys
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from structrep.deployed.answers import Cells, Space
from structrep.errors import Unreadable
from structrep.graph.reads import Read
from structrep.modules.source import functions_in
from structrep.rewrite.node_changes import NodeChanges
from structrep.trace.followed import Followed


class Spelling:
    """The names of things in the code of one method.

    Args:
        changes: which say what becomes of tensors.

    Attributes:
        names: names of what is outside of the module, and what they stand for.
    """

    def __init__(self, followed: Followed, changes: NodeChanges) -> None:
        self.model, self.call, self.changes = followed.traced.model, followed.call, changes
        self.names: dict[str, Any] = {}

    def read(self, path: str, read: Read) -> str:
        """A read as code.

        Args:
            path: of the module or tensor that it is about.

        Raises:
            Unreadable: that is no part of the module.
        """
        holder = read.holder
        if isinstance(holder, nn.Module):
            return read.of(self.part(path))
        if isinstance(holder, Tensor):
            return read.of(self._tensor(path))
        if isinstance(holder, dict):
            return f"{self._space(holder)}.{read.text}"
        if isinstance(holder, FunctionType):
            return self._cell(holder, read.text)
        module = read.text.partition(".")[0]
        if module not in sys.modules:  # a variable around code of another class, say
            raise Unreadable(f"{self.call.shown} goes by {read.text}, which may be set to something else")
        self.names[module] = sys.modules[module]
        return read.text

    def part(self, path: str) -> str:
        """A module or tensor as code.

        Raises:
            Unreadable: it is no part of the module.
        """
        if path == self.call.path:
            return "self"
        spelt = "self"
        for name in self.relative(path).split("."):
            spelt = f"{spelt}.{name}" if name.isidentifier() else f'getattr({spelt}, "{name}")'
        return spelt

    def relative(self, path: str) -> str:
        """The path of a module or tensor, as the module whose method it is has it.

        Raises:
            Unreadable: it is no part of the module.
        """
        prefix = f"{self.call.path}." if self.call.path else ""
        return path[len(prefix) :] if path.startswith(prefix) else self._other_path(path)

    def _other_path(self, path: str) -> str:
        """What is held in several places, an activation that all blocks share for instance, is known by the first."""
        parent, _, name = path.rpartition(".")
        held: Any = getattr(self.model.get_submodule(parent), name, None)
        module = self.call.module
        known = (
            *module.named_modules(remove_duplicate=False),
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        found: str | None = next((other for other, value in known if value is held and held is not None), None)
        if found is None:
            raise Unreadable(f"{self.call.path} uses {path}, which is not below it")
        return found

    def _tensor(self, path: str) -> str:
        """A tensor, or one of the layer that it was merged into."""
        if path not in self.changes.homes:
            return self.part(path)
        home, plain = self.changes.homes[path].removesuffix("+"), not self.changes.homes[path].endswith("+")
        try:
            spelt = self.part(home)
        except (Unreadable, AttributeError):
            return self.changes.first_left(self.call)
        return f"{spelt}.weight" if plain else f"next({spelt}.parameters())"

    def _cell(self, function: FunctionType, text: str) -> str:
        """What a function is closed over, and what is asked of that."""
        name = "".join(itertools.takewhile(lambda c: c.isalnum() or c == "_", text))
        rest, of = text[len(name) :], function.__qualname__
        if any(function is one for one in functions_in(_defined(self.call.module, self.call.method))):
            return f"structrep_cell(type(self), {self.call.method!r}, {of!r}, {name!r}){rest}"
        if function.__globals__.get(of) is function:
            place = function.__code__.co_freevars.index(name)
            return f"{self._space(function.__globals__)}.{of}.__closure__[{place}].cell_contents{rest}"
        return f"{self._name(f'cells_of_{function.__name__}', Cells(function))}.{text}"

    def _space(self, names: dict[str, Any]) -> str:
        """A name for a namespace."""
        module = sys.modules.get(str(names.get("__name__", "")))
        held: Any = module if module is not None and vars(module) is names else Space(names)
        return self._name(f"module_{names.get('__name__', 'none')}", held)

    def _name(self, stem: str, held: Any) -> str:
        """A name that stands for something in written code."""
        name = "".join(c if c.isalnum() else "_" for c in stem)
        while self.names.get(name, held) != held:
            name += "_"
        self.names[name] = held
        return name


def _defined(module: nn.Module, name: str) -> Any:
    """What a module's class has by a name."""
    return next((vars(base)[name] for base in type(module).__mro__ if name in vars(base)), None)
