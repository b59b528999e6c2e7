"""What torch's operations do with the memory that they are given, and with chance: asked of their own schemas.

The schema of an ATen operator says which arguments it writes to and which of them its result may look at; a tag says
that it draws random numbers. What has no such words is listed here:

* composite operators, and functions in Python: some give back what they were given (`dropout`, `einsum`, `type_as`).
  They may, unless a row of the table says that their result is their `OWN`: one that is missing there costs a merge,
  and never makes a wrong one. What else no schema says, of shapes and dtypes, is in the same row.
* what writes without a word: running statistics, embeddings that are renormed as they are looked up.
* modules, by the file of torch that they are from.

Nothing is known of what is not torch's own: it may write to what it is given, and give it back.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket

from structrep.graph.facts import CALL, SHARES, UNFOLLOWED, WRITES, Fact, Made
from structrep.graph.table import CASTS, QUESTIONS, Is, facts

Target = Callable[..., Any] | str  # a function, or the name of a method of tensors
AUGMENTED = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
)  # fmt: skip
_WRITES_FIRST = {"setitem", "delitem", *(function.__name__ for function in AUGMENTED)}
# Operators whose schemas do not say that they write to these arguments, if another one is given.
_UNSAID_WRITES = {
    "batch_norm": (("running_mean", "running_var"), "training"),
    "native_batch_norm": (("running_mean", "running_var"), "training"),
    "instance_norm": (("running_mean", "running_var"), "use_input_stats"),
    "embedding": (("weight",), "max_norm"),
    "embedding_bag": (("weight",), "max_norm"),
}
# Files of torch.nn whose modules give memory of their own, unless they are told to work in place.
_MAKERS = {"activation", "batchnorm", "conv", "instancenorm", "loss", "normalization", "pooling", "rnn", "sparse"}
# Modules of torch whose functions in Python do what the operators of their names do.
_HOMES = ("torch", "torch.functional", "torch._tensor", "torch.nn.functional", "torch._jit_internal", "_operator")
# Arguments with which a function gives several tensors.
_MORE = ("as_tuple", "return_indices", "return_inverse", "return_counts")
_CHANCE = ("training", "train", "dropout_p", "dropout", "p")  # arguments of 0, with which nothing is drawn


def name_of(target: Target) -> str:
    """What torch calls an operation, or an attribute of tensors; "" for those of others.

    `Tensor.__add__`, `operator.add` and `torch.add` are all `add`.
    """
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        space, _, name = _qualified(target).partition("::")
        return name if space == "aten" else ""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name in ("__get__", "__set__"):
        return str(getattr(getattr(target, "__self__", None), "__name__", ""))
    own = isinstance(target, str) or _is_torch(target)
    return (name.strip("_") if name.startswith("__") else name) if own else ""


def torch_name(node: fx.Node) -> str:
    """What torch calls the operation that a node is; "" for modules, and for functions of others."""
    own = node.op in ("call_function", "call_method") and not UNFOLLOWED.get(node)
    return name_of(node.target) if own else ""


def does(node: fx.Node, what: Is) -> bool:
    """Whether a node is an operation that is all this, in place or not."""
    name = torch_name(node)
    return bool(name) and what in facts(name) | facts(name.rstrip("_"))


def of_modules(cls: type) -> str:
    """What torch calls the operation of a class of its modules: `nn.PixelShuffle` is `pixel_shuffle`; "" for others."""
    own = (getattr(cls, "__module__", None) or "").startswith("torch.nn.modules.")
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", cls.__name__).lower() if own else ""


def module_does(module: nn.Module, what: Is) -> bool:
    """Whether a module, or one that it inherits from, is an operation that is all this."""
    return any(what in facts(of_modules(base)) for base in type(module).__mro__)


def _is_torch(target: Callable[..., Any]) -> bool:
    module = getattr(target, "__module__", None) or ""
    if isinstance(target, FunctionType):  # others, such as those of torch.masked, share no more than a name
        return module in _HOMES
    return module.partition(".")[0] in ("torch", "_operator", "builtins", "math", "")


def _qualified(target: OpOverload | OpOverloadPacket) -> str:
    name: str = target._schema.name if isinstance(target, OpOverload) else target._qualified_op_name
    return name


@functools.cache
def _overloads(target: Target) -> tuple[OpOverload, ...]:
    """The operators of tensors that a call may run; () where torch has none of that name."""
    if isinstance(target, OpOverload):
        return (target,)
    packet = target if isinstance(target, OpOverloadPacket) else getattr(torch.ops.aten, name_of(target) or " ", None)
    if not isinstance(packet, OpOverloadPacket):
        return ()
    # those of named tensors, which newer torch has no more, do what the others do
    found = (getattr(packet, name) for name in packet.overloads() if "name" not in name.lower())
    return tuple(one for one in found if "Tensor" in str(one._schema))  # others are of numbers, in TorchScript


def has_schema(target: Target) -> bool:
    """Whether all that an operation does is in schemas; what one in Python does is not."""
    return not isinstance(target, FunctionType) and bool(_overloads(target))


def _is_composite(overload: OpOverload) -> bool:
    """Whether an operator is made of others, whose memory its result may look at though its schema does not say so."""
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CompositeImplicitAutograd"))
    except RuntimeError:  # of TorchScript alone
        return False


def _aliased(argument: Any, results: Sequence[Any]) -> bool:
    """Whether one of an operator's results may look at an argument; of a list of results no schema says at which."""
    mine = argument.alias_info
    theirs = [result.alias_info for result in results if result.alias_info is not None]
    return mine is not None and any(not one.before_set or one.before_set & mine.before_set for one in theirs)


