"""Whether an edit is right on every path."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from structrep.errors import Unreadable
from structrep.modules.boxes import written
from structrep.modules.definitions import Put, Reaching
from structrep.rewrite.syntax import Syntax

_KINDS = {"ndim", "dtype", "device", "dim", "is_cuda", "requires_grad"}  # what a merge changes of no value


_AROUND = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.FunctionDef)


class Judge:
    """Looks at all that stays of a method, and at what does not.

    Args:
        before: what reaches each read where all runs that ran.
        vanished: the syntax that is to be no more.
    """

    def __init__(self, syntax: Syntax, before: Reaching, vanished: set[ast.AST]) -> None:
        self.syntax, self.before, self.vanished = syntax, before, vanished

    def check(self, put: Mapping[ast.AST, Put]) -> set[ast.AST]:
        """Raise if the edit is not right on every path; gives what stays of that which the vanishing text went by.

        Raises:
            Unreadable: it is not.
        """
        self._check_reads()
        used = (n for n in self.syntax.wanted.misused if n not in self.vanished and not self.syntax.is_unreachable(n))
        if (first := next(used, None)) is not None:
            raise Unreadable(f"line {getattr(first, 'lineno', 0)} may use what is merged otherwise")
        self._check_writes(put)
        self._check_effects()
        return self._gone_by()

    def _check_writes(self, put: Mapping[ast.AST, Put]) -> None:
        """Raise if text that stays, and was not seen to run, may write to what a layer is given, or to what is handed
        on by one that does nothing any more."""
        read = {one.base for one in put.values() if isinstance(one.base, str)}
        idle = [text for text, numbers in self.syntax.values.items() if numbers & self.syntax.wanted.changed]
        for text in (*idle, *(text for text, _ in self.syntax.wanted.takers)):
            if isinstance(text, ast.AST):
                read |= {
                    n.id for n in self.syntax.operands(text) if isinstance(n, ast.Name) and n.id != self.syntax.itself
                }
        for node in ast.walk(self.syntax.tree):
            if node in self.vanished or not isinstance(node, ast.stmt) or isinstance(node, _AROUND):
                continue
            if any(part in self.syntax.wanted.kept | self.syntax.wanted.free for part in ast.walk(node)):
                continue
            if not read.isdisjoint(written(node)):
                raise Unreadable(f"line {node.lineno} may write to what the merged layer is given")

    def _check_reads(self) -> None:
        """Raise if anything that stays reads a value that will be another, but for what was seen to and takes nothing
        else, and for questions to which all such values have one answer."""
        for node in self.before.reads:
            if node in self.vanished or not isinstance(node, ast.Name) or self.syntax.is_unreachable(node):
                continue
            found = [self.syntax.values_of(one) for one in self.syntax.canonical(node, self.before)]
            changed = any(self.syntax.wanted.changed & numbers for numbers in found)
            if changed and not self._asks_kind(node) and not self._is_taken(node, frozenset().union(*found)):
                raise Unreadable(f"line {node.lineno} reads {node.id}, which is what a merged layer gives")
        for text, numbers in self.syntax.values.items():
            kept = isinstance(text, ast.expr) and text not in self.vanished
            if kept and numbers & self.syntax.wanted.changed and not self._is_taken(text, numbers):  # type: ignore[arg-type]
                raise Unreadable(f"line {getattr(text, 'lineno', 0)} hands on what a merged layer gives")
        for text, number in self.syntax.wanted.takers:
            given = (
                [self._sources(one) for one in self.syntax.operands(text)] if text not in self.vanished else [{number}]
            )
            if not any(number in numbers and numbers <= self.syntax.wanted.changed for numbers in given):
                raise Unreadable(f"line {getattr(text, 'lineno', 0)} may be given something else on some path")

    def _sources(self, node: ast.AST) -> frozenset[int]:
        """The numbers of all values that an expression may be; none if any may be another."""
        if isinstance(node, ast.IfExp) and (known := self.syntax.known(node.test)) is not None:
            return self._sources(node.body if known else node.orelse)
        if isinstance(node, ast.Name) and node in self.before.reads:
            found = [self.syntax.values_of(one) for one in self.syntax.canonical(node, self.before)]
            return frozenset().union(*found) if all(found) else frozenset()
        return self.syntax.values.get(node, frozenset())

    def _asks_kind(self, name: ast.Name) -> bool:
        parent = self.syntax.parents.get(name)
        if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
            return parent.func.id == "isinstance"
        return isinstance(parent, ast.Attribute) and parent.attr in _KINDS

    def _is_taken(self, value: ast.expr, numbers: frozenset[int]) -> bool:
        """Whether it was seen what takes a value: an operation, another name, or who called the method."""
        texts = self.syntax.wanted.kept | self.syntax.wanted.free | self.syntax.wanted.gone
        inner, around = value, self.syntax.parents[value]
        while around not in texts and isinstance(around, (ast.Starred, ast.Attribute, ast.keyword, ast.IfExp)):
            if isinstance(around, ast.IfExp) and (self.syntax.known(around.test) is None or inner is around.test):
                return False
            inner, around = around, self.syntax.parents[around]  # type: ignore[assignment]
        if isinstance(around, ast.Return):
            return numbers == self.syntax.values.get("return")
        if isinstance(around, ast.Assign):
            names = all(isinstance(target, ast.Name) for target in around.targets)
            return names or any(
                part in texts for target in around.targets for part in ast.walk(target)
            )  # unpacked there
        return around in texts or isinstance(around, ast.Expr)

    def _gone_by(self) -> set[ast.AST]:
        """What stays of the statements that give the vanishing text its numbers: settings, say, by names of their own.

        Raises:
            Unreadable: it goes by an argument that may be another at the next call.
        """
        found: set[ast.AST] = set()
        pending = [node for node in self.vanished if node in self.before.reads]
        for node in pending:
            for one in self.before.reads[node]:
                if one is None or self.syntax.values_of(one):
                    continue
                if isinstance(one, ast.arg):
                    if one.arg != self.syntax.itself:
                        raise Unreadable(f"line {getattr(node, 'lineno', 0)} goes by the argument {one.arg}")
                    continue
                statement = next((s for s in (one, *self.syntax.around(one)) if isinstance(s, ast.stmt)), None)
                parts = {statement.iter, statement.target} if isinstance(statement, ast.For) else {statement}
                new = {n for part in parts if part is not None for n in ast.walk(part)} - found - self.vanished
                found |= new
                pending += [n for n in new if n in self.before.reads]
        return found

    def _check_effects(self) -> None:
        """Raise if what is no longer run may do more than compute, or goes by what is set elsewhere."""
        for node in self.vanished:
            if isinstance(node, ast.Name) and node.id in self.syntax.wanted.settings and isinstance(node.ctx, ast.Load):
                raise Unreadable(f"line {node.lineno} goes by {node.id}, which may be set to something else")
            if isinstance(node, (ast.NamedExpr, ast.Return, ast.Raise, ast.Delete, ast.Assert)):
                raise Unreadable(f"line {node.lineno} does more than what is merged")
            if (
                isinstance(node, ast.Call)
                and not self.syntax.only_computes(node)
                and not self.syntax.is_unreachable(node)
            ):
                raise Unreadable(f"line {node.lineno} may do more than what is merged")
