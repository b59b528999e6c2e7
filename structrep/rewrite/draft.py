"""Drafts: how a model will be changed so that the user gets their own model back.

* A layer of the chain that is a module gives up its place: the host takes the merged coefficients, the others become
  identities. No forward changes.
* What is written in a module's own forward changes that forward: it is cut out of the traced graph and installed as a
  generated subclass of the module's own class, so that `isinstance`, methods and attributes stay, and copying,
  pickling, exporting and tracing again work. Children that nothing calls any more are set to None.
* A block that stands for one plain layer (structrep.blocks, a subclass of a convolution) is replaced by it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from structrep import process
from structrep.errors import Refusal
from structrep.graph.calls import Call, Traced
from structrep.guard.other_forwards import Borders
from structrep.guard.sharing import Replicas
from structrep.match.merge import Merge
from structrep.records.plan import Way
from structrep.rewrite.edit import Edit
from structrep.rewrite.forward import Forward
from structrep.rewrite.guards import Guard
from structrep.rewrite.leftovers import Leftovers
from structrep.rewrite.placement import Placement
from structrep.rewrite.rewriter import Rewriter, Rewritten
from structrep.rewrite.units import fallen
from structrep.rewrite.untaken import Untaken


@dataclass(frozen=True, eq=False)
class Draft:
    """How a model will be changed, decided before anything is.

    Args:
        placement: of the merges that are made.
        refused: those that cannot be written back, with the reason.
        unwritable: methods that cannot be written anew, by path and name, and why.
        unedited: those whose text cannot be edited, and why.
        forwards: the methods that change.
        at_rest: the guards of each that the model passes as it is.
    """

    traced: Traced
    replicas: Replicas
    borders: Borders
    placement: Placement
    refused: list[tuple[Merge, Refusal]]
    unwritable: Mapping[tuple[str, str], Refusal]
    unedited: Mapping[tuple[str, str], Refusal]
    forwards: Mapping[Call, Rewritten]
    at_rest: Mapping[Call, set[Guard]]

    @classmethod
    def of(cls, traced: Traced, replicas: Replicas, borders: Borders, merges: Iterable[Merge]) -> Draft:
        """The draft of some merges."""
        untaken = Untaken(traced, replicas.asking, borders)
        rewriter = Rewriter(traced, replicas, untaken, borders)
        left = list(merges)
        refused: list[tuple[Merge, Refusal]] = []
        with process.alone():  # forwards are asked what the names of their modules stand for
            while True:
                placement = Placement(traced, untaken, left)
                placement.decide()
                forwards, failed = rewriter.write(placement)
                lost = fallen(left, failed)
                refused += lost.items()
                gone = () if lost else Leftovers(traced, replicas, placement.changes, forwards, left).computed_from
                kept = [one for one in left if one not in lost and not any(call in gone for call in one.owner.chain())]
                if len(kept) == len(left):
                    break
                left = kept  # what is merged in a part that goes is gone with it
            at_rest = {owner: forward.holding(owner.module) for owner, forward in forwards.items()}
        return cls(
            traced, replicas, borders, placement, refused, rewriter.unwritable, rewriter.unedited, forwards, at_rest
        )

    def without(self, merges: Container[Merge]) -> Draft:
        """The draft of all merges but some."""
        left = [merge for merge in self.merges if merge not in merges]
        return Draft.of(self.traced, self.replicas, self.borders, left)

    @property
    def merges(self) -> Sequence[Merge]:
        return self.placement.merges

    def way(self, merge: Merge) -> Way:
        """How a merge is made: by modules alone, by an edit of a forward, or by one that is written anew."""
        made = [one for owner, one in self.forwards.items() if merge in self.placement.owned.get(owner, ())]
        edited = any(isinstance(one, Edit) and not one.same for one in made)
        return "rewrite" if any(isinstance(one, Forward) for one in made) else "edit" if edited else "swap"

    def where(self, merge: Merge) -> str:
        """The path that the merged layer will have."""
        return self.placement.where(merge)
