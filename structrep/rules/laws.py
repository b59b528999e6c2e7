"""The laws: merges that hold for every term, whether a paper named them or not.

Tried after all families. The merged map of a law is the value of the term itself.
"""

from functools import reduce

from structrep import algebra
from structrep.algebra import ConvMap
from structrep.pattern import Affine, Anything, Concat, Conv, Many, Optional, Seq, Sum, View
from structrep.registry import default
from structrep.terms.layer import Formula


def computed(formula: Formula) -> bool:
    """Computed from parameters alone, whatever the formula."""
    return True


@default.law(Conv(formula=computed).named("conv"), source="what depends on parameters alone is a constant")
def constant_kernel(conv: ConvMap) -> ConvMap:
    return conv


@default.law(
    Seq(Anything().named("map"), Affine().named("norm"), Optional(View())),
    source="associativity: scale and shift of the outputs",
)
def fold_norm(map: ConvMap, norm: ConvMap) -> ConvMap:
    return map >> norm


@default.law(
    Seq(Affine().named("norm"), Anything().named("map")), source="associativity: scale and shift of the inputs"
)
def fold_prenorm(norm: ConvMap, map: ConvMap) -> ConvMap:
    return norm >> map


@default.law(Sum(Many(Anything()).named("branches")), source="additivity: branches on one input")
def branches(branches: list[ConvMap]) -> ConvMap:
    return reduce(lambda a, b: a + b, branches)


@default.law(Concat(Many(Anything()).named("branches")), source="concatenation: branches on one input, stacked")
def concat(branches: list[ConvMap]) -> ConvMap:
    return algebra.concat(branches)


@default.law(Seq(Anything().named("first"), Anything().named("second")), source="associativity: maps in a chain")
def chain(first: ConvMap, second: ConvMap) -> ConvMap:
    return first >> second
