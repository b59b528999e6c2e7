"""Whether an edit is right on every path."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from structrep.errors import Unreadable
from structrep.graph.table import QUESTIONS
from structrep.modules.definitions import Definition, Reaching
from structrep.modules.paths import sets_what_runs, swallows
from structrep.modules.presence import path_to
from structrep.modules.settable import written
from structrep.rewrite.syntax import COMPREHENSIONS, Syntax, in_place_alike, names_in

# What a merge changes of no value.
_INVARIANT = {name for name, one in QUESTIONS.items() if one.of in ("rank", "dtype", "kind", "place", "gradient")}


class Judge:
    """Looks at all that stays of a method, and at what does not.

    Args:
        before: what reaches each read where all runs that ran.
        in_eval: the same in eval mode, for which alone layers are merged.
        vanished: the syntax that is to be no more.
    """

    def __init__(self, syntax: Syntax, before: Reaching, in_eval: Reaching, vanished: set[ast.AST]) -> None:
        self.syntax, self.before, self.in_eval, self.vanished = syntax, before, in_eval, vanished

    def check(self, bases: Sequence[frozenset[Definition]]) -> set[ast.AST]:
        """Raise if the edit is not right on every path; gives what stays of that which the vanishing text went by.

        Args:
            bases: the definitions with which merged layers are given something.

        Raises:
            Unreadable: it is not.
        """
        self._check_reads()
        used = (n for n in self.syntax.wanted.misused if n not in self.vanished and not self.syntax.is_unreachable(n))
        if (first := next(used, None)) is not None:
            raise Unreadable(f"line {getattr(first, 'lineno', 0)} may use what is merged otherwise")
        self._check_paths()
        self._check_returns()
        self._check_writes()
        self._check_vanished(bases)
        asked = self._gone_by()
        self._check_effects(asked)
        return asked

    def _check_paths(self) -> None:
        """Raise if what is merged may run otherwise for what no condition of the text says."""
        changed = self.syntax.wanted.changed
        texts = {t for t, numbers in self.syntax.values.items() if isinstance(t, ast.AST) and numbers & changed}
        outside = self.syntax.wanted.settings | set(self.syntax.code.co_freevars)
        for one in ast.walk(self.syntax.tree):
            inside = isinstance(one, (ast.For, ast.With, ast.Try)) and not texts.isdisjoint(ast.walk(one))
            if inside and isinstance(one, ast.For) and (names := names_in(one.iter) & outside):
                raise Unreadable(f"line {one.lineno} goes by {min(names)}, which may be set to something else")
            if inside and swallows(one):
                raise Unreadable(f"line {getattr(one, 'lineno', 0)} may catch what is raised there")
        takers = {text for text, _ in self.syntax.wanted.takers}
        if sets_what_runs(self.syntax.tree, {*texts, *takers}):
            raise Unreadable("it may set itself what runs what is merged")

    def _check_returns(self) -> None:
        """Raise if the method may return something else than what was merged with layers behind it, which would be
        missing there, or call another method that is changed where it was not seen to."""
        own, others = self.syntax.wanted.altered
        for node in ast.walk(self.syntax.tree):
            if not isinstance(node, ast.Attribute) or self.syntax.parents.get(node) in self.syntax.located:
                continue
            altered = path_to(node, self.syntax.itself) in own or node.attr in others
            if altered and not self.syntax.is_unreachable(node):
                raise Unreadable(f"line {node.lineno} asks for {node.attr}, which does what is merged")
        changed = self.syntax.wanted.changed
        if changed.isdisjoint(self.syntax.values.get("return", ())):
            return
        for one in self.syntax.returns(self.syntax.tree.body)[0]:
            sources = self._sources(one.value) if one.value is not None else frozenset()
            if not sources or not self._are_alike(sources):
                raise Unreadable(f"line {one.lineno} gives what was not merged with the layers behind it")

    def _check_writes(self) -> None:
        """Raise if text that stays, and was not seen to run, may write to what a layer hands on that does nothing any
        more."""
        read = set[str]()
        idle = [text for text, numbers in self.syntax.values.items() if numbers & self.syntax.wanted.changed]
        for text in (*idle, *(text for text, _ in self.syntax.wanted.takers)):
            if isinstance(text, ast.AST):
                read |= {
                    n.id for n in self.syntax.operands(text) if isinstance(n, ast.Name) and n.id != self.syntax.itself
                }
        for node in ast.walk(self.syntax.tree):
            if node not in self.vanished and not read.isdisjoint(self.syntax.may_write(node)):
                raise Unreadable(f"line {getattr(node, 'lineno', 0)} may write to what a merged layer hands on")

    def _check_reads(self) -> None:
        """Raise if anything that stays reads a value that will be another, but for what was seen to and takes nothing
        else, and for questions to which all such values have one answer."""
        for node in self.before.reads:
            if node in self.vanished or not isinstance(node, ast.Name) or self.syntax.is_unreachable(node):
                continue
            found = [self.syntax.values_of(one) for one in self.syntax.canonical(node, self.before)]
            changed = any(self.syntax.wanted.changed & numbers for numbers in found)
            always = all(found) and self._are_alike(frozenset().union(*found))
            taken = always and self._is_taken(node, frozenset().union(*found))
            if changed and not self._asks_invariant(node) and not taken:
                raise Unreadable(f"line {node.lineno} reads {node.id}, which is what a merged layer gives")
        for text, numbers in self.syntax.values.items():
            kept = isinstance(text, ast.expr) and text not in self.vanished
            if kept and numbers & self.syntax.wanted.changed and not self._is_taken(text, numbers):  # type: ignore[arg-type]
                raise Unreadable(f"line {getattr(text, 'lineno', 0)} hands on what a merged layer gives")
        for text, number in self.syntax.wanted.takers:
            given = [self._sources(one) for one in _operands(text)] if text not in self.vanished else [{number}]
            if not any(number in numbers and self._are_alike(frozenset(numbers)) for numbers in given):
                raise Unreadable(f"line {getattr(text, 'lineno', 0)} may be given something else on some path")

    def _are_alike(self, numbers: frozenset[int]) -> bool:
        """Whether values will all be others, and in one way: one whose channels are in another order, by itself."""
        wanted = self.syntax.wanted
        return numbers <= wanted.changed and (len(numbers) == 1 or numbers.isdisjoint(wanted.turned))

    def _check_vanished(self, bases: Sequence[frozenset[Definition]]) -> None:
        """Raise if what vanishes may have read something else on another path than what is merged."""
        for node in self.vanished:
            made = self.syntax.canonical(node, self.in_eval) if node in self.in_eval.reads else frozenset()
            if len(made) < 2 or self._is_in_a_loop(node) or self.syntax.is_unreachable(node):
                continue
            if any(one in self.vanished for one in made) or made not in bases:
                raise Unreadable(f"line {getattr(node, 'lineno', 0)} may take something else on another path")
        for node in self.vanished:
            for around in self.syntax.around(node) if node in self.syntax.wanted.gone else ():
                if isinstance(around, ast.Try) and around not in self.vanished:
                    raise Unreadable(f"line {around.lineno} tries what is merged")

    def _is_in_a_loop(self, node: ast.AST) -> bool:
        """Whether something is in a loop that vanishes as a whole."""
        return any(
            isinstance(one, (ast.For, *COMPREHENSIONS)) and one in self.vanished for one in self.syntax.around(node)
        )

    def _sources(self, node: ast.AST) -> frozenset[int]:
        """The numbers of all values that an expression may be; none if any may be another."""
        if isinstance(node, ast.IfExp) and (known := self.syntax.known(node.test)) is not None:
            return self._sources(node.body if known else node.orelse)
        if isinstance(node, ast.Name) and node in self.before.reads:
            found = [self.syntax.values_of(one) for one in self.syntax.canonical(node, self.before)]
            return frozenset().union(*found) if all(found) else frozenset()
        return self.syntax.values.get(node, frozenset())

    def _asks_invariant(self, name: ast.Name) -> bool:
        parent = self.syntax.parents.get(name)
        if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
            return parent.func.id == "isinstance"
        return isinstance(parent, ast.Attribute) and parent.attr in _INVARIANT

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

    def _check_effects(self, asked: set[ast.AST]) -> None:
        """Raise if what is no longer run may do more than compute, or goes by what no guard can ask for."""
        choices = [one for one in self.vanished if isinstance(one, ast.IfExp) and in_place_alike(one)]
        same = {node for one in choices for node in ast.walk(one)}  # in place, or not: both ways vanish
        for node in self.vanished | asked:
            line = f"line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and self._is_outside(node):
                raise Unreadable(f"{line} goes by {node.id}, which may be set to something else")
            if (name := self._asked_for(node)) in self.syntax.wanted.computed:
                raise Unreadable(f"{line} goes by {name}, which is computed")
            odd = isinstance(node, ast.Attribute) and node.attr in ("__class__", "__dict__")
            if odd or (
                isinstance(node, (ast.NamedExpr, ast.Return, ast.Raise, ast.Delete, ast.Assert)) and node not in asked
            ):
                raise Unreadable(f"{line} does more than what is merged")
            plain = isinstance(node, ast.Call) and not self.syntax.only_computes(node)
            if plain and node not in same and not self.syntax.is_unreachable(node):
                raise Unreadable(f"{line} may do more than what is merged")
        self._check_names(asked)

    def _asked_for(self, node: ast.AST) -> str | None:
        """The name of what the module is asked for; "*" for a name that is computed."""
        if isinstance(node, ast.Attribute):
            return path_to(node, self.syntax.itself)
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1):
            return None
        named = node.args[1]
        if node.func.id not in ("getattr", "hasattr") or path_to(node.args[0], self.syntax.itself) is None:
            return None
        return str(named.value) if isinstance(named, ast.Constant) else "*"

    def _is_outside(self, name: ast.Name) -> bool:
        """Whether a name is of what may be set elsewhere: in the file, in a function around, in a class."""
        if name.id in self.syntax.wanted.settings or name.id in self.syntax.code.co_freevars:
            return True
        parent = self.syntax.parents.get(name)
        of_class = isinstance(parent, ast.Attribute) or (isinstance(parent, ast.Call) and name.id == "type")
        outside = self.before.reads.get(name) == frozenset({None}) and name.id not in self.syntax.wanted.libraries
        return outside and of_class

    def _check_names(self, asked: set[ast.AST]) -> None:
        """Raise if the method changes what vanishing text knows by a name of its own: a list of parts, say."""
        nodes = {node for node in self.vanished | asked if isinstance(node, ast.Name) and not self._has_values(node)}
        names = {node.id for node in nodes} - {self.syntax.itself}
        for node in ast.walk(self.syntax.tree):
            if node not in self.syntax.located and not names.isdisjoint(written(node)):
                raise Unreadable(f"line {getattr(node, 'lineno', 0)} may set what is merged by")

    def _has_values(self, name: ast.Name) -> bool:
        made = self.syntax.canonical(name, self.before) if name in self.before.reads else ()
        return any(self.syntax.values_of(one) for one in made)


def _operands(text: ast.AST) -> list[ast.AST]:
    """What an operation is surely done with: not what is chosen from."""
    found: list[ast.AST] = []
    pending = list(ast.iter_child_nodes(text))
    for node in pending:
        if isinstance(node, (ast.Starred, ast.keyword, ast.List, ast.Tuple, ast.Attribute)):
            pending += ast.iter_child_nodes(node)
        found.append(node)
    return found
