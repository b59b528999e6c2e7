"""Edits of a method's own text, by its syntax: an expression is replaced, what only it needed vanishes, and the rest of
the method stays what its author wrote.

An edit is right if every text that vanishes is inside what is replaced, or in statements whose names nothing that stays
reads on any path; if each name that stays is read with the definitions that it had before; and if the value that the
merged layer is given is spelt, in that place, by a name that has the definitions with which the vanishing text read it.
"""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from types import CodeType

from structrep.errors import Unreadable
from structrep.modules.definitions import Definition, Put, Reaching
from structrep.rewrite.judge import Judge
from structrep.rewrite.syntax import Syntax
from structrep.rewrite.text import Writer
from structrep.rewrite.wanted import Edited, Piece, Wanted

_LOOPS = (ast.For, ast.While)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_CHOICES = (ast.IfExp, ast.BoolOp, ast.Lambda, *_COMPREHENSIONS)
_MOST = 64  # ways to choose which texts are replaced


def edited(code: CodeType, wanted: Wanted) -> Edited:
    """Change the text of a method.

    Raises:
        Unreadable: no edit is right.
    """
    found = _edited(code, wanted)
    if isinstance(found, str):
        raise Unreadable(found)
    return found


@functools.lru_cache(2048)  # blocks of a class mostly change in the same way
def _edited(code: CodeType, wanted: Wanted) -> Edited | str:
    found = _tried(code, replace(wanted, answers=()))
    if not wanted.answers or (isinstance(found, Edited) and not found.sums):
        return found
    best = _tried(code, wanted)
    if isinstance(best, str) or (isinstance(found, Edited) and found.sums <= best.sums):
        return found if isinstance(found, Edited) else best
    for test, _ in wanted.answers:  # each is a guard: what is right on all paths needs none
        fewer = replace(wanted, answers=tuple(one for one in wanted.answers if one[0] is not test))
        other = _tried(code, fewer)
        if isinstance(other, Edited) and other.sums <= best.sums:
            wanted, best = fewer, other
    return best


def _tried(code: CodeType, wanted: Wanted) -> Edited | str:
    try:
        return _Editor(code, wanted).edit()
    except Unreadable as reason:
        return str(reason)


