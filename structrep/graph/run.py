"""Nodes of a graph, run."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from structrep.graph.facts import CALL, DTYPE, SHAPE, UNFOLLOWED, VALUE
from structrep.graph.observed import Given, Thing
from structrep.graph.operations import writes
from structrep.modules.copies import shallow_copy


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
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _asking(mode), torch.no_grad():
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


@contextlib.contextmanager
def _asking(mode: FakeTensorMode) -> Iterator[None]:
    """Tensors without numbers; torch logs as errors what cannot be done with them, which here is an answer."""
    mine, log = threading.get_ident(), logging.getLogger("torch._subclasses.fake_tensor")

    def other(record: logging.LogRecord) -> bool:
        return record.thread != mine

    log.addFilter(other)
    try:
        with mode:
            yield
    finally:
        log.removeFilter(other)


def _fake(mode: FakeTensorMode, given: Tensor | Given | Thing) -> Any:
    if isinstance(given, Tensor):
        return mode.from_tensor(given.detach())
    if isinstance(given, Thing):
        raise TypeError(f"a {given.cls.__name__} has no shape")
    if given.number is not None:
        return given.number
    return torch.empty_strided(given.shape, given.stride, dtype=given.dtype, device=given.device)


class Failed(Exception):
    """What a node gives cannot be told."""


class Partial:
    """A graph that is still being made, run as far as is asked: sizes without computing, numbers where they are needed.

    Args:
        inputs: what its placeholders stand for, in order.
    """

    def __init__(self, inputs: list[Any]) -> None:
        self.inputs = inputs
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.sized: dict[fx.Node, Any] = {}
        self.numbers: dict[fx.Node, Any] = {}

    def shown(self, node: fx.Node) -> Any:
        """What a node gives, of tensors no numbers.

        Raises:
            Failed: it cannot be told so.
        """
        with _asking(self.mode):
            return self._run(node, self.sized, lambda given: _fake(self.mode, given), shallow_copy)

    def value(self, node: fx.Node) -> Any:
        """What a node gives.

        Raises:
            Failed: it cannot be computed.
        """
        before = [one for one in node.graph.nodes if one.op != "output"]
        if any(not UNFOLLOWED.get(one) and writes(one) for one in before):  # to what others have read, or will
            for one in before[: before.index(node)]:
                self._attempt(one)
        return self._run(node, self.numbers, _real, copy.deepcopy)

    def _attempt(self, node: fx.Node) -> None:
        try:
            self._run(node, self.numbers, _real, copy.deepcopy)
        except Failed:
            return  # whoever needs it says so

    def _run(
        self,
        node: fx.Node,
        known: dict[fx.Node, Any],
        given: Callable[[Any], Any],
        own: Callable[[nn.Module], nn.Module],
    ) -> Any:
        pending = [node]
        while pending:  # no recursion: a chain of nodes may be longer than Python's stack
            last = pending[-1]
            if last not in known and (left := [one for one in last.all_input_nodes if one not in known]):
                pending += left
                continue
            pending.pop()
            if last not in known:
                try:
                    known[last] = self._one(last, known, given, own)
                except Exception as error:  # whatever code that is kept whole raises
                    said = error.args if isinstance(error, Failed) else (f"{type(error).__name__}: {error}",)
                    known[last] = Failed(*said)  # one of its own, which holds nothing of what ran
        if isinstance(known[node], Failed):
            raise Failed(*known[node].args)
        return known[node]

    def _one(
        self,
        node: fx.Node,
        known: dict[fx.Node, Any],
        given: Callable[[Any], Any],
        own: Callable[[nn.Module], nn.Module],
    ) -> Any:
        failed = next((known[one] for one in node.all_input_nodes if isinstance(known[one], Failed)), None)
        if failed is not None:
            raise Failed(*failed.args)
        if node.op == "placeholder":
            place = [one for one in node.graph.nodes if one.op == "placeholder"].index(node)
            return given(self.inputs[place])
        if node.op == "get_attr":
            return VALUE.of(node)
        # what is not followed may write to itself
        module = own(CALL.of(node).module) if node.op == "call_module" and UNFOLLOWED.get(node) else None
        return computed(node, known.__getitem__, module)


def _real(given: Tensor | Given | Thing) -> Any:
    if isinstance(given, Tensor):
        return given.detach().clone()
    if isinstance(given, Thing) or given.number is None:
        raise Failed("of what a part is given only the sizes are known")
    return given.number
