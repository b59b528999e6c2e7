"""The weight and bias that norms of each value end with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from structrep.algebra import ConvMap
from structrep.algebra.precision import doubled
from structrep.errors import Unreadable
from structrep.graph.facts import CALL, COMPUTED
from structrep.modules.parametrized import by_properties, hooks
from structrep.read.arguments import Arguments, NotConstant
from structrep.read.nodes import called, read_node
from structrep.terms.layer import Layer
from structrep.terms.layers import diagonal_layer, numbers_in

# Norms that take their statistics from each value, and the spatial dims of their weight and bias: 0 for the last dim of
# a value, None for dim 1 of a value of any rank.
ENDINGS: dict[Any, int | None] = {
    nn.LayerNorm: 0, nn.RMSNorm: 0, nn.GroupNorm: None,
    nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3,
    F.layer_norm: 0, F.rms_norm: 0, F.group_norm: None,
}  # fmt: skip


def ends(module: nn.Module) -> bool:
    """Whether a module is a norm of each value, which may end with a scale."""
    type_: Any = next((base for base in type(module).__mro__ if base in ENDINGS), None)
    return type_ is not None and type(module).forward is type_.forward and "forward" not in module.__dict__


def read_ending(node: fx.Node) -> Layer | None:
    """The scale and shift per channel that a norm of each value ends with; None where there is none."""
    if node.op == "call_module":
        module = CALL.of(node).module
        computes = by_properties(module) or isinstance(COMPUTED.of(node), Unreadable)
        if not ends(module) or hooks(module) or computes:
            return None
        dims = next(ENDINGS[base] for base in type(module).__mro__ if base in ENDINGS)
        numbers: dict[str, Any] = called(node)._parameters
        weight, bias = numbers.get("weight"), numbers.get("bias")
    elif node.op == "call_function" and node.target in ENDINGS:
        a = Arguments(node, read_node)
        try:
            weight, bias = a.tensor(2, "weight"), None if node.target is F.rms_norm else a.tensor(3, "bias")
        except NotConstant:
            return None
        dims = ENDINGS[node.target]
    else:
        return None
    given = weight if weight is not None else bias
    if given is None or given.ndim != 1:
        return None

    def load(c: int, d: int) -> ConvMap:
        return ConvMap.scale(doubled(torch.ones_like(given) if weight is None else weight), bias, dims=d)

    kind = "norm" if dims is None else "affine"
    scale = diagonal_layer(kind, load, len(given), dims, numbers_in(weight, bias))
    return replace(scale, node=node, shifts=bias is not None)
