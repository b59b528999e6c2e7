"""The syntax of a method, with what a trace has seen of its texts."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import CodeType

from torch import Tensor

from structrep.errors import Unreadable
from structrep.modules.boxes import FILLS
from structrep.modules.definitions import Definition, Reaching
from structrep.modules.positions import definition
from structrep.modules.presence import path_to, presence
from structrep.rewrite.wanted import Piece, Wanted

PURE = {"abs", "bool", "dict", "enumerate", "float", "getattr", "hasattr", "int", "isinstance", "len", "list", "max",
         "min", "range", "reversed", "slice", "sorted", "str", "sum", "super", "tuple", "type", "zip"}  # fmt: skip
_ODD = (ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom, ast.Await)
_NAMESPACES = {"locals", "vars", "eval", "exec", "dir", "globals"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Writes:
    """What a method's text may write to in place, where it was not seen to run."""

    def __init__(self, syntax: Syntax) -> None:
        self.syntax = syntax
        self.shared = self._shared()

    def _shared(self) -> dict[str, set[str]]:
        """The names that may share memory with each name."""
        groups: dict[str, set[str]] = {}
        for node in ast.walk(self.syntax.tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            value = node.iter if isinstance(node, (ast.For, ast.comprehension)) else getattr(node, "value", None)
            if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.For, ast.comprehension)):
                continue
            if value is None or self._is_new(value):
                continue
            named = [n for one in (value, *targets) if one is not None for n in ast.walk(one)]
            names = {n.id for n in named if isinstance(n, ast.Name) and n.id != self.syntax.itself}
            whole = names.union(*(groups.get(name, set()) for name in names))
            for name in whole:
                groups[name] = whole
        return groups

    def _is_new(self, value: ast.expr) -> bool:
        """Whether an expression gives a tensor of its own: what a layer, or arithmetic, has made."""
        if isinstance(value, (ast.BinOp, ast.UnaryOp, ast.Compare, ast.Constant)):
            return True
        if not isinstance(value, ast.Call) or value not in self.syntax.wanted.kept | self.syntax.wanted.gone:
            return False
        return path_to(value.func, self.syntax.itself) in self.syntax.parts

    def to(self, text: ast.AST) -> set[str]:
        """The names whose values a text may write to in place where it was not seen to run."""
        found: set[str] = set()
        if isinstance(text, ast.stmt):
            targets = text.targets if isinstance(text, ast.Assign) else [getattr(text, "target", None)]
            aug = isinstance(text, ast.AugAssign) and text not in self.syntax.located
            stores = [n for t in targets if t is not None for n in ast.walk(t)]
            for node in stores:
                if aug or (isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store)):
                    found |= names_in(node)
            if not isinstance(text, ast.AugAssign) and not found:
                return set()  # its value is looked at by itself
        for node in ast.walk(text) if not isinstance(text, ast.stmt) else ():
            call = isinstance(node, ast.Call) and node not in self.syntax.located and not self._writes_nothing(node)
            named = isinstance(node, ast.Attribute) and node.attr.endswith("_") and not node.attr.startswith("_")
            if (
                call or (named and self.syntax.parents.get(node) not in self.syntax.located)
            ) and not self.syntax.is_unreachable(node):
                found |= names_in(node)
        found -= {self.syntax.itself}
        return found.union(*(self.shared.get(name, set()) for name in found))

    def _writes_nothing(self, call: ast.Call) -> bool:
        """Whether a call that was not seen to run surely writes to nothing that it is given."""
        named = [keyword.arg for keyword in call.keywords]
        if "inplace" in named or "out" in named:
            return False
        if isinstance(call.func, ast.Name):
            constant = call.func.id == "getattr" and any(
                isinstance(one, ast.Constant) and str(one.value).endswith("_") for one in call.args
            )
            known = PURE | {"print", "callable", "id"} | self.syntax.wanted.functions
            return call.func.id in known and not constant
        path = path_to(call.func, self.syntax.itself)
        if path is not None:
            return path in self.syntax.wanted.calm
        if isinstance(call.func, ast.Attribute) and call.func.attr in FILLS and self._is_box(call.func.value):
            return True
        name = call.func.attr if isinstance(call.func, ast.Attribute) else "_"
        root = next(iter(names_in(call.func)), "")
        return (
            not name.endswith("_")
            and not name.startswith("_")
            and root != "operator"
            and self.syntax.only_computes(call)
        )

    def _is_box(self, value: ast.expr) -> bool:
        """Whether a name is of a list, a set or a dict that the method has made: to fill that writes to no tensor."""
        if not isinstance(value, ast.Name):
            return False
        given = [
            one.value if isinstance(one, ast.Assign) and one.targets == [name] else None
            for name in ast.walk(self.syntax.tree)
            if isinstance(name, ast.Name) and name.id == value.id and isinstance(name.ctx, ast.Store)
            for one in [self.syntax.parents[name]]
        ]
        boxes = (ast.List, ast.Set, ast.Dict, ast.ListComp, ast.SetComp, ast.DictComp)
        return bool(given) and all(isinstance(one, boxes) for one in given)


