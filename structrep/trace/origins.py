"""How the constants of a trace came about, and what float64 makes of that."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from structrep.algebra.precision import doubled
from structrep.algebra.precision import exact as on_float64
from structrep.algebra.shadows import Shadows
from structrep.graph.calls import Origin, storage
from structrep.terms.layer import Computed, Formula

ROUNDINGS = 4  # of a dtype, by which what it computes may differ from what float64 does


class Origins:
    """What is computed of weights alone: each constant with the step that gave it."""

    def __init__(self) -> None:
        self.known: dict[int, Origin] = {}  # by the id of a constant
        self.written: set[int] = set()  # storages written in place: how they came about is no longer one expression
        self.put: dict[int, list[Tensor]] = defaultdict(list)  # what was written to them, by storage

    def is_fresh(self, tensor: Tensor) -> bool:
        """Whether a tensor was made during this trace, and is no view of what the model holds."""
        while id(tensor) in self.known:
            base = next((a for a in self.known[id(tensor)].args if isinstance(a, Tensor)), None)
            if base is None or storage(base) != storage(tensor):
                return True
            tensor = base
        return False

    def formula(self, tensor: Tensor) -> Formula | None:
        """All that a constant was computed with and from; None if it was not computed here."""
        calls: set[str] = set()
        tensors: dict[int, Tensor] = {}
        pending, seen = [tensor], set()
        while pending:
            one = pending.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            origin = self.known.get(id(one))
            if origin is None or isinstance(one, nn.Parameter):
                tensors[id(one)] = one
            else:
                calls.add(getattr(origin.function, "__name__", "").strip("_"))
                pending += (*origin.given, *self.put.get(storage(one), ()))
        return Formula(frozenset(calls), tuple(tensors.values())) if calls else None

    def computed(self, tensor: Tensor) -> Computed:
        """A constant, what it was computed with and from, and how it is computed again."""
        formula = self.formula(tensor) or Formula(frozenset(), (tensor,))
        return Computed(tensor, formula, functools.partial(self.exact, tensor))

    def exact(self, tensor: Tensor) -> Tensor:
        """A constant computed again, in float64; as it is where its storage was written to since."""
        known: dict[int, Tensor] = {}

        def again() -> Tensor:
            pending = [tensor]
            while pending:
                one = pending[-1]
                origin = self.known.get(id(one))
                if storage(one) in self.written:
                    raise RuntimeError("it is no longer what it was")
                if origin is None or isinstance(one, nn.Parameter):
                    known[id(one)] = one.detach().to(on_float64(one.device))
                elif left := [given for given in origin.given if id(given) not in known]:
                    pending += left
                    continue
                elif id(one) not in known:
                    args, kwargs = pytree.tree_map(lambda v: known.get(id(v), v), (origin.args, origin.kwargs))
                    known[id(one)] = origin.again(args, kwargs)
                pending.pop()
            return known[id(tensor)]

        with torch.no_grad(), Shadows() as shadows:
            try:
                found = shadows.of(again())
            except Exception:  # code that wrote to what it had computed with
                return tensor
        nearer: Tensor = nearest_to(found, tensor, known.values())
        return nearer


def nearest_to(found: Any, stored: Any, given: Iterable[Any]) -> Any:
    """What float64 makes of a formula, if it is what was stored but for rounding: a step, `round(x)`, may be another.

    Args:
        given: the numbers on the way, whose size tells what rounding is.
    """
    if not (isinstance(found, Tensor) and isinstance(stored, Tensor) and stored.is_floating_point()):
        return stored
    if found.shape != stored.shape or not stored.numel():
        return stored
    numbers = [one.detach() for one in (found, *given) if isinstance(one, Tensor) and one.numel()]
    # of masks, of float8 and of numbers without a sign torch has no absolute value
    numbers = [one.double() if one.itemsize == 1 or not one.dtype.is_signed else one for one in numbers]
    sizes = [one.abs().max() for one in numbers]
    rounding = ROUNDINGS * torch.finfo(stored.dtype).eps * max(float(size) for size in sizes)
    off = float((doubled(found) - doubled(stored)).abs().max())
    return doubled(found) if off <= rounding else stored
