"""How the methods change that merges are written in."""

from __future__ import annotations

import contextlib
from collections.abc import Set
from typing import TypeAlias

from torch import fx

from structrep.errors import ExampleOnly, Refusal, Unreadable
from structrep.graph.calls import Call, Introspection, Traced, site
from structrep.graph.facts import CALL
from structrep.guard.callers import Callers
from structrep.guard.other_forwards import Borders
from structrep.guard.sharing import Replicas
from structrep.match.merge import Merge
from structrep.modules.introspection import WHAT
from structrep.modules.uses import Use
from structrep.rewrite.edit import Edit
from structrep.rewrite.forward import Forward, written_anew
from structrep.rewrite.leftovers import Leftovers
from structrep.rewrite.node_changes import NodeChanges
from structrep.rewrite.placement import Placement, all_nodes
from structrep.rewrite.slot import Slot, is_asked_for, slot
from structrep.rewrite.units import units
from structrep.rewrite.untaken import Untaken
from structrep.rewrite.untouched import Untouched
from structrep.trace.followed import Followed

Rewritten: TypeAlias = Forward | Edit | Slot | Untouched


class Rewriter:
    """The rewriter of methods, in the cheapest way that is right for each: as it is, edited, or written anew.

    Attributes:
        unwritable: methods that cannot be written anew, by path and name, and why.
        unedited: those whose text cannot be edited, and why.
    """

    def __init__(self, traced: Traced, replicas: Replicas, untaken: Untaken, borders: Borders) -> None:
        self.traced, self.replicas, self.untaken, self.borders = traced, replicas, untaken, borders
        self.callers = Callers(traced)
        self.unwritable: dict[tuple[str, str], Refusal] = {}
        self.unedited: dict[tuple[str, str], Refusal] = {}

    def write(self, placement: Placement) -> tuple[dict[Call, Rewritten], dict[Merge, Refusal]]:
        """The methods that change, by their calls; and the merges of those that cannot be written, with the reasons."""
        written: dict[Call, Rewritten] = {}
        failed: dict[Merge, Refusal] = {}
        for owner, written_out in placement.changes.owners.items():
            try:
                written[owner] = (
                    self._slot(placement, owner, written_out)
                    or self._edited(placement, owner, written_out)
                    or self._anew(placement, owner, written_out)
                )
                failed |= self._otherwise(placement, owner, written[owner])
            except Refusal as reason:
                if (text := self.unedited.get(site(owner))) is not None:
                    reason.args = (f"{reason}; nor can its text be edited: {text}", *reason.args[1:])
                self.unwritable[reason.where if isinstance(reason, ExampleOnly) else site(owner)] = reason
                failed.update(dict.fromkeys(placement.owned[owner], reason))
        for owner in placement.idle_sums():
            with contextlib.suppress(Refusal):
                written[owner] = written_anew(Followed.of(self.traced, owner, ()), placement.changes)
        return written, failed

    def _otherwise(self, placement: Placement, owner: Call, made: Rewritten) -> dict[Merge, Refusal]:
        """The merges that another forward of the module runs by its own text, with the reasons, if this one does
        otherwise now."""
        failed: dict[Merge, Refusal] = {}
        written = _texts_in(placement.changes, owner) - placement.changes.refilled.keys()
        for merge in placement.owned[owner] if made.does_otherwise else ():
            if written.isdisjoint(all_nodes(merge)):
                continue
            try:
                self.borders.check_text(owner, set(all_nodes(merge)))
            except Refusal as reason:
                failed[merge] = reason
        return failed

    def _slot(self, placement: Placement, owner: Call, written_out: Set[Call]) -> Slot | None:
        """The slot that a method has for the one layer that is new in its module."""
        homes = [placement.homes.get(merge, ("", "")) for merge in placement.owned[owner]]
        names = [name for path, name in homes if path == owner.path and name]
        if len(names) != 1 or not is_asked_for(owner, names[0]) or self._asked(placement, owner):
            return None
        with contextlib.suppress(Unreadable):
            forward = self._anew(placement, owner, written_out)
            left = Leftovers(self.traced, self.replicas, placement.changes, {}, placement.merges)
            return slot(forward, names[0], {call.module for call in left.dead_calls()})
        return None

    def _edited(self, placement: Placement, owner: Call, written_out: Set[Call]) -> Edit | Untouched | None:
        """The method with its own text edited; None if that is not all that changes, or would not be right."""
        if owner in placement.anew or self.callers.doubt(*site(owner)) is not None:
            return None
        changes, misuses = placement.changes, list[Use]()
        for merge in placement.owned[owner]:
            if self.untaken.hidden(merge, owner):
                return None
            risks, swaps = self.untaken.risks(merge), any(unit.module is not None for unit in units(merge))
            elsewhere = _texts_in(changes, owner).isdisjoint(merge.nodes)
            if (swaps or elsewhere) and any(next(call.homes()) is owner for call in risks.guarded):
                return None
            for call, found in risks.misuses.items() if swaps else ():  # which is another one on all paths
                misuses += found if next(call.homes()) is owner else ()
        asked = self._asked(placement, owner)
        nodes = [node for node in owner.nodes() if next(CALL.of(node).homes()) is owner]
        try:
            filled = any(node in changes.refilled for node in nodes)
            if filled and any(owner in self.untaken.risks(merge).strays for merge in placement.owned[owner]):
                return None
            if filled or (any(node in changes.ended for node in nodes) and changes.dead.isdisjoint(nodes)):
                return None if asked else Untouched(self.traced, changes, owner)
            edit = Edit(self.traced, changes, owner, written_out, misuses)
            for one in asked:
                edit.check_asked(one)
            return edit
        except Unreadable as reason:
            self.unedited[site(owner)] = reason
            return None

    def _asked(self, placement: Placement, owner: Call) -> list[Introspection]:
        """The questions of a method that have another answer once all is merged that it is changed for: about all that
        is below a module, and about layers that are exchanged. Those that text asks for by name stay as they are."""
        exchanged = {unit.module for unit in (*placement.hosts.values(), *placement.idle)}
        return [
            one
            for merge in placement.owned[owner]
            for call, one in self.replicas.asked_by(owner, {*merge.nodes, *merge.stretch.scales})
            if one.what == WHAT or call in exchanged
        ]

    def _anew(self, placement: Placement, owner: Call, written_out: Set[Call]) -> Forward:
        if (doubt := self.callers.doubt(*site(owner))) is not None:
            raise Unreadable(doubt)
        forward = written_anew(Followed.of(self.traced, owner, written_out), placement.changes)
        inside = {owner, *written_out}
        self._check_choice(placement.owned[owner], inside, forward)
        return forward

    def _check_choice(self, merges: Set[Merge], inside: Set[Call], forward: Forward) -> None:
        """Raise where it cannot be told, and so not be guarded, what code that is written anew picks parts by."""
        told = [one for one in forward.reads if not one.asked.endswith(" is None)")]  # whether a part is there
        if told or forward.ways or forward.guards:
            return
        for merge in merges:
            for call, (use, *_) in self.untaken.risks(merge).misuses.items():
                if next(call.homes()) in inside:
                    where = f"line {use.line} of {use.code.co_filename}"
                    raise Unreadable(f"{where} may use what is merged otherwise, and what that hangs on is not known")


def _texts_in(changes: NodeChanges, owner: Call) -> set[fx.Node]:
    """The nodes that text of a call's own gives, and that change."""
    return {root for root, (call, _) in changes.units.items() if call is owner}
