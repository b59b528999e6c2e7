"""A plan: what is merged in a model, and what may be done with it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from structrep import process
from structrep.convert.selection import Selection
from structrep.errors import (
    BadInput,
    MergeDropped,
    NothingMerged,
    Slower,
    StructrepError,
    Unmerged,
    VerificationError,
    warn,
)
from structrep.files import save_bytes, writer
from structrep.match.merge import Merge
from structrep.match.why import refusal, why
from structrep.modules.arguments import Example
from structrep.modules.copies import make_eager, own_copy
from structrep.modules.parametrized import uncached
from structrep.modules.source import told_of_sources
from structrep.modules.wrappers import adapters, finish, settle
from structrep.prove.measured import Measured
from structrep.prove.verify import verify
from structrep.records.base import as_html, as_text
from structrep.records.latency import LatencyRecord, milliseconds
from structrep.records.plan import Explanation, MergeRecord, PlanRecord, RefusalRecord, plan_tables
from structrep.records.verification import Verification
from structrep.report.drawing import Drawing
from structrep.report.page import demand_plots, page
from structrep.rewrite.diff import diff
from structrep.rewrite.edit import Edit
from structrep.rewrite.norms import forget_norms, give_norms_back
from structrep.rewrite.surgery import Surgery
from structrep.terms.term import Term

IN_TORCH = Measured()  # what cost="measured" is, so that timings are kept from one plan to the next
# deploy models by id, of which nobody expects that there is anything to merge
_made: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


class Plan:
    """All merges and refusals for one model, as `structrep.plan` gives it. Nothing is changed before `apply`.

    Examples:
        >>> plan = structrep.plan(model, torch.randn(1, 3, 224, 224))
        >>> print(plan)  # a table of what becomes what, and of what stays and why
        >>> deploy = plan.apply()
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        measured: Measured | None = None,
        given: nn.Module | None = None,
        wrapper: str = "",
    ) -> None:
        self._model, self._wrapper = model, wrapper  # of peft's, around the user's
        # the user's, if that has wrappers inside, of which the plan knows nothing
        self._given = model if given is None else given
        self._selection, self._measured = selection, measured
        self.latency: LatencyRecord | None = None  # of the whole model, if merges were chosen by measurement
        self._applied = self._is_proved = False
        self._state = _state(self._given)

    @property
    def merges(self) -> tuple[MergeRecord, ...]:
        """What is merged, in the order of the layers: where, by which rules, what it costs before and after."""
        return self._selection.records(self._measured.seconds if self._measured else lambda merge: None)

    @property
    def refusals(self) -> tuple[RefusalRecord, ...]:
        """What stays, and why: the law that does not hold, or the line of code that stands in the way."""
        return tuple(map(refusal, self._selection.missed))

    @property
    def terms(self) -> tuple[Term, ...]:
        """What is merged, as expressions over layers, in the order of `merges`."""
        return tuple(merge.term for merge in self._selection.merges)

    @property
    def merged(self) -> dict[str, Merge]:
        """The merges by the paths that their layers will have."""
        return self._selection.merged

    @property
    def inexact(self) -> bool:
        """Whether some merge differs from the model at the border, as the user allowed."""
        return self._selection.inexact

    @property
    def record(self) -> PlanRecord:
        """The plan without the model, to be printed or written as JSON."""
        model = type(self._model).__name__
        return PlanRecord(model=model, merges=self.merges, refusals=self.refusals, notes=self.notes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of the model: that the source of some of its classes cannot be read."""
        return told_of_sources(self._model)

    @uncached()
    def faster(self, example_inputs: Example) -> Plan:
        """This plan, or one without the merges that make the model slower, as measured: one by one, and all of them.

        Raises:
            BadInput: the plan was not made with `cost="measured"`; the model or the runtime rejects the inputs.
        """
        if self._measured is None:
            raise BadInput(
                "this plan has counted what merges cost, and has no runtime to time them in: "
                "structrep.plan(model, example_inputs, cost='measured') gives the faster plan"
            )
        chosen = self
        while slower := self._measured.slower(chosen.merged.values()):
            chosen = Plan(self._model, chosen._selection.faster(slower), self._measured, self._given, self._wrapper)
        forms = {"merged": chosen.apply(), "all merged": self.apply(), "as it is": own_copy(self._model)}
        if chosen is self:
            del forms["all merged"]
        best, latency = self._measured.fastest(forms, example_inputs)
        chosen = self if best == "all merged" else chosen
        chosen.latency = latency
        if best == "as it is":
            merged, before = (milliseconds(latency.models[form].median) for form in ("merged", best))
            slow = Slower(f"the whole model takes {before} as it is, and {merged} merged: measured here")
            chosen._selection = chosen._selection.without(dict.fromkeys(chosen._selection.merges, slow))
        return chosen

    @uncached()
    def prove(self) -> None:
        """Prove every merge on its own region in float64; one that fails is taken out, and listed as refused."""
        self._selection = self._selection.proved()
        self._is_proved = True

    def proved(self) -> Plan:
        """What is left of this plan once every merge was proved, each that was not told by a `structrep.MergeDropped`
        warning and listed as refused there; this plan stays as it is."""
        if self._is_proved:
            return self
        found = copy.copy(self)
        found.prove()
        kept = set(found._selection.merges)
        for where, merge in self.merged.items():
            if merge not in kept:
                reason = next(miss.reason for miss in found._selection.missed if miss.of is merge)
                warn(f"{where} ({' + '.join(merge.rules)}) is not merged, as planned: {reason}", MergeDropped)
        return found

    def verify(self, example_inputs: Example, deploy: nn.Module | None = None, **how: Any) -> Verification:
        """Compare the deploy model with the model, as `structrep.verify` does, and each merged layer on the way.

        Args:
            example_inputs: as for `structrep.verify`.
            deploy: what `apply` gave; made anew by default.
            how: device, dtype, autocast and so on, as for `structrep.verify`.

        Raises:
            BadInput: the model rejects the inputs.
        """
        return verify(
            self._model, self.apply() if deploy is None else deploy, example_inputs, merges=self.merged, **how
        )

    @uncached()
    def apply(self, inplace: bool = False) -> nn.Module:
        """The deploy model: the same class and names, with every merge done.

        Args:
            inplace: change the model itself instead of a copy, layer by layer: each merged kernel is made, and what it
                was made from given back, before the next.

        Raises:
            StructrepError: the model is no longer the one that the plan was made for: the plan was applied in place
                before, or weights changed.
        """
        if self._applied:
            raise StructrepError("this plan was applied in place already: make a new one with structrep.plan(model)")
        if _state(self._given) != self._state:
            raise StructrepError(
                "the model's weights changed since this plan was made: make a new one, structrep.plan(model)"
            )
        self._applied = inplace
        if inplace:
            settle(self._given)
        model = self._given if inplace else own_copy(self._model)
        had = adapters(model)
        with process.room():  # forwards are asked what the names of their modules stand for
            deploy = Surgery(self._selection.draft, model).perform(release=inplace)
        if inplace and self._wrapper and adapters(deploy) < had:
            warn(
                f"the model inside the {self._wrapper} was merged in place: what the wrapper says of adapters "
                "(save_pretrained, unload, disable_adapter) is no longer so; go on with the model that is given back"
            )
        if inplace:
            make_eager(deploy, {id(module): module for module in deploy.modules()})
        finish(deploy, had)
        if self._selection.findings.blocks:
            give_norms_back(deploy)
        else:
            forget_norms(deploy)
        _made[id(deploy)] = deploy
        return deploy

    def reparameterize(
        self, example_inputs: Example | None = None, *, inplace: bool = False, verify: bool = True
    ) -> nn.Module:
        """The deploy model, proved, as `structrep.reparameterize` gives it; the plan stays as it is.

        Raises:
            Unmerged, VerificationError, BadInput: as for `structrep.reparameterize`.
        """
        chosen = self.proved() if verify else self
        if left := [path for path in self._selection.findings.blocks if path not in chosen.merged]:
            name = type(self._model).__name__
            raise Unmerged(f"of the blocks in {name} these cannot be merged: {', '.join(left)}{chosen.record.reasons}")
        if not chosen._selection.merges and _made.get(id(self._model)) is not self._model:
            warn(chosen.record.nothing, NothingMerged)
        whole = verify and example_inputs is not None and not chosen.inexact
        deploy = chosen.apply(inplace and not whole)
        if whole and example_inputs is not None:
            _demand(chosen.verify(example_inputs, deploy))
            deploy = chosen.apply(inplace=True) if inplace else deploy
        self._applied = self._applied or inplace
        return deploy

    def diff(self) -> str:
        """The edited forwards as a unified diff with files and lines, which `git apply` takes; "" if there are none."""
        return diff(self._model, (one for one in self._selection.draft.forwards.values() if isinstance(one, Edit)))

    def why(self, first: str, second: str) -> Explanation:
        """Why two layers, by their names, did not merge; or that they do.

        Raises:
            BadInput: the model has no module of that name.
        """
        return why(self._selection.findings, list(self.merged.items()), first, second)

    def report(self, path: str | os.PathLike[str], example_inputs: Example | None = None, force: bool = False) -> None:
        """Write a page that shows what is merged, what is refused and why, and how the two models compare: HTML, in one
        file that needs nothing else.

        Args:
            example_inputs: as for `structrep.verify`; without them the page has no errors, latencies and multiply-adds.
            force: replace the file if there is one.

        Raises:
            BadInput: the file is there already or cannot be written; the model rejects the inputs; there are example
                inputs, and matplotlib, which draws their errors, is not installed.
            StructrepError: as for `apply`.
        """
        save = writer(Path(path), force)
        demand_plots(example_inputs)
        deploy = self.apply()
        verification = None if example_inputs is None else self.verify(example_inputs, deploy)
        save(save_bytes, self.page(deploy, example_inputs, verification))

    def page(
        self, deploy: nn.Module, example_inputs: Example | None = None, verification: Verification | None = None
    ) -> bytes:
        """What `report` writes, of a deploy model and what `verify` gave of it on the example inputs."""
        drawing = self.drawing(deploy, example_inputs)
        models = self._model, deploy
        return page(drawing, self.merged, self.inexact, models, example_inputs, verification, self.diff())

    def draw(self, deploy: bool = False, inside: str = "") -> str:
        """A picture of what the model computes, as SVG: in colour what is merged, marked what is refused. Large parts
        are one box each.

        Args:
            deploy: draw what the deploy model computes.
            inside: the name of a module; draw that.

        Raises:
            BadInput: no module of that name computes anything in the model's forward.
        """
        return self.drawing(self.apply() if deploy else None).draw(int(deploy), inside)

    def drawing(self, deploy: nn.Module | None = None, example_inputs: Example | None = None) -> Drawing:
        """What pictures are drawn with; of the deploy model too, if it is given."""
        return Drawing(self.record, self._selection.findings.replicas, self._selection.merges, deploy, example_inputs)

    def _repr_html_(self) -> str:
        return as_html(*plan_tables(self.record))

    def __str__(self) -> str:
        return as_text(*plan_tables(self.record))

    def __repr__(self) -> str:
        merges, refusals = len(self._selection.merges), len(self._selection.missed)
        return f"<Plan for {type(self._model).__name__}: {merges} merges, {refusals} refusals>"


def _state(model: nn.Module) -> list[tuple[str, int, int]]:
    """Which tensors a model holds, and how often each was written."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [(name, tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for name, tensor in named]


def _demand(found: Verification) -> None:
    if not found.ok:
        first = found.first_off
        where = f"; the first merged layer that is off is {first.where} ({' + '.join(first.rules)})" if first else ""
        raise VerificationError(
            f"the deploy model differs from the training-time model by more than rounding{where}\n{found}"
        )
