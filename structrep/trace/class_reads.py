"""What methods ask the class of their module for, by their instructions."""

from __future__ import annotations

import dis
import inspect
import itertools
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType

from torch import nn

from structrep.graph.reads import MISSING, PLACEHOLDER, Read
from structrep.modules.source import functions, functions_in
from structrep.trace.instructions import instructions_of


def is_type(one: dis.Instruction) -> bool:
    return one.opname == "LOAD_GLOBAL" and one.argval == "type"


def class_reads(codes: Iterable[CodeType], module: nn.Module) -> Iterator[Read]:
    """What methods of a module ask its class for: `type(self).name`, or `cls.name` in a class method."""
    codes = list(codes)
    own = {function.__code__ for f in functions(type(module)).values() for function in functions_in(f)}
    for code in (one for one in codes if one in own and one.co_argcount):
        for inner in (code, *(one for one in code.co_consts if isinstance(one, CodeType))):
            plain = [one for one in instructions_of(inner)[0] if one.opname not in ("PRECALL", "RESUME", "PUSH_NULL")]
            for asks, given, call, then in zip(plain, plain[1:], plain[2:], plain[3:], strict=False):
                if is_type(asks) and given.argval == code.co_varnames[0] and call.opname == "CALL":
                    yield from _of_its_class(then, module)
    for name in sorted({name for code in codes for name in code.co_names}):
        method = inspect.getattr_static(type(module), name, None)
        of_class = method.__func__.__code__ if isinstance(method, classmethod) else None
        steps = instructions_of(of_class)[0] if of_class is not None and of_class.co_argcount else ()
        for given, then in itertools.pairwise(steps):
            if given.opname.startswith("LOAD_FAST") and given.arg == 0:  # what it is given first
                yield from _of_its_class(then, module)


def _of_its_class(step: dis.Instruction, module: nn.Module) -> Iterator[Read]:
    """What an instruction asks the class of a module for, which is no function."""
    told = getattr(type(module), step.argval, MISSING) if step.opname == "LOAD_ATTR" else MISSING
    if told is not MISSING and not isinstance(told, (FunctionType, MethodType, property)):
        yield Read(module, f"type({PLACEHOLDER}).{step.argval}", told, counts=False)
