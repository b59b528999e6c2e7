"""A method of the user's, edited: what a trace says of its steps, put to its text."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import FunctionType
from typing import Any

from torch import fx, nn

from structrep.deployed.answers import NAMES
from structrep.deployed.edited import EditedMethod, compiled, layers, original, same
from structrep.errors import Unreadable
from structrep.graph.calls import Call, Traced
from structrep.graph.facts import FORMULA, VALUE
from structrep.graph.reads import Read
from structrep.modules.mentions import mentions
from structrep.modules.positions import definition, imported, parts_of, place
from structrep.modules.presence import path_to
from structrep.modules.source import functions, written_in
from structrep.modules.uses import Use
from structrep.rewrite import guards
from structrep.rewrite.conditions import answer
from structrep.rewrite.edits import Edits
from structrep.rewrite.expressions import edited
from structrep.rewrite.guards import Guard
from structrep.rewrite.otherwise import inside
from structrep.rewrite.steps import Steps
from structrep.rewrite.wanted import Edited
from structrep.trace.instructions import namespace_reads

_LIBRARIES = {"torch", "math", "numpy", "operator", "functools", "itertools"}
_ITSELF = r"\bself\b(?=\.)"  # in guards, what a method calls its module
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
        self.traced, self.edits, self.call = traced, edits, call
        self.constants: dict[str, Any] = {}
        self.merged: dict[Any, Any] = {}
        self.out = {(one.path, one.method) for one in written_out}
        self._check_method()
        answers = tuple((test, known[1]) for test in self._tests() if (known := self._answer(test)) is not None)
        steps = Steps(edits, call, self.code, self.tree, self.space, list(misuses), answers)
        self._check_changes(steps.gone)
        found = self.edited = edited(self.code, steps.wanted())
        self._check_source(found)
        self.reads: list[Guard] = []
        self.asked: list[Guard] = []  # of parts that vanish: for as long as nothing is applied
        self.mentions = {f"{call.path}.{path}" if call.path else path for path in self._mentioned(found.mentions)}
        self._note_guards(found)
        self._guard_tensors(steps.gone)
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
            raise Unreadable(f"{self.call.shown}: its edited text is no valid code: {error}") from error
        return EditedMethod(self.call.method, source)

    def _text(self, guarded: Iterable[Guard]) -> list[str]:
        lines = list(self.edited.after)
        if code := guards.code(guarded):
            at, indent = self._first_statement()
            itself = self.tree.args.args[0].arg
            lines[at:at] = [f"{' ' * indent}{re.sub(_ITSELF, itself, line)}\n" for line in code]
        return lines

    def holding(self, module: nn.Module) -> set[Guard]:
        """The guards that a module would pass."""
        return {one for one in (*self.reads, *self.asked) if one.passes(module, {**self.space, **NAMES})}

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
        if any(node in one.were for one in self.edits.reordered for node in nodes):
            raise Unreadable(f"{self.call.shown} would add up in another order")
        for node in nodes:
            if node in gone or node in self.edits.ended:
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

    def _note_guards(self, found: Edited) -> None:
        """Note what the vanished text went by, which the merged layer was made for.

        Raises:
            Unreadable: it went by what holds for the example alone, or by what no guard can ask for.
        """
        for call in self._vanished_calls(found):
            for asker, told in call.observed():
                raise Unreadable(f"{asker.shown} asks {told}, which holds for the example alone")
        for one in inside(self.call, self.out):
            for told in one.answers:
                if one is not self.call or told.code is not self.code or place(self.code, told.at) in found.vanished:
                    raise Unreadable(f"{one.shown} asks {told}, which holds for the example alone")
        assumed = {node for test in found.assumed for node in ast.walk(test)}
        helpers = [one for one in found.vanished if isinstance(one, ast.Call) and self._is_of_others(one)]
        for helper in helpers:
            held = self.space.get(helper.func.id) if isinstance(helper.func, ast.Name) else None
            if isinstance(held, FunctionType):
                self._check_names(held)
                defaults = (*(held.__defaults__ or ()), *(held.__kwdefaults__ or {}).values())
                if any(isinstance(one, (list, dict, set)) for one in defaults):
                    raise Unreadable(f"{self.call.shown} goes by a default of {held.__name__}, which may change")
        helped = bool(helpers)
        counted = any(isinstance(one, ast.Name) and one.id == "len" for one in found.vanished)
        for (path, _), read in self.call.reads.items():
            asked = [place(code, at) if code is self.code else None for code, at, _ in read.places]
            computed = helped or isinstance(read.holder, nn.Module)  # by a property, say
            if any((one in found.vanished and one not in assumed) if one is not None else computed for one in asked):
                self._demand_none(path, read, counted)
        self.reads += [made for test in found.assumed for made in self._assumed(test)]
        for one in self._vanished_calls(found):
            for (path, _), read in one.reads.items():
                if any(f"{path}.".startswith(f"{part.path}.") for part in self._parts_around(one)):
                    self.asked += self._guard(path, read, asked_still=False)
                else:
                    self._demand_none(path, read, counted=True)
            if isinstance(one.code, FunctionType) and not one.leaf:
                self._check_names(one.code)

    def _parts_around(self, one: Call) -> Iterator[Call]:
        """The parts that go with a call: what they are set to, or cast to, matters no more."""
        around = itertools.takewhile(lambda call: call is not self.call, one.chain())
        parts = (call for call in around if call.method == "forward" and call.module is not self.call.module)
        return (part for part in parts if part.path not in self.mentions)

    def _check_names(self, function: FunctionType) -> None:
        """Raise if a function goes by what may be set outside of it."""
        for read in namespace_reads([(function.__code__, function.__globals__, function)]):
            if guards.unlike("it", read.told) is not None:
                raise Unreadable(f"{self.call.shown} goes by {read.text}, which may be set to something else")

    def _guard_tensors(self, gone: set[fx.Node]) -> None:
        """Guard tensors of the module itself that are merged to be None, as they are then, or there where the text
        still asks for them: they may be set later."""
        held = (given for node in gone for given in node.all_input_nodes if VALUE.known(given))
        paths = dict.fromkeys(self.traced.names.get(id(VALUE.of(given)), "") for given in held)
        for holder, _, name in (path.rpartition(".") for path in paths if path):
            if holder == self.call.path and not isinstance(self.call.module, _OF_LAYERS):
                made = guards.kept if ".".join(filter(None, (holder, name))) in self.mentions else guards.gone
                self.reads.append(replace(made(f"self.{name}", self.call.shown), scripted=True))

    def _mentioned(self, paths: frozenset[str]) -> set[str]:
        """The paths of all that text may ask a module for, by its methods too."""
        module, known = self.call.module, functions(type(self.call.module))
        named: set[str] = set(paths)
        for name in [path.partition(".")[0] for path in paths]:
            inner = mentions(type(module), name) if name in known else frozenset()
            named |= {"*"} if inner is None or hasattr(nn.Module, name) else inner
            held = module._modules.get(name)
            if held is not None and any(f"{name}." in path and not _has(module, path) for path in paths):
                named.add(f"{name}.*")
        every = {prefix.removesuffix("*") for prefix in named if prefix.endswith("*")}
        below = {path for path, _ in module.named_modules() if any(path.startswith(prefix) for prefix in every)}
        return {path for path in named | below if path and not path.endswith("*")}

    def _vanished_calls(self, found: Edited) -> Iterator[Call]:
        """The calls that are made no more, of parts and of methods."""
        for step in self.call.steps:
            within = place(self.code, step.at) if isinstance(step, Call) and step.at is not None else None
            if isinstance(step, Call) and within in found.vanished:
                yield from step.all_calls()

    def _is_of_others(self, call: ast.Call) -> bool:
        """Whether a call runs a function of the user's, which may ask for something itself."""
        held = self.space.get(call.func.id) if isinstance(call.func, ast.Name) else None
        method = path_to(call.func, self.code.co_varnames[0])
        return isinstance(held, FunctionType) or (method is not None and method not in dict(parts_of(self.call.module)))

    def _demand_none(self, path: str, read: Read, counted: bool) -> None:
        """Raise if something hangs on an answer that a merge does not settle: a forward written anew guards it.

        Args:
            counted: whether code may count the parts of a container, instead of going through them.
        """
        if isinstance(read.holder, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and not counted:
            return
        if self._guard(path, read):
            raise Unreadable(f"{self.call.shown} goes by {read.of(path or 'the model')}, which may be set")

    def _guard(self, path: str, read: Read, asked_still: bool = True) -> list[Guard]:
        """A guard for an answer, if something hangs on it that a merge does not settle.

        Args:
            asked_still: whether it is asked when the model is applied; else one that cannot be guarded is none.
        """
        holder = read.holder
        if isinstance(holder, nn.Module):
            name = read.text.removeprefix(".")
            own = holder is self.call.module and isinstance(holder, _OF_LAYERS)
            if name == "training" or read.text.endswith(" is None)") or (own and name in _plain(holder).__constants__):
                return []
        prefix = f"{self.call.path}." if self.call.path else ""
        if not isinstance(holder, nn.Module) or not f"{path}.".startswith(prefix) or read.unstable:
            if not asked_still:
                return []
            raise Unreadable(f"{self.call.shown} goes by {read.of(path or 'the model')}, which may change")
        spelt = ".".join(filter(None, ("self", path.removeprefix(self.call.path).lstrip("."))))
        made = guards.guard(read.of(spelt), read.of(spelt), read.told, self.call.shown, scripted=True)
        return [replace(made, scripted=True)] if made is not None else []

    def _assumed(self, test: ast.AST) -> Iterator[Guard]:
        """A guard for a condition that is taken to have the answer that it has."""
        found = self._answer(test)
        if found is None:
            return
        if "inplace" in found[0]:
            raise Unreadable(f"{self.call.shown} goes by {found[0]}, which may be no matter")
        spelt, told = found
        made = guards.guard(f"bool({spelt})", spelt, told, self.call.shown, scripted=True)
        assert made is not None
        yield replace(made, unlike=f"not ({spelt})" if told else spelt)

    def _tests(self) -> Iterator[ast.expr]:
        return (node.test for node in ast.walk(self.tree) if isinstance(node, (ast.If, ast.IfExp)))

    def _answer(self, test: ast.AST) -> tuple[str, bool] | None:
        return answer(test, self.tree, self.space, self.call.module)

    def _first_statement(self) -> tuple[int, int]:
        """Where guards stand: the place in the edited lines of the first statement, and its indentation."""
        body = self.tree.body
        doc = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and len(body) > 1
        first = body[1] if doc else body[0]
        if first.lineno <= self.tree.lineno or (doc and first.lineno <= (body[0].end_lineno or 0)):
            raise Unreadable(f"{self.call.shown} has no line of its own for its first statement")
        after = (body[0].end_lineno or 0) + 1 if doc else first.lineno
        return after - self.edited.line, first.col_offset


def _plain(layer: nn.Module) -> Any:
    """The class of torch's that a layer is one of."""
    return next(one for one in type(layer).__mro__ if one.__module__.startswith("torch.nn."))


def _has(module: nn.Module, path: str) -> bool:
    """Whether there is a module, a tensor or a setting of a module at a path."""
    *way, name = path.split(".")
    for one in way:
        found = module._modules.get(one)
        if found is None:
            return False
        module = found
    held = (module._modules, module._parameters, module._buffers, vars(module))
    return any(name in one for one in held)
