"""What nodes are called in the model that they come from."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import fx, nn

from structrep.graph.facts import CALL, COMPUTED


def path_of(node: fx.Node) -> str:
    """The path of the module that a node is, or is written in."""
    call = CALL.of(node)
    return call.path if call is not None else ""


def layer_of(node: fx.Node) -> str:
    """The path of the layer that a node is, or is written in."""
    call = CALL.of(node)
    return call.path if call is not None and isinstance(call.module, _LAYERS) else ""


def layers_of(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """The paths of the layers among some nodes."""
    return tuple(dict.fromkeys(filter(None, map(layer_of, nodes))))


_LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Linear)


def is_lone_layer(nodes: Collection[fx.Node]) -> bool:
    """Whether nodes are a call of one layer, which computes its weights."""
    return len(nodes) == 1 and all(node.op == "call_module" and COMPUTED.of(node) for node in nodes)
