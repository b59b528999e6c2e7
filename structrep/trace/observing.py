"""What a forward is told where it asks what hangs on its input.

* An `assert` holds, and a branch that only raises is not taken (`conditions`): the graph asserts it.
* The dtype of an input is that of the parameters; a forward that is written anew asks again.
* A plain function that asks is kept whole, if it can be: then nothing is told.
* All else is told as it is for the example inputs, by a run of the graph as far as it is made; without them, as what is
  known of ranks and channels says. `Call.specializations` has it: the path that was taken is one of several.
"""

from __future__ import annotations

import contextlib
import operator
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import TraceError

from structrep.graph import dtypes
from structrep.graph.calls import Call
from structrep.graph.facts import ASSERTED, RANK, RELIED, STATIC_DTYPE
from structrep.graph.known import Known
from structrep.graph.queries import asks_gradient
from structrep.graph.reads import Read
from structrep.graph.run import Failed, Partial
from structrep.graph.shapes import rank, rank_of_module
from structrep.graph.specializations import specialized
from structrep.trace.conditions import length, sized, spared
from structrep.trace.frames import outside
from structrep.trace.held import owner_of
from structrep.trace.patches import plain_function
from structrep.trace.reads import GRADIENTS, INPUTS

if TYPE_CHECKING:
    from structrep.trace.tracer import CallTracer

_ENGINE = ("structrep.trace.", "structrep.process", "structrep.graph.", fx.proxy.__name__)
MOST = 10_000  # answers to one call: a loop that goes on as long as what is only taken for granted holds has no end
MOST_ASSUMED = 100  # of them those that nothing tells
REMEDY = "give example inputs: structrep.reparameterize(model, x)"


class Unanswered(TraceError):
    """Nothing tells what a condition is."""


