"""What a forward was told where it asked what hangs on its input: the trace is specialized to the answer."""

from __future__ import annotations

import ast
import linecache
from dataclasses import dataclass
from types import CodeType
from typing import Any

from structrep.modules.positions import place


@dataclass(frozen=True)
class Specialization:
    """An answer to what hangs on the input, taken for the example: it may be another for another input.

    Args:
        code, at: whose instruction asked.
        text: what was asked, as it is written: a condition, or what a number or a length was needed for.
        told: the answer.
        line: of the file that the code is in.
        asserted: whether the graph has an assertion of it, so that a forward that is written anew raises elsewhere.
        gradient: whether it was asked if a value has a gradient.
    """

    code: CodeType
    at: int
    text: str
    told: Any
    line: int
    asserted: bool = False
    gradient: bool = False

    def __str__(self) -> str:
        asked = f"`{self.text}`" if self.text else "for something"  # where nothing has the source
        return f"{asked} ({self.code.co_filename}:{self.line})"


def specialized(
    code: CodeType, at: int, line: int, told: Any, *, asserted: bool = False, gradient: bool = False
) -> Specialization:
    """What an instruction was told, with what it asks as it is written."""
    node = place(code, at)
    inner = node.test if isinstance(node, ast.Assert) else node
    text = ast.unparse(inner) if inner is not None else linecache.getline(code.co_filename, line).strip()
    return Specialization(code, at, text, told, line, asserted, gradient)
