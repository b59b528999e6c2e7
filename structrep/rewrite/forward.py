"""The forward of one module, cut out of the flat graph of a model.

The recorded calls say which nodes a module's own code made and which its children did. Nodes that edits touch are
written out, with the edits made; untouched children stay calls of children.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import operator
import sys
import textwrap
import typing
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from types import CodeType, FunctionType
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from structrep.deployed.answers import NAMES, Cells, Space, matches
from structrep.deployed.methods import Method
from structrep.errors import Unreadable
from structrep.graph import contexts
from structrep.graph.aliases import aliases, writers
from structrep.graph.calls import Call, Entry, Origin, Traced, storage
from structrep.graph.facts import ASKED, AT, AUTOCAST, CONSTANT, CONTEXTS, FORMULA, HELD, KEPT, STAND_IN, UNKNOWN, VALUE
from structrep.graph.observed import Given, Part, Thing
from structrep.graph.operations import writes
from structrep.graph.queries import asks_kind, counts_sizes, only_asserted
from structrep.graph.reads import MISSING, Read
from structrep.graph.structures import is_traced, proxies
from structrep.guard.callers import asks
from structrep.match.sum_order import as_traced
from structrep.modules import positions
from structrep.modules.source import functions_in, written_in
from structrep.read.nodes import read_node
from structrep.rewrite import guards
from structrep.rewrite.edits import Edits
from structrep.rewrite.guards import Guard
from structrep.rewrite.observed import demand_same_for_all
from structrep.rewrite.otherwise import Comparison, Different, Slot, alternatives, copied, counterparts, inside, steps
from structrep.terms.layer import Layer, Same
from structrep.trace.again import retrace
from structrep.trace.class_reads import class_reads
from structrep.trace.instructions import namespace_reads
from structrep.trace.questions import INPUTS, WHOLE

_ITSELF = "structrep_itself"  # an attribute path for the module itself, for which graphs have none


class Forward:
    """The forward of one module (or another of its methods), cut out of the flat graph, with the edits made.

    Raises:
        Unreadable: the forward takes values from elsewhere than its arguments.
    """

    def __init__(
        self,
        traced: Traced,
        edits: Edits,
        call: Call,
        written_out: set[Call],
        answers: Mapping[tuple[str, str], Any] | None = None,
    ) -> None:
        self.traced = traced
        self.edits = edits
        self.call = call
        self.written_out = written_out
        self.answers = dict(answers or {})  # what it was told otherwise than the forward that it is another way of
        self.out = {(one.path, one.method) for one in written_out}
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.constants: dict[str, Tensor] = {}
        self.rebuilt: dict[int, Any] = {}
        self.guards: list[Guard] = []  # of arguments
        self.names: dict[str, Any] = {}  # that guards and questions use
        self.again: dict[tuple[Any, tuple[Any, ...]], _Text] = {}  # arguments that are asked for again
        self.reads: list[Guard] = []
        self.ways: list[tuple[str, Forward | list[Guard]]] = []  # a condition on how it is run -> what it does then
        self.merged: dict[tuple[str, str], Entry] = {}  # plain tensors that are merged, by holder and a name there
        self.excluded: dict[tuple[str, str], Any] = {}  # answers that ways before have taken care of
        self.settled = set(self.answers)  # questions about inputs that need not be asserted
        self.entered: tuple[contexts.Context, ...] = ()  # that what is written next stands in
        demand_same_for_all(call, self.out, edits.vanishing)
        self._arguments()
        self._ask_again()
        self._mark_merged()
        self._body(call)
        self._enter(call.contexts)
        self.graph.output(self._rebuild(call.result))
        for node in reversed(self.graph.nodes):
            unused = node.target in (operator.getitem, getattr, "view", "reshape") or CONSTANT.get(node)
            if not node.users and unused:
                self.graph.erase_node(node)
        code = self.graph.python_code("self")
        source = code.src.strip().replace("def forward(", f"def {call.method}(", 1) + "\n"
        self.head, _, body = source.replace(f"self.{_ITSELF}", "self").partition("\n")
        self.body = contexts.blocks(textwrap.dedent(body))
        self.globals = code.globals
        self.method()

    def method(self, holds: Callable[[Guard], bool] = lambda guard: True) -> Method:
        """The method as text, with the guards for which something holds."""
        source = f"{self.head}\n{textwrap.indent(self._text(holds), '    ')}\n"
        used = {name: value for name, value in self._known().items() if name in source}
        function = next(c for c in compile(source, self.call.method, "exec").co_consts if isinstance(c, CodeType))
        unused = {"device"} if "device(type=" not in source else set()  # written code always knows some names
        if clash := sorted((used.keys() - unused) & set(function.co_varnames[: function.co_argcount])):
            raise Unreadable(f"an argument named {clash[0]} clashes with what written code uses")
        names = {name: value for name, value in used.items() if name in function.co_names or name in self.head}
        method = Method.of(self.call.method, source, names)
        try:
            method.compile(f"<{self.call.method}>")
        except (SyntaxError, NameError) as error:
            raise Unreadable(f"{self.call.path or 'the model'}: its new forward is no valid code: {error}") from error
        return method

    def _text(self, holds: Callable[[Guard], bool]) -> str:
        """What the method does, as code."""
        lines = guards.code(self.guards)
        for condition, way in self.ways:
            inner = way._text(holds) if isinstance(way, Forward) else "\n".join(guards.code(way))
            lines += [f"if {condition}:", textwrap.indent(inner, "    ")]
        return "\n".join([*lines, *guards.code(filter(holds, self.reads)), self.body]).rstrip()

    def _known(self) -> dict[str, Any]:
        """The names that the method's text may use."""
        known = {"torch": torch, **NAMES, **self.globals, **self.names}
        for _, way in self.ways:
            known |= way._known() if isinstance(way, Forward) else {}
        return known

    def holding(self, module: nn.Module) -> set[Guard]:
        """The guards of what the forward has read that a module would pass."""
        ways = (way for _, way in self.ways if isinstance(way, Forward))
        found = {one for way in ways for one in way.holding(module)}
        return found | {one for one in self.reads if one.passes(module, self._known())}

    # --- what was read -----------------------------------------------------------------------------------------------

    def _ask_again(self) -> None:
        """Decide for each thing that the forward asked for: asked again where it goes, guarded, or no matter."""
        calls = list(inside(self.call, self.out))
        asked = {key: read for one in calls for key, read in one.reads.items() if key not in self.answers}
        reads = list(asked.items())
        for (path, _), read in reads:
            self._check_stable(path, read)
            if read.text == WHOLE:
                raise Unreadable(f"{self.call.shown} looks at all attributes of {path or 'the model'} at once")
        plain = [(key, read) for key, read in reads if not read.where_am_i]
        staying = set(steps(self.call, self.out))
        done = {
            call: [(step, at) for step in call.steps if step in staying and (at := _at(step)) is not None]
            for call in calls
        }
        left = [
            (key, read)
            for key, read in plain
            if not self._is_handed(key, [call for call in calls if key in call.reads], done)
            and not self._passes_on(key, read)
        ]
        cast = self._pass_on_together(left)
        for (path, text), read in left:
            if (path, text) not in cast:
                self._guard(path, read)
        for key, read in reads:
            if read.where_am_i:
                self._other_way(key, read)
        for one in calls:
            function = one.code
            if isinstance(function, FunctionType) and not one.leaf:
                codes: list[Any] = [(code, space, None) for code, space in one.codes.items()]
                own = (function.__code__, function.__globals__, function)
                for read in namespace_reads([own, *codes], self.traced.unfollowed):
                    self._check_stable(one.path, read)
                    self._guard("", read)
                for read in class_reads([function.__code__, *one.codes], one.module):
                    self._guard(one.path, read)

    def _check_stable(self, path: str, read: Read) -> None:
        if read.unstable:
            raise Unreadable(f"{path or 'the model'} asks {read.text}, whose answer may be another at every call")

    def _told(self, answers: Mapping[tuple[str, str], Any]) -> tuple[Traced, Call] | None:
        return retrace(self.traced, self.call, {**self.answers, **answers})

    def _compared(self, again: tuple[Traced, Call]) -> list[Slot] | None:
        """The arguments that differ in the call as it is when told otherwise; None if more does."""
        if any(call.mutates for call in inside(again[1], self.out)):
            return None
        try:
            return Comparison((self.traced, self.call), again, self.out).slots
        except Different:
            return None

    def _asked_anew(self, again: tuple[Traced, Call]) -> set[tuple[str, str]]:
        """What is asked for only when told otherwise."""
        asked = [{key for call in inside(root, self.out) for key in call.reads} for root in (again[1], self.call)]
        return asked[0] - asked[1]

    def _passes_on(self, key: tuple[str, str], read: Read) -> bool:
        """Whether all that hangs on an answer is arguments of operations, which then ask for it again."""
        matters = isinstance(read.told, bool) and isinstance(read.holder, nn.Module) and "inplace" not in read.text
        # Most flags change what is computed: to find out is dear, and a guard costs nothing.
        if not read.counts or matters:
            return False
        similar = self._similar(key, read)
        if similar in self.traced.handed:
            found = self._placed(self.traced.handed[similar], back=True)
        else:
            found = self._handed(read.told, [key])
            if not any(isinstance(where, int) for where, _ in found or ()):  # a constant of this forward alone
                self.traced.handed[similar] = self._placed(found)
        if found:
            self.again |= dict.fromkeys(found, _Text(self._spelt(key[0], read)))
        return found is not None

    def _is_handed(self, key: tuple[str, str], calls: list[Call], done: Mapping[Call, list[tuple[Any, int]]]) -> bool:
        """Whether the code hands an answer to operations as it is, each time that it has asked."""
        found: list[tuple[Any, tuple[Any, ...]]] = []
        for call in calls:
            code, read = call.bytecode, call.reads[key]
            for places in {one: read.places.count(one) for one in read.places}.items():
                (asking, at, deep), count = places
                handed = positions.argument(asking, at, deep) if asking is code and type(read.told) in _HANDED else None
                if handed is None:
                    return False
                operation, (kind, place) = handed
                takers = [step for step, made in done[call] if positions.place(asking, made) is operation]
                if len(takers) != count or not self.edits.changed.isdisjoint(takers):
                    return False
                for taker in takers:
                    behind = isinstance(taker, fx.Node) and taker.op == "call_method" and kind == "args"
                    method = behind and not isinstance(operation, ast.BinOp)
                    where = place + 1 if method and isinstance(place, int) else place
                    try:
                        given = getattr(taker, kind)[where]
                    except (IndexError, KeyError):
                        return False
                    if type(given) is not type(read.told) or given != read.told:
                        return False
                    found.append((taker, (kind, where)))
        self.again |= dict.fromkeys(found, _Text(self._spelt(key[0], calls[0].reads[key])))
        return True

    def _similar(self, key: tuple[str, str], read: Read) -> tuple[Any, ...]:
        """What tells forwards apart of which the same hangs on an answer: most modules of a class do the same."""
        done = tuple(
            (step.path.removeprefix(self.call.path), step.method)
            if isinstance(step, Call)
            else (
                step.op,
                str(step.target).removeprefix(self.call.path),
                len(step.all_input_nodes),
                str(step.kwargs.keys()),
            )
            for step in steps(self.call, self.out)
        )
        alone = tuple(len(proxy.node.users) == 1 for proxy in proxies((self.call.args, self.call.kwargs)))
        told = tuple((text, repr(one.told)) for (_, text), one in self.call.reads.items())
        answers = tuple(map(str, self.answers.items()))
        given = tuple(map(repr, pytree.tree_leaves((self.call.args, self.call.kwargs))))
        module, of = self.call.module, (key[0].removeprefix(self.call.path), key[1], repr(read.told))
        held = (module._modules, module._parameters, module._buffers)
        parts = tuple((name, type(part)) for one in held for name, part in one.items())
        return type(module), self.call.method, of, done, alone, told, answers, given, parts

    def _placed(self, found: set[Any] | None, back: bool = False) -> set[Any] | None:
        """Arguments by the places of their operations in the forward, or by the operations again."""
        if not found:
            return found
        done = list(steps(self.call, self.out))
        place = dict(enumerate(done)) if back else {step: index for index, step in enumerate(done)}
        return {(place.get(where, where), way) for where, way in found}

    def _handed(self, told: Any, keys: list[tuple[str, str]]) -> set[Any] | None:
        """The arguments that an answer is, whatever it is; None if anything else hangs on it.

        Args:
            keys: the questions that have this answer.
        """
        found: set[Any] | None = None
        for other in alternatives(told):
            again = self._told(dict.fromkeys(keys, other))
            if again is None and isinstance(other, torch.device):
                continue  # constants cannot be made where there is no such device
            slots = None if again is None or self._asked_anew(again) else self._compared(again)
            if slots is None or any(slot.before != told or slot.after != other for slot in slots):
                return None
            places = {slot.where for slot in slots}
            if any(where in self.edits.changed for where, _ in places) and not isinstance(told, torch.dtype):
                return None
            if found is not None and places != found:
                return None
            found = places
        return found

    def _pass_on_together(self, reads: list[tuple[tuple[str, str], Read]]) -> set[tuple[str, str]]:
        """Of questions for dtypes those that have one answer, and are asked again if that is what casting the model
        does: to change it for all, inputs too. Others of them than the first are guarded to be as that is."""
        for dtype in {read.told for _, read in reads if isinstance(read.told, torch.dtype)}:
            same = [(key, read) for key, read in reads if read.told == dtype and isinstance(read.holder, Tensor)]
            found = self._handed(dtype, [*(key for key, _ in same), INPUTS]) if same else None
            if found is None:
                continue
            texts = [self._spelt(key[0], read) for key, read in same]
            self.again |= dict.fromkeys(found, _Text(texts[0]))
            others = (text for text in texts if text != texts[0])
            self.reads += [guards.alike(text, texts[0], self.call.shown) for text in others]
            return {key for key, _ in same}
        return set()

    def _other_way(self, key: tuple[str, str], read: Read) -> None:
        """Follow the forward as it is run otherwise; write that too, if it does anything else then.

        Raises:
            Unreadable: that cannot be.
        """
        of_input = isinstance(read.holder, fx.Node)
        again = self._told({key: not read.told})
        slots = None if again is None or self._asked_anew(again) else self._compared(again)
        if slots == []:
            self.settled.add(key)
            return
        asked = self._spelt(key[0], read) if not of_input else self._spelt_comparison(read.holder)
        if asked is None:
            return  # it is asserted where it is asked
        condition = f"not {asked}" if read.told else asked
        try:
            self.ways.append((condition, self._written_otherwise(key, read, again)))
            self.settled.add(key)
        except Unreadable:
            if read.text == "torch.jit.is_scripting()":  # that is not how it is run, but for who asks for it
                self.ways.append((condition, [guards.never(read.text, self.call.shown)]))
            elif not of_input:
                raise
        self.excluded[key] = read.told

    def _written_otherwise(self, key: tuple[str, str], read: Read, again: tuple[Traced, Call] | None) -> Forward:
        if again is None:
            raise Unreadable(
                f"{self.call.shown} asks {read.text}, and cannot be followed where that is {not read.told}"
            )
        written_out = {one for one in inside(again[1], self.out) if (one.path, one.method) in self.out}
        answers = {**self.answers, **self.excluded, key: not read.told}
        where = f"where {read.text or 'the dtype of its input'} is {not read.told}"
        return Forward(again[0], self._edits_of(again, where), again[1], written_out, answers)

    def _spelt_comparison(self, node: fx.Node) -> str | None:
        """A comparison of dtypes as code, of an argument of this forward; None if what is compared is made here."""
        sides: list[str] = []
        for place, side in enumerate(node.args):
            source = side.args[0] if isinstance(side, fx.Node) and side.target is getattr else None
            if isinstance(source, fx.Node):
                given = self.env.get(source)
                if not isinstance(given, fx.Node) or given.op != "placeholder":
                    return None
                sides.append(f"{str(given.target).strip('*')}.dtype")
            else:
                sides.append(repr(self.again.get((node, ("args", place)), side)))
        return f"({sides[0]} {'==' if node.target is operator.eq else '!='} {sides[1]})"

    def _edits_of(self, again: tuple[Traced, Call], where: str) -> Edits:
        """The edits of the forward as it is when told otherwise."""
        same = counterparts((self.traced, self.call), again)
        back = {new: old for old, new in same.items()}
        for node in again[1].nodes():
            if node not in back and copied(node) is not None:
                continue  # what is made of it matters
            if writes(node) and node not in back:
                raise Unreadable(f"{self.call.shown} writes in place {where}")
            gone = {n for n in node.all_input_nodes if back.get(n) in self.edits.vanishing}
            formulas = [FORMULA.of(n).tensors for n in node.all_input_nodes if FORMULA.get(n)]
            made_of = [*itertools.chain(*formulas), *(VALUE.get(n) for n in node.all_input_nodes)]
            held = {again[0].names.get(id(tensor)) for tensor in made_of}
            layer = (
                str(node.target) in self.edits.layers if node.op == "call_module" else held & self.edits.homes.keys()
            )
            if layer and node not in back:
                raise Unreadable(f"{self.call.shown} does not use {node.name} as it is merged {where}")
            if gone and node not in back:
                raise Unreadable(f"{self.call.shown} uses {next(iter(gone)).name}, which would be gone, {where}")
        given = {proxy.node for proxy in proxies(self.call.result)}
        for proxy in proxies(again[1].result):
            if back.get(proxy.node) in self.edits.vanishing - given:
                raise Unreadable(f"{self.call.shown} gives back {proxy.node.name}, which would be gone, {where}")
        edits = self.edits
        return replace(
            edits,
            dead={same[n] for n in edits.dead if n in same},
            replaced={same[n]: (same[b], path) for n, (b, path) in edits.replaced.items() if n in same and b in same},
            bypassed={same[n]: same[b] for n, b in edits.bypassed.items() if n in same and b in same},
            refilled={same[n]: (same[b], path) for n, (b, path) in edits.refilled.items() if n in same and b in same},
            ended={same[n] for n in edits.ended if n in same},
            owners={},
            vanishing={same[n] for n in edits.vanishing if n in same},
        )

    def _mark_merged(self) -> None:
        """Guard tensors that are merged to be what they were, or to be gone: nothing else would see them set."""
        for node in (step for step in steps(self.call, self.out) if isinstance(step, fx.Node)):
            merged = node in self.edits.dead or node in self.edits.ended
            for given in (n for n in node.all_input_nodes if n.op == "get_attr") if merged else ():
                formula = FORMULA.get(given)
                for tensor in formula.tensors if formula else (VALUE.get(given),):
                    entry, path = self.traced.plain(tensor), self.traced.names.get(id(tensor), "")
                    if entry is not None:
                        alias = entry.alias
                        while self.merged.setdefault((entry.holder, alias), entry) != entry:  # another of this name
                            alias += "_"
                        spelt = self._spelt_path(entry.holder)
                        self.reads.append(guards.same(f"{spelt}{entry.text}", f"{spelt}.{alias}", self.call.shown))
                    elif path and path.startswith(f"{self.call.path}." if self.call.path else ""):
                        self.reads.append(guards.gone(self._spelt_path(path), self.call.shown))

    def _guard(self, path: str, read: Read) -> None:
        if read.told is MISSING:
            holder, _, name = self._spelt(path, read).rpartition(".")
            self.reads.append(guards.missing(f"{holder}.{name}", holder, name, self.call.shown))
            return
        if path in self.edits.homes and (read.of_numbers or read.text.endswith(".shape")):
            return  # of a tensor that is merged, which is no more set
        asked = self._spelt(path, read)
        held = isinstance(read.holder, nn.Module) and read.text[1:] in read.holder.__dict__
        named = asked.replace("structrep_is(", "isinstance(") if isinstance(read.holder, nn.Module) else read.of(path)
        made = guards.guard(asked, named, read.told, self.call.shown, scripted=held)
        if made is not None and read.of_numbers:
            made = replace(made, unlike=f"not structrep_is_exporting() and ({made.unlike})")
        if made is not None:
            self.reads.append(made)

    def _spelt(self, path: str, read: Read) -> str:
        """A question as code of this forward."""
        if isinstance(read.holder, nn.Module):
            return read.of(self._spelt_path(path))
        if isinstance(read.holder, Tensor):
            return read.of(self._spelt_tensor(path))
        if isinstance(read.holder, dict):
            return f"{self._space(read.holder)}.{read.text}"
        if isinstance(read.holder, FunctionType):
            function: FunctionType = read.holder
            name, rest = _head(read.text)
            of = function.__qualname__
            if any(function is f for f in functions_in(_defined(self.call.module, self.call.method))):
                return f"structrep_cell(type(self), {self.call.method!r}, {of!r}, {name!r}){rest}"
            if function.__globals__.get(of) is function:
                place = function.__code__.co_freevars.index(name)
                return f"{self._space(function.__globals__)}.{of}.__closure__[{place}].cell_contents{rest}"
            return f"{self._name(f'cells_of_{function.__name__}', Cells(function))}.{read.text}"
        module = read.text.partition(".")[0]
        self.names[module] = sys.modules[module]
        return read.text

    def _space(self, names: dict[str, Any]) -> str:
        """A name for a namespace."""
        module = sys.modules.get(str(names.get("__name__", "")))
        held: Any = module if module is not None and vars(module) is names else Space(names)
        return self._name(f"module_{names.get('__name__', 'none')}", held)

    def _name(self, stem: str, held: Any) -> str:
        """A name that stands for something in written code."""
        name = "".join(c if c.isalnum() else "_" for c in stem)
        while self.names.get(name, held) != held:
            name += "_"
        self.names[name] = held
        return name

    def _spelt_path(self, path: str) -> str:
        if path == self.call.path:
            return "self"
        spelt = "self"
        for name in self._relative(path).split("."):
            spelt = f"{spelt}.{name}" if name.isidentifier() else f'getattr({spelt}, "{name}")'
        return spelt

    def _spelt_tensor(self, path: str) -> str:
        """A tensor, or one of the layer that it was merged into."""
        if path not in self.edits.homes:
            return self._spelt_path(path)
        home, plain = self.edits.homes[path].removesuffix("+"), not self.edits.homes[path].endswith("+")
        try:
            spelt = self._spelt_path(home)
        except (Unreadable, AttributeError):
            return self.edits.first_left(self.call)
        return f"{spelt}.weight" if plain else f"next({spelt}.parameters())"

    # --- the method --------------------------------------------------------------------------------------------------

    def _arguments(self) -> None:
        """Placeholders named and ordered as the module's own forward has them; constants stay as traced."""
        signature = inspect.signature(self.call.function)
        bound = signature.bind(*self.call.args, **self.call.kwargs)
        hints = _plain_hints(self.call.code)
        self._check_calls(bound)
        for name, parameter in signature.parameters.items():
            kind = parameter.kind
            star = "*" if kind is parameter.VAR_POSITIONAL else "**" * (kind is parameter.VAR_KEYWORD)
            default = () if star or parameter.default is parameter.empty else (parameter.default,)
            if default and not _is_literal(default[0]):
                raise Unreadable(f"the default of argument {name} is no literal: {default[0]!r}")
            node = self.graph.placeholder(star + name, hints.get(name) if not star else None, *default)
            if name in bound.arguments:
                self._accept(bound.arguments[name], node, name, default == (None,))
            elif star:
                self._expect(node, () if star == "*" else {}, name)
            elif default:
                self._expect(node, *default, name)

    def _check_calls(self, traced: inspect.BoundArguments) -> None:
        """Raise where a run has shown that the model calls this with other arguments than it was traced with."""
        path, method = self.call.path, self.call.method
        whole = inspect.BoundArguments(traced.signature, traced.arguments.copy())
        whole.apply_defaults()
        plain = not isinstance(self.call.module, fx.GraphModule)
        for form in self.traced.observed.forms(path, method) if plain else ():
            if form is None:
                raise Unreadable(f"{path} is given more than tensors and plain values as the model runs")
            for name, value in form.given.items():
                if name not in whole.arguments or not _fits(value, whole.arguments[name]):
                    raise Unreadable(f"{path} is called with another {name} as the model runs than it was traced with")

    def _accept(self, value: Any, node: fx.Node, name: str, optional: bool) -> None:
        if is_traced(value):
            if optional:
                self.guards.append(guards.given(name))
            elif isinstance(value, fx.Proxy) and self._is_asked_what_it_is(value.node):
                self.guards.append(guards.tensor(name))
            self._expect(node, value, name)
            for proxy, access in _places(value, node, self.graph):
                self.env[proxy.node] = access
        else:
            self._expect(node, value, name)

    def _is_asked_what_it_is(self, node: fx.Node) -> bool:
        """Whether an argument of the model was taken for a tensor by code that may do something else with others."""
        number = isinstance(STAND_IN.get(node), (int, float))
        whole = self.call.parent is None and not isinstance(self.call.module, fx.GraphModule)
        return whole and not number and not UNKNOWN.known(node) and asks(self.call, node, first=True)

    def _expect(self, node: fx.Node, value: Any, name: str) -> None:
        """The merged forward holds for the traced constants and structure of this argument only."""
        template = _template(value)
        if template is not ... and not isinstance(self.call.module, fx.GraphModule):  # which was itself made for them
            made = guards.argument(name, template)
            self.guards += [made] if made is not None else []

    def _body(self, call: Call) -> None:
        if call.mutates:
            raise Unreadable(
                f"{call.path or 'the model'} changes its arguments or itself as it runs, beside its result"
            )
        for step in call.steps:
            if isinstance(step, fx.Node):
                self._copy(step)
            elif (step.path, step.method) in self.out or step.leaf or step.method != "forward":
                self._body(step)
            else:
                self._collapse(step)

    def _enter(self, wanted: tuple[contexts.Context, ...]) -> None:
        """Write what comes next in some contexts, as far as the forward itself enters them."""
        own = wanted[len(self.call.contexts) :]
        if reasons := [one.unwritable for one in own if one.unwritable]:
            raise Unreadable(f"{self.call.path or 'the model'} {reasons[0]}")
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, self.entered, strict=False))
        kept = len(list(same))
        for _ in self.entered[kept:]:
            self.graph.call_function(contexts.leave)
        for one in own[kept:]:
            self.graph.call_function(contexts.enter, (one.code,))
        self.entered = own

    def _copy(self, node: fx.Node) -> None:
        if AUTOCAST.of(node):
            raise Unreadable(f"{self.call.path or 'the model'} runs part of its forward under autocast")
        self._enter(CONTEXTS.of(node))
        if node in self.edits.refilled:
            self.env[node] = self._refilled(node, *self.edits.refilled[node])
        elif node in self.edits.replaced:
            base, path = self.edits.replaced[node]
            self.env[node] = self.graph.call_module(self._relative(path), (self._load(base),))
        elif node in self.edits.bypassed:
            self.env[node] = self._load(self.edits.bypassed[node])
        elif isinstance(same := self._unchanged(node), fx.Node):
            self.env[node] = self._load(same)
        elif asks_kind(node) and not self._has(cast(fx.Node, node.args[0])):
            self.env[node] = self.graph.call_function(getattr, (next(iter(self.env.values())), node.args[1]))
        elif node in self.edits.dead or ASKED.get(node) in self.settled:
            return
        elif (only_asserted(node) or counts_sizes(node)) and not all(self._has(n) for n in node.all_input_nodes):
            return  # of sizes that are no longer there; whoever would need them says so
        else:
            op, target, args = as_traced(node, self.edits.reordered)
            target = self._relative(str(target)) if op == "call_module" else target
            load = self._load_input if node in self.edits.ended else self._load
            args = fx.node.map_arg(self._asking(args, node, ("args",)), load)
            kwargs = fx.node.map_arg(self._asking(dict(node.kwargs), node, ("kwargs",)), load)
            self.env[node] = self.graph.create_node(op, target, args, kwargs)
            CONSTANT.note(self.env[node], VALUE.known(node))

    def _asking(self, value: Any, where: Any, way: tuple[Any, ...]) -> Any:
        """An argument, with what is asked for again as code."""
        if not self.again:
            return value
        if (where, way) in self.again:
            return self.again[where, way]
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            return type(value)(self._asking(item, where, (*way, place)) for place, item in enumerate(value))
        if isinstance(value, dict):
            return {key: self._asking(item, where, (*way, key)) for key, item in value.items()}
        return value

    def _refilled(self, node: fx.Node, base: fx.Node, path: str) -> fx.Node:
        """The same call, with the parameters that its module will have."""
        weight, bias = (
            self.graph.get_attr(self._relative(".".join(filter(None, (path, name))))) for name in ("weight", "bias")
        )
        rest = fx.node.map_arg(node.args[3:], self._load)
        named = {k: v for k, v in node.kwargs.items() if k not in ("input", "weight", "bias")}
        kwargs = fx.node.map_arg(named, self._load)
        assert callable(node.target)
        return self.graph.call_function(node.target, (self._load(base), weight, bias, *rest), kwargs)

    def _unchanged(self, node: fx.Node) -> fx.Node | None:
        """What an arithmetic operation such as `x + 0` gives back as it is."""
        asked = any(where is node for where, _ in self.again)
        if node.op != "call_function" or asked or node in self.edits.dead or written_in(node.target) != "_operator":
            return None
        reading = read_node(node)
        if not isinstance(reading, Same):
            return None
        if reading.source in writes(node):
            return reading.source
        # An operation that changes nothing still gives a value of its own, and either may be written to.
        same = aliases(node) | aliases(reading.source)
        written = any(not isinstance(read_node(writer), Same) for writer in writers(same))
        alone = _is_new(reading.source) if written else len(reading.source.users) == 1
        return reading.source if alone else None

    def _collapse(self, call: Call) -> None:
        """A child's call, as it stands in its parent's forward."""
        self._enter(call.contexts)
        args = self._rebuild(self._asking(call.args, call, ("args",)))
        kwargs = self._rebuild(self._asking(call.kwargs, call, ("kwargs",)))
        node = self.graph.call_module(self._relative(call.path), args, kwargs)
        for before, after in call.written:
            self.env[after] = self._load(before)
        for proxy, access in _places(call.result, node, self.graph):
            self.env[proxy.node] = access

    def _relative(self, path: str) -> str:
        """The path of a module or tensor, as the module whose forward this is has it."""
        prefix = f"{self.call.path}." if self.call.path else ""
        return path[len(prefix) :] if path.startswith(prefix) else self._other_name(path)

    def _other_name(self, path: str) -> str:
        """What is held in several places, an activation that all blocks share for instance, is known by the first."""
        parent, _, name = path.rpartition(".")
        holder = self.traced.model.get_submodule(parent)
        held: Any = getattr(holder, name, None)
        module = self.call.module
        known = (
            *module.named_modules(remove_duplicate=False),
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        found: str | None = next((other for other, value in known if value is held and held is not None), None)
        if found is None:
            raise Unreadable(f"{self.call.path} uses {path}, which is not below it")
        return found

    def _has(self, node: fx.Node) -> bool:
        return node in self.env or node.op == "get_attr"

    def _load(self, node: fx.Node) -> Any:
        if isinstance(HELD.get(node), nn.Module):
            return self.graph.get_attr(_ITSELF if node.target == self.call.path else self._relative(str(node.target)))
        if node.op == "get_attr" and not VALUE.known(node):
            kind = type(HELD.get(node)).__name__
            raise Unreadable(f"{self.call.path or 'the model'} uses a {kind} that is no part of it")
        if node.op == "get_attr":
            return self._constant(VALUE.of(node))
        if node not in self.env:
            raise Unreadable(
                f"{self.call.path or 'the model'} uses {node.name}, which does not come in through its arguments"
            )
        return self.env[node]

    def _load_input(self, node: fx.Node) -> Any:
        """What depends on the input; None for the rest."""
        return None if VALUE.known(node) else self._load(node)

    def _constant(self, tensor: Tensor) -> Any:
        """A tensor attribute by its name; what was computed from some is computed again; anything else is kept as it
        is."""
        pending = [tensor]
        while pending:
            origin = self._origin(pending[-1])
            left = [one for one in origin.given if id(one) not in self.rebuilt] if origin is not None else []
            pending += reversed(left)
            if not left:
                one = pending.pop()
                if id(one) not in self.rebuilt:
                    around = self.call.contexts + self.entered
                    self._enter(origin.contexts if origin is not None else around)
                    self.rebuilt[id(one)] = self._recompute(one, origin)
                    CONSTANT.note(self.rebuilt[id(one)], True)
                    self._enter(around)
        return self.rebuilt[id(tensor)]

    def _origin(self, tensor: Tensor) -> Origin | None:
        """How a tensor is computed again; None if it is held, or kept as it is."""
        origin = self.traced.origins.get(id(tensor))
        if id(tensor) in self.traced.names or origin is None or storage(tensor) in self.traced.written:
            return None
        return origin if getattr(origin.function, "__name__", "__get__") != "__get__" else None

    def _recompute(self, tensor: Tensor, origin: Origin | None) -> Any:
        if id(tensor) in self.traced.names:
            return self.graph.get_attr(self._relative(self.traced.names[id(tensor)]))
        if origin is not None:
            given = (
                self._asking(origin.args, id(tensor), ("args",)),
                self._asking(origin.kwargs, id(tensor), ("kwargs",)),
            )
            args, kwargs = pytree.tree_map(lambda one: self.rebuilt[id(one)] if isinstance(one, Tensor) else one, given)
            name = origin.function.__name__
            if getattr(Tensor, name, None) is origin.function:
                return self.graph.call_method(name, args, kwargs)
            return self.graph.call_function(origin.function, args, kwargs)
        if (entry := self.traced.entries.get(id(tensor))) is not None:
            (_, name), *steps = entry.steps
            found = self.graph.get_attr(self._relative(f"{entry.holder}.{name}" if entry.holder else name))
            for how, key in steps:
                found = self.graph.call_function(getattr if how == "." else operator.getitem, (found, key))
            return found
        name = f"constant_{len(self.constants)}"
        self.constants[name] = tensor
        return self.graph.get_attr(name)

    def _rebuild(self, value: Any) -> Any:
        """A structure of traced values, as an argument of the new graph."""
        if isinstance(value, fx.Proxy):
            return self._load(value.node)
        if isinstance(value, Tensor):
            return self._constant(value)
        if isinstance(value, slice):
            return slice(*(self._rebuild(v) for v in (value.start, value.stop, value.step)))
        if is_dataclass(value) and not isinstance(value, type):
            plain = not hasattr(value, "__post_init__") and all(f.init for f in fields(value))
            if not plain and not isinstance(value, dict):
                raise Unreadable(f"a {type(value).__name__} is more than its fields, and cannot be written as code")
            given = {f.name: self._rebuild(getattr(value, f.name)) for f in fields(value)}
            return self.graph.call_function(type(value), (), given)
        if isinstance(value, (tuple, list)) and not _is_plain(type(value)):
            raise Unreadable(f"a {type(value).__name__} may be more than its items, and cannot be written as code")
        if isinstance(value, tuple):
            parts = [self._rebuild(item) for item in value]
            return self.graph.call_function(type(value), tuple(parts)) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, list):
            return [self._rebuild(item) for item in value]
        if type(value) in (dict, OrderedDict):
            made = {key: self._rebuild(item) for key, item in value.items()}
            return made if type(value) is dict else self.graph.call_function(OrderedDict, (list(made.items()),))
        if is_traced(value):
            where = self.call.path or "the model"
            raise Unreadable(f"{where} passes a {type(value).__name__}, which cannot be written as code")
        return value


