"""Layers that are given other coefficients where they stand, and what stands for those that are gone."""

from __future__ import annotations

from torch import Tensor, nn

from structrep.algebra import ConvMap
from structrep.deployed.layers import Features2d
from structrep.graph.shapes import rank
from structrep.modules.parametrized import by_properties, settle, torch_class
from structrep.read.lower import lower
from structrep.read.modules import read_module
from structrep.rewrite.units import Unit
from structrep.terms.layer import Layer


def nothing(unit: Unit) -> nn.Module:
    """What stands in the place of a layer whose work another one does now."""
    layer = unit.segments[0].term.layer
    if layer is None or layer.kind != "norm" or layer.dims is not None or layer.node is None:
        return nn.Identity()
    return Features2d() if rank(layer.node) == 2 else nn.Identity()


def kernels_of(layer: Layer) -> tuple[Tensor, ...]:
    """The stored tensors that a layer's kernel comes from."""
    if layer.formula is not None:
        return layer.formula.parameters
    return () if layer.weight is None else (layer.weight,)


def all_dead(module: nn.Module, dead: set[nn.Module]) -> bool:
    if module in dead:
        return True
    children = list(module.children())
    container = getattr(type(module), "forward", None) is nn.Module.forward  # a ScriptModule's class has none
    return container and bool(children) and all(all_dead(child, dead) for child in children)


def refill(module: nn.Module, map_: ConvMap, like: Tensor, *, bias: bool, requires_grad: bool) -> bool:
    """Give a plain layer new coefficients where it stands, in place of those that it has or computes; False if the map
    does not have its geometry."""
    cls, g = torch_class(module), map_.geometry
    if cls is None or not issubclass(cls, (nn.Linear, nn.modules.conv._ConvNd)) or by_properties(module):
        return False
    layer = read_module(module)
    if layer is None or isinstance(module, nn.modules.conv._ConvTransposeNd) != g.transposed:
        return False  # a transposed convolution of stride 1 becomes an ordinary one
    border = {"zeros": "constant"}.get(mode := getattr(module, "padding_mode", "zeros"), mode)
    if layer.shape(g.in_channels, g.dims) != g or (g.pads and border != map_.border) or bool(map_.fill.any()):
        return False
    fresh = lower(map_, like, bias=bias, requires_grad=requires_grad)
    settle(module)
    rest = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update(
        {**fresh._parameters, **{name: one for name, one in rest.items() if name not in fresh._parameters}}
    )
    return True
