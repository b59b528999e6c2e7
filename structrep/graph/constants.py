"""Values that do not depend on the input: what they are, and in float64."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from structrep.graph.facts import EXACT, RECOMPUTE, UNSTEADY, VALUE


def constant(value: Any) -> Tensor | float | None:
    """The number or tensor that an argument is, if it does not depend on the input, nor on how often it was asked."""
    if isinstance(value, fx.Node):
        value = VALUE.get(value) if not UNSTEADY.get(value) else None
    if isinstance(value, Tensor):
        return value
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def exact(value: Any) -> Tensor | float | None:
    """The same, computed in float64 if it is computed: what the model computes in its own dtype is off by rounding, and
    a border by so much is another one."""
    pending = [value] if isinstance(value, fx.Node) else []
    while pending:
        last = pending[-1]
        done = not RECOMPUTE.known(last) or EXACT.known(last)
        inputs = () if done else last.all_input_nodes
        if left := [n for n in inputs if RECOMPUTE.known(n) and not EXACT.known(n)]:
            pending += left
            continue
        if not done:
            EXACT.note(last, RECOMPUTE.of(last)())
        pending.pop()
    known = constant(value)
    return held(value) if known is not None and isinstance(value, fx.Node) and EXACT.known(value) else known


def held(node: fx.Node) -> Any:
    """The value of a constant, as merges have read it."""
    return EXACT.get(node, VALUE.of(node))