@functools.cache
def _marked(target: Target) -> tuple[frozenset[int | str], frozenset[int | str], frozenset[str]]:
    """The arguments that the result of an operator may look at, and those it writes to, by place and name; all names.

    Arguments by name alone, such as `out`, count by name.
    """
    shared: set[int | str] = set()
    written: set[int | str] = set()
    names: set[str] = set()
    for overload in _overloads(target):
        for place, argument in enumerate(overload._schema.arguments):
            keys: set[int | str] = {argument.name, *(() if argument.kwarg_only else (place,))}
            keys |= {"input"} if argument.name == "self" else set()
            names |= {key for key in keys if isinstance(key, str)}
            if _aliased(argument, overload._schema.returns):
                shared |= keys
            if argument.alias_info is not None and argument.alias_info.is_write:
                written |= keys
    return frozenset(shared), frozenset(written), frozenset(names)


@functools.cache
def _may_share(target: Target) -> bool:
    """Whether an operation may give back any memory that it is given: its schema does not say, or there is none."""
    name = name_of(target)
    if Is.VIEW in facts(name):
        return True
    overloads = _overloads(target)
    return Is.OWN not in facts(name) and (not overloads or any(map(_is_composite, overloads)))


@functools.cache
def _defaults(target: Target) -> dict[str, Any]:
    """The arguments of an operation by name, in order; of its first operator, if it is no function in Python."""
    if isinstance(target, FunctionType):
        whole = getattr(F, f"{name_of(target)}_with_indices", target)  # of which there is one for each answer
        return {one.name: one.default for one in inspect.signature(whole).parameters.values()}
    return {a.name: a.default_value for one in _overloads(target)[:1] for a in one._schema.arguments}


