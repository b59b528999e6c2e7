"""A method of the user's, edited: what a trace says of its steps, put to its text."""

from __future__ import annotations

import ast
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

from torch import fx, nn

from structrep.deployed.answers import NAMES
from structrep.deployed.edited import EditedMethod, compiled, layers, original, same
from structrep.errors import Unreadable
from structrep.graph.calls import Call, Traced
from structrep.graph.facts import AT, CALL, FORMULA, VALUE
from structrep.graph.queries import asks_shape, only_asserted
from structrep.graph.reads import Read
from structrep.graph.structures import proxies
from structrep.modules.paths import definition, imported, parts_of, place
from structrep.modules.presence import path_to
from structrep.modules.uses import Place, Use, place_of
from structrep.read.nodes import hands_on
from structrep.rewrite import guards
from structrep.rewrite.edits import Edits
from structrep.rewrite.expressions import Edited, Piece, Wanted, edited
from structrep.rewrite.guards import Guard
from structrep.rewrite.otherwise import Comparison, Different, inside
from structrep.trace.again import retrace
from structrep.trace.instructions import namespace_reads

_LIBRARIES = {"torch", "math", "numpy", "operator", "functools", "itertools"}
_OF_LAYERS = (nn.modules.batchnorm._NormBase, nn.modules.conv._ConvNd, nn.Linear, nn.LayerNorm, nn.GroupNorm)


