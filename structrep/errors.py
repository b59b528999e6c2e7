"""What can go wrong, said as: what was found, both values, the remedy.

Two families. A `Refusal` is a merge that was *not* done; the plan lists it and the model keeps its branches there.
Every other `StructrepError` stops the call; the user's model is then as it was. Beside them there are warnings, of what
a call has left undone.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path

LISTED = 8  # names of a kind in one message


class StructrepError(Exception):
    """Base of everything structrep raises on purpose."""


class Refusal(StructrepError):
    """A merge that was not done, with the reason."""

    @property
    def kind(self) -> str:
        return type(self).__name__


class Inexact(Refusal):
    """The merged map would differ from the original on some input, usually at the border."""


class Incompatible(Refusal):
    """Two maps cannot be added, composed or stacked: their channels, sizes or layouts differ."""


class Costlier(Refusal):
    """The merged layer would take more multiply-adds than the layers it replaces."""


class Slower(Refusal):
    """The merged layer takes longer than the layers it replaces, as measured."""


class Overflow(Refusal):
    """A merged coefficient is larger than the layer's dtype can hold."""


class Unreadable(Refusal):
    """A layer is not a known linear map, or cannot be written back as a layer."""


class ExampleOnly(Unreadable):
    """A forward would have to be written anew that does what it does for inputs like the example alone.

    Args:
        where: the path and the name of the method that does.
    """

    def __init__(self, reason: str, where: tuple[str, str]) -> None:
        super().__init__(reason)
        self.where = where


class WrongMerge(Refusal):
    """A rule's merge function does not compute the term its pattern matched."""


class Shared(Refusal):
    """A value or a layer inside the merge is used elsewhere too."""


class Isolated(Refusal):
    """A norm that no convolution or Linear beside it takes."""


class Hooked(Refusal):
    """A hook watches or changes a value inside the merge, or may set what a layer of it holds."""


class Mutated(Refusal):
    """The input of the merge is overwritten in place before the merged layer would read it."""


class Untraceable(Refusal):
    """A module's forward cannot be followed by torch.fx; it is left as it is and its children are tried apart."""


class InvalidRule(StructrepError):
    """A rule was refused at registration."""


class InvalidReader(StructrepError):
    """A reader was refused at registration."""


class BrokenRule(StructrepError):
    """A rule does not do what it says, on its own examples."""


class UnknownRule(StructrepError):
    """A rule was asked for by a name that is not registered."""


class TrainingMode(StructrepError):
    """A norm is in training mode, so it has no fixed scale to fold."""


class Uninitialized(StructrepError):
    """The model still has lazy parameters without values."""


class Sharded(StructrepError):
    """Parameters are spread over processes, and no process has the values to merge."""


class BadInput(StructrepError):
    """What was given cannot be used: example inputs that the model rejects, a name of nothing, a damaged file."""


class Unmerged(StructrepError):
    """A model that should be a deploy model still has something to merge."""


class VerificationError(StructrepError):
    """The deploy model is farther from the truth than the training-time model's own rounding explains."""


class MergeDropped(UserWarning):
    """A merge that a plan lists failed its proof: it was not done, and the model keeps its branches there."""


class NothingMerged(UserWarning):
    """A model was converted, and there is nothing in it to merge: it is as it was."""


def warn(message: str, kind: type[Warning] = UserWarning) -> None:
    """Warn, at the line that called structrep."""
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "structrep":
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, kind, stacklevel=depth)


def said(error: BaseException) -> str:
    """An error's type and the first line of what it says; of an assertion that says nothing, its line."""
    try:
        lines = str(error).strip().splitlines()
    except TypeError:  # it holds a traced value, which has no text
        lines = []
    raised = traceback.extract_tb(error.__traceback__)
    if isinstance(error, AssertionError) and not lines and raised and raised[-1].line:
        lines = [f"{raised[-1].line} ({Path(raised[-1].filename).name}, line {raised[-1].lineno})"]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def some(lines: Iterable[str]) -> list[str]:
    """The first of them, and how many more there are."""
    found = list(lines)
    more = len(found) - LISTED
    return [*found[:LISTED], *([f"and {more} more"] if more > 0 else [])]


def listed(names: Iterable[str]) -> str:
    return ", ".join(some(names))
