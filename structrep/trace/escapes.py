"""Traced values that outlive their trace: what a forward has given to something that is not the model's.

`SEEN.append(y)` leaves no trace in a graph, whoever is asked to append; who looks at it later finds what a merged layer
gives. So all values that are still held when a trace is done are looked for where they are.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from types import CellType, FrameType
from typing import Any
from weakref import ref

from torch import fx

from structrep.graph.calls import Call
from structrep.graph.structures import is_record


def _counts(values: list[Any]) -> list[int]:
    return [sys.getrefcount(one) for one in values]


_ALONE = _counts([object()])[0]  # references to what only that list holds


def clear_frames(error: BaseException | None) -> None:
    """Let go of what the frames hold that an error came through, or an error before it, and those that called them."""
    while error is not None:
        for inner, _ in traceback.walk_tb(error.__traceback__):
            frame: FrameType | None = inner
            with contextlib.suppress(RuntimeError):  # it runs still, and so does what called it
                while frame is not None:
                    frame.clear()
                    frame = frame.f_back
        error = error.__context__


def escaped(values: Iterable[ref[fx.Proxy]], calls: Iterable[Call]) -> list[fx.Proxy]:
    """The values that something holds when their trace is done, but for what its calls gave; that lets go of them where
    it can.

    Args:
        values: all that the forward had in hand.
        calls: of the trace.
    """
    alive = [one for one in [known() for known in values] if one is not None]
    calls = list(calls)
    if not alive or _counts(alive) == _held_by(alive, calls):
        return []
    gc.collect()  # what only garbage holds is held by nobody
    of_calls = {id(one) for call in calls for one in _objects((call.args, call.kwargs, call.result))}
    holders: list[Any] = []
    ours: set[int] = set()  # what our own structures, or code that runs, hold
    held: set[int] = set()
    for holder in gc.get_referrers(*alive):
        inside = {id(one) for one in gc.get_referents(holder)}
        if id(holder) in of_calls or isinstance(holder, (FrameType, fx.proxy.Attribute)):
            ours |= inside
        elif holder is not alive:
            held |= inside
            holders.append(holder)
    # What nothing is seen to hold may be held where the collector does not look, as after `gc.freeze()`.
    unseen = {
        id(one) for one, count in zip(alive, _counts(alive), strict=True) if id(one) not in ours and count > _ALONE
    }
    found = [one for one in alive if id(one) in held | unseen]
    for holder in holders:
        _let_go(holder, set(map(id, found)))
    return found


def _held_by(alive: list[fx.Proxy], calls: list[Call]) -> list[int]:
    """How many references there are to each value if nothing but the calls of its trace, and other values, hold it: to
    look through all that Python holds is dear."""
    held = dict.fromkeys(map(id, alive), _ALONE)
    attributes = (vars(one) for one in alive if isinstance(one, fx.proxy.Attribute))
    structures = {id(one): one for call in calls for one in _objects((call.args, call.kwargs, call.result))}
    for holder in (*map(vars, calls), *attributes, *structures.values()):
        for one in gc.get_referents(holder) if isinstance(holder, (tuple, list, dict)) else ():
            if id(one) in held:
                held[id(one)] += 1
    return list(held.values())


def _objects(value: Any) -> Iterator[Any]:
    """All objects of a structure, with what holds their attributes."""
    yield value
    inner: list[Any] = []
    if isinstance(value, (tuple, list)):
        inner += value
    elif isinstance(value, dict):
        inner += value.values()
    if hasattr(value, "__dict__") and (is_record(value) or hasattr(type(value), "__dataclass_fields__")):
        inner.append(vars(value))  # model outputs of transformers are dicts too
    for one in inner:
        yield from _objects(one)


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
