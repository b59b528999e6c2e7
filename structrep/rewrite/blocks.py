"""The blocks of contexts in a forward that is written anew: `with torch.no_grad():` and the like."""

from __future__ import annotations

import ast
import itertools

from torch import fx

from structrep.errors import Unreadable
from structrep.graph.calls import Call
from structrep.graph.contexts import Context


class Blocks:
    """The contexts that are entered where a graph is written.

    Args:
        call: of the method, whose own contexts its caller enters.

    Attributes:
        entered: those that what is written next stands in.
    """

    def __init__(self, graph: fx.Graph, call: Call) -> None:
        self.graph, self.call = graph, call
        self.entered: tuple[Context, ...] = ()

    @property
    def around(self) -> tuple[Context, ...]:
        """All that what is written next runs in."""
        return self.call.contexts + self.entered

    def enter(self, wanted: tuple[Context, ...]) -> None:
        """Write what comes next in some contexts, as far as the method itself enters them.

        Raises:
            Unreadable: one of them cannot be written as code.
        """
        own = wanted[len(self.call.contexts) :]
        if reasons := [one.unwritable for one in own if one.unwritable]:
            raise Unreadable(f"{self.call.path or 'the model'} {reasons[0]}")
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, self.entered, strict=False))
        kept = len(list(same))
        for _ in self.entered[kept:]:
            self.graph.call_function(leave)
        for one in own[kept:]:
            self.graph.call_function(enter, (one.code,))
        self.entered = own


def enter(code: str) -> None:
    """Stands in a graph where a context is entered."""


def leave() -> None:
    """Stands in a graph where the last context is left."""


def indented(body: str) -> str:
    """The code of a graph, with blocks for the contexts that are entered and left in it."""
    lines: list[str] = []
    depth = 0
    for line in body.splitlines():
        name, given = _called(line)
        if name == enter.__name__:
            lines.append(f"{'    ' * depth}with {given}:")
            depth += 1
        elif name == leave.__name__:
            depth -= 1
            if lines[-1].lstrip().startswith("with "):
                lines.pop()  # nothing is left inside
        else:
            lines.append("    " * depth + line)
    return "\n".join(lines)


def _called(line: str) -> tuple[str, str]:
    """Which of the two functions above a line of a graph's code calls, if any, and with what."""
    before = f"{__name__.replace('.', '_')}_"
    if before not in line:
        return "", ""
    found = ast.parse(line).body[0]
    if not isinstance(found, ast.Assign) or not isinstance(found.value, ast.Call):
        return "", ""
    given = [ast.literal_eval(one) for one in found.value.args]
    return ast.unparse(found.value.func).removeprefix(before), given[0] if given else ""
