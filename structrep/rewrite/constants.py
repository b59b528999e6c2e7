"""The constants that a forward which is written anew uses: by name, computed again from those, or lifted."""

from __future__ import annotations

import operator
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx

from structrep.graph.calls import Origin, Traced, storage
from structrep.graph.facts import CONSTANT
from structrep.rewrite.blocks import Blocks
from structrep.rewrite.reads_again import ReadsAgain
from structrep.rewrite.spelling import Spelling


class ConstantLoader:
    """The loader of tensors that do not depend on the input, into a graph that is written.

    Args:
        reads_again: what they are computed with is asked for again there.

    Attributes:
        lifted: those of which nothing is known but their numbers, each an attribute of a name of its own.
    """

    def __init__(
        self, graph: fx.Graph, traced: Traced, spelling: Spelling, reads_again: ReadsAgain, blocks: Blocks
    ) -> None:
        self.graph, self.traced, self.spelling = graph, traced, spelling
        self.reads_again, self.blocks = reads_again, blocks
        self.written: dict[int, Any] = {}  # by id
        self.lifted: dict[str, Tensor] = {}

    def load(self, tensor: Tensor) -> Any:
        """A tensor in the graph, with all that it is computed from.

        Raises:
            Unreadable: it is held by something that is no part of the module.
        """
        pending = [tensor]
        while pending:
            one = pending[-1]
            origin = self._origin(one)
            left = [given for given in origin.given if id(given) not in self.written] if origin is not None else []
            pending += reversed(left)
            if not left:
                pending.pop()
                if id(one) not in self.written:
                    around = self.blocks.around
                    self.blocks.enter(origin.contexts if origin is not None else around)
                    self.written[id(one)] = self._write(one, origin)
                    CONSTANT.note(self.written[id(one)], True)
                    self.blocks.enter(around)
        return self.written[id(tensor)]

    def _origin(self, tensor: Tensor) -> Origin | None:
        """How a tensor is computed again; None if it is held, or lifted."""
        origin = self.traced.origins.get(id(tensor))
        if id(tensor) in self.traced.names or origin is None or storage(tensor) in self.traced.written:
            return None
        return origin if getattr(origin.function, "__name__", "__get__") != "__get__" else None

    def _write(self, tensor: Tensor, origin: Origin | None) -> Any:
        if id(tensor) in self.traced.names:
            return self.graph.get_attr(self.spelling.relative(self.traced.names[id(tensor)]))
        if origin is not None:
            given = (
                self.reads_again.put(origin.args, id(tensor), ("args",)),
                self.reads_again.put(origin.kwargs, id(tensor), ("kwargs",)),
            )
            args, kwargs = pytree.tree_map(lambda one: self.written[id(one)] if isinstance(one, Tensor) else one, given)
            name = origin.function.__name__
            if getattr(Tensor, name, None) is origin.function:
                made = self.graph.call_method(name, args, kwargs)
            else:
                made = self.graph.call_function(origin.function, args, kwargs)
            return made if origin.item is None else self.graph.call_function(operator.getitem, (made, origin.item))
        if (entry := self.traced.entries.get(id(tensor))) is not None:
            (_, name), *steps = entry.steps
            found = self.graph.get_attr(self.spelling.relative(f"{entry.holder}.{name}" if entry.holder else name))
            for how, key in steps:
                found = self.graph.call_function(getattr if how == "." else operator.getitem, (found, key))
            return found
        name = f"constant_{len(self.lifted)}"
        self.lifted[name] = tensor
        return self.graph.get_attr(name)
