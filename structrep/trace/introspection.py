"""What code asks about parts of the model as a trace runs: who asks whom for what, and where.

A merge changes layers: their types, settings and parameters. An introspection of one counts if it was seen; what code
might ask on other paths is another matter. Noted are attributes of parts that are not the asker's own, parts that are
handed to somebody, and walks over all that is below a module.
"""

from __future__ import annotations

import functools
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import nn

from structrep.graph.calls import Call, Introspection
from structrep.modules.call_sites import in_space
from structrep.modules.introspection import (
    BY_NAME,
    CLASS,
    GEOMETRY,
    MODULES,
    TENSORS,
    TYPE,
    WHAT,
    Handed,
    asks,
    asks_for_geometry,
    handed,
    only_runs,
    resolve,
)
from structrep.modules.objects import OF_MODULES, STORES
from structrep.modules.runners import only_calls

WALKS = MODULES.keys() | TENSORS | {BY_NAME}
_RUN = (OF_MODULES - STORES) | {"forward"}  # what is looked up to run a part, or belongs to torch
_NOTED = {"getattr", "hasattr", "callable", "id"}  # functions that ask nothing but what is noted
_LATER = (nn.Identity, nn.Sequential, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what layers may be after a merge


def _shown(frame: FrameType) -> FrameType:
    """The frame of code that asks which can be shown, and is not of Python's own library."""
    outer: FrameType | None = frame
    while outer is not None:
        home = str(outer.f_globals.get("__name__")).partition(".")[0]
        if home not in sys.stdlib_module_names and linecache.getline(outer.f_code.co_filename, outer.f_lineno):
            return outer
        outer = outer.f_back
    return frame


def _place(call: Call) -> int | None:
    """The instruction of a call's code that runs; None if it is not its code that does."""
    outer: FrameType | None = sys._getframe(1)
    while outer is not None and outer.f_code is not call.bytecode:
        outer = outer.f_back
    return None if outer is None else outer.f_lasti


class Got(NamedTuple):
    """A part that code has got: the names on the way to it from a module, where, and whether its type questions are
    noted there (`patches.show_tensors`)."""

    call: Call
    module: nn.Module
    way: tuple[str, ...]
    code: CodeType
    at: int
    space: dict[str, Any]
    typed: bool
    place: int | None


class Introspections:
    """The introspections of a trace: what code asks about parts.

    Args:
        paths: of the modules of the model.
        current: the call that runs.
        reach: is told of each tensor that a walk hands out.
    """

    def __init__(
        self, paths: Mapping[nn.Module, str], current: Callable[[], Any], reach: Callable[[str, Any], None]
    ) -> None:
        self.paths = {id(module): path for module, path in paths.items()}  # whose hash may ask them for attributes
        self.current, self.reach = current, reach
        self.found: dict[tuple[str, int, str], Introspection] = {}  # by path, call and what
        self.got: dict[tuple[Any, ...], Got] = {}
        self.own: set[tuple[int, str]] = set()  # attributes that calls look up in their own modules

    def attribute(self, module: nn.Module, name: str, frame: FrameType) -> None:
        """Note that code of the user's looks up an attribute of a part; of its own module it may."""
        call, path = self.current(), self.paths.get(id(module))
        if call is None or path is None or name in _RUN:
            return
        if path == call.path:
            self.own.add((id(call), name))
            return
        held = object.__getattribute__(module, "__dict__")
        if all(held[store].get(name) is None for store in STORES):
            own = name not in GEOMETRY or any(one is call.module for one in frame.f_locals.values())
            shown = _shown(frame)
            what = TYPE if name == "__class__" else name
            self._note(call, path, what, shown.f_code, shown.f_lineno, _place(call), apart=not own)

    def is_instance(self, module: nn.Module, cls: type, told: bool, frame: FrameType) -> None:
        """Note that code asks whether a part is of a class, if that may be otherwise for what it becomes."""
        call, path = self.current(), self.paths.get(id(module))
        if call is not None and path is not None and any(issubclass(one, cls) != told for one in _LATER):
            self._note(call, path, CLASS, frame.f_code, frame.f_lineno, _place(call))

    def store(self, module: nn.Module, name: str, frame: FrameType) -> None:
        """Note that code of the user's looks at all parts of a module, or at all tensors."""
        self.attribute(module, name, frame)
        if name == "_modules":
            self.part(module, (), frame)

    def part(self, module: nn.Module, way: tuple[str, ...], frame: FrameType) -> None:
        """Note that code of the user's gets a part."""
        call = self.current()
        if call is not None and id(module) in self.paths:
            self._get(call, module, frame.f_code, frame.f_lasti, frame.f_globals, way)

    def walk(self, module: nn.Module, name: str, plain: Callable[..., Any], frame: FrameType) -> Callable[..., Any]:
        """A method that gives what is below a module; it is noted who looks at that."""
        call = self.current()
        if call is None or id(module) not in self.paths:
            return plain
        if name == BY_NAME:
            get = functools.partial(self._get, call, module, frame.f_code, frame.f_lasti, frame.f_globals)
            return functools.partial(self._by_name, plain, get)
        ask = functools.partial(self._all, call, module, MODULES.get(name, "*"), frame.f_code, frame.f_lineno)
        if name in TENSORS:
            return functools.partial(self._tensors, plain, ask)
        if not only_runs(frame.f_code, frame.f_lasti):
            ask()
        return plain

    def _get(
        self, call: Call, module: nn.Module, code: CodeType, at: int, space: dict[str, Any], way: tuple[str, ...]
    ) -> None:
        key = id(call), id(module), id(code), at
        self.got.setdefault((*key, way), Got(call, module, way, code, at, space, "isinstance" in space, _place(call)))

    def _by_name(self, plain: Callable[[str], nn.Module], get: Callable[[Any], None], target: str) -> nn.Module:
        get(tuple(filter(None, target.split("."))))
        return plain(target)

    def _tensors(self, plain: Callable[..., Any], ask: Callable[[], None], *args: Any, **kwargs: Any) -> Iterator[Any]:
        """The tensors of a walk. Of the first it is known what is asked; who takes more looks at all."""
        for place, one in enumerate(plain(*args, **kwargs)):
            if place == 1:
                ask()
            self.reach("", one[1] if isinstance(one, tuple) else one)
            yield one
        ask()

    def _all(self, call: Call, module: nn.Module, which: str, code: CodeType, line: int) -> None:
        for _, part in resolve(module, (which,)):
            if id(part) in self.paths:
                self._note(call, self.paths[id(part)], WHAT, code, line, _place(call))

    def _note(
        self, call: Call, path: str, what: str, code: CodeType, line: int, place: int | None, apart: bool = False
    ) -> None:
        known = self.found.get((path, id(call), what))
        places = [*(known.places if known is not None else ()), place]
        if known is None or (known.apart and not apart):
            known = Introspection(call, call.path, what, code.co_filename, line, apart)
        self.found[path, id(call), what] = replace(known, places=list(dict.fromkeys(places)))

    def all(self) -> Iterator[tuple[str, Introspection]]:
        """The introspections, each with the path of the part that it is about."""
        for got in self.got.values():
            for one in handed(got.code, got.at):
                noted = one.helper in _NOTED or (one.helper == "isinstance" and got.typed)
                ran = not one.method or (id(got.call), one.method) in self.own
                function = in_space(one.helper, got.space)
                if noted or not ran or asks_for_geometry(function, one.place) or only_calls(function, one.place):
                    continue
                for _, part in resolve(got.module, (*got.way, *one.way)):
                    if id(part) in self.paths:
                        self._note(got.call, self.paths[id(part)], one.what, got.code, one.line, got.place)
                        self._types(got, one, part)
        yield from ((path, one) for (path, _, _), one in self.found.items())

    def _types(self, got: Got, one: Handed, part: nn.Module) -> None:
        """Note what is asked for the type of a part that a function asks which is given it: no trace sees those."""
        method = getattr(type(got.call.module), one.method, None)
        function = method or vars(got.call.module).get(one.method) or in_space(one.helper, got.space)
        for below, ask in asks(part, [(function, one.place + (method is not None))], picked=False):
            if not below and ask.what in (TYPE, CLASS):
                path = self.paths[id(part)]
                key = path, id(got.call), ask.what
                made = Introspection(got.call, got.call.path, ask.what, ask.file, ask.line)
                self.found.setdefault(key, made).places.append(got.place)