class Syntax:
    """A method's syntax, and simple things about it.

    Raises:
        Unreadable: it cannot be read, or does what no syntax tells.
    """

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
        self.answers = dict(wanted.answers)
        self.located = wanted.kept | wanted.free | wanted.gone
        self.may_write = Writes(self).to
        self.sums: set[ast.AST] = set()  # texts that add 0
        plain = Reaching(self.tree, self.known, writes=self.may_write)
        self.sums = {node for node in wanted.free if self.adds_nothing(node, plain)}
        self.pieces = tuple(map(self._with_sums, wanted.pieces))

    def adds_nothing(self, text: ast.AST, plain: Reaching) -> bool:
        """Whether a text adds 0 to something, on every path."""
        parts: list[ast.expr] = []
        if isinstance(text, ast.BinOp) and isinstance(text.op, ast.Add):
            parts = [text.left, text.right]
        elif isinstance(text, ast.AugAssign) and isinstance(text.op, ast.Add):
            parts = [text.value]
        return any(self.is_zero(part, plain) for part in parts)

    def is_zero(self, node: ast.expr, plain: Reaching) -> bool:
        if isinstance(node, ast.Constant):
            return type(node.value) in (int, float) and node.value == 0
        if isinstance(node, ast.IfExp) and (known := self.known(node.test)) is not None:
            return self.is_zero(node.body if known else node.orelse, plain)
        if not isinstance(node, ast.Name) or node not in plain.reads:
            return False
        made = [self.assigned(one) for one in self.canonical(node, plain)]
        return bool(made) and all(
            isinstance(one, (ast.Constant, ast.IfExp)) and self.is_zero(one, plain) for one in made
        )

    def operands(self, text: ast.AST) -> Iterator[ast.AST]:
        """What an operation is done with, as far as that is names, also inside of functions' arguments."""
        pending = list(ast.iter_child_nodes(text))
        for node in pending:
            yield node
            if node not in self.wanted.gone and node not in self.wanted.kept:
                pending += ast.iter_child_nodes(node)

    def canonical(self, name: ast.AST, reaching: Reaching) -> frozenset[Definition]:
        """The definitions of a name, and where one only hands on another name, the definitions of that."""
        found: set[Definition] = set()
        pending, seen = [*reaching.reads.get(name, ())], set[Definition]()
        while pending:
            one = pending.pop()
            if one in seen:
                continue
            seen.add(one)
            value = self.assigned(one)
            around = self.parents.get(one) if one is not None else None
            if one is not None and around in self.sums and one in reaching.reads:  # `x += 0`
                pending += reaching.reads[one]
            elif isinstance(value, ast.Name) and value in reaching.reads:
                pending += reaching.reads[value]
            else:
                found.add(one)
        return frozenset(found)

    def assigned(self, one: Definition) -> ast.expr | None:
        """The expression whose value a definition gives a name."""
        parent = self.parents.get(one) if one is not None else None
        if isinstance(parent, ast.Assign) and one in parent.targets:
            return parent.value
        if isinstance(parent, (ast.AnnAssign, ast.NamedExpr)) and parent.target is one:
            return parent.value
        return None

    def values_of(self, one: Definition) -> frozenset[int]:
        if isinstance(one, ast.arg):
            return self.values.get(one.arg, frozenset())
        parent = self.parents.get(one) if one is not None else None
        if isinstance(parent, ast.AugAssign):
            return self.values.get(parent, frozenset())
        if isinstance(one, ast.stmt):  # that is replaced
            return frozenset(piece.value for piece in self.pieces if one in self.around(piece.text))
        value = self.assigned(one)
        return self.values.get(value, frozenset()) if value is not None else frozenset()

    def is_dead(self, around: ast.AST, one: ast.AST, known: Callable[[ast.expr], bool | None] | None = None) -> bool:
        """Whether something is on a way of a condition that is never taken.

        Args:
            known: the answers to conditions; those that are the same in all modes by default.
        """
        if not isinstance(around, (ast.If, ast.IfExp)) or (answer := (known or self.known)(around.test)) is None:
            return False
        never = around.orelse if answer else around.body
        return one in never if isinstance(never, list) else one is never

    def is_pure(self, text: ast.AST) -> bool:
        """Whether nothing is seen of it that a text is not run: it only computes."""
        for node in ast.walk(text):
            if node in self.wanted.kept or isinstance(node, ast.NamedExpr):
                return False
            if isinstance(node, ast.Call) and not self.only_computes(node):
                return False
        return True

    def only_computes(self, call: ast.Call) -> bool:
        function = call.func
        if call in self.wanted.gone or call in self.wanted.free or self.is_of_part(call):
            return True
        if isinstance(function, ast.Name):
            return function.id in PURE
        if not isinstance(function, ast.Attribute):
            return False
        if path_to(function, self.itself) in self.wanted.computing:
            return True
        name, owner = function.attr, function.value
        odd = name.endswith("_") or name.startswith(("_", "rand", "set_", "manual", "seed", "register", "backward"))
        if odd or name in ("bernoulli", "multinomial", "normal", "dropout"):
            return False
        while isinstance(owner, ast.Attribute):
            owner = owner.value
        of_library = isinstance(owner, ast.Name) and owner.id in self.wanted.libraries
        return of_library or (hasattr(Tensor, name) and path_to(function, self.itself) not in self.parts)

    def is_of_part(self, call: ast.Call) -> bool:
        """Whether a part of the module is called by what a text in a generator or the like makes of it: what was seen
        to vanish there is all that it did."""
        around = [one for one in self.around(call) if one in self.wanted.gone]
        inner = [one for one in self.around(call) if isinstance(one, COMPREHENSIONS)]
        if not around or not inner:
            return False
        targets = {
            n.id for one in inner for part in one.generators for n in ast.walk(part.target) if isinstance(n, ast.Name)
        }
        named = isinstance(call.func, ast.Name) and call.func.id in targets
        return named or path_to(call.func, self.itself) in self.parts

    def known_in_eval(self, test: ast.expr) -> bool | None:
        """The answer to a condition, if there is only one in eval mode."""
        if (known := self.known(test)) is not None:
            return known
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self.known_in_eval(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            decides = isinstance(test.op, ast.Or)
            return decides if any(self.known_in_eval(one) is decides for one in test.values) else None
        return False if path_to(test, self.itself) == "training" else None

    def known(self, test: ast.expr) -> bool | None:
        if isinstance(test, ast.Constant):
            return bool(test.value)
        there = presence(test, self.itself, self.parts)
        return self.answers.get(test) if there is None else there

    def is_unreachable(self, node: ast.AST, known: Callable[[ast.expr], bool | None] | None = None) -> bool:
        return any(self.is_dead(one, inner, known) for inner, one in itertools.pairwise((node, *self.around(node))))

    def returns(self, body: list[ast.stmt]) -> tuple[list[ast.Return], bool]:
        """What may be returned from some statements in eval mode, and whether what follows them may run."""
        found: list[ast.Return] = []
        for one in body:
            if isinstance(one, (ast.Return, ast.Raise)):
                return [*found, *([one] if isinstance(one, ast.Return) else [])], False
            known = self.known_in_eval(one.test) if isinstance(one, ast.If) else None
            blocks = [block for name in ("body", "orelse", "finalbody") if (block := getattr(one, name, None))]
            blocks += [inner.body for name in ("handlers", "cases") for inner in getattr(one, name, ())]
            if isinstance(one, ast.If):
                blocks = [one.body, one.orelse] if known is None else [one.body if known else one.orelse]
            elif isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            ways = [self.returns(block) for block in blocks]
            found += [inner for way, _ in ways for inner in way]
            if isinstance(one, (ast.If, ast.With)) and not any(goes_on for _, goes_on in ways):
                return found, False
        return found, True

    def around(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self.parents and not isinstance(self.parents[node], ast.FunctionDef):
            node = self.parents[node]
            yield node

    def without_sums(self, made: set[Definition], before: Reaching) -> set[Definition]:
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

    def _with_sums(self, piece: Piece) -> Piece:
        """A piece with what adds nothing to it."""
        text = piece.text
        while (
            isinstance(text, ast.expr) and isinstance(self.parents[text], ast.BinOp) and self.parents[text] in self.sums
        ):
            text = self.parents[text]
        return replace(piece, text=text)

    def is_emptied(self, around: ast.If | ast.For, removed: set[ast.stmt]) -> bool:
        """Whether nothing is left of a condition or a loop, and something was."""
        inside = [s for s in (*around.body, *around.orelse) if not isinstance(s, ast.Pass)]
        live = [s for s in inside if not self.is_dead(around, s)]
        return bool(live) and removed.issuperset(live)


def names_in(node: ast.AST) -> set[str]:
    """The names in an expression."""
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


_IN_PLACE = {"add_": ast.Add, "sub_": ast.Sub, "mul_": ast.Mult, "div_": ast.Div}


def in_place_alike(choice: ast.IfExp) -> bool:
    """Whether the two expressions of a conditional one are the same, but that one computes in place:
    `x.mul_(g) if self.inplace else x * g`."""
    spelt = []
    for one in (choice.body, choice.orelse):
        if isinstance(one, ast.BinOp):
            spelt.append((type(one.op), ast.dump(one.left), ast.dump(one.right)))
        elif isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and len(one.args) == 1:
            operation = _IN_PLACE.get(one.func.attr if one.func.attr.endswith("_") else f"{one.func.attr}_")
            spelt.append((operation, ast.dump(one.func.value), ast.dump(one.args[0])))  # type: ignore[arg-type]
    return len(spelt) == 2 and spelt[0] == spelt[1] and spelt[0][0] is not None
