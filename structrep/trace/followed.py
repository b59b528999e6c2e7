"""A method of a module, as a trace has followed it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

from torch import fx

from structrep.graph.calls import Call, Traced, site
from structrep.graph.facts import ASSERTED


@dataclass(frozen=True, eq=False)
class Followed:
    """One call of a method, and what would be written in its place: its own steps, and those of some that it calls.

    Args:
        out: paths and names of the methods that are written out in it.
    """

    traced: Traced
    call: Call
    out: Set[tuple[str, str]]

    @classmethod
    def of(cls, traced: Traced, call: Call, written_out: Iterable[Call]) -> Followed:
        return cls(traced, call, {site(one) for one in written_out})

    def writes_out(self, call: Call) -> bool:
        """Whether a call that it makes is no call where it is written, but the steps of that."""
        return call.leaf or call.method != "forward" or site(call) in self.out

    def steps(self) -> Iterator[fx.Node | Call]:
        """What it does, as it would be written: nodes, and calls that stay calls."""
        return self._steps_of(self.call)

    def calls(self) -> Iterator[Call]:
        """The calls that are written out: itself, its methods, and what they write out."""
        return self._calls_of(self.call)

    def _steps_of(self, call: Call) -> Iterator[fx.Node | Call]:
        for step in call.steps:
            if isinstance(step, fx.Node):
                if not ASSERTED.known(step):
                    yield step
            elif self.writes_out(step):
                yield from self._steps_of(step)
            else:
                yield step

    def _calls_of(self, call: Call) -> Iterator[Call]:
        yield call
        for step in call.steps:
            if isinstance(step, Call) and self.writes_out(step):
                yield from self._calls_of(step)
