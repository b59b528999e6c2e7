"""Casts: the dtypes that nodes of a graph give."""

from __future__ import annotations

import torch
from torch import fx

from structrep.ranks import argument

CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


def cast_to(node: fx.Node) -> torch.dtype | None:
    """The dtype that a cast gives, if it does no more."""
    if len(node.args) + len(node.kwargs) == 1:
        return CASTS.get(str(node.target))
    if len(node.args) + len(node.kwargs) > 2 or node.target not in ("to", "type"):
        return None
    to = argument(node, 1, "dtype")
    to = to.meta.get("value") if isinstance(to, fx.Node) else to
    if isinstance(to, str):  # `x.type("torch.FloatTensor")`
        to = getattr(getattr(torch, to.removeprefix("torch."), None), "dtype", None)
    return to if isinstance(to, torch.dtype) else None