def _named(target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    defaults = _defaults(target)
    return {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    return pytree.tree_leaves(list(args[:1]) or dict(kwargs))


def _at(
    marks: frozenset[int | str], names: frozenset[str], target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any]:
    """The arguments that are marked in a schema, and those of names that no schema has."""
    if isinstance(target, FunctionType):  # whose arguments may be in another order
        given = _named(target, args, kwargs)
        by_name = not any(isinstance(one, int) for one in marks)
        return pytree.tree_leaves([given.get(str(one)) for one in marks] if by_name else (args, dict(kwargs)))
    named = [value for key, value in kwargs.items() if key in marks or key not in {*names, "out"}]
    return pytree.tree_leaves([*(value for place, value in enumerate(args) if place in marks), *named])


def written(target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call overwrites of what it is given, or may."""
    name, plain = name_of(target), target if isinstance(target, str) else getattr(target, "__name__", "")
    _, marks, names = _marked(target)
    if not (name or _overloads(target)):
        return pytree.tree_leaves((args, dict(kwargs)))
    found = [*_at(marks, names, target, args, kwargs), *pytree.tree_leaves(kwargs.get("out", ()))]
    ends = plain.endswith("_") and not plain.endswith("__") and getattr(target, "__module__", "") != "_operator"
    in_place = "inplace" in _defaults(target) and _named(target, args, kwargs)["inplace"] is not False
    if ends or in_place or name in _WRITES_FIRST:
        found += _first(args, kwargs)
    if name in _UNSAID_WRITES:
        given = _named(target, args, kwargs)
        arguments, asked = _UNSAID_WRITES[name]
        found += [given.get(one) for one in arguments] if given.get(asked) else []
    return found


def shared(target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call's result may look at of what it is given, or hold."""
    if target is getattr:
        return [] if args[1] in QUESTIONS else [args[0]]
    if name_of(target) == "getitem":
        return _first(args, kwargs)
    if getattr(target, "__module__", "") == "_operator" and any(map(_is_sequence, args)):
        return pytree.tree_leaves(args)  # tuples, added up
    if _may_share(target):
        return pytree.tree_leaves((args, dict(kwargs)))
    marks, _, names = _marked(target)
    return [*_at(marks, names, target, args, kwargs), *written(target, args, kwargs)]


def _is_sequence(value: Any) -> bool:
    """Whether a value is several tensors, or may be."""
    if isinstance(value, fx.Node):
        known = value.op in ("call_function", "call_method") and not UNFOLLOWED.get(value)
        return _given(value.target) == "several" if known else bool(UNFOLLOWED.get(value))
    return isinstance(value, (list, tuple))


def _tagged(target: Target, tag: str) -> bool:
    return any(getattr(torch.Tag, tag) in overload.tags for overload in _overloads(target))


def draws(target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call draws random numbers."""
    if not _tagged(target, "nondeterministic_seeded"):
        return False
    given = _named(target, args, kwargs)
    return not any(isinstance(given.get(name), (bool, float)) and not given[name] for name in _CHANCE)


def is_pointwise(target: Target) -> bool:
    """Whether an operation makes each number of the numbers at its place."""
    return _tagged(target, "pointwise")


@functools.cache
def _is_elementwise(target: Target) -> bool:
    """Whether an operation, whatever it is given beside a tensor, makes each number of the one at its place."""
    overloads = _overloads(target)
    return bool(overloads) and all(torch.Tag.pointwise in one.tags for one in overloads) and _given(target) == "tensor"


def keeps_shape(node: fx.Node) -> bool:
    """Whether a node gives a value of the shape of the first one that it is given."""
    alone = len(node.all_input_nodes) == 1  # several are brought to one shape
    return does(node, Is.SHAPE) or (alone and bool(torch_name(node)) and _is_elementwise(node.target))


def reshapes(target: Target) -> bool:
    """Whether an operation gives the very tensor that it is given another shape."""
    return _tagged(target, "inplace_view")


def moves(target: Target) -> bool:
    """Whether an operation gives the very tensor that it is given other memory."""
    return reshapes(target) and name_of(target) in ("set_", "resize_", "resize_as_", "resize_as_sparse_")


def gives(target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """What a call gives: "tensor", "several" of them, "number", or "" where that cannot be told."""
    given = _named(target, args, kwargs)
    more = any(given.get(name) not in (None, False, inspect.Parameter.empty) for name in _MORE)
    return "several" if more and (name_of(target) or _overloads(target)) else _given(target)


@functools.cache
def _given(target: Target) -> str:
    overloads = _overloads(target)
    function = getattr(torch.Tensor, target, None) if isinstance(target, str) else target
    if isinstance(function, FunctionType) and inspect.unwrap(function) is function:  # no method that a trace exchanges
        hint = str(inspect.signature(function).return_annotation)
        known = _defaults(function)
        if any(name in known for name in _MORE) or hint in ("Tensor", "torch.Tensor", str(torch.Tensor)):
            return "tensor"  # it gives more if it is told to
        if "args" in known:  # one of several functions, by what it is told
            return ""
    found = {_kind(overload._schema.returns) for overload in overloads} or {
        "tensor" if name_of(target) in CASTS else ""
    }
    return found.pop() if len(found) == 1 else ""


def _kind(results: Sequence[Any]) -> str:
    kinds = [str(result.type) for result in results]
    if kinds == ["Tensor"]:
        return "tensor"
    return "several" if kinds and all("Tensor" in kind for kind in kinds) else "number"


def writes(node: fx.Node) -> set[fx.Node]:
    """The inputs that a node overwrites in place, or may."""
    return _kept(node, WRITES, _writes)


def shares(node: fx.Node) -> set[fx.Node]:
    """The inputs whose memory a node may give, or hold."""
    return _kept(node, SHARES, _shares)


def _kept(node: fx.Node, fact: Fact[Made], made: Callable[[fx.Node], set[fx.Node]]) -> set[fx.Node]:
    """What is made of a node, made once for as long as it has these arguments: aliases are followed over and over."""
    if fact.known(node):
        args, kwargs, found = fact.of(node)
        if args is node.args and kwargs is node.kwargs:
            return found
    fact.note(node, (node.args, node.kwargs, made(node)))
    return fact.of(node)[2]


def _writes(node: fx.Node) -> set[fx.Node]:
    if rearranges(node):
        return set()
    if node.op == "call_module":
        in_place = getattr(CALL.of(node).module, "inplace", False)
        found = _first(node.args, node.kwargs) if in_place else []
    else:
        found = written(node.target, node.args, node.kwargs) if node.op.startswith("call") else []
    return _nodes([*found, *(node.all_input_nodes if UNFOLLOWED.get(node) else ())])


def rearrangers() -> set[FunctionType]:
    """einops' one function, whatever is called of it, if it is loaded: it looks up what it is given by type, so that no
    traced value goes through."""
    einops = sys.modules.get("einops.einops")
    return {einops.reduce} if einops is not None else set()


def rearranging_layers() -> set[type[nn.Module]]:
    """einops' layers, which do the same."""
    layers = sys.modules.get("einops.layers.torch")
    return {layers.Rearrange, layers.Reduce} if layers is not None else set()


def rearranges(node: fx.Node) -> bool:
    """Whether a node is a call of einops that only moves or averages numbers."""
    if node.op == "call_module":
        module = CALL.of(node).module
        return type(module) in rearranging_layers() and getattr(module, "reduction", "mean") == "mean"
    told = node.kwargs.get("reduction", node.args[2] if len(node.args) > 2 else None)
    return node.target in rearrangers() and told in ("rearrange", "repeat", "mean")


def rearranged_ranks(node: fx.Node) -> tuple[int, int] | None:
    """How many dims a call of einops takes and gives, by its pattern; None if that leaves it open, or it is none."""
    if not rearranges(node):
        return None
    pattern = CALL.of(node).module.pattern if node.op == "call_module" else next(iter(node.args[1:]), None)
    if not isinstance(pattern, str) or "." in pattern or "\u2026" in pattern:
        return None
    taken, _, given = re.sub(r"\([^)]*\)", "_", pattern).partition("->")
    return len(taken.split()), len(given.split())


def _shares(node: fx.Node) -> set[fx.Node]:
    inputs = set(node.all_input_nodes)
    if UNFOLLOWED.get(node):
        return inputs
    if node.op == "call_module":
        return writes(node) if _makes(CALL.of(node).module) else inputs
    return _nodes(shared(node.target, node.args, node.kwargs)) if node.op.startswith("call") else set()


def _nodes(values: list[Any]) -> set[fx.Node]:
    return {one for one in values if isinstance(one, fx.Node)}


def _makes(module: nn.Module) -> bool:
    """Whether a module gives memory of its own, if it does not write to its input: torch's own, run as it is."""
    for base in type(module).__mro__:
        space, _, file = (getattr(base, "__module__", None) or "").rpartition(".")
        if space == "torch.nn.modules" and base.forward is type(module).forward:  # type: ignore[attr-defined]
            return file in _MAKERS or base.__name__ in ("Linear", "Bilinear")
    return False
