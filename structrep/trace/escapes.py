"""Traced values that outlive their trace: what a forward has given to something that is not the model's.

`SEEN.append(y)` leaves no trace in a graph, whoever is asked to append; who looks at it later finds what a merged layer
gives. So all values that are still held when a trace is done are looked for where they are.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable, Iterator
from types import CellType, FrameType
from typing import Any
from weakref import ref

from torch import fx

from structrep.graph.calls import Call
from structrep.graph.structures import is_record


def escaped(values: Iterable[ref[fx.Proxy]], calls: Iterable[Call]) -> list[fx.Proxy]:
    """The values that something holds when their trace is done, but for what its calls gave; that lets go of them where
    it can.

    Args:
        values: all that the forward had in hand.
        calls: of the trace.
    """
    alive = [proxy for one in values if (proxy := one()) is not None]
    if not alive:
        return []
    gc.collect()  # what only garbage holds is held by nobody
    own = {id(alive), *(id(one) for call in calls for one in _objects((call.args, call.kwargs, call.result)))}
    holders = [one for one in gc.get_referrers(*alive) if id(one) not in own and not _is_own(one)]
    held = {id(one) for holder in holders for one in gc.get_referents(holder)}
    found = [proxy for proxy in alive if id(proxy) in held]
    for holder in holders:
        _let_go(holder, {id(proxy) for proxy in found})
    return found


def _objects(value: Any) -> Iterator[Any]:
    """All objects of a structure, with what holds their attributes."""
    yield value
    inner: Iterable[Any] = ()
    if isinstance(value, (tuple, list)):
        inner = value
    elif isinstance(value, dict):
        inner = value.values()
    elif is_record(value) or hasattr(type(value), "__dataclass_fields__"):
        inner = [getattr(value, "__dict__", {})]
    for one in inner:
        yield from _objects(one)


def _is_own(holder: Any) -> bool:
    """Whether what holds a value is code that runs, or an attribute of that value."""
    return isinstance(holder, (FrameType, fx.proxy.Attribute))


def _let_go(holder: Any, values: set[int]) -> None:
    """Take values, by id, out of what holds them."""
    if isinstance(holder, CellType):
        holder.cell_contents = None
    elif isinstance(holder, (list, deque)):
        kept = [one for one in holder if id(one) not in values]
        holder.clear()
        holder.extend(kept)
    elif isinstance(holder, dict):
        for key in [key for key, one in holder.items() if id(one) in values]:
            if "__name__" in holder:  # the names of a file
                holder[key] = None
            else:
                del holder[key]
