"""What a trace is: its graph, the calls that made its nodes, and how its constants came about."""

from __future__ import annotations

import functools
import inspect
import linecache
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from structrep.errors import Untraceable
from structrep.graph.contexts import Context
from structrep.graph.facts import CALL
from structrep.graph.observed import Observed
from structrep.graph.reads import Read
from structrep.graph.specializations import Specialization


@dataclass(eq=False)
class Call:
    """One call of a module during a trace, or of a method of a module on a traced value."""

    module: nn.Module
    path: str
    parent: Call | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaf: bool
    method: str = "forward"
    function: Callable[..., Any] = field(default=lambda: None, repr=False)  # the bound method
    result: Any = None
    settings: dict[str, Any] = field(default_factory=dict)  # of a layer, when it was called
    inlined: bool = False  # a method called from several places, or given weights: part of each of its callers
    written: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)  # arguments it wrote in place: before, after
    mutates: bool = False  # whether it changed what it was given, or its own module
    steps: list[fx.Node | Call] = field(default_factory=list)  # what its forward did, in order
    reads: dict[tuple[str, str], Read] = field(default_factory=dict)  # what it asked for, by whose it is and how
    codes: dict[CodeType, dict[str, Any]] = field(default_factory=dict)  # the code that asked, and its namespace
    # methods that were given no value, and what those may call, by code, with the module whose they are and its path
    functions: dict[CodeType, tuple[FunctionType, nn.Module, str]] = field(default_factory=dict)
    held: dict[fx.Node, set[CodeType]] = field(default_factory=dict)  # values that code of no call had as it asked
    at: int | None = None  # the instruction of its parent's code that it is called by, if that code itself calls it
    contexts: tuple[Context, ...] = ()  # that it is called in
    specializations: list[Specialization] = field(default_factory=list)  # what its code was told of its input

    @property
    def code(self) -> Callable[..., Any]:
        """The function that runs, apart from what it is bound to."""
        function = self.function
        while isinstance(function, functools.partial):
            function = function.func
        return getattr(function, "__func__", function)

    @functools.cached_property  # it is asked for at every question
    def bytecode(self) -> CodeType | None:
        """What Python runs of that function, whatever decorators are around it; None of one that is not Python's."""
        return getattr(inspect.unwrap(self.code), "__code__", None)

    @property
    def shown(self) -> str:
        """Whose method it is, by the names of class and method."""
        return f"{type(self.module).__name__}.{self.method}"

    def chain(self) -> Iterator[Call]:
        """This call and those around it, innermost first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent

    def homes(self) -> Iterator[Call]:
        """The calls around what this call does whose forward could be written anew, innermost first."""
        return (call for call in self.chain() if not call.leaf and not call.inlined)

    def nodes(self) -> Iterator[fx.Node]:
        """All nodes made inside, in order."""
        for step in self.steps:
            if isinstance(step, fx.Node):
                yield step
            else:
                yield from step.nodes()

    def all_calls(self) -> Iterator[Call]:
        """This call and those inside that are no single layers."""
        yield self
        for step in self.steps:
            if isinstance(step, Call) and not step.leaf:
                yield from step.all_calls()

    def observed(self) -> Iterator[tuple[Call, Specialization]]:
        """What it, and what it calls, was told that may be otherwise for another input, and is not asserted."""
        return ((call, one) for call in self.all_calls() for one in call.specializations if not one.asserted)

    @functools.cached_property
    def counted(self) -> bool:
        """Whether anything that was done where it was traced, a number of rounds for instance, may hang on that."""
        (*_, root) = self.chain()
        return root.counted if root is not self else next(self.observed(), None) is not None

    def arguments(self) -> dict[str, Any]:
        """What it was given, by parameter."""
        return dict(inspect.signature(self.function).bind(*self.args, **self.kwargs).arguments)

    def holds(self, node: fx.Node) -> bool:
        return any(call is self for call in CALL.of(node).chain())


def site(call: Call) -> tuple[str, str]:
    """Whose method a call is of; the same for every trace."""
    return call.path, call.method


@dataclass(frozen=True)
class Introspection:
    """Something that code asked about a part of the model, beside running it, or may ask.

    Args:
        asker: the call that ran; None of code that is not followed.
        by: the path of the module whose forward it is.
        what: the attribute; what it is, of a part that was handed to somebody.
        file, line: where that stands.
        apart: whether a function asked it that is no method of the module.
        places: the instructions of the asker's code by which it came to that; None where that is not known.
    """

    asker: Call | None
    by: str
    what: str
    file: str
    line: int
    apart: bool = False
    places: list[int | None] = field(default_factory=list, compare=False)

    @property
    def question(self) -> tuple[str, str, str, int]:
        """What is asked where, whichever call it is that asks."""
        return self.by, self.what, self.file, self.line

    def said_of(self, path: str) -> str:
        """The introspection of the part at a path, with the line that asks it."""
        where = f"{self.file}:{self.line}: {linecache.getline(self.file, self.line).strip()}"
        return f"{self.by or 'the model'} asks for {self.what} of {path} ({where})"


@dataclass(eq=False)
class Trace:
    """The flat graph of one module: all that could be followed below it, and the calls that made it."""

    path: str
    graph: fx.Graph
    root: Call
    calls: list[Call]
    opaque: Set[type[nn.Module]] = frozenset()  # module types and functions that were kept whole
    whole: Set[FunctionType] = frozenset()

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)


@dataclass(frozen=True)
class Entry:
    """A plain tensor that stands in a dict, a list or an object which a module holds.

    Args:
        holder: path of the module.
        steps: how it is got from there: "." and an attribute, "[" and a key, each.
    """

    holder: str
    steps: tuple[tuple[str, Any], ...]

    @property
    def text(self) -> str:
        """How it is asked for, behind the module."""
        return "".join(f".{key}" if how == "." else f"[{key!r}]" for how, key in self.steps)

    @property
    def alias(self) -> str:
        """A name for it among the attributes of its holder."""
        words = "_".join(str(key) for _, key in self.steps)
        return "reparam_" + "".join(c if c.isalnum() else "_" for c in words)

    def of(self, model: nn.Module) -> Any:
        found: Any = model.get_submodule(self.holder)
        for how, key in self.steps:
            found = getattr(found, key) if how == "." else found[key]
        return found


@dataclass(eq=False)
class Traced:
    """All traces of a model."""

    model: nn.Module  # the throwaway copy: same names, same storage
    names: dict[int, str]  # id of a tensor that the model holds -> its path
    entries: dict[int, Entry] = field(default_factory=dict)  # id of one in a dict, a list or an object that it holds
    traces: list[Trace] = field(default_factory=list)
    untraced: dict[str, Untraceable] = field(default_factory=dict)  # module path -> why it was left whole
    assumed: dict[str, Untraceable] = field(default_factory=dict)  # module path -> why it was followed on one way alone
    unfollowed: dict[FunctionType, tuple[str, Untraceable]] = field(default_factory=dict)  # kept whole: by whom, why
    calls: dict[tuple[nn.Module, str], list[Call]] = field(default_factory=lambda: defaultdict(list))  # by method
    origins: dict[int, Origin] = field(default_factory=dict)  # id of a computed constant -> how it was computed
    written: set[int] = field(default_factory=set)  # storages of constants that were also written in place
    observed: Observed = field(default_factory=Observed)  # what the parts of the model are given as it runs
    handled: dict[str, str] = field(default_factory=dict)  # path of a module -> a module whose code, which cannot be
    # followed, was seen to call it
    guessed: set[Call] = field(default_factory=set)  # calls of parts of which no run told how they are called
    whole: set[str] = field(default_factory=set)  # paths of modules of whose code some is not followed
    reached: dict[str, set[Call]] = field(
        default_factory=dict
    )  # path of a child or tensor -> forwards of others using it

    # path of a part -> what was asked about it
    introspections: dict[str, list[Introspection]] = field(default_factory=lambda: defaultdict(list))
    told: dict[str, set[Call]] = field(default_factory=dict)  # and by those that ask no more than a dtype or a device
    handed: dict[Any, Any] = field(default_factory=dict)  # what was found to hang on answers, for calls that are alike
    # which objects change as a method runs, by its path and name (`states.Holdings.changes`); and which of them were
    # looked at after each call, to know which call changes them
    changes: dict[tuple[str, str], frozenset[int]] = field(default_factory=dict)
    watched: Mapping[tuple[str, str], frozenset[int]] | None = None

    def above(self, calls: Iterable[Call]) -> list[Call]:
        """The calls of modules around those of some calls that no run was seen to make: they may make them."""
        guessed = [one for one in calls if one in self.guessed]
        ways = {one.path[:end] for one in guessed for end, mark in enumerate(one.path) if mark == "."}
        ways |= {""} if guessed else set()
        return [one for made in self.calls.values() for one in made if one.path in ways and not one.leaf]

    def plain(self, tensor: Any) -> Entry | None:
        """Where a tensor stands that is an attribute of a module, or in one, and neither parameter nor buffer."""
        holder, _, name = self.names.get(id(tensor), "").rpartition(".")
        own = name in vars(self.model.get_submodule(holder))
        return Entry(holder, ((".", name),)) if own else self.entries.get(id(tensor))


@dataclass(eq=False)
class Origin:
    """How a constant was computed from parameters, buffers and numbers."""

    result: Tensor
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    contexts: tuple[Context, ...] = ()  # that it was computed in
    item: int | None = None  # which it is of several that the function gives

    def again(self, args: Any, kwargs: Any) -> Any:
        """What the function gives for other arguments."""
        found = self.function(*args, **kwargs)
        return found if self.item is None else found[self.item]

    @property
    def given(self) -> list[Tensor]:
        """The tensors that it was computed from, in one step."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


@dataclass(eq=False)
class Method:
    """What a method of a module was seen to do: its calls, and what they use of others otherwise than by calling."""

    calls: list[Call]
    reached: dict[str, set[tuple[str, str]]]  # by path, who uses it: a module's path, and its method
    introspected: dict[str, set[tuple[str, str, str, int]]]  # what it asks of parts, by path
    forwards: dict[str, list[Call]] = field(default_factory=dict)  # calls of modules, by their paths

    def __post_init__(self) -> None:
        for call in self.calls:
            if call.method == "forward":
                self.forwards.setdefault(call.path, []).append(call)


def storage(tensor: Tensor) -> int:
    """Which memory a tensor looks at; of a sparse one, which has several, the tensor."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)
