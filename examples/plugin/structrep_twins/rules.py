"""The rule: a pattern, a line, an example."""

from structrep import ConvMap, rule
from structrep.pattern import Conv, Norm, Scalar, Seq, Sum, spatial
from structrep_twins import Twins

BRANCH = Seq(Conv(spatial), Norm())


@rule(
    Seq(Sum(BRANCH.named("left"), BRANCH.named("right")), Scalar().named("half")),
    source="this example",
    example=lambda: Twins(4),
)
def twins(left: ConvMap, right: ConvMap, half: ConvMap) -> ConvMap:
    return (left + right) >> half