class Edit:
    """The edit of one method, for what is merged of its steps.

    Args:
        misuses: what the method may do, on paths that were not taken, with some of what is merged alone.

    Raises:
        Unreadable: it cannot be made, or would not be right on every path.
    """

    def __init__(
        self, traced: Traced, edits: Edits, call: Call, written_out: set[Call], misuses: Iterable[Use] = ()
    ) -> None:
        self.traced, self.edits, self.call, self.misuses = traced, edits, call, list(misuses)
        self.constants: dict[str, Any] = {}
        self.merged: dict[Any, Any] = {}
        self.numbers: dict[fx.Node, int] = {}
        self.units = {root: set(nodes) for root, (owner, nodes) in edits.units.items() if owner is call}
        self.gone = set[fx.Node]().union(*self.units.values())
        self.out = {(one.path, one.method) for one in written_out}
        self._check_method()
        self._check_changes()
        found = self.edited = edited(self.code, self._wanted())
        self._check_source(found)
        self.reads: list[Guard] = []
        self.asked: list[Guard] = []  # of parts that vanish: for as long as nothing is applied
        self._note_guards(found)
        named = set(found.mentions) - {"*"} | (set(call.module._modules) if "*" in found.mentions else set())
        self.mentions = {f"{call.path}.{path}" if call.path else path for path in named}
        self.method()

    @property
    def same(self) -> bool:
        """Whether the text stays as it is."""
        return self.edited.before == self.edited.after and not self.reads

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
            raise Unreadable(f"{self._shown()}: its edited text is no valid code: {error}") from error
        return EditedMethod(self.call.method, source)

    def _text(self, guarded: Iterable[Guard]) -> list[str]:
        lines = list(self.edited.after)
        if code := guards.code(guarded):
            at, indent = self._first_statement()
            lines[at:at] = [f"{' ' * indent}{line}\n" for line in code]
        return lines

    def holding(self, module: nn.Module) -> set[Guard]:
        """The guards that a module would pass."""
        return {one for one in (*self.reads, *self.asked) if one.passes(module, {**self.space, **NAMES})}

    # --- what can be edited -----------------------------------------------------------------------------------------

    def _check_method(self) -> None:
        """Raise unless the method is one of the module's class, and its text is known."""
        module, code = self.call.module, self.call.bytecode
        try:
            *_, plain = layers(original(getattr(type(module), "__structrep_base__", type(module)), self.call.method))
            *_, runs = layers(original(type(module), self.call.method))
        except TypeError as error:
            raise Unreadable(f"{self._shown()}: {error}") from error
        if isinstance(module, fx.GraphModule) or code is None or runs.__code__ is not code:
            raise Unreadable(f"{self._shown()} is no method of its class")
        if set(code.co_freevars) - set(plain.__code__.co_freevars):
            raise Unreadable(f"{self._shown()} is closed over other variables than its class's own")
        found = definition(code)
        if found is None or not isinstance(found[0], ast.FunctionDef) or not found[0].args.args:
            raise Unreadable(f"the source of {self._shown()} is not known")
        self.code, self.function, self.tree = code, runs, found[0]
        self.space = runs.__globals__

    def _check_changes(self) -> None:
        """Raise where more changes than expressions."""
        nodes = list(self.call.nodes())
        if any(node in one.were for one in self.edits.reordered for node in nodes):
            raise Unreadable(f"{self._shown()} would add up in another order")
        for node in nodes:
            if node in self.gone or node in self.edits.ended:
                for given in node.all_input_nodes:
                    formula = FORMULA.get(given)
                    held = formula.tensors if formula else (VALUE.get(given),)
                    if any(self.traced.plain(tensor) is not None for tensor in held if tensor is not None):
                        raise Unreadable(f"{self._shown()} merges a tensor that is no parameter of its module")

    def _check_source(self, found: Edited) -> None:
        """Raise unless the text is what runs: not where a tool has changed the code as it was imported."""
        try:
            as_read = compiled("".join(found.before), self.code, self.code.co_filename, imported(self.code.co_filename))
        except (SyntaxError, StopIteration):
            as_read = None
        if as_read is None or not same(as_read, self.code):
            raise Unreadable(f"the source of {self._shown()} is not what runs")

    # --- steps as texts ---------------------------------------------------------------------------------------------

    def _wanted(self) -> Wanted:
        texts: dict[ast.AST, list[fx.Node | Call]] = {}
        roots: dict[fx.Node, ast.AST | None] = {}
        for step in self.call.steps:
            at = step.at if isinstance(step, Call) else AT.of(step)
            text = place(self.code, at) if at is not None else None
            nodes = [step] if isinstance(step, fx.Node) else list(step.nodes())
            roots |= {node: text for node in nodes if node in self.units}
            if text is not None:
                texts.setdefault(text, []).append(step)
            elif not self.gone.isdisjoint(nodes):
                raise Unreadable(f"{self._shown()} has others compute what is merged")
        kinds = {text: self._kind(text, steps) for text, steps in texts.items()}
        values: dict[ast.AST | str, frozenset[int]] = {}
        for name, given in self.call.arguments().items():
            if isinstance(given, fx.Proxy):
                values[name] = frozenset({self._number(given.node)})
        if isinstance(self.call.result, fx.Proxy):
            values["return"] = frozenset({self._number(self.call.result.node)})
        for text, steps in texts.items():
            last = steps if self._repeats(text) else steps[-1:]
            values[text] = frozenset(n for step in last for n in self._numbers_of(step))
        made_in = {
            node: text for text, steps in texts.items() for step in steps
            for node in ([step] if isinstance(step, fx.Node) else step.nodes())
        }  # fmt: skip
        pieces = tuple(self._piece(node, text, values, made_in) for node, text in roots.items())
        if len({piece.text for piece in pieces}) < len(pieces):
            raise Unreadable(f"{self._shown()} has one text for several merges")
        named = {name: self.space[name] for name in self.code.co_names if name in self.space}
        return Wanted(
            pieces,
            frozenset(text for text, kind in kinds.items() if kind == "gone"),
            frozenset(text for text, kind in kinds.items() if kind == "free"),
            frozenset(text for text, kind in kinds.items() if kind == "kept"),
            tuple(values.items()),
            parts_of(self.call.module),
            frozenset(
                name
                for name, value in named.items()
                if isinstance(value, ModuleType) and value.__name__.partition(".")[0] in _LIBRARIES
            ),
            frozenset(
                name for name, value in named.items() if not isinstance(value, ModuleType) and not callable(value)
            ),
            frozenset(self.numbers[node] for node in self.edits.vanishing if node in self.numbers),
            tuple(self._answers()),
            frozenset(self._misused()),
            tuple(self._takers(texts, kinds)),
        )

    def _takers(
        self, texts: dict[ast.AST, list[fx.Node | Call]], kinds: dict[ast.AST, str]
    ) -> Iterator[tuple[ast.AST, int]]:
        """The texts that stay and take values that will be others."""
        placed = {step: text for text, steps in texts.items() for step in steps}
        for step in self.call.steps:
            of_call = [proxy.node for proxy in proxies((step.args, step.kwargs))] if isinstance(step, Call) else []
            given = step.all_input_nodes if isinstance(step, fx.Node) else of_call
            for node in given:
                if node not in self.edits.vanishing or (isinstance(step, fx.Node) and asks_shape(step)):
                    continue
                if step not in placed:
                    raise Unreadable(f"{self._shown()} has others take what a merged layer gives")
                if kinds[placed[step]] != "gone":
                    yield placed[step], self._number(node)

    def _misused(self) -> Iterator[ast.AST]:
        """The texts that may use some of what is merged alone."""
        places: set[Place] = set()
        for use in self.misuses:
            if use.code is not self.code:
                raise Unreadable(f"line {use.line} of {use.code.co_filename} may use what is merged otherwise")
            places |= use.places
        for node in ast.walk(self.tree):
            if isinstance(node, ast.expr) and place_of(node, self.code) in places:
                yield node

    def _answers(self) -> Iterator[tuple[ast.AST, bool]]:
        """The conditions in the text that go by settings of the module alone, and their answers."""
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.If, ast.IfExp)) and (found := self._spelt(node.test)) is not None:
                yield node.test, found[1]

    def _spelt(self, test: ast.AST) -> tuple[str, bool] | None:
        """A condition, or what decides it, in terms of the module's attributes and of constants alone, and its answer."""
        parts = test.values if isinstance(test, ast.BoolOp) else []
        for one in (test, *parts):
            found = _Settings(self.tree, self.code.co_varnames[0], self.space)
            spelt = ast.unparse(found.visit(ast.parse(ast.unparse(one), mode="eval").body))
            if not found.alone:
                continue
            with contextlib.suppress(Exception):  # an attribute that there is none of
                told = bool(eval(spelt, self.space, {"self": self.call.module}))
                if one is test or (isinstance(test, ast.BoolOp) and told == isinstance(test.op, ast.Or)):
                    return spelt, told
        return None

    def _piece(
        self,
        node: fx.Node,
        text: ast.AST | None,
        values: dict[ast.AST | str, frozenset[int]],
        made_in: dict[fx.Node, ast.AST],
    ) -> Piece:
        base, path = self.edits.replaced.get(node) or (self.edits.bypassed[node], None)
        number = self._number(node)
        if text is None or number not in values[text]:
            raise Unreadable(f"{self._shown()} has no text for what is merged")
        gone = frozenset(made_in[one] for one in self.units[node] if one in made_in)
        return Piece(text, number, self._number(base), path and path.rpartition(".")[2], gone)

    def _kind(self, text: ast.AST, steps: list[fx.Node | Call]) -> str:
        nodes = [n for step in steps for n in ([step] if isinstance(step, fx.Node) else step.nodes())]
        changed = [node for node in nodes if node in self.gone]
        rest = [node for node in nodes if node not in self.gone and not self._is_idle(node)]
        if changed and rest:
            raise Unreadable(f"line {getattr(text, 'lineno', 0)} of {self._shown()} does more than what is merged")
        return "gone" if changed else "kept" if rest else "free"

    def _is_idle(self, node: fx.Node) -> bool:
        """Whether a node does nothing, or what is no part of the computation."""
        return VALUE.known(node) or only_asserted(node) or self._source(node) is not None

    def _source(self, node: fx.Node) -> fx.Node | None:
        """What a node hands on as it is; None if it does something."""
        if node in self.edits.ended or node in self.edits.refilled:
            return None
        return hands_on(node)

    def _number(self, node: fx.Node) -> int:
        """A number for a value; one that is handed on as it is has the same."""
        while (source := self._source(node)) is not None:
            node = source
        return self.numbers.setdefault(node, len(self.numbers))

    def _numbers_of(self, step: fx.Node | Call) -> set[int]:
        if isinstance(step, fx.Node):
            return {self._number(step)}
        return {self._number(step.result.node)} if isinstance(step.result, fx.Proxy) else set()

    def _repeats(self, text: ast.AST) -> bool:
        """Whether a text stands in a loop."""
        found = definition(self.code)
        assert found is not None
        parents, node = found[1], text
        while node in parents:
            node = parents[node]
            if isinstance(node, (ast.For, ast.While)):
                return True
        return False

    # --- what is no longer asked ------------------------------------------------------------------------------------

    def _note_guards(self, found: Edited) -> None:
        """Note what the vanished text went by, which the merged layer was made for."""
        assumed = {node for test in found.assumed for node in ast.walk(test)}
        helped = any(isinstance(one, ast.Call) and self._is_of_others(one) for one in found.vanished)
        for (path, _), read in self.call.reads.items():
            asked = [place(code, at) if code is self.code else None for code, at, _ in read.places]
            if any((one in found.vanished and one not in assumed) if one is not None else helped for one in asked):
                self.reads += self._guard(path, read)
        self.reads += [made for test in found.assumed for made in self._assumed(test)]
        for one in inside(self.call, self.out):
            if one is self.call:
                continue
            self.asked += [
                made for (path, _), read in one.reads.items() for made in self._guard(path, read, of_part=True)
            ]
            if isinstance(one.code, FunctionType) and not one.leaf:
                for read in namespace_reads([(one.code.__code__, one.code.__globals__, one.code)]):
                    if guards.unlike("it", read.told) is not None:
                        raise Unreadable(f"{self._shown()} goes by {read.text}, which may be set to something else")

    def _is_of_others(self, call: ast.Call) -> bool:
        """Whether a call runs a function of the user's, which may ask for something itself."""
        held = self.space.get(call.func.id) if isinstance(call.func, ast.Name) else None
        method = path_to(call.func, self.code.co_varnames[0])
        return isinstance(held, FunctionType) or (method is not None and method not in dict(parts_of(self.call.module)))

    def _guard(self, path: str, read: Read, of_part: bool = False) -> list[Guard]:
        """A guard for an answer, if something hangs on it that a merge does not settle.

        Args:
            of_part: it is asked by what vanishes as a whole.
        """
        holder = read.holder
        if isinstance(holder, nn.Module):
            name = read.text.removeprefix(".")
            numbers = (
                isinstance(holder, _OF_LAYERS) and name in _plain(holder).__constants__
            )  # as of a layer that is called
            if name == "training" or read.text.endswith(" is None)") or numbers:
                return []
        if not of_part and self._is_no_matter(f"self{read.text}"):
            return []
        prefix = f"{self.call.path}." if self.call.path else ""
        if not isinstance(holder, nn.Module) or not f"{path}.".startswith(prefix) or read.unstable:
            raise Unreadable(f"{self._shown()} goes by {read.of(path or 'the model')}, which may change")
        spelt = ".".join(filter(None, ("self", path.removeprefix(self.call.path).lstrip("."))))
        made = guards.guard(read.of(spelt), read.of(spelt), read.told, self._shown(), scripted=True)
        if made is not None and "structrep_" in made.unlike and not of_part:
            raise Unreadable(f"{self._shown()} goes by {read.of(spelt)}, which no line of code compares")
        return [replace(made, scripted=True)] if made is not None else []

    def _assumed(self, test: ast.AST) -> Iterator[Guard]:
        """A guard for a condition that is taken to have the answer that it has."""
        found = self._spelt(test)
        if found is None or found[0] in ("False", "not False") or self._is_no_matter(found[0]):
            return
        spelt, told = found
        made = guards.guard(f"bool({spelt})", spelt, told, self._shown(), scripted=True)
        assert made is not None
        yield replace(made, unlike=f"not ({spelt})" if told else spelt)

    def _is_no_matter(self, spelt: str) -> bool:
        """Whether a condition asks whether something is done in place, and all else is the same either way."""
        key = self.call.path, spelt.removeprefix("self")
        read = self.call.reads.get(key) if "inplace" in spelt else None
        if read is None or not isinstance(read.told, bool):
            return False
        again = retrace(self.traced, self.call, {key: not read.told})
        if again is None:
            return False
        try:
            return not Comparison((self.traced, self.call), again, self.out).slots
        except Different:
            return False

    def _first_statement(self) -> tuple[int, int]:
        """Where guards stand: the place in the edited lines of the first statement, and its indentation."""
        body = self.tree.body
        doc = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and len(body) > 1
        first = body[1] if doc else body[0]
        if first.lineno <= self.tree.lineno or (doc and first.lineno <= (body[0].end_lineno or 0)):
            raise Unreadable(f"{self._shown()} has no line of its own for its first statement")
        after = (body[0].end_lineno or 0) + 1 if doc else first.lineno
        return after - self.edited.line, first.col_offset

    def _shown(self) -> str:
        return f"{type(self.call.module).__name__}.{self.call.method}"


