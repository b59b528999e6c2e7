"""What is known of the nodes of a graph: every key of `node.meta`, of which type it is, who writes it, and what it
means that there is none.

A new fact is a line here. Nothing else names a key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import fx

T = TypeVar("T")
Made = tuple[Any, Any, set[fx.Node]]  # of a node with these args and kwargs


class Fact(Generic[T]):
    """One thing that may be known of a node."""

    def __init__(self, key: str) -> None:
        self.key = key

    def of(self, node: fx.Node) -> T:
        """What is known.

        Raises:
            KeyError: nothing is.
        """
        found: T = node.meta[self.key]
        return found

    def get(self, node: fx.Node, default: Any = None) -> Any:
        """What is known, or a default."""
        return node.meta.get(self.key, default)

    def known(self, node: fx.Node) -> bool:
        return self.key in node.meta

    def note(self, node: fx.Node, value: T) -> None:
        node.meta[self.key] = value

    def forget(self, node: fx.Node) -> None:
        node.meta.pop(self.key, None)


# --- of every node, by the tracer ---------------------------------------------------------------------------

CALL: Fact[Any] = Fact("call")  # the call whose code made it (`calls.Call`); None of the output, which none made
INDEX: Fact[int] = Fact("index")  # its place in the order in which nodes were made; `match.sum_order` makes some anew
AT: Fact[int | None] = Fact("at")  # the instruction of that call's code; None where other code made it
AUTOCAST: Fact[bool] = Fact("autocast")  # whether autocast was on
UNFOLLOWED: Fact[bool] = Fact("unfollowed")  # whether it is a function that was kept whole
CONTEXTS: Fact[tuple[Any, ...]] = Fact("contexts")  # the contexts of no_grad, autocast and the like that it ran in

# --- of some, by the tracer: none of others -----------------------------------------------------------------

COMPUTED: Fact[Any] = Fact("computed")  # of a module that is called: what it computes first, by name; or why not
ASSIGNED: Fact[Any] = Fact("assigned")  # of such a one: the formula of a kernel that its forward has assigned
STORED: Fact[bool] = Fact("stored")  # a value that a forward stored in its module, or gave away: it is looked at later
ASSERTED: Fact[Any] = Fact("asserted")  # an assertion, or what it asserts: the condition that was taken to hold
RELIED: Fact[fx.Node] = Fact("relied")  # of an assertion: the value of which it says how many dims it has
HELD: Fact[Any] = Fact("held")  # an object that is no tensor, of a get_attr
UNKNOWN: Fact[type] = Fact("unknown")  # an input that is an object, of which only the type is known

# --- of constants -------------------------------------------------------------------------------------------------

VALUE: Fact[Any] = Fact("value")  # what it is, in the model's own dtype; none of what depends on the input
FORMULA: Fact[Any] = Fact("formula")  # what it was computed with and from; none, or None, if it was not computed
UNSTEADY: Fact[bool] = Fact("unsteady")  # whether it may be another at the next call
RECOMPUTE: Fact[Callable[[], Any]] = Fact("recompute")  # computes it in float64; none if it was not computed
EXACT: Fact[Any] = Fact("exact")  # what that gave, once it was asked for (`constants.exact`)
TO_OWN_DTYPE: Fact[bool] = Fact("to_own_dtype")  # of a cast: whether it is to the dtype of the model, by folding

# --- of values, by who asks first ---------------------------------------------------------------------------

SHAPE: Fact[tuple[int, ...]] = Fact("shape")  # with example inputs, where they could be followed (`run.infer_shapes`)
DTYPE: Fact[torch.dtype] = Fact("dtype")  # the same
STATIC_DTYPE: Fact[torch.dtype | None] = Fact("static_dtype")  # its dtype, as known without a run; or None (`dtypes`)
RANK: Fact[int | None] = Fact("rank")  # how many dims it has; None if that is not known (`shapes`)
STAND_IN: Fact[Any] = Fact("stand_in")  # a number or tensor that answers for it when it is asked (`structures`)
COUNTS_SIZES: Fact[bool] = Fact("counts_sizes")  # whether it is made of sizes alone (`queries`)

WRITES: Fact[Made] = Fact("writes")  # the inputs that it overwrites (`operations`)
SHARES: Fact[Made] = Fact("shares")  # the inputs whose memory it may give (`operations`)

# --- of what is written ---------------------------------------------------------------------------------------------

IDLE: Fact[bool] = Fact("idle")  # of a norm: whether nobody reads it, and it is not to be run (`match.idle`)
REORDERED: Fact[Any] = Fact("reordered")  # of an addition in another order: what it was (`match.sum_order`)
CONSTANT: Fact[bool] = Fact("constant")  # of a node of a written forward: whether it may be left out if nobody reads it
