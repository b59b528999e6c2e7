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
import linecache
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import CodeType

from torch import Tensor

from structrep.errors import Unreadable
from structrep.modules.definitions import Definition, Put, Reaching
from structrep.modules.paths import definition
from structrep.modules.presence import path_to, presence

_PURE = {"abs", "bool", "dict", "enumerate", "float", "getattr", "hasattr", "int", "isinstance", "len", "list", "max",
         "min", "range", "reversed", "slice", "sorted", "str", "sum", "tuple", "type", "zip"}  # fmt: skip
_ODD = (ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom, ast.Await)
_NAMESPACES = {"locals", "vars", "eval", "exec", "dir", "globals"}
_LOOPS = (ast.For, ast.While)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_CHOICES = (ast.IfExp, ast.BoolOp, ast.Lambda, *_COMPREHENSIONS)
_ATOMS = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant)
_KINDS = {"ndim", "dtype", "device", "dim", "is_cuda", "requires_grad"}  # what a merge changes of no value
_MOST = 64  # ways to choose which texts are replaced


@dataclass(frozen=True)
class Piece:
    """A text whose value becomes that of a layer, or of what that would be given.

    Args:
        text: whose value it is.
        value: a number for that value.
        base: the number of the value that the layer is given.
        layer: the name of the layer in its module; None to hand on the base.
        gone: the texts that the layer does the work of.
    """

    text: ast.AST
    value: int
    base: int
    layer: str | None
    gone: frozenset[ast.AST]


@dataclass(frozen=True)
class Wanted:
    """What is to be changed in a method, in terms of its syntax.

    Args:
        pieces: the texts to replace.
        gone: the texts that are computed no more.
        free: those that do nothing, and may stay or vanish.
        kept: all other texts that were seen to do something.
        values: texts, arguments by name, and "return", with the numbers of the values that they were seen to have.
        parts: the modules and tensors of the module by path, and whether they are there.
        libraries: names of torch's modules, and of others without effects.
        settings: names of plain values outside of the method.
        changed: the numbers of values that will be others.
        answers: conditions on what the module is set to, and the answers that they have.
        misused: texts that may use some of what is merged without the rest.
        takers: texts that stay, and take values that will be others, with the numbers of these.
    """

    pieces: tuple[Piece, ...]
    gone: frozenset[ast.AST]
    free: frozenset[ast.AST]
    kept: frozenset[ast.AST]
    values: tuple[tuple[ast.AST | str, frozenset[int]], ...]
    parts: frozenset[tuple[str, bool]]
    libraries: frozenset[str]
    settings: frozenset[str]
    changed: frozenset[int]
    answers: tuple[tuple[ast.AST, bool], ...]
    misused: frozenset[ast.AST]
    takers: tuple[tuple[ast.AST, int], ...]


