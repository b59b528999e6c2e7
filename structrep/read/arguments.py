"""The arguments of a traced call, and the readers of functions by what is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from structrep.algebra import Ints
from structrep.graph.constants import constant
from structrep.graph.shapes import argument, spatial_size
from structrep.terms.layer import Reading


class NotConstant(Exception):
    """An argument that should be a constant depends on the input."""


class Arguments:
    """Arguments of a call by name or place, as the function's own signature has them.

    Args:
        read: reads other nodes.
    """

    def __init__(self, node: fx.Node, read: Callable[[fx.Node], Reading | None]) -> None:
        self.node, self.read = node, read

    def __call__(self, place: int, name: str, default: Any = None) -> Any:
        return argument(self.node, place, name, default)

    def tensor(self, place: int, name: str) -> Tensor | None:
        value = self(place, name)
        if value is None:
            return None
        found = constant(value)
        if not isinstance(found, Tensor):
            raise NotConstant
        return found

    @property
    def size(self) -> Ints | None:
        """Spatial size of the input, for the example."""
        return spatial_size(self.node.all_input_nodes[0])

    def pair(self, other: str = "other") -> tuple[Any, Any]:
        return self(0, "input"), self(1, other)


# Functions by themselves, tensor methods by name.
CALLS: dict[Callable[..., Any] | str, Callable[[Arguments], Reading | None]] = {}


def reads(*targets: Callable[..., Any] | str) -> Callable[[Any], Any]:
    def register(reader: Callable[[Arguments], Reading | None]) -> Callable[[Arguments], Reading | None]:
        CALLS.update(dict.fromkeys(targets, reader))
        return reader

    return register