_PLAIN = (ast.Attribute, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Not, ast.boolop, ast.cmpop, ast.expr_context)  # fmt: skip


class _Settings(ast.NodeTransformer):
    """Puts a condition in terms of a module's attributes, by what the names in it were given; modules are not trained."""

    def __init__(self, tree: ast.FunctionDef, itself: str, space: dict[str, Any]) -> None:
        self.itself, self.alone = itself, True
        self.fixed = {name for name, value in space.items() if isinstance(value, (type, ModuleType))}
        stored = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, (ast.Store, ast.Del))]
        counts = Counter(name.id for name in stored)
        self.fixed -= counts.keys() | {one.arg for one in ast.walk(tree) if isinstance(one, ast.arg)}
        self.known = {
            one.targets[0].id: one.value
            for one in ast.walk(tree)
            if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name) and counts[one.targets[0].id] == 1
        }

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Name):
            if node.id == self.itself:
                return ast.Name("self")
            if node.id in self.fixed:
                return node
            if node.id in self.known:
                return self.visit(ast.parse(ast.unparse(self.known.pop(node.id)), mode="eval").body)
        elif isinstance(node, ast.Attribute) and node.attr == "training":
            return ast.Constant(False)
        elif isinstance(node, ast.Call):
            asks = isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
            if asks and not node.keywords and all(isinstance(one, ast.Constant) for one in node.args[1:]):
                node.args[0] = self.visit(node.args[0])
                return node
        elif isinstance(node, _PLAIN):
            return self.generic_visit(node)
        self.alone = False
        return node


