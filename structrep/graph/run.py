"""Nodes of a graph, run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from structrep.graph.facts import CALL, DTYPE, SHAPE, VALUE
from structrep.graph.observed import Given, Thing


def _own(value: Any) -> Any:
    """A structure with lists and dicts that may be written to, which those of torch.fx may not."""
    if isinstance(value, list):
        return list(map(_own, value))
    if isinstance(value, dict):
        return {key: _own(one) for key, one in value.items()}
    return tuple(map(_own, value)) if type(value) is tuple else value


def computed(node: fx.Node, load: Callable[[fx.Node], Any], module: nn.Module | None = None) -> Any:
    """What a node gives, its arguments loaded; `module` stands for the one that it calls."""
    args: Any = _own(fx.node.map_arg(node.args, load))
    kwargs: Any = _own(fx.node.map_arg(node.kwargs, load))
    if node.op == "call_module":
        return (module or CALL.of(node).module)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


_LENDS = {"from_dlpack", "to_dlpack", "__dlpack__"}  # what hands on memory, of which fake tensors have none


def infer_shapes(graph: fx.Graph, inputs: list[Any]) -> None:
    """Note the shape and dtype of every node that can be followed without computing, in its `meta`."""
    given = iter(inputs)
    values: dict[fx.Node, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        for node in graph.nodes:
            try:
                if node.op == "placeholder":
                    values[node] = _fake(mode, next(given))
                elif node.op == "get_attr":
                    values[node] = VALUE.of(node)
                elif node.op != "output" and getattr(node.target, "__name__", node.target) not in _LENDS:
                    found = computed(node, values.__getitem__)
                    faked = any(isinstance(values[one], FakeTensor) for one in node.all_input_nodes)
                    if not faked or not isinstance(found, Tensor) or isinstance(found, FakeTensor):
                        values[node] = found  # else it is no fake any more, and may have no memory either
            except Exception:  # unknown from here on, which only makes the plan more careful
                continue
            if isinstance(values.get(node), Tensor):
                SHAPE.note(node, tuple(values[node].shape))
                DTYPE.note(node, values[node].dtype)


def _fake(mode: FakeTensorMode, given: Tensor | Given | Thing) -> Any:
    if isinstance(given, Tensor):
        return mode.from_tensor(given.detach())
    if isinstance(given, Thing):
        raise TypeError(f"a {given.kind.__name__} has no shape")
    if given.number is not None:
        return given.number
    return torch.empty_strided(given.shape, given.stride, dtype=given.dtype, device=given.device)