@dataclass(frozen=True)
class Edited:
    """A method's text, changed.

    Args:
        before, after: the lines of its definition.
        line: the number of the first in its file.
        vanished: the syntax that is no more, and what stays of that which it went by.
        mentions: paths of what the rest of the method asks its module for; "*" if that may be anything.
        assumed: conditions that have to have the answers still that they had.
        sums: how many additions of 0 are left.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    file: str
    line: int
    vanished: frozenset[ast.AST]
    mentions: frozenset[str]
    assumed: tuple[ast.AST, ...]
    sums: int


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
        read = definition(code)
        if read is None or not isinstance(read[0], ast.FunctionDef) or not code.co_varnames:
            raise Unreadable("its source cannot be read")
        self.code, self.wanted = code, wanted
        self.tree, self.parents = read[0], read[1]
        self.itself, self.parts = code.co_varnames[0], dict(wanted.parts)
        nodes = list(ast.walk(self.tree))
        called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        if any(isinstance(node, _ODD) for node in nodes) or called & _NAMESPACES:
            raise Unreadable("it yields, or looks at its own names")
        self.order = {node: place for place, node in enumerate(nodes)}
        self.values = dict(wanted.values)
        self.sums: set[ast.AST] = set()
        self.answers = dict(wanted.answers)

    def edit(self) -> Edited:
        plain = Reaching(self.tree, self._known)
        self.sums = {node for node in self.wanted.free if self._adds_nothing(node, plain)}
        self.pieces = tuple(map(self._with_sums, self.wanted.pieces))
        reasons: list[str] = []
        for self.by_alias in (False, True):
            choices = itertools.product(*(list(self._places(piece.text)) for piece in self.pieces))
            for places in itertools.islice(choices, _MOST):
                try:
                    return self._try(dict(zip(places, self.pieces, strict=True)))
                except Unreadable as error:
                    reasons.append(str(error))
        raise Unreadable("; ".join(dict.fromkeys(reasons)) or "it has no place for a merged layer")

    def _adds_nothing(self, text: ast.AST, plain: Reaching) -> bool:
        """Whether a text adds 0 to something, on every path."""
        parts: list[ast.expr] = []
        if isinstance(text, ast.BinOp) and isinstance(text.op, ast.Add):
            parts = [text.left, text.right]
        elif isinstance(text, ast.AugAssign) and isinstance(text.op, ast.Add):
            parts = [text.value]
        return any(self._is_zero(part, plain) for part in parts)

    def _is_zero(self, node: ast.expr, plain: Reaching) -> bool:
        if isinstance(node, ast.Constant):
            return type(node.value) in (int, float) and node.value == 0
        if not isinstance(node, ast.Name) or node not in plain.reads:
            return False
        made = [self._assigned(one) for one in self._canonical(node, plain)]
        return bool(made) and all(isinstance(one, ast.Constant) and self._is_zero(one, plain) for one in made)

    def _with_sums(self, piece: Piece) -> Piece:
        """A piece with what adds nothing to it."""
        text = piece.text
        while (
            isinstance(text, ast.expr) and isinstance(self.parents[text], ast.BinOp) and self.parents[text] in self.sums
        ):
            text = self.parents[text]
        return replace(piece, text=text)

    def _places(self, text: ast.AST) -> Iterator[ast.AST]:
        """What may be replaced for a text, innermost first: the whole of a loop around it at least."""
        around = [text]
        while not isinstance(around[-1], ast.FunctionDef):
            around.append(self.parents[around[-1]])
        around.pop()
        loops = [place for place, node in enumerate(around) if isinstance(node, _LOOPS)]
        first = loops[-1] if loops else 0
        for node in around[first:]:
            if node is text or isinstance(node, (ast.IfExp, ast.If, *_LOOPS, ast.With)):
                yield node

    def _try(self, places: dict[ast.AST, Piece]) -> Edited:
        outer = [place for place in places if not any(one in places for one in self._around(place))]
        put = {place: Put("", self._named(place, piece)) for place, piece in places.items()}
        unedited = Reaching(self.tree, self._known, put, behind=True)
        self.read_as: dict[ast.AST, tuple[ast.Name, frozenset[Definition]]] = {}
        for place, piece in places.items():
            put[place] = Put(self._base(place, piece, unedited), put[place].name)
        self.replaced = set[ast.AST]()
        for place, one in put.items():
            base = set(ast.walk(one.base)) if isinstance(one.base, ast.expr) else set()
            self.replaced |= set(ast.walk(place)) - base
        self._check_replaced()
        bases = set[Definition]().union(*(made for _, made in self.read_as.values()))
        removed = self._sweep(put, unedited, bases)
        after = Reaching(self.tree, self._known, put, removed)
        vanished = self.replaced | {node for one in removed for node in ast.walk(one)}
        if left := next((text for text in self.wanted.gone if text not in vanished), None):
            raise Unreadable(f"line {getattr(left, 'lineno', 0)} computes what is merged, and may not vanish")
        for node in unedited.reads:
            if node in vanished or node in put:
                continue
            if self._canonical(node, after) != self._canonical(node, unedited):
                name = getattr(node, "id", "a name")
                raise Unreadable(f"line {getattr(node, 'lineno', 0)} reads {name}, which would be another on some path")
        for place, piece in places.items():
            self._check_base(place, piece, put[place], unedited, after)
        self._check_reads(vanished, unedited)
        if used := next((n for n in self.wanted.misused if n not in vanished and not self._is_unreachable(n)), None):
            raise Unreadable(f"line {getattr(used, 'lineno', 0)} may use what is merged otherwise")
        self._check_writes(put, vanished)
        asked = self._gone_by(vanished, unedited)
        self._check_effects(vanished)
        return self._written(places, put, outer, removed, vanished, asked)

    # --- what is replaced, and by what ------------------------------------------------------------------------------

    def _named(self, place: ast.AST, piece: Piece) -> str | None:
        """The name that a statement gives the value of a text in it; None of an expression."""
        text = piece.text
        if not isinstance(place, ast.stmt):
            inner = text
            for one in itertools.takewhile(lambda n: n is not place, self._around(text)):
                inner = one
            if (
                isinstance(place, ast.IfExp)
                and place is not text
                and (inner is place.test or self.parents[text] is not place)
            ):
                raise Unreadable(f"line {getattr(text, 'lineno', 0)} does more than what is merged")
            return None
        if isinstance(text, ast.AugAssign):
            target: ast.AST = text.target
        else:
            parent = self.parents[text]
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
                alias = before.reads[name] != self._canonical(name, before)
                return alias != self.by_alias, len(before.reads[name]), name not in inside, self.order[name]

            first = min(names, key=last)
            self.read_as[place] = first, before.reads[first]
            return first.id
        texts = [text for text, numbers in self.values.items() if numbers == {piece.base} and text in inside]
        texts = [text for text in texts if isinstance(text, ast.expr) and text is not place]
        if len(texts) != 1 or isinstance(place, ast.stmt):
            raise Unreadable(f"nothing spells what line {getattr(place, 'lineno', 0)} would be made of")
        (text,) = texts
        assert isinstance(text, ast.expr)
        if any(isinstance(one, _CHOICES) for one in itertools.takewhile(lambda n: n is not place, self._around(text))):
            raise Unreadable(f"line {getattr(place, 'lineno', 0)} makes it of something on some paths alone")
        if isinstance(place, _CHOICES):
            raise Unreadable(f"line {getattr(place, 'lineno', 0)} makes it of something on some paths alone")
        return text

    def _reads_of(self, piece: Piece, before: Reaching) -> list[tuple[ast.Name, frozenset[Definition]]]:
        """Where a text that vanishes reads a value by a name."""
        found = []
        for text in piece.gone:
            for operand in self._operands(text):
                if isinstance(operand, ast.Name) and operand in before.reads:
                    made = self._canonical(operand, before)
                    if any(piece.base in self._values_of(one) for one in made):
                        found.append((operand, made))
        return found

    def _operands(self, text: ast.AST) -> Iterator[ast.AST]:
        """What an operation is done with, as far as that is names, also inside of functions' arguments."""
        pending = list(ast.iter_child_nodes(text))
        for node in pending:
            yield node
            if node not in self.wanted.gone and node not in self.wanted.kept:
                pending += ast.iter_child_nodes(node)

    def _canonical(self, name: ast.AST, reaching: Reaching) -> frozenset[Definition]:
        """The definitions of a name, and where one only hands on another name, the definitions of that."""
        found: set[Definition] = set()
        pending, seen = [*reaching.reads.get(name, ())], set[Definition]()
        while pending:
            one = pending.pop()
            if one in seen:
                continue
            seen.add(one)
            value = self._assigned(one)
            around = self.parents.get(one) if one is not None else None
            if one is not None and around in self.sums and one in reaching.reads:  # `x += 0`
                pending += reaching.reads[one]
            elif isinstance(value, ast.Name) and value in reaching.reads:
                pending += reaching.reads[value]
            else:
                found.add(one)
        return frozenset(found)

    def _assigned(self, one: Definition) -> ast.expr | None:
        """The expression whose value a definition gives a name."""
        parent = self.parents.get(one) if one is not None else None
        if isinstance(parent, ast.Assign) and one in parent.targets:
            return parent.value
        if isinstance(parent, (ast.AnnAssign, ast.NamedExpr)) and parent.target is one:
            return parent.value
        return None

    def _values_of(self, one: Definition) -> frozenset[int]:
        if isinstance(one, ast.arg):
            return self.values.get(one.arg, frozenset())
        parent = self.parents.get(one) if one is not None else None
        if isinstance(parent, ast.AugAssign):
            return self.values.get(parent, frozenset())
        if isinstance(one, ast.stmt):  # that is replaced
            return frozenset(piece.value for piece in self.pieces if one in self._around(piece.text))
        value = self._assigned(one)
        return self.values.get(value, frozenset()) if value is not None else frozenset()

    def _check_base(self, place: ast.AST, piece: Piece, put: Put, before: Reaching, after: Reaching) -> None:
        """Raise unless all that vanishes reads the base with the definitions that its name has where it is put."""
        if not isinstance(put.base, str):
            return
        made = [definitions for _, definitions in self._reads_of(piece, before)]
        if any(one != made[0] for one in made) or self._canonical(place, after) != made[0]:
            raise Unreadable(f"{put.base} may be another at line {getattr(place, 'lineno', 0)} on some path")

    def _check_replaced(self) -> None:
        if kept := next((text for text in self.wanted.kept if text in self.replaced), None):
            raise Unreadable(f"line {getattr(kept, 'lineno', 0)} does more than what is merged")

    # --- what vanishes with it --------------------------------------------------------------------------------------

    def _sweep(self, put: dict[ast.AST, Put], before: Reaching, bases: set[Definition]) -> set[ast.stmt]:
        """The statements that nothing needs any more.

        Args:
            bases: the definitions of what merged layers are given.
        """
        read = {one for made in before.reads.values() for one in made}
        rest = (n for n in ast.walk(self.tree) if isinstance(n, ast.stmt) and n not in self.replaced)
        removed = {one for one in rest if self._may_go(one, read)}
        while True:
            whole = {s for s in removed if not isinstance(s, (ast.If, ast.For)) or self._is_emptied(s, removed)}
            vanished = self.replaced | {node for one in whole for node in ast.walk(one)}
            stays = (made for node, made in before.reads.items() if node not in vanished and node not in put)
            needed = self._without_sums(bases.union(*stays), before)
            left = {one for one in whole if needed.isdisjoint(_targets(one))}
            if left == removed:
                return left
            removed = left

    def _without_sums(self, made: set[Definition], before: Reaching) -> set[Definition]:
        """Definitions, with those that `x += 0` adds to in its place."""
        found, pending = set[Definition](), [*made]
        while pending:
            one = pending.pop()
            if one in found:
                continue
            if one is not None and self.parents.get(one) in self.sums and self.wanted.pieces:
                pending += before.reads.get(one, ())
            else:
                found.add(one)
        return found

    def _may_go(self, one: ast.stmt, read: set[Definition]) -> bool:
        """Whether a statement does no more than to give names values, and did so for somebody, or vanishes in any
        case."""
        if isinstance(one, (ast.If, ast.For)):
            return self._is_pure(one.test if isinstance(one, ast.If) else one.iter)
        if isinstance(one, ast.Assign):
            targets = one.targets
        elif isinstance(one, ast.AugAssign) or (isinstance(one, ast.AnnAssign) and one.value is not None):
            targets = [one.target]
        else:
            return False
        nodes = [node for target in targets for node in ast.walk(target)]
        if not all(isinstance(n, (ast.Name, ast.Tuple, ast.List, ast.expr_context)) for n in nodes):
            return False
        if isinstance(one, ast.AugAssign) and one not in self.wanted.gone and one not in self.sums:
            return False  # which may be in place
        gone = any(node in self.wanted.gone for node in ast.walk(one))
        return self._is_pure(one) and (gone or not read.isdisjoint(_targets(one)))

    def _is_emptied(self, around: ast.If | ast.For, removed: set[ast.stmt]) -> bool:
        """Whether nothing is left of a condition or a loop, and something was."""
        inside = [s for s in (*around.body, *around.orelse) if not isinstance(s, ast.Pass)]
        live = [s for s in inside if not self._is_dead(around, s)]
        return bool(live) and removed.issuperset(live)

    def _is_dead(self, around: ast.AST, one: ast.AST) -> bool:
        """Whether something is on a way of a condition that is never taken."""
        if not isinstance(around, (ast.If, ast.IfExp)) or (known := self._known(around.test)) is None:
            return False
        never = around.orelse if known else around.body
        return one in never if isinstance(never, list) else one is never

    def _is_pure(self, text: ast.AST) -> bool:
        """Whether nothing is seen of it that a text is not run: it only computes."""
        for node in ast.walk(text):
            if node in self.wanted.kept or isinstance(node, ast.NamedExpr):
                return False
            if isinstance(node, ast.Call) and not self._only_computes(node):
                return False
        return True

    def _only_computes(self, call: ast.Call) -> bool:
        function = call.func
        if call in self.wanted.gone or call in self.wanted.free or self._is_of_part(call):
            return True
        if isinstance(function, ast.Name):
            return function.id in _PURE
        if not isinstance(function, ast.Attribute):
            return False
        name, owner = function.attr, function.value
        odd = name.endswith("_") or name.startswith(("_", "rand", "set_", "manual", "seed", "register", "backward"))
        if odd or name in ("bernoulli", "multinomial", "normal", "dropout"):
            return False
        while isinstance(owner, ast.Attribute):
            owner = owner.value
        of_library = isinstance(owner, ast.Name) and owner.id in self.wanted.libraries
        return of_library or (hasattr(Tensor, name) and path_to(function, self.itself) not in self.parts)

    def _is_of_part(self, call: ast.Call) -> bool:
        """Whether a part of the module is called by what a text in a generator or the like makes of it: what was seen
        to vanish there is all that it did."""
        around = [one for one in self._around(call) if one in self.wanted.gone]
        inner = [one for one in self._around(call) if isinstance(one, _COMPREHENSIONS)]
        if not around or not inner:
            return False
        targets = {
            n.id for one in inner for part in one.generators for n in ast.walk(part.target) if isinstance(n, ast.Name)
        }
        named = isinstance(call.func, ast.Name) and call.func.id in targets
        return named or path_to(call.func, self.itself) in self.parts

    def _known(self, test: ast.expr) -> bool | None:
        there = presence(test, self.itself, self.parts)
        return self.answers.get(test) if there is None else there

    def _check_writes(self, put: dict[ast.AST, Put], vanished: set[ast.AST]) -> None:
        """Raise if text that stays, and was not seen to run, may write to the value that a layer is given."""
        bases = {one.base for one in put.values() if isinstance(one.base, str)}
        for node in ast.walk(self.tree):
            if node in vanished or node in self.wanted.kept:
                continue
            written: list[ast.AST] = []
            if isinstance(node, ast.Call):
                if isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_"):
                    written.append(node.func.value)
                written += [keyword.value for keyword in node.keywords if keyword.arg == "out"]
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                written.append(node.value)
            if any(_root(one) in bases for one in written):
                raise Unreadable(f"line {getattr(node, 'lineno', 0)} may write to what the merged layer is given")

    def _check_reads(self, vanished: set[ast.AST], before: Reaching) -> None:
        """Raise if anything that stays reads a value that will be another, but for what was seen to and takes nothing
        else, and for questions to which all such values have one answer."""
        for node in before.reads:
            if node in vanished or not isinstance(node, ast.Name) or self._is_unreachable(node):
                continue
            found = [self._values_of(one) for one in self._canonical(node, before)]
            changed = any(self.wanted.changed & numbers for numbers in found)
            if changed and not self._asks_kind(node) and not self._is_taken(node, frozenset().union(*found)):
                raise Unreadable(f"line {node.lineno} reads {node.id}, which is what a merged layer gives")
        for text, numbers in self.values.items():
            kept = isinstance(text, ast.expr) and text not in vanished
            if kept and numbers & self.wanted.changed and not self._is_taken(text, numbers):  # type: ignore[arg-type]
                raise Unreadable(f"line {getattr(text, 'lineno', 0)} hands on what a merged layer gives")
        for text, number in self.wanted.takers:
            given = [self._sources(one, before) for one in self._operands(text)] if text not in vanished else [{number}]
            if not any(number in numbers and numbers <= self.wanted.changed for numbers in given):
                raise Unreadable(f"line {getattr(text, 'lineno', 0)} may be given something else on some path")

    def _sources(self, node: ast.AST, before: Reaching) -> frozenset[int]:
        """The numbers of all values that an expression may be; none if any may be another."""
        if isinstance(node, ast.IfExp) and (known := self._known(node.test)) is not None:
            return self._sources(node.body if known else node.orelse, before)
        if isinstance(node, ast.Name) and node in before.reads:
            found = [self._values_of(one) for one in self._canonical(node, before)]
            return frozenset().union(*found) if all(found) else frozenset()
        return self.values.get(node, frozenset())

    def _asks_kind(self, name: ast.Name) -> bool:
        parent = self.parents.get(name)
        if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
            return parent.func.id == "isinstance"
        return isinstance(parent, ast.Attribute) and parent.attr in _KINDS

    def _is_taken(self, value: ast.expr, numbers: frozenset[int]) -> bool:
        """Whether it was seen what takes a value: an operation, another name, or who called the method."""
        texts = self.wanted.kept | self.wanted.free | self.wanted.gone
        inner, around = value, self.parents[value]
        while around not in texts and isinstance(around, (ast.Starred, ast.Attribute, ast.keyword, ast.IfExp)):
            if isinstance(around, ast.IfExp) and (self._known(around.test) is None or inner is around.test):
                return False
            inner, around = around, self.parents[around]  # type: ignore[assignment]
        if isinstance(around, ast.Return):
            return numbers == self.values.get("return")
        if isinstance(around, ast.Assign):
            names = all(isinstance(target, ast.Name) for target in around.targets)
            return names or any(
                part in texts for target in around.targets for part in ast.walk(target)
            )  # unpacked there
        return around in texts or isinstance(around, ast.Expr)

    def _gone_by(self, vanished: set[ast.AST], before: Reaching) -> set[ast.AST]:
        """What stays of the statements that give the vanishing text its numbers: settings, say, by names of their own.

        Raises:
            Unreadable: it goes by an argument that may be another at the next call.
        """
        found: set[ast.AST] = set()
        pending = [node for node in vanished if node in before.reads]
        for node in pending:
            for one in before.reads[node]:
                if one is None or self._values_of(one):
                    continue
                if isinstance(one, ast.arg):
                    if one.arg != self.itself:
                        raise Unreadable(f"line {getattr(node, 'lineno', 0)} goes by the argument {one.arg}")
                    continue
                statement = next((s for s in (one, *self._around(one)) if isinstance(s, ast.stmt)), None)
                parts = {statement.iter, statement.target} if isinstance(statement, ast.For) else {statement}
                new = {n for part in parts if part is not None for n in ast.walk(part)} - found - vanished
                found |= new
                pending += [n for n in new if n in before.reads]
        return found

    def _check_effects(self, vanished: set[ast.AST]) -> None:
        """Raise if what is no longer run may do more than compute, or goes by what is set elsewhere."""
        for node in vanished:
            if isinstance(node, ast.Name) and node.id in self.wanted.settings and isinstance(node.ctx, ast.Load):
                raise Unreadable(f"line {node.lineno} goes by {node.id}, which may be set to something else")
            if isinstance(node, (ast.NamedExpr, ast.Return, ast.Raise, ast.Delete, ast.Assert)):
                raise Unreadable(f"line {node.lineno} does more than what is merged")
            if isinstance(node, ast.Call) and not self._only_computes(node) and not self._is_unreachable(node):
                raise Unreadable(f"line {node.lineno} may do more than what is merged")

    def _is_unreachable(self, node: ast.AST) -> bool:
        return any(self._is_dead(one, inner) for inner, one in itertools.pairwise((node, *self._around(node))))

    def _around(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self.parents and not isinstance(self.parents[node], ast.FunctionDef):
            node = self.parents[node]
            yield node

    # --- the text ---------------------------------------------------------------------------------------------------

    def _written(
        self,
        pieces: dict[ast.AST, Piece],
        put: dict[ast.AST, Put],
        outer: Iterable[ast.AST],
        removed: set[ast.stmt],
        vanished: set[ast.AST],
        asked: set[ast.AST],
    ) -> Edited:
        text = _Text(self.code, self.tree)
        idle = {s for s in removed if not any(one in removed for one in self._around(s))}
        for place in outer:
            new = self._spelt(place, put, pieces, text)
            one = put[place]
            parent = self.parents[place]
            if one.name is not None:
                new = f"{one.name} = {new}"
                if one.base == one.name and pieces[place].layer is None:
                    idle.add(place)  # type: ignore[arg-type]
                    continue
            elif (
                isinstance(parent, ast.Assign) and len(parent.targets) == 1 and isinstance(parent.targets[0], ast.Name)
            ):
                if new == parent.targets[0].id:  # `x = x`
                    idle.add(parent)
                    continue
            text.replace(place, new)
        idle |= {
            one
            for one in ast.walk(self.tree)
            if isinstance(one, (ast.If, ast.For)) and self._is_emptied(one, idle) and self._is_pure(one)
        }
        emptied = self._emptied(idle)
        for statement in idle - {s for s, _ in emptied}:
            text.remove(statement)
        for statement, keeps in emptied:
            text.replace(statement, "pass") if keeps else text.remove(statement)
        gone = vanished | {node for one in idle for node in ast.walk(one)}
        stays = [node for node in ast.walk(self.tree) if node not in gone]
        mentions = {path for n in stays if isinstance(n, ast.Attribute) and (path := path_to(n, self.itself))}
        mentions |= {name for n in stays if isinstance(n, ast.Name) and n.id == self.itself for name in self._asked(n)}
        for name in {piece.layer for piece in pieces.values()} & mentions:
            raise Unreadable(f"it asks for {name} already")
        before, after = text.lines()
        return Edited(
            before,
            after,
            self.code.co_filename,
            text.first,
            frozenset(gone | asked),
            frozenset(mentions),
            tuple(self.answers),
            sum(isinstance(node, (ast.BinOp, ast.AugAssign)) and node in self.wanted.free for node in stays),
        )

    def _asked(self, itself: ast.Name) -> Iterator[str]:
        """What a mention of the module asks it for, if not by an attribute; "*" if that may be anything."""
        around = self.parents.get(itself)
        if isinstance(around, ast.Attribute):
            return
        asks = around.func.id if isinstance(around, ast.Call) and isinstance(around.func, ast.Name) else ""
        named = around.args[1:2] if isinstance(around, ast.Call) and asks in ("getattr", "hasattr") else []
        if named and isinstance(named[0], ast.Constant):
            yield str(named[0].value)
        elif asks not in ("isinstance", "super", "type", "id"):
            yield "*"

    def _emptied(self, idle: set[ast.stmt]) -> list[tuple[ast.stmt, bool]]:
        """Statements that are all that a block has, of which the first becomes `pass`."""
        found: list[tuple[ast.stmt, bool]] = []
        for node in ast.walk(self.tree):
            for body in (getattr(node, "body", None), getattr(node, "orelse", None), getattr(node, "finalbody", None)):
                if isinstance(body, list) and body and all(s in idle for s in body):
                    found += [(s, s is body[0] and isinstance(s, ast.stmt)) for s in body]
        return found

    def _spelt(self, place: ast.AST, put: dict[ast.AST, Put], pieces: dict[ast.AST, Piece], text: _Text) -> str:
        base, piece = put[place].base, pieces[place]
        if isinstance(base, str):
            spelt = base
        elif base in put:
            spelt = self._spelt(base, put, pieces, text)
        else:
            inner = [
                node for node in ast.walk(base) if node in put and not any(a in put for a in self._between(node, base))
            ]
            spelt = text.of(base, {node: self._spelt(node, put, pieces, text) for node in inner})
            if piece.layer is None and not isinstance(base, _ATOMS):
                spelt = f"({spelt})"
        return spelt if piece.layer is None else f"{self.itself}.{piece.layer}({spelt})"

    def _between(self, node: ast.AST, around: ast.AST) -> Iterator[ast.AST]:
        return itertools.takewhile(lambda one: one is not around, self._around(node))


def _root(node: ast.AST) -> str | None:
    """The name of what an expression is an entry, an attribute or a view of."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _targets(statement: ast.stmt) -> set[ast.AST]:
    """The names that a statement, but not what is in it, gives values."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {n for target in targets if target is not None for n in ast.walk(target) if isinstance(n, ast.Name)}


class _Text:
    """The lines of a definition, and changes to be made there."""

    def __init__(self, code: CodeType, tree: ast.FunctionDef) -> None:
        self.first = min([tree.lineno, *(one.lineno for one in tree.decorator_list)])
        lines = linecache.getlines(code.co_filename)[self.first - 1 : tree.end_lineno]
        self.raw = [line.encode() for line in lines]
        self.changes: list[tuple[tuple[int, int], tuple[int, int], str | None]] = []

    def _start(self, node: ast.AST) -> tuple[int, int]:
        return getattr(node, "lineno") - self.first, getattr(node, "col_offset")

    def _end(self, node: ast.AST) -> tuple[int, int]:
        return getattr(node, "end_lineno") - self.first, getattr(node, "end_col_offset")

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
                after[start[0] : end[0] + 1] = (head + new.encode() + tail).splitlines(keepends=True)
        return tuple(line.decode() for line in self.raw), tuple(line.decode() for line in after)
