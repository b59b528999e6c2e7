"""A method of the user's, edited: what a trace says of its steps, put to its text."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from typing import Any

from torch import fx, nn

from structrep.deployed.answers import NAMES
from structrep.deployed.edited import EditedMethod, compiled, layers, original, same
from structrep.errors import Unreadable
from structrep.graph.calls import Call, Introspection, Traced
from structrep.graph.facts import FORMULA, SHAPE, VALUE
from structrep.modules.computing import computing
from structrep.modules.positions import definition, imported, place
from structrep.modules.source import functions, written_in
from structrep.modules.uses import Use
from structrep.rewrite import guards
from structrep.rewrite.conditions import answer, of_rank
from structrep.rewrite.expressions import edited
from structrep.rewrite.gone_by import GoneBy
from structrep.rewrite.guards import Guard
from structrep.rewrite.mentioned import Mentioned
from structrep.rewrite.node_changes import NodeChanges
from structrep.rewrite.steps import Steps
from structrep.rewrite.untaken import decorated_otherwise
from structrep.rewrite.wanted import Edited
from structrep.trace.followed import Followed

_USED = {"ValueError", "bool", "getattr", "hasattr", "len", "str"}  # by the code of guards


class Edit:
    """The edit of one method, for what is merged of its steps.

    Args:
        misuses: what the method may do, on paths that were not taken, with some of what is merged alone.

    Raises:
        Unreadable: it cannot be made, or would not be right on every path.
    """

    def __init__(
        self, traced: Traced, changes: NodeChanges, call: Call, written_out: Set[Call], misuses: Collection[Use] = ()
    ) -> None:
        self.traced, self.changes, self.call = traced, changes, call
        self.constants: dict[str, Any] = {}
        self.merged: dict[Any, Any] = {}
        self._check_method()
        known = ((test, self._answer(test) or self._of_rank(test)) for test in self._tests())
        answers = tuple((test, told[1]) for test, told in known if told is not None)
        methods = computing(call.module, self.tree, self.tree.args.args[0].arg)
        named = {use: names for use in misuses if (names := self._named_by(use))}  # parts that a setting names
        left = [use for use in misuses if use not in named]
        steps = Steps(changes, call, self.code, self.tree, self.space, left, answers, methods)
        self._check_changes(steps.gone)
        found = self.edited = edited(self.code, steps.wanted())
        self._check_source(found)
        self.mentions = {f"{call.path}.{path}" if call.path else path for path in self._mentioned(found.stays)}
        followed = Followed.of(traced, call, written_out)
        went_by = GoneBy(followed, self.function, found, self.mentions, self._answer, self._of_rank, methods, changes)
        went_by.note()
        went_by.guard_tensors(steps.gone)
        went_by.guard_names({name for names in named.values() for name in names})
        self.reads, self.asked = went_by.reads, went_by.asked
        guards.check_settled(self.reads, call, others=True)
        if self.reads and (others := sorted(_USED & self.space.keys())):
            raise Unreadable(f"{self.call.shown} needs a guard, and {others[0]} is something else in its file")
        self.method()

    @property
    def same(self) -> bool:
        """Whether the text stays as it is."""
        return self.edited.before == self.edited.after and not self.reads

    @property
    def does_otherwise(self) -> bool:
        """Whether it takes other steps than it took: not if all that it does more is to guard."""
        return self.edited.before != self.edited.after

    @property
    def lines(self) -> tuple[str, ...]:
        """The method's text, with all guards."""
        return tuple(self._text(self.reads))

    def method(self, holds: Callable[[Guard], bool] = lambda guard: True) -> EditedMethod:
        """The method, with the guards for which something holds."""
        source = "".join(self._text(filter(holds, self.reads)))
        try:
            compiled(source, self.code, f"<{self.call.method}>")
        except (SyntaxError, StopIteration) as error:
            raise Unreadable(f"{self.call.shown}: its edited text is no valid code: {error}") from error
        return EditedMethod(self.call.method, source)

    def _text(self, guarded: Iterable[Guard]) -> list[str]:
        lines = list(self.edited.after)
        if code := guards.code(guarded):
            at, indent = self._first_statement()
            lines[at:at] = [f"{' ' * indent}{line}\n" for line in guards.by_name(code, self.tree.args.args[0].arg)]
        return lines

    def holding(self, module: nn.Module) -> set[Guard]:
        """The guards that a module would pass."""
        return {one for one in (*self.reads, *self.asked) if one.passes(module, {**self.space, **NAMES})}

    def check_asked(self, one: Introspection) -> None:
        """Raise where text that stays asks a part for what a merge changes."""
        texts = [None if at is None else place(self.code, at) for at in one.places]
        if not all(text in self.edited.vanished for text in texts):
            raise Unreadable(f"{self.call.shown} asks for {one.what} of what is merged in its line {one.line}")

    def _check_method(self) -> None:
        """Raise unless the method is one of the module's class, and its text is known."""
        module, code = self.call.module, self.call.bytecode
        try:
            *_, plain = layers(original(getattr(type(module), "__structrep_base__", type(module)), self.call.method))
            *_, runs = layers(original(type(module), self.call.method))
        except TypeError as error:
            raise Unreadable(f"{self.call.shown}: {error}") from error
        if (
            isinstance(module, fx.GraphModule)
            or code is None
            or runs.__code__ is not code
            or written_in(plain).startswith("torch.")
        ):
            raise Unreadable(f"{self.call.shown} is no method of its class")
        if set(code.co_freevars) - set(plain.__code__.co_freevars):
            raise Unreadable(f"{self.call.shown} is closed over other variables than its class's own")
        found = definition(code)
        if found is None or not isinstance(found[0], ast.FunctionDef) or not found[0].args.args:
            raise Unreadable(f"the source of {self.call.shown} is not known")
        self.code, self.function, self.tree = code, runs, found[0]
        self.space = runs.__globals__

    def _check_changes(self, gone: set[fx.Node]) -> None:
        """Raise where more changes than expressions."""
        nodes = list(self.call.nodes())
        if decorated_otherwise(self.call, self.changes.vanishing):
            raise Unreadable(f"{self.call.shown} has a decorator that may do otherwise")
        if any(node in one.were for one in self.changes.reordered for node in nodes):
            raise Unreadable(f"{self.call.shown} would add up in another order")
        for node in nodes:
            if node in gone or node in self.changes.ended:
                for given in node.all_input_nodes:
                    formula = FORMULA.get(given)
                    held = formula.tensors if formula else (VALUE.get(given),)
                    if any(self.traced.plain(tensor) is not None for tensor in held if tensor is not None):
                        raise Unreadable(f"{self.call.shown} merges a tensor that is no parameter of its module")

    def _check_source(self, found: Edited) -> None:
        """Raise unless the text is what runs: not where a tool has changed the code as it was imported."""
        try:
            as_read = compiled("".join(found.before), self.code, self.code.co_filename, imported(self.code.co_filename))
        except (SyntaxError, StopIteration):
            as_read = None
        if as_read is None or not same(as_read, self.code):
            raise Unreadable(f"the source of {self.call.shown} is not what runs")

    def _mentioned(self, stays: Set[ast.AST]) -> set[str]:
        """The paths of all that the text may ask its module for, by its methods too."""
        module = self.call.module
        calls = {name: self.traced.calls.get((module, name), ()) for name in functions(type(module))}
        edited = {name for name, made in calls.items() if made and all(one in self.changes.owners for one in made)}
        found = Mentioned(module, edited)
        parents = {child: one for one in ast.walk(self.tree) for child in ast.iter_child_nodes(one)}
        silent = {node for one in stays if isinstance(one, (ast.Raise, ast.Assert)) for node in ast.walk(one)}
        found.add(stays - silent, self.tree.args.args[0].arg, parents)
        if found.counts:
            raise Unreadable(f"{self.call.shown} may ask for all that its module has")
        found.add(silent, self.tree.args.args[0].arg, parents)
        return set(found.paths())

    def _named_by(self, use: Use) -> set[str]:
        """The settings of the module that tell which part a use is of, if these tell it, and were asked for."""
        itself, found = self.tree.args.args[0].arg, set[str]()
        for hangs in use.hangs_on:
            owner, _, text = hangs.partition(" ")
            way = text.rpartition(": ")[2].split(".")
            read = self.call.reads.get((self.call.path, f".{way[-1]}"))
            own = owner == str(id(self.call.module)) and len(way) == 2 and way[0] in (itself, "self")
            if not own or read is None or not isinstance(read.told, str):
                return set()
            found.add(way[1])
        return found

    def _tests(self) -> Iterator[ast.expr]:
        return (node.test for node in ast.walk(self.tree) if isinstance(node, (ast.If, ast.IfExp)))

    def _answer(self, test: ast.AST) -> tuple[str, bool] | None:
        return answer(test, self.tree, self.space, self.call.module)

    def _of_rank(self, test: ast.expr) -> tuple[str, bool] | None:
        given = {name: one.node for name, one in self.call.arguments().items() if isinstance(one, fx.Proxy)}
        ranks = {name: len(SHAPE.of(node)) for name, node in given.items() if SHAPE.known(node)}
        return of_rank(test, self.tree, ranks)

    def _first_statement(self) -> tuple[int, int]:
        """Where guards stand: the place in the edited lines of the first statement, and its indentation."""
        body = self.tree.body
        doc = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and len(body) > 1
        first = body[1] if doc else body[0]
        if first.lineno <= self.tree.lineno or (doc and first.lineno <= (body[0].end_lineno or 0)):
            raise Unreadable(f"{self.call.shown} has no line of its own for its first statement")
        after = (body[0].end_lineno or 0) + 1 if doc else first.lineno
        return after - self.edited.line, first.col_offset