def _is_new(node: fx.Node) -> bool:
    """Whether a node gives what a convolution or Linear has made, perhaps normed, and nothing else can look at."""
    while sum(not only_asserted(user) for user in node.users) == 1 and not KEPT.get(node):
        reading = read_node(node)
        if isinstance(reading, Layer) and reading.kind in ("conv", "linear"):
            return True
        if reading is None or not isinstance(reading, (Layer, Same)) or reading.source is None:
            return False
        node = reading.source
    return False


def _is_plain(cls: type) -> bool:
    """Whether a list or tuple type has no code of its own."""
    return cls in (list, tuple, torch.Size) or (cls.__mro__[1] is tuple and hasattr(cls, "_fields"))


def _is_literal(value: Any) -> bool:
    """Whether a value's repr is code for it."""
    if type(value) in (list, tuple):
        return all(map(_is_literal, value))
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


_SCRIPTED: dict[Any, Any] = {  # types that `torch.jit.script` has to be told of arguments, as it wants them spelt
    **{one: one for one in (bool, int, float, str)},
    **{one | None: typing.Union[one, None] for one in (bool, int, float, str, Tensor)},  # noqa: UP007
    **dict.fromkeys((list[bool], typing.List[bool]), typing.List[bool]),  # noqa: UP006
    **dict.fromkeys((list[int], typing.List[int]), typing.List[int]),  # noqa: UP006
    **dict.fromkeys((list[float], typing.List[float]), typing.List[float]),  # noqa: UP006
    **dict.fromkeys((list[Tensor], typing.List[Tensor]), typing.List[Tensor]),  # noqa: UP006
}


