"""The text of a method, changed."""

from __future__ import annotations

import ast
import itertools
import linecache
import re
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

from structrep.errors import Unreadable
from structrep.modules.definitions import Put
from structrep.modules.presence import path_to
from structrep.rewrite.syntax import Syntax
from structrep.rewrite.wanted import Edited, Piece

_ATOMS = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant)


class Writer:
    """Writes what an edit leaves of a method."""

    def __init__(
        self, syntax: Syntax, pieces: dict[ast.AST, Piece], put: dict[ast.AST, Put], removed: set[ast.stmt]
    ) -> None:
        self.syntax, self.pieces, self.put, self.removed = syntax, pieces, put, removed

    def written(self, outer: Iterable[ast.AST], vanished: set[ast.AST], asked: set[ast.AST]) -> Edited:
        """The change.

        Args:
            outer: what is replaced, and in nothing that is.
            vanished: the syntax that is no more.
            asked: what stays of that which it went by.

        Raises:
            Unreadable: the text has something of a layer's name already.
        """
        text = _Text(self.syntax.code, self.syntax.tree)
        idle = {s for s in self.removed if not any(one in self.removed for one in self.syntax.around(s))}
        for place in outer:
            new = self._spelt(place, text)
            one = self.put[place]
            parent = self.syntax.parents[place]
            if one.name is not None:
                new = f"{one.name} = {new}"
                if one.base == one.name and self.pieces[place].layer is None:
                    idle.add(place)  # type: ignore[arg-type]
                    continue
            elif isinstance(parent, ast.Assign) and [ast.unparse(one) for one in parent.targets] == [new]:  # `x = x`
                idle.add(parent)
                continue
            text.replace(place, new)
        idle |= {
            one
            for one in ast.walk(self.syntax.tree)
            if isinstance(one, (ast.If, ast.For)) and self.syntax.is_emptied(one, idle) and self.syntax.is_pure(one)
        }
        idle = {s for s in idle if not any(one in idle for one in self.syntax.around(s))}
        emptied = self._emptied(idle)
        for statement in idle - {s for s, _ in emptied}:
            text.remove(statement)
        for statement, keeps in emptied:
            text.replace(statement, "pass") if keeps else text.remove(statement)
        gone = vanished | {node for one in idle for node in ast.walk(one)}
        stays = [node for node in ast.walk(self.syntax.tree) if node not in gone]
        runs = [node for node in stays if not self.syntax.is_unreachable(node, self.syntax.known_in_eval)]
        paths = {path_to(node, self.syntax.itself) for node in stays if isinstance(node, ast.Attribute)}
        for name in {piece.layer for piece in self.pieces.values() if piece.layer is not None} & paths:
            raise Unreadable(f"it asks for {name} already")
        before, after = text.lines()
        return Edited(
            before,
            after,
            self.syntax.code.co_filename,
            text.first,
            frozenset(gone | asked),
            frozenset(runs),
            tuple(self.syntax.answers),
            sum(isinstance(node, (ast.BinOp, ast.AugAssign)) and node in self.syntax.wanted.free for node in stays),
        )

    def _emptied(self, idle: set[ast.stmt]) -> list[tuple[ast.stmt, bool]]:
        """Statements that are all that a block has, of which the first becomes `pass`."""
        found: list[tuple[ast.stmt, bool]] = []
        for node in ast.walk(self.syntax.tree):
            for body in (getattr(node, "body", None), getattr(node, "orelse", None), getattr(node, "finalbody", None)):
                if isinstance(body, list) and body and all(s in idle for s in body):
                    found += [(s, s is body[0] and isinstance(s, ast.stmt)) for s in body]
        return found

    def _spelt(self, place: ast.AST, text: _Text) -> str:
        base, piece = self.put[place].base, self.pieces[place]
        if isinstance(base, str):
            spelt = base
        elif base in self.put:
            spelt = self._spelt(base, text)
        else:
            inner = [
                node
                for node in ast.walk(base)
                if node in self.put and not any(a in self.put for a in self._between(node, base))
            ]
            spelt = text.of(base, {node: self._spelt(node, text) for node in inner})
            if piece.layer is None and not isinstance(base, _ATOMS):
                spelt = f"({spelt})"
        return spelt if piece.layer is None else f"{self.syntax.itself}.{piece.layer}({spelt})"

    def _between(self, node: ast.AST, around: ast.AST) -> Iterator[ast.AST]:
        return itertools.takewhile(lambda one: one is not around, self.syntax.around(node))


