"""What a method is called with as a trace runs: placeholders for what may be another the next time, constants else."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.utils._pytree as pytree
from torch import Tensor, nn

from structrep.errors import BadInput
from structrep.graph.observed import Arguments, Given, Part, Thing
from structrep.graph.structures import mapped
from structrep.modules.arguments import Example, as_arguments


@dataclass(frozen=True)
class Placeholder:
    """Stands for a tensor argument until there is a graph to make its placeholder in."""

    name: str
    given: Given | Thing | None = None  # what a run gave there


class Inputs(NamedTuple):
    """The arguments of a call, by position and by name, and what an example has in their placeholders, in order."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    values: list[Any]


def bind(
    module: nn.Module,
    method: str,
    given: Example | Arguments | None,
    flags: Mapping[str, Any],
    paths: Mapping[nn.Module, str],
) -> Inputs:
    """Decide what a method is called with.

    Args:
        given: an example, or what a run was seen to give; without it, placeholders for what has no default.
        flags: arguments by name, for want of an example; ... is a placeholder.
        paths: of the modules that may be among what a run gave.

    Raises:
        BadInput: the method does not take the example.
    """
    signature = inspect.signature(getattr(module, method))
    if isinstance(given, Arguments):
        return _as_called(given, signature, {path: part for part, path in paths.items()})
    if given is None:
        return Inputs(_required(signature, flags), [])
    args, kwargs = as_arguments(given)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise BadInput(f"the model's {method}{signature} does not take the example inputs: {error}") from error
    tensors: list[Tensor] = []

    def placeholder(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf)
        return Placeholder(f"input_{len(tensors)}")

    return Inputs(pytree.tree_map(placeholder, (tuple(args), dict(kwargs))), tensors)


def _required(signature: inspect.Signature, flags: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Placeholders for the parameters without a default, and the flags."""
    required = [
        p for p in signature.parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in flags
    ]  # fmt: skip
    first = next(iter(signature.parameters.values()), None)
    if not required and first is not None and first.default is None:
        required = [first]  # as in transformers, where all is optional and the first is the input
    by_name = any(name in flags and p.default is p.empty for name, p in signature.parameters.items())
    positional = tuple(Placeholder(p.name) for p in required if p.kind is not p.KEYWORD_ONLY and not by_name)
    if not positional and any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        positional = (Placeholder("input"),)  # a wrapper that hands on what it is given
    named = {p.name: Placeholder(p.name) for p in required if p.kind is p.KEYWORD_ONLY or by_name}
    more = {name: Placeholder(name) if value is ... else value for name, value in flags.items()}
    return positional, {**named, **more}


def _as_called(called: Arguments, signature: inspect.Signature, modules: Mapping[str, nn.Module]) -> Inputs:
    """Placeholders for tensors, numbers and objects, and constants for the rest."""
    values: list[Given | Thing] = []

    def placeholder(leaf: Any) -> Any:
        if isinstance(leaf, Part):
            return modules[leaf.path]
        if not isinstance(leaf, (Given, Thing)):
            return leaf
        values.append(leaf)
        return Placeholder(f"input_{len(values)}", leaf)

    return Inputs(mapped(placeholder, called.bound(signature)), values)