def _plain_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The types that `torch.jit.script` has to be told of a function's arguments."""
    try:
        hints = typing.get_type_hints(inspect.unwrap(function))
    except Exception:  # a name that is only there for a type checker
        return {}
    return {name: found for name, hint in hints.items() if (found := _scripted(hint)) is not None}


def _scripted(hint: Any) -> Any:
    try:
        return _SCRIPTED.get(hint)
    except TypeError:  # what cannot be a key
        return None


_HANDED = (bool, int, float, str, tuple, list, type(None), torch.dtype, torch.device)


def _at(step: fx.Node | Call) -> int | None:
    """The instruction by which the code of a call does a step."""
    found: int | None = step.at if isinstance(step, Call) else AT.of(step)
    return found


class _Text:
    """Code that stands for a value."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _head(text: str) -> tuple[str, str]:
    """A name, and what is asked of it."""
    name = "".join(itertools.takewhile(lambda c: c.isalnum() or c == "_", text))
    return name, text[len(name) :]


def _defined(module: nn.Module, name: str) -> Any:
    """What a module's class has by a name."""
    return next((vars(base)[name] for base in type(module).__mro__ if name in vars(base)), None)


def _fits(seen: Any, traced: Any) -> bool:
    """Whether an argument that a part was seen to be given is one that it was traced with."""
    if isinstance(seen, Given):
        plain = type(traced) in (int, float) and traced == seen.number
        return plain or isinstance(traced, fx.Proxy) or (seen.number is None and isinstance(traced, Tensor))
    if isinstance(seen, (list, tuple)):
        alike = isinstance(traced, (list, tuple)) and len(seen) == len(traced)
        return isinstance(traced, fx.Proxy) or (alike and all(map(_fits, seen, traced)))
    if isinstance(seen, dict) and isinstance(traced, dict):
        return seen.keys() == traced.keys() and all(_fits(seen[key], traced[key]) for key in seen)
    if isinstance(seen, (Part, Thing)) or is_traced(traced):
        return seen is not None
    return matches(seen, traced)


