"""What is to be changed in a method, and the change, in terms of its syntax."""

from __future__ import annotations

import ast
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A text whose value becomes that of a layer, or of what that would be given.

    Args:
        text: whose value it is.
        value: a number for that value.
        base: the number of the value that the layer is given.
        layer: the name of the layer in its module; None to hand on the base.
        gone: the texts that the layer does the work of.
    """

    text: ast.AST
    value: int
    base: int
    layer: str | None
    gone: frozenset[ast.AST]


@dataclass(frozen=True)
class Wanted:
    """What is to be changed in a method, in terms of its syntax.

    Args:
        pieces: the texts to replace.
        gone: the texts that are computed no more.
        free: those that do nothing, and may stay or vanish.
        kept: all other texts that were seen to do something.
        values: texts, arguments by name, and "return", with the numbers of the values that they were seen to have.
        parts: the modules and tensors of the module by path, and whether they are there.
        libraries: names of torch's modules, and of others without effects.
        settings: names of plain values outside of the method.
        changed: the numbers of values that will be others.
        turned: those of them with channels in an order of their own.
        answers: conditions on what the module is set to, and the answers that they have.
        misused: texts that may use some of what is merged without the rest.
        computed: names of what the module's class computes when it is asked for; "*" if it may be any.
        calm: paths of parts, and names of methods, that surely write to nothing that they are given, nor set anything.
        computing: paths of methods of the module, and of its parts, that only compute.
        functions: names of torch's functions that write to nothing.
        altered: names of methods of the module, and of others, that give or take other values then.
        takers: texts that stay, and take values that will be others, with the numbers of these.
    """

    pieces: tuple[Piece, ...]
    gone: frozenset[ast.AST]
    free: frozenset[ast.AST]
    kept: frozenset[ast.AST]
    values: tuple[tuple[ast.AST | str, frozenset[int]], ...]
    parts: frozenset[tuple[str, bool]]
    libraries: frozenset[str]
    settings: frozenset[str]
    changed: frozenset[int]
    turned: frozenset[int]
    answers: tuple[tuple[ast.expr, bool], ...]
    misused: frozenset[ast.AST]
    altered: tuple[frozenset[str], frozenset[str]]
    takers: tuple[tuple[ast.AST, int], ...]
    calm: frozenset[str]
    computed: frozenset[str]
    computing: frozenset[str]
    functions: frozenset[str]


@dataclass(frozen=True)
class Edited:
    """A method's text, changed.

    Args:
        before, after: the lines of its definition.
        line: the number of the first in its file.
        vanished: the syntax that is no more, and what stays of that which it went by.
        stays: the syntax that may run still.
        assumed: conditions that have to have the answers still that they had.
        sums: how many additions of 0 are left.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    file: str
    line: int
    vanished: frozenset[ast.AST]
    stays: frozenset[ast.AST]
    assumed: tuple[ast.expr, ...]
    sums: int
