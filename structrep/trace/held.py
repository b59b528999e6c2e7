"""The tensors that a model holds, by where they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from structrep.graph.calls import Entry, Traced
from structrep.graph.observed import Observed
from structrep.modules.copies import ATOMS
from structrep.modules.objects import OF_MODULES, is_object


def owner_of(module: nn.Module) -> Tensor | None:
    return next((t for t in module.parameters() if t.is_floating_point()), None)


def _named_tensors(paths: dict[nn.Module, str]) -> Iterator[tuple[str, Tensor]]:
    for module, path in paths.items():
        for name, value in (*module._parameters.items(), *module._buffers.items(), *module.__dict__.items()):
            if isinstance(value, Tensor):
                yield f"{path}.{name}" if path else name, value


def untraced(twin: nn.Module, paths: dict[nn.Module, str], observed: Observed | None = None) -> Traced:
    names = {id(tensor): name for name, tensor in _named_tensors(paths)}
    entries = {id(tensor): entry for tensor, entry in _entries(paths) if id(tensor) not in names}
    return Traced(twin, names, entries, observed=observed or Observed())


DEEP = 4  # entries in entries that are looked into


def _entries(paths: dict[nn.Module, str]) -> Iterator[tuple[Tensor, Entry]]:
    """Plain tensors in dicts, lists, tuples and objects that modules hold."""
    for module, path in paths.items():
        own = ((name, value) for name, value in vars(module).items() if name not in OF_MODULES)
        pending: list[tuple[Any, tuple[tuple[str, Any], ...]]] = [
            (value, ((".", name),)) for name, value in own if type(value) not in ATOMS
        ]
        while pending:
            value, steps = pending.pop()
            if isinstance(value, Tensor):
                yield value, Entry(path, steps)
            elif len(steps) <= DEEP and not isinstance(value, nn.Module):
                pending += [(one, (*steps, step)) for step, one in _parts_of(value) if type(one) not in ATOMS]


def _parts_of(value: Any) -> Iterator[tuple[tuple[str, Any], Any]]:
    if isinstance(value, (list, tuple)):
        yield from ((("[", place), one) for place, one in enumerate(value))
    elif isinstance(value, Mapping):
        yield from ((("[", key), one) for key, one in value.items() if type(key) in (str, int))
    elif is_object(value) or isinstance(value, SimpleNamespace):
        yield from (((".", name), one) for name, one in getattr(value, "__dict__", {}).items())