class Untouched:
    """A forward that stays as it is: its norms are given parameters that are there no more.

    Raises:
        Unreadable: its text does more with these than to hand them on.
    """

    def __init__(self, traced: Traced, edits: Edits, call: Call) -> None:
        self.constants: dict[str, Any] = {}
        self.merged: dict[Any, Any] = {}
        read = definition(call.bytecode) if call.bytecode is not None else None
        nodes = list(call.nodes())
        ended = [node for node in nodes if node in edits.ended]
        if read is None or not isinstance(read[0], ast.FunctionDef) or not ended or not edits.dead.isdisjoint(nodes):
            raise Unreadable("more changes than parameters")
        prefix = f"{call.path}." if call.path else ""
        held: set[str] = set()
        for node in ended:
            at = AT.of(node) if CALL.of(node) is call else None
            text = place(call.bytecode, at) if at is not None and call.bytecode is not None else None
            space = call.code.__globals__ if isinstance(call.code, FunctionType) else {}
            if not isinstance(text, ast.Call) or not _is_torchs(text.func, space):
                raise Unreadable("a norm is applied by code of its own")
            for given in node.all_input_nodes:
                if VALUE.known(given):
                    path = traced.names.get(id(VALUE.of(given)), "")
                    if FORMULA.get(given) or not path.startswith(prefix):
                        raise Unreadable("a norm has parameters that are computed")
                    held.add(path.removeprefix(prefix))
        tree, parents, _ = read
        itself = tree.args.args[0].arg if tree.args.args else ""
        for one in ast.walk(tree):
            if isinstance(one, ast.Attribute) and path_to(one, itself) in held:
                around = parents[one]
                if not (isinstance(around, ast.Call) and one in around.args) and not isinstance(around, ast.keyword):
                    raise Unreadable(f"line {one.lineno} does more with self.{one.attr} than to hand it on")

    def holding(self, module: nn.Module) -> set[Guard]:
        """None, for it was told nothing."""
        return set()


def _is_torchs(function: ast.expr, space: dict[str, Any]) -> bool:
    """Whether code calls a function of torch's by the name of its module."""
    owner = function
    while isinstance(owner, ast.Attribute):
        owner = owner.value
    held = space.get(owner.id) if isinstance(owner, ast.Name) and owner is not function else None
    return isinstance(held, ModuleType) and held.__name__.partition(".")[0] == "torch"


def _plain(layer: nn.Module) -> Any:
    """The class of torch's that a layer is one of."""
    return next(one for one in type(layer).__mro__ if one.__module__.startswith("torch.nn."))
