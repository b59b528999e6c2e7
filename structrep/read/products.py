"""Products of a value with a matrix, whichever way they are written."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from structrep.graph.constants import constant, exact
from structrep.graph.shapes import rank
from structrep.read.arguments import Arguments, reads
from structrep.read.functions import stacked
from structrep.terms.layer import Layer, Sum
from structrep.terms.layers import channel_mix_layer, linear_layer


@reads(F.linear)
def _(a: Arguments) -> Layer | None:
    weight = a.tensor(1, "weight")
    return None if weight is None or weight.ndim != 2 else linear_layer(weight, a.tensor(2, "bias"))


@reads(torch.addmm, "addmm")
def _(a: Arguments) -> Layer | None:
    bias, weight = constant(a(0, "input")), constant(a(2, "mat2"))
    if not isinstance(bias, Tensor) or not isinstance(weight, Tensor) or bias.shape != weight.shape[1:]:
        return None
    return None if a.node.kwargs.keys() & {"alpha", "beta"} else channel_mix_layer(weight, weight.T, 0, bias)


def _weighed(a: Arguments, weight: Any, value: Any, dim: int) -> Sum | None:
    """A sum of values that are stacked along a dim, each with its number of a weight, (count,)."""
    numbers, stack = exact(weight), stacked(value, a)
    if stack is None or stack[1] != dim or not isinstance(numbers, Tensor) or numbers.shape != (len(stack[0]),):
        return None
    told = numbers.detach().double().tolist()
    return Sum(tuple(zip(stack[0], told, strict=True)), (value,))


@reads(torch.tensordot)
def _(a: Arguments) -> Layer | Sum | None:
    weight, dims = constant(a(1, "b")), a(2, "dims", 2)
    if dims == 1 and (found := _weighed(a, a(0, "a"), a(1, "b"), 0)) is not None:
        return found
    last = dims in (1, ([-1], [0]), ((-1,), (0,))) and isinstance(weight, Tensor) and weight.ndim == 2
    return channel_mix_layer(weight, weight.T, 0) if last else None  # type: ignore[arg-type, union-attr]


@reads(operator.matmul, torch.matmul, "matmul", torch.mm, "mm")
def _(a: Arguments) -> Layer | None:
    left, right = a.pair()
    before, behind = constant(left), constant(right)
    if isinstance(behind, Tensor) and behind.ndim == 2:
        return channel_mix_layer(behind, behind.T, 0)
    batches = isinstance(before, Tensor) and before.ndim == 2 and isinstance(right, fx.Node) and rank(right) == 3
    return channel_mix_layer(before, before, 1) if batches else None  # type: ignore[arg-type]


@reads(torch.einsum)
def _(a: Arguments) -> Layer | Sum | None:
    equation, *operands = a.node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    weights = [index for index, operand in enumerate(operands) if isinstance(constant(operand), Tensor)]
    if not isinstance(equation, str) or len(operands) != 2 or len(weights) != 1:
        return None
    weight = constant(operands[weights[0]])
    given, _, result = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    letters, value = terms[weights[0]], terms[1 - weights[0]]
    assert isinstance(weight, Tensor)
    if len(letters) == 1 and value.count(letters) == 1 and value.replace(letters, "") == result:
        return _weighed(a, operands[weights[0]], operands[1 - weights[0]], value.index(letters))
    mixed, made = set(letters) & set(value), set(letters) - set(value)
    if not len(letters) == weight.ndim == len(mixed | made) == 2 or len(mixed) != 1:
        return None
    (channel,), (out,) = mixed, made
    if value.replace(channel, out) != result or value.count(channel) != 1:
        return None
    matrix = weight if letters == out + channel else weight.T
    if value.endswith(channel):
        return channel_mix_layer(weight, matrix, 0)
    plain = value.find(channel) == 1 and value.isalpha() and len(set(value)) == len(value)
    return channel_mix_layer(weight, matrix, len(value) - 2) if plain and len(value) <= 5 else None
