"""What a merge function is handed of a match."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from structrep.pattern.base import Captures, Either, Pattern
from structrep.pattern.combinators import Concat, Many, Optional, Sum
from structrep.terms.term import Term


def arguments(pattern: Pattern, found: Captures, read: Callable[[Term], Any]) -> dict[str, Any]:
    """Captures as a merge function takes them: maps by name; absent branches 0, absent stages 1, repeated parts
    lists."""
    result = _absent(pattern, in_sum=False)
    for name, captured in found.items():
        result[name] = [read(term) for term in captured] if isinstance(captured, list) else read(captured)
    return result


def _absent(pattern: Pattern, in_sum: bool) -> dict[str, Any]:
    """The neutral element for every name below a pattern."""
    neutral: Any = [] if pattern.repeats else 0 if in_sum else 1
    result = {pattern.name: neutral} if pattern.name else {}
    inside_sum = isinstance(pattern, (Sum, Concat)) or (in_sum and isinstance(pattern, (Optional, Either, Many)))
    for part in pattern.inside():
        result |= _absent(part, inside_sum)
    return result