def _template(value: Any) -> Any:
    """A structure with `...` where anything may stand.

    Raises:
        Unreadable: it holds a constant that cannot be written as code.
    """
    if isinstance(value, (fx.Proxy, Tensor)):
        return ...
    if value is None or type(value) in (bool, int, float, str, torch.dtype, torch.device):
        return value
    if type(value) in (list, tuple):
        parts = [_template(item) for item in value]
        return parts if type(value) is list else tuple(parts)
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {key: _template(item) for key, item in value.items()}
    if is_traced(value):
        return ...
    raise Unreadable(f"a forward that is given a {type(value).__name__} cannot be written anew")


def _places(value: Any, node: fx.Node, graph: fx.Graph) -> Iterator[tuple[fx.Proxy, fx.Node]]:
    """Every traced value inside a structure, with the expression that takes it out of `node`."""
    if isinstance(value, fx.Proxy):
        yield value, node
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if is_traced(item):
                yield from _places(item, graph.call_function(operator.getitem, (node, index)), graph)
    elif isinstance(value, dict) and not is_dataclass(value):
        for key, item in value.items():
            if is_traced(item):
                yield from _places(item, graph.call_function(operator.getitem, (node, key)), graph)
    elif is_dataclass(value):
        for f in fields(value):
            item = getattr(value, f.name)
            if is_traced(item):
                yield from _places(item, graph.call_function(getattr, (node, f.name)), graph)
