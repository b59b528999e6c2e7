"""Values that do not depend on the input: what they are, and in float64."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx


def constant(value: Any) -> Tensor | float | None:
    """The number or tensor that an argument is, if it does not depend on the input, nor on how often it was asked."""
    if isinstance(value, fx.Node):
        value = value.meta.get("value") if not value.meta.get("unsteady") else None
        if isinstance(value, Tensor):
            return value
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def exact(value: Any) -> Tensor | float | None:
    """The same, computed in float64 if it is computed: what the model computes in its own dtype is off by rounding, and
    a border by so much is another one."""
    pending = [value] if isinstance(value, fx.Node) else []
    while pending:
        last = pending[-1]
        done = "recompute" not in last.meta or "exact" in last.meta
        inputs = () if done else last.all_input_nodes
        if left := [n for n in inputs if "recompute" in n.meta and "exact" not in n.meta]:
            pending += left
            continue
        if not done:
            last.meta["exact"] = last.meta["recompute"]()
        pending.pop()
    known = constant(value)
    return held(value) if known is not None and isinstance(value, fx.Node) and "exact" in value.meta else known


def held(node: fx.Node) -> Any:
    """The value of a constant, as merges have read it."""
    return node.meta.get("exact", node.meta["value"])