class _Text:
    """The lines of a definition, and changes to be made there."""

    def __init__(self, code: CodeType, tree: ast.FunctionDef) -> None:
        self.first = min([tree.lineno, *(one.lineno for one in tree.decorator_list)])
        lines = linecache.getlines(code.co_filename)[self.first - 1 : tree.end_lineno]
        self.raw = [line.encode() for line in lines]
        self.changes: list[tuple[tuple[int, int], tuple[int, int], str | None]] = []

    def _start(self, node: ast.AST) -> tuple[int, int]:
        at: Any = node
        return at.lineno - self.first, at.col_offset

    def _end(self, node: ast.AST) -> tuple[int, int]:
        at: Any = node
        return at.end_lineno - self.first, at.end_col_offset

    def replace(self, node: ast.AST, new: str) -> None:
        start, end = self._start(node), self._end(node)
        head, tail = self.raw[start[0]][: start[1]], self.raw[end[0]][end[1] :]
        around = head[-1:] + tail[:1]
        if around == b"()" and isinstance(node, ast.BinOp) and head[-2:-1] in b" ([{=,-+*/":  # no call of anything
            start, end = (start[0], start[1] - 1), (end[0], end[1] + 1)
        self.changes.append((start, end, new))

    def remove(self, node: ast.AST) -> None:
        self.changes.append((self._start(node), self._end(node), None))

    def of(self, node: ast.AST, inside: dict[ast.AST, str]) -> str:
        """The text of an expression, with others in the place of some of its parts."""
        found, at = b"", self._start(node)
        for part in sorted(inside, key=self._start):
            found += self._between(at, self._start(part)) + inside[part].encode()
            at = self._end(part)
        return (found + self._between(at, self._end(node))).decode()

    def _between(self, start: tuple[int, int], end: tuple[int, int]) -> bytes:
        if start[0] == end[0]:
            return self.raw[start[0]][start[1] : end[1]]
        return b"".join((self.raw[start[0]][start[1] :], *self.raw[start[0] + 1 : end[0]], self.raw[end[0]][: end[1]]))

    def lines(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The definition as it was, and as it is to be."""
        after = list(self.raw)
        for start, end, new in sorted(self.changes, key=lambda change: change[0], reverse=True):
            head, tail = after[start[0]][: start[1]], after[end[0]][end[1] :]
            if new is None:
                code, _, _ = tail.partition(b"#")
                if head.strip() and not code.strip(b" \t;\n"):
                    head = head.rstrip(b" \t;")
                tail = tail.lstrip(b" \t;") if not head.strip() and code.strip(b" \t;\n") else tail
                alone = not head.strip() and not code.strip(b" \t;\n")
                after[start[0] : end[0] + 1] = [] if alone else [head + tail]
            else:
                text = (b" " if _joins(head[-1:], new[:1]) else b"") + new.encode()
                text += b" " if _joins(tail[:1], new[-1:]) else b""
                after[start[0] : end[0] + 1] = [*re.findall(rb".*\n|.+", head + text + tail)]
        return tuple(line.decode() for line in self.raw), tuple(line.decode() for line in after)


def _joins(one: bytes, other: str) -> bool:
    """Whether two characters beside each other would be of one word."""
    return all(
        character.isalnum() or character == "_" for character in (one.decode(errors="ignore"), other) if character
    ) and bool(one)
