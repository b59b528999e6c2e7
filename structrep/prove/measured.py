"""Merges chosen by how long both forms take, on the user's device and shapes, in the runtime that will run them.

Multiply-adds say little about some layers: one large depthwise kernel may take longer than its branches, or a tenth of
their time, by what a runtime has for it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from structrep.errors import BadInput, Slower, said
from structrep.files import save_bytes, writer
from structrep.graph.constants import held
from structrep.graph.facts import CALL, INDEX, SHAPE
from structrep.graph.queries import only_asserted
from structrep.match.merge import Merge
from structrep.modules.arguments import Example, as_arguments
from structrep.prove.latency import device_name, device_of, in_turn
from structrep.prove.run import How
from structrep.read.lower import lower
from structrep.records.latency import LatencyRecord, milliseconds
from structrep.terms.term import Term, geometry

Runtime = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Callable[[], object]]
ROUNDS, ENOUGH = 20, 1.0  # rounds of both forms, or fewer once they have taken so many seconds
TIE = 1.01  # how much slower than the fastest a whole model may be to count as fast


def eager(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], object]:
    """torch itself."""
    return partial(model, *args, **kwargs)


@dataclass(eq=False)
class Measured:
    """How merges are timed.

    Examples:
        >>> structrep.reparameterize(model, x, cost=structrep.Measured(runtime=mine, cache="timings.json"))

    Args:
        runtime: gets a module and the arguments that it will be called with, and gives what runs it: a
            session of another runtime, say. Timed is that call.
        cache: a JSON file that timings of layers are kept in, and read from the next time; one file for each runtime.
            In a process they are kept anyway, as long as this object is.

    Raises:
        BadInput: the cache is there and holds no timings, or cannot be written.
    """

    runtime: Runtime = eager
    cache: str | Path | None = None
    timings: dict[str, tuple[float, float]] = field(init=False, default_factory=dict)  # seconds: as it is, and merged

    def __post_init__(self) -> None:
        if self.cache is None:
            return
        writer(path := Path(self.cache), force=True)  # says what would stop it
        if not path.exists():
            return
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.timings = {key: (float(one), float(two)) for key, (one, two) in kept.items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise BadInput(f"{path} holds no timings of layers ({said(error)}): remove it, or name another") from error

    def slower(self, merges: Iterable[Merge]) -> dict[Merge, Slower]:
        """The merges whose layer takes longer than what it is made of; not those that cannot be run apart."""
        found: dict[Merge, Slower] = {}
        for merge in merges:
            seconds = self.seconds(merge)
            if seconds is not None and seconds[1] > seconds[0]:
                before, after = map(milliseconds, seconds)
                found[merge] = Slower(f"{merge.term} takes {before}, as one layer it would take {after}: measured here")
        return found

    def seconds(self, merge: Merge) -> tuple[float, float] | None:
        """How long the layers of a merge take, and the merged one, on a value as they are given; None if nothing tells
        how large that is, or they cannot be run apart. Where the difference may be noise they take the same."""
        shape = SHAPE.get(merge.base)
        weight = next(layer.weight for layer in merge.term.leaves() if layer.weight is not None)
        if shape is None or merge.carried is not None or merge.is_table:
            return None
        key = " ".join(
            (
                _written(merge.term),
                str(tuple(shape)),
                str(weight.dtype),
                device_name(weight.device),
                f"torch {torch.__version__}",
            )
        )
        if key not in self.timings:
            if (stretch := _stretch(merge)) is None:
                return None
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(weight)
            try:
                record = self._timed({"as it is": stretch, "merged": lower(merge.value(), weight)}, (x,), {})
            except Exception:  # a runtime that takes whole models may not take such a part
                return None
            before, after = record.models.values()
            low, _, high = statistics.quantiles(
                (b / a for a, b in zip(before.seconds, after.seconds, strict=True)), n=4
            )
            self.timings[key] = before.median, before.median if low <= 1 <= high else after.median
            if self.cache is not None:
                writer(Path(self.cache), force=True)(save_bytes, json.dumps(self.timings, indent=1).encode())
        return self.timings[key]

    def fastest(self, models: Mapping[str, nn.Module], example_inputs: Example) -> tuple[str, LatencyRecord]:
        """The name of the first of some models that none is faster than, and how long each takes.

        Args:
            models: they are run, and so are hooks on them; give copies.
            example_inputs: as for `structrep.verify`.

        Raises:
            BadInput: the runtime does not take a model.
        """
        first = next(iter(models.values()))
        try:
            record = self._timed(models, *as_arguments(How.of(first).inputs(example_inputs, first)))
        except Exception as error:
            raise BadInput(f"the runtime does not take {type(first).__name__}: {said(error)}") from error
        best = min(one.median for one in record.models.values())
        return next(name for name, one in record.models.items() if one.median <= TIE * best), record

    def _timed(self, models: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LatencyRecord:
        with torch.no_grad():
            runs = {name: self.runtime(model, args, kwargs) for name, model in models.items()}
            return in_turn(runs, ROUNDS, device_of(models.values()), ENOUGH)


def _stretch(merge: Merge) -> nn.Module | None:
    """The layers of a merge as a module of their own; None if they go by more than the value that they are given."""
    graph, layers = fx.Graph(), nn.Module()
    known = {merge.base: graph.placeholder("x")}

    def find(node: fx.Node) -> fx.Node:
        if node not in known:
            name = f"constant_{len(known)}"
            layers.register_buffer(name, held(node))  # TypeError, KeyError: it is no constant tensor
            known[node] = graph.get_attr(name)
        return known[node]

    try:
        for node in sorted(merge.nodes, key=lambda node: INDEX.of(node)):
            if only_asserted(node):
                continue
            known[node] = graph.node_copy(node, find)
            if node.op == "call_module":
                name = known[node].target = f"layer_{len(known)}"
                layers.add_module(name, CALL.of(node).module)
    except (KeyError, TypeError):
        return None
    graph.output(known[merge.root])
    return fx.GraphModule(layers, graph)


def _written(term: Term) -> str:
    """A term with the geometry of each of its layers, by which it takes the time that it does."""
    whole = geometry(term)
    shapes = [layer.shape(layer.in_channels or whole.in_channels, whole.dims) for layer in term.leaves()]
    return f"{term}: {', '.join(str(astuple(shape)) for shape in (whole, *shapes))}"
