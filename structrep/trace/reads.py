"""The reads of a forward while a trace runs: what it asks for beside the values that it is given.

* Plain attributes of modules, and of objects that modules hold (configurations), by any way of asking: `self.low`,
  `getattr(self, name)`, a helper that is given the object (`attributes`).
* Entries of dicts and lists, where code asks for one of a constant key; else the whole.
* Where it runs: `torch.jit.is_tracing()`, `torch.is_grad_enabled()` (`environment`).
* dtype and device of tensors that the model holds (`constants`).

What a trace was told holds for that trace. Told otherwise (`CallTracer(answers=)`), a forward shows what hangs on it.
Module-level names and closures' cells are found in the code that ran (`namespace_reads`): nothing can watch those.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from structrep.graph.calls import Call
from structrep.graph.reads import Read
from structrep.graph.structures import proxies
from structrep.modules.objects import HOLDERS
from structrep.trace.frames import is_library, outside

_BETWEEN = (
    "structrep.trace.",
    "structrep.deployed.",
    "structrep.rewrite.guards",
    "structrep.graph.structures",
    "torch._tensor",
    "torch.overrides",
)
INPUTS = "", "the dtype of inputs"  # what is answered for the dtype of inputs
GRADIENTS = "", "the gradients of values"  # what a call is answered, one after another
WHOLE = ".__dict__"  # all that a module has, of which no guard could say that it is the same


class Reads:
    """Notes the reads of calls, each in its call, and tells what they are told.

    Args:
        current: the call that runs.
        answers: what is answered otherwise than it is, by `Call.reads`' keys.
    """

    def __init__(self, current: Callable[[], Call | None], answers: Mapping[tuple[str, str], Any] | None) -> None:
        self.current = current
        self.answers = dict(answers or {})
        self.noted = 0  # how many were noted

    def note(
        self, holder: Any, path: str, text: str, told: Any, frame: FrameType, counts: bool = True, deep: int = 0
    ) -> Any:
        """Note a read of the call that runs; returns what it is told."""
        call = self.current()
        if call is None:
            return told
        self.noted += 1
        call.codes[frame.f_code] = frame.f_globals
        if frame.f_code is not call.bytecode:  # a function that it calls
            for proxy in proxies([one for one in frame.f_locals.values() if isinstance(one, HOLDERS)]):
                call.held.setdefault(proxy.node, set()).add(frame.f_code)
        key = (path, text)
        read = call.reads.setdefault(key, Read(holder, text, told, counts))
        read.places.append((frame.f_code, frame.f_lasti, deep))
        return self.answers.get(key, told) if counts else told

    def ask(self, holder: Any, path: str, text: str, told: Any, counts: bool = True) -> Any:
        """A read of a tensor of the model: its dtype, where it is, what its numbers are."""
        frame = outside(sys._getframe(1), _BETWEEN)
        return told if frame is None or is_library(frame) else self.note(holder, path, text, told, frame, counts)
