"""What is known of the sizes of values where nothing was run: dims and channels, and that inputs are no empty ones on
which gradients are wanted."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from structrep.graph.facts import CALL, STAND_IN, VALUE
from structrep.graph.operations import does, torch_name
from structrep.graph.run import Failed, computed
from structrep.graph.shapes import channels, rank
from structrep.graph.table import MIRRORED, QUESTIONS, Is

_DEEPEST = 50  # questions inside each other


class Some:
    """A size of which no more is known than that it is none of 0."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:  # within tuples too
        raise Failed("a size that is not known")

    def __mul__(self, other: Any) -> Some:
        if isinstance(other, Some) or other > 0:
            return self
        raise Failed("a size that is not known")

    __rmul__ = __mul__


class Known:
    """The values of questions about what a graph's nodes give.

    Args:
        device: where inputs are taken to be.
        guess: tells how many dims inputs have, where nothing does that was traced.

    Attributes:
        ranks: nodes of which it matters how many dims they have, and how many those are.
        loose: whether anything else was taken for granted.
    """

    def __init__(self, device: torch.device | None, guess: Callable[[], int | None]) -> None:
        self.device, self.guess = device, guess
        self.ranks: dict[fx.Node, int] = {}
        self.loose = False

    def value(self, node: fx.Node, depth: int = 0) -> Any:
        """The value of a question.

        Raises:
            Failed: it is not known.
        """
        if VALUE.known(node):
            return VALUE.of(node)
        source = node.args[0] if node.args else None
        if depth > _DEEPEST or not isinstance(source, fx.Node) or node.op not in ("call_function", "call_method"):
            raise Failed("it is not known")

        def of(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(of, value))
            if isinstance(value, slice):
                return slice(of(value.start), of(value.stop), of(value.step))
            return self.value(value, depth + 1) if isinstance(value, fx.Node) else value

        name = str(node.args[1]) if node.target is getattr else torch_name(node)
        if name in ("shape", "size"):
            sizes = self._sizes(source)
            at: Any = of(node.args[1]) if name == "size" and len(node.args) > 1 else node.kwargs.get("dim")
            return sizes if at is None else operator.getitem(sizes, at)
        if name in MIRRORED and len(node.args) == 2:
            return self._compared(name, *map(of, node.args))
        if does(node, Is.COUNTS) or node.target is operator.not_:
            return computed(node, of)
        self.loose = True
        asked = QUESTIONS.get(name)
        if asked and asked.of == "rank":
            return self._dims(source)
        if asked and asked.of == "sizes":
            return Some()
        if asked and asked.of == "place" and self.device is not None:
            return self.device if name == "device" else self.device.type == name.removeprefix("is_")
        if asked and asked.of != "place" and isinstance(asked.like, bool):
            return asked.like
        if node.target is getattr:
            return computed(node, of)
        raise Failed("it is not known")

    def _dims(self, node: fx.Node) -> int:
        found = rank(node)
        if found is None and node.op == "placeholder" and not STAND_IN.known(node):
            self.loose = True
            found = self.guess()
        if found is None:
            raise Failed("nothing tells how many dims it has")
        return found

    def _sizes(self, node: fx.Node) -> tuple[Any, ...]:
        """The sizes of a value: those that weights fix, for as many dims as it has."""
        dims = self.ranks[node] = self._dims(node)
        found: list[Any] = [Some() for _ in range(dims)]
        if dims > 1 and (size := channels(node)) is not None:
            found[1] = size
        module = CALL.of(node).module if node.op == "call_module" else None
        if dims and isinstance(module, nn.Linear):
            found[-1] = module.out_features
        return tuple(found)

    def _compared(self, how: str, one: Any, other: Any) -> bool:
        if isinstance(other, Some) and not isinstance(one, Some):
            return self._compared(MIRRORED[how], other, one)
        if not isinstance(one, Some):
            return bool(getattr(operator, how)(one, other))
        self.loose = True
        if type(other) is int and other <= 0 and how in ("eq", "ne", "gt", "le"):
            return how in ("ne", "gt")
        if type(other) is int and other <= 1 and how in ("lt", "ge"):
            return how == "ge"
        raise Failed("a size that is not known")