class _Editor:
    def __init__(self, code: CodeType, wanted: Wanted) -> None:
        self.code, self.syntax = code, Syntax(code, wanted)

    def edit(self) -> Edited:
        reasons: list[str] = []
        for self.by_alias in (False, True):
            choices = itertools.product(*(list(self._places(piece.text)) for piece in self.syntax.pieces))
            for places in itertools.islice(choices, _MOST):
                try:
                    return self._try(dict(zip(places, self.syntax.pieces, strict=True)))
                except Unreadable as error:
                    reasons.append(str(error))
        raise Unreadable("; ".join(dict.fromkeys(reasons)) or "it has no place for a merged layer")

    def _places(self, text: ast.AST) -> Iterator[ast.AST]:
        """What may be replaced for a text, innermost first: the whole of a loop around it at least."""
        around = [text]
        while not isinstance(around[-1], ast.FunctionDef):
            around.append(self.syntax.parents[around[-1]])
        around.pop()
        loops = [place for place, node in enumerate(around) if isinstance(node, _LOOPS)]
        first = loops[-1] if loops else 0
        for node in around[first:]:
            if node is text or isinstance(node, (ast.IfExp, ast.If, *_LOOPS, ast.With)):
                yield node

    def _try(self, places: dict[ast.AST, Piece]) -> Edited:
        outer = [place for place in places if not any(one in places for one in self.syntax.around(place))]
        put = {place: Put("", self._named(place, piece)) for place, piece in places.items()}
        unedited = Reaching(self.syntax.tree, self.syntax.known, put, behind=True, writes=self.syntax.may_write)
        self.read_as: dict[ast.AST, tuple[ast.Name, frozenset[Definition]]] = {}
        for place, piece in places.items():
            put[place] = Put(self._base(place, piece, unedited), put[place].name)
        self.replaced = set[ast.AST]()
        for place, one in put.items():
            base = set(ast.walk(one.base)) if isinstance(one.base, ast.expr) else set()
            self.replaced |= set(ast.walk(place)) - base
        if kept := next((text for text in self.syntax.wanted.kept if text in self.replaced), None):
            raise Unreadable(f"line {getattr(kept, 'lineno', 0)} does more than what is merged")
        bases = set[Definition]().union(*(made for _, made in self.read_as.values()))
        removed = self._sweep(put, unedited, bases)
        after = Reaching(self.syntax.tree, self.syntax.known, put, removed, writes=self.syntax.may_write)
        vanished = self.replaced | {node for one in removed for node in ast.walk(one)}
        if left := next((text for text in self.syntax.wanted.gone if text not in vanished), None):
            raise Unreadable(f"line {getattr(left, 'lineno', 0)} computes what is merged, and may not vanish")
        for node in unedited.reads:
            if node in vanished or node in put:
                continue
            if self.syntax.canonical(node, after) != self.syntax.canonical(node, unedited):
                name = getattr(node, "id", "a name")
                raise Unreadable(f"line {getattr(node, 'lineno', 0)} reads {name}, which would be another on some path")
        for place, piece in places.items():
            self._check_base(place, piece, put[place], unedited, after)
        in_eval = Reaching(self.syntax.tree, self.syntax.known_in_eval, put, behind=True, writes=self.syntax.may_write)
        given = [self.syntax.canonical(name, in_eval) for name, _ in self.read_as.values()]
        asked = Judge(self.syntax, unedited, in_eval, vanished).check(given)
        return Writer(self.syntax, places, put, removed).written(outer, vanished, asked)

    def _named(self, place: ast.AST, piece: Piece) -> str | None:
        """The name that a statement gives the value of a text in it; None of an expression."""
        text = piece.text
        if not isinstance(place, ast.stmt):
            inner = text
            for one in itertools.takewhile(lambda n: n is not place, self.syntax.around(text)):
                inner = one
            if (
                isinstance(place, ast.IfExp)
                and place is not text
                and (inner is place.test or self.syntax.parents[text] is not place)
            ):
                raise Unreadable(f"line {getattr(text, 'lineno', 0)} does more than what is merged")
            return None
        if isinstance(text, ast.AugAssign):
            target: ast.AST = text.target
        else:
            parent = self.syntax.parents[text]
            if not isinstance(parent, ast.Assign) or len(parent.targets) != 1 or parent.value is not text:
                raise Unreadable(f"line {getattr(text, 'lineno', 0)} gives its value no name of its own")
            target = parent.targets[0]
        if not isinstance(target, ast.Name):
            raise Unreadable(f"line {getattr(text, 'lineno', 0)} gives its value no name of its own")
        return target.id

    def _base(self, place: ast.AST, piece: Piece, before: Reaching) -> str | ast.expr:
        """How a base is spelt: by a name that the vanishing text reads, or by its own text inside."""
        names = [name for name, _ in self._reads_of(piece, before)]
        inside = set(ast.walk(place))
        if names:

            def last(name: ast.Name) -> tuple[bool, int, bool, int]:
                alias = before.reads[name] != self.syntax.canonical(name, before)
                return alias != self.by_alias, len(before.reads[name]), name not in inside, self.syntax.order[name]

            first = min(names, key=last)
            self.read_as[place] = first, before.reads[first]
            return first.id
        texts = [text for text, numbers in self.syntax.values.items() if numbers == {piece.base} and text in inside]
        texts = [text for text in texts if isinstance(text, ast.expr) and text is not place]
        if len(texts) != 1 or isinstance(place, ast.stmt):
            raise Unreadable(f"nothing spells what line {getattr(place, 'lineno', 0)} would be made of")
        (text,) = texts
        assert isinstance(text, ast.expr)
        if any(
            isinstance(one, _CHOICES) for one in itertools.takewhile(lambda n: n is not place, self.syntax.around(text))
        ):
            raise Unreadable(f"line {getattr(place, 'lineno', 0)} makes it of something on some paths alone")
        if isinstance(place, _CHOICES):
            raise Unreadable(f"line {getattr(place, 'lineno', 0)} makes it of something on some paths alone")
        return text

    def _reads_of(self, piece: Piece, before: Reaching) -> list[tuple[ast.Name, frozenset[Definition]]]:
        """Where a text that vanishes reads a value by a name."""
        found = []
        for text in piece.gone:
            for operand in self.syntax.operands(text):
                if isinstance(operand, ast.Name) and operand in before.reads:
                    made = self.syntax.canonical(operand, before)
                    if any(piece.base in self.syntax.values_of(one) for one in made):
                        found.append((operand, made))
        return found

    def _check_base(self, place: ast.AST, piece: Piece, put: Put, before: Reaching, after: Reaching) -> None:
        """Raise unless all that vanishes reads the base with the definitions that its name has where it is put."""
        if not isinstance(put.base, str):
            return
        made = [definitions for _, definitions in self._reads_of(piece, before)]
        merged = piece.base in self.syntax.wanted.changed  # what the merged layer gives, if all before it has run
        if merged and any(self.syntax.values_of(one) != {piece.base} for definitions in made for one in definitions):
            raise Unreadable(f"line {getattr(place, 'lineno', 0)} may be given something else on some path")
        if any(one != made[0] for one in made) or self.syntax.canonical(place, after) != made[0]:
            raise Unreadable(f"{put.base} may be another at line {getattr(place, 'lineno', 0)} on some path")

    def _sweep(self, put: dict[ast.AST, Put], before: Reaching, bases: set[Definition]) -> set[ast.stmt]:
        """The statements that nothing needs any more.

        Args:
            bases: the definitions of what merged layers are given.
        """
        read = {one for made in before.reads.values() for one in made}
        rest = (n for n in ast.walk(self.syntax.tree) if isinstance(n, ast.stmt) and n not in self.replaced)
        removed = {one for one in rest if self._may_go(one, read)}
        while True:
            whole = {s for s in removed if not isinstance(s, (ast.If, ast.For)) or self.syntax.is_emptied(s, removed)}
            vanished = self.replaced | {node for one in whole for node in ast.walk(one)}
            stays = (made for node, made in before.reads.items() if node not in vanished and node not in put)
            needed = self.syntax.without_sums(bases.union(*stays), before)
            left = {one for one in whole if needed.isdisjoint(_targets(one))}
            if left == removed:
                return left
            removed = left

    def _may_go(self, one: ast.stmt, read: set[Definition]) -> bool:
        """Whether a statement does no more than to give names values, and did so for somebody, or vanishes in any
        case."""
        if isinstance(one, (ast.If, ast.For)):
            return self.syntax.is_pure(one.test if isinstance(one, ast.If) else one.iter)
        if isinstance(one, ast.Assign):
            targets = one.targets
        elif isinstance(one, ast.AugAssign) or (isinstance(one, ast.AnnAssign) and one.value is not None):
            targets = [one.target]
        else:
            return False
        nodes = [node for target in targets for node in ast.walk(target)]
        if not all(isinstance(n, (ast.Name, ast.Tuple, ast.List, ast.expr_context)) for n in nodes):
            return False
        if isinstance(one, ast.AugAssign) and one not in self.syntax.wanted.gone and one not in self.syntax.sums:
            return False  # which may be in place
        gone = any(node in self.syntax.wanted.gone for node in ast.walk(one))
        return self.syntax.is_pure(one) and (gone or not read.isdisjoint(_targets(one)))


def _targets(statement: ast.stmt) -> set[ast.AST]:
    """The names that a statement, but not what is in it, gives values."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {n for target in targets if target is not None for n in ast.walk(target) if isinstance(n, ast.Name)}
