"""What values hold: lists and dicts their entries, objects what a copy of them would be made of."""

from __future__ import annotations

import copyreg
import warnings
from collections.abc import Iterator
from types import GeneratorType, MappingProxyType
from typing import Any

import torch

MOST, DEEPEST = 20_000, 16  # parts that are looked at, and objects in each other
INSIDE = object()  # what `leaf` says of what holds something


class Contents:
    """What values hold, as something that is the same for another value that holds the same; what is in each other is
    looked at once."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, Any]] = {}  # places of objects by their ids, with what keeps these their own

    def leaf(self, value: Any) -> Any:
        """What a value is told by that is not looked into; `INSIDE` of one that is."""
        raise NotImplementedError

    def closed(self, value: Any) -> Any:
        """What a value is told by that cannot be copied."""
        raise NotImplementedError

    def of(self, value: Any, depth: int = 0) -> Any:
        """What a value holds."""
        told = self.leaf(value)
        if told is not INSIDE:
            return told
        if id(value) in self.seen:
            return self.seen[id(value)][0]
        if len(self.seen) > MOST or depth > DEEPEST:
            return None
        self.seen[id(value)] = len(self.seen), value
        kind, name = type(value), type(value).__qualname__
        if kind in (list, tuple):
            return name, *(self.of(one, depth + 1) for one in value)
        plain = kind.__reduce_ex__ is object.__reduce_ex__  # type: ignore[comparison-overlap]
        if isinstance(value, (dict, MappingProxyType)) and plain:
            return name, *((self.of(key, depth + 1), self.of(one, depth + 1)) for key, one in value.items())
        if isinstance(value, (set, frozenset)):
            return name, *sorted(repr(self.of(one, depth + 1)) for one in value)
        if isinstance(value, torch.Generator):
            return name, *value.get_state().tolist()
        if isinstance(value, GeneratorType):
            frame = value.gi_frame
            return name, frame and (frame.f_lasti, *(self.of(one, depth + 1) for one in frame.f_locals.values()))
        if kind.__module__.partition(".")[0] == "numpy" and hasattr(value, "tobytes"):
            return value.shape, value.tobytes() if value.nbytes <= MOST else None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python will not copy iterators for ever
                reduce = copyreg.dispatch_table.get(kind)
                made = reduce(value) if reduce is not None else value.__reduce_ex__(4)
            rest = () if isinstance(made, str) else [list(x) if isinstance(x, Iterator) else x for x in made[1:]]
        except Exception:
            return self.closed(value)
        return name, made if isinstance(made, str) else tuple(self.of(one, depth + 1) for one in rest)
