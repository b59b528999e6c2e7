"""Edited methods as a patch."""

from __future__ import annotations

import difflib
import linecache
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from structrep.rewrite.edit import Edit


def diff(model: nn.Module, edits: Iterable[Edit]) -> str:
    """The edits of methods as a unified diff, which `git apply` takes.

    A method that is not changed in the same way in all modules of its class is shown behind `# `, for a file has one
    text for all of them.
    """
    methods: dict[tuple[str, int], list[Edit]] = defaultdict(list)
    for one in edits:
        if not one.same:
            methods[one.edited.file, one.edited.line].append(one)
    changes: dict[str, list[tuple[int, int, tuple[str, ...]]]] = defaultdict(list)
    remarks: list[str] = []
    for (file, line), made in methods.items():
        texts = {one.lines: one for one in made}
        used = sum(_runs(module, made[0]) for module in model.modules())
        if len(texts) == 1 and used == len(made):
            changes[file].append((line, len(made[0].edited.before), made[0].lines))
            continue
        for lines, first in texts.items():
            where = ", ".join(one.call.path or "the model" for one in made if one.lines == lines)
            rows = _patch(file, [(line, len(first.edited.before), lines)])
            remarks += [f"# {where}:\n", *(f"# {row}" for row in rows)]
    found = [row for file, those in changes.items() for row in _patch(file, those)]
    return "".join([*found, *remarks])


def _runs(module: nn.Module, one: Edit) -> bool:
    """Whether a module's method is the one that is edited."""
    held: Any = getattr(type(module), one.call.method, None)
    while hasattr(held, "__wrapped__"):
        held = held.__wrapped__
    return getattr(held, "__code__", None) is one.code


def _patch(file: str, changes: list[tuple[int, int, tuple[str, ...]]]) -> list[str]:
    before = linecache.getlines(file)
    after = list(before)
    for line, count, lines in sorted(changes, reverse=True):
        after[line - 1 : line - 1 + count] = lines
    return _named(file, before, after)


def _named(file: str, before: list[str], after: list[str]) -> list[str]:
    name = _shown(file)
    rows = difflib.unified_diff(before, after, f"a/{name}", f"b/{name}")
    return [row if row.endswith("\n") else f"{row}\n\\ No newline at end of file\n" for row in rows]


def _shown(file: str) -> str:
    """A file as it is called below the folder that its package is in."""
    path = Path(file)
    roots = [Path.cwd(), *map(Path, filter(None, sys.path))]
    inside = [path.relative_to(root) for root in roots if path.is_absolute() and path.is_relative_to(root)]
    return min(inside, key=lambda one: len(one.parts)).as_posix() if inside else path.name
