"""Questions whether a value has a gradient, of which it does not matter what the answer is.

Activation checkpointing (`if self.with_cp and x.requires_grad`) and frozen norms ask so, and do the same both ways. A
call is followed once more for each way that its answers may send it. Where all are the same, it has asked nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from structrep.graph.calls import Call, Traced
from structrep.graph.facts import CALL
from structrep.graph.queries import asks_gradient
from structrep.trace.again import retrace
from structrep.trace.comparison import differences
from structrep.trace.followed import Followed
from structrep.trace.reads import GRADIENTS

_MOST = 3  # questions of one call: each doubles the ways


def settle_gradients(traced: Traced) -> None:
    """Forget the questions for gradients of calls that do the same for all answers."""
    for call in list(itertools.chain(*traced.calls.values())):
        if any(one.gradient for one in call.specializations) and _is_same(traced, call):
            call.specializations = [one for one in call.specializations if not one.gradient]
            _forget(call)


def _is_same(traced: Traced, call: Call) -> bool:
    """Whether a call does the same, whatever it is told of gradients."""
    as_followed = Followed.of(traced, call, ())
    known = {(one.code, one.at, one.told) for _, one in call.observed()}
    for again in _ways(traced, call):
        others = () if again is None else (one for _, one in again.call.observed() if not one.gradient)
        if again is None or not known.issuperset((one.code, one.at, one.told) for one in others):
            return False
        if differences(as_followed, again) != []:
            return False
    return True


def _ways(traced: Traced, call: Call) -> Iterator[Followed | None]:
    """The call on each way that its answers may send it; None where it cannot be followed, or is asked too much."""
    pending: list[tuple[bool, ...]] = [()]
    for answers in pending:
        found = retrace(traced, call, {GRADIENTS: answers})
        told = () if found is None else tuple(one.told for one in found[1].specializations if one.gradient)
        if found is None or len(told) > _MOST:
            yield None
            return
        yield Followed.of(*found, ())
        pending += [(*told[:place], not told[place]) for place in range(len(answers), len(told))]


def _forget(call: Call) -> None:
    """Take away the questions that nobody needs an answer to any more."""
    for node in [one for one in call.nodes() if CALL.of(one) is call and asks_gradient(one) and not one.users]:
        call.steps.remove(node)
        node.graph.erase_node(node)