class Observer:
    """Answers the questions of one trace.

    Args:
        run: of the example.
    """

    def __init__(self, tracer: CallTracer, run: Partial | None) -> None:
        self.tracer, self.recorder, self.run = tracer, tracer.recorder, run
        self.followed, self.assumed = tracer.policy.followed, tracer.policy.assumed
        self.guesses = 0
        self.busy = False  # whether code runs as it does outside of the trace

    def condition(self, asked: fx.Proxy) -> bool:
        """What a condition is."""
        if (told := self._dtype_asked(asked.node)) is not None:
            return self._note_dtype(asked, told)
        frame = self._frame()
        demanded = spared(frame) if frame is not None else None
        if demanded is None:
            return bool(self._told(asked, bool, "a condition that depends on the input"))
        holds = asked if demanded else self.tracer.create_proxy("call_function", operator.not_, (asked,), {})
        self._assert(holds, "the forward raises for this input")
        self._note(frame, demanded, asserted=True)
        return demanded

    def number(self, asked: fx.Proxy, convert: Callable[[Any], Any]) -> Any:
        """What a number is."""
        return self._told(asked, convert, "a number that depends on the input is needed")

    def of_same_type(self, asked: fx.Proxy) -> Any:
        """A value of the type that one is of."""
        return self._told(asked, lambda value: value, "the type of a value that nothing tells")

    def length(self, asked: fx.Proxy, what: str) -> int:
        """How many items a value has."""
        count = length(asked.node)
        if count is None and (source := sized(asked.node)) is not None and (dims := self._dims(source)) is not None:
            self._rely({source: dims})
            count = length(asked.node)
            self._note(self._frame(), count, asserted=True)
        return self._told(asked, len, what) if count is None else count

    # --- telling -----------------------------------------------------------------------------------------------------

    def _told(self, asked: fx.Proxy, convert: Callable[[Any], Any], what: str) -> Any:
        frame = self._frame()
        call = self.recorder.current
        if frame is None or call is None or len(call.specializations) > MOST:
            raise self.recorder.refuse(TraceError(what))
        where = specialized(frame.f_code, frame.f_lasti, frame.f_lineno, None)
        function = plain_function(frame, call.bytecode)
        if function is not None and function not in self.followed:
            raise self.recorder.refuse(TraceError(f"{what}: {where}"))
        owner = owner_of(self.tracer.module)
        known = Known(owner.device if owner is not None else None, self._likely_dims)
        try:
            told = self._find(asked.node, convert, known)
        except Failed as reason:
            if convert is not bool or type(call.module) not in self.assumed or self.guesses > MOST_ASSUMED:
                remedy = REMEDY if self.run is None else str(reason)
                refusal = Unanswered if convert is bool else TraceError
                raise self.recorder.refuse(refusal(f"{what}: {where}; {remedy}")) from reason
            self.guesses += 1
            told = False
        gradient = asks_gradient(asked.node)
        if gradient:
            told = self._gradient_told(call, told)
        if not known.loose:  # weights fix it, for a value of so many dims
            self._rely(known.ranks)
        self._note(frame, told, asserted=not known.loose, gradient=gradient)
        return told

    def _gradient_told(self, call: Call, told: bool) -> bool:
        """Whether a value has a gradient, as the call that is traced is answered in order, if it is."""
        answers = self.tracer.reads.answers.get(GRADIENTS, ()) if call is self.recorder.calls[0] else ()
        place = sum(one.gradient for one in call.specializations)
        return answers[place] if place < len(answers) else told

    def _find(self, node: fx.Node, convert: Callable[[Any], Any], known: Known) -> Any:
        """What a node gives, as a number or a length.

        Raises:
            Failed: nothing tells.
        """
        told: list[Any] = []
        reason = "it is not known"  # no error: one that is held here would hold this frame, and all values with it
        with self._apart():
            try:
                told.append(convert(known.value(node)))
            except Exception:  # of a size that is not known, or of what is no number
                known.loose = True
            if not known.loose:
                return told[0]
            for way in (self.run.shown, self.run.value) if self.run is not None else ():
                try:
                    return convert(way(node))
                except Failed as failed:
                    reason = str(failed)
                except Exception as error:  # a tensor without numbers, or nothing that has any
                    reason = f"{type(error).__name__}: {error}"
        if not told:
            raise Failed(reason)
        return told[0]

    def _rely(self, ranks: Mapping[fx.Node, int]) -> None:
        """Assert how many dims values have, on which all may rely from now on."""
        for node, dims in ranks.items():
            asked = self.tracer.create_proxy("call_function", getattr, (self.tracer.proxy(node), "ndim"), {})
            holds = self.tracer.create_proxy("call_function", operator.eq, (asked, dims), {})
            said = f"the forward was reparameterized for an input of other dims: a value has {dims} here"
            RELIED.note(self._assert(holds, said), node)
            RANK.note(node, dims)

    def _dims(self, node: fx.Node) -> int | None:
        """How many dims a value has in the example; or those that it must have, for all that is known."""
        if self.run is None:
            return self._likely_dims() if node.op == "placeholder" else rank(node)
        with self._apart(), contextlib.suppress(Failed):
            found = self.run.shown(node)
            return found.ndim if isinstance(found, Tensor) else None
        return None

    def _likely_dims(self) -> int | None:
        """How many dims the first layer wants that wants so many."""
        return next((dims for m in self.tracer.module.modules() if (dims := rank_of_module(m, None))), None)

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Run code as it runs outside of the trace: nobody notes what it does, and it draws no numbers of others."""
        recorder, contexts = self.recorder, self.tracer.contexts
        stack, entered, drawn = recorder.stack, contexts.entered, random.getstate()
        numpy: Any = sys.modules.get("numpy.random")
        of_numpy = numpy.get_state() if numpy is not None else None
        recorder.stack, self.busy = [], True
        try:
            with torch.random.fork_rng(), torch._C.DisableTorchFunction():
                yield
        finally:
            recorder.stack, contexts.entered, self.busy = stack, entered, False
            random.setstate(drawn)
            if of_numpy is not None:
                numpy.set_state(of_numpy)

    def _frame(self) -> FrameType | None:
        """The code that asks."""
        return outside(sys._getframe(1), _ENGINE)

    def _note(self, frame: FrameType | None, told: Any, *, asserted: bool = False, gradient: bool = False) -> None:
        if frame is not None and (call := self.recorder.current) is not None:
            made = specialized(frame.f_code, frame.f_lasti, frame.f_lineno, told, asserted=asserted, gradient=gradient)
            call.specializations.append(made)

    def _assert(self, holds: fx.Proxy, said: str) -> fx.Node:
        return self.tracer.create_proxy("call_function", torch._assert, (holds, said), {}).node

    # --- dtypes ------------------------------------------------------------------------------------------------------

    def _dtype_asked(self, node: fx.Node) -> bool | None:
        """The answer to `x.dtype == torch.float32`; None to other questions. Inputs are taken to be of the dtype of the
        parameters."""
        owner = owner_of(self.tracer.module)
        if node.target not in (operator.eq, operator.ne) or owner is None or len(node.args) != 2:
            return None
        for one in self.tracer.graph.nodes:
            dtypes.note(one, owner.dtype)
        found = [self._taken(one, owner.dtype) if isinstance(one, fx.Node) else one for one in node.args]
        if not all(isinstance(one, torch.dtype) for one in found):
            return None
        return (found[0] == found[1]) == (node.target is operator.eq)

    def _taken(self, node: fx.Node, own: torch.dtype) -> torch.dtype | None:
        """The dtype that a question gives: its value's, and where nothing tells that, the model's."""
        if node.target is not getattr or node.args[1] != "dtype":
            return None
        dtype = STATIC_DTYPE.of(node.all_input_nodes[0]) or own
        return self.tracer.reads.answers.get(INPUTS, own) if dtype is own else dtype

    def _note_dtype(self, asked: fx.Proxy, told: bool) -> bool:
        """Note a condition on the dtype of an input, and assert what it is taken to be."""
        call = self.recorder.stack[-1]
        place = sum(isinstance(read.holder, fx.Node) for read in call.reads.values())
        key = f"{call.path}.{call.method}", f"dtype {place}"
        frame = self._frame()
        places = [(frame.f_code, frame.f_lasti, 0)] if frame is not None else []
        call.reads[key] = Read(asked.node, "", told, places=places)
        told = self.tracer.reads.answers.get(key, told)
        holds = self.tracer.create_proxy("call_function", operator.eq, (asked, told), {})
        ASSERTED.note(holds.node, key)
        said = "the forward was reparameterized for an input of another dtype: convert the model again for that"
        ASSERTED.note(self._assert(holds, said), key)
        return told
