"""ExpandNets: Linear Over-parameterization to Train Compact Convolutional Networks. Guo et al., NeurIPS 2020,
arXiv:1811.10495.

Training time: chains without anything between. CL: a 1x1 that expands the channels, the kxk, a 1x1 that reduces them
(section 3.1). CK: a large kxk as a chain of 3x3 (section 3.2). A Linear as a chain of Linears (section 3.3). The
padding is on the first of the chain; anywhere later the border pixels would differ and the algebra refuses.
"""

from structrep.algebra import ConvMap
from structrep.blocks import ExpandConv2d, ExpandLinear
from structrep.pattern import Conv, Many, Seq, pointwise, spatial
from structrep.registry import rule


@rule(
    Seq(Conv(pointwise).named("expand"), Conv(spatial).named("conv"), Conv(pointwise).named("reduce")),
    source="ExpandNets (CL), arXiv:1811.10495, section 3.1",
    example=lambda: ExpandConv2d(4, 8, 3, padding=1, rate=2),
)
def expandnet(expand: ConvMap, conv: ConvMap, reduce: ConvMap) -> ConvMap:
    return expand >> conv >> reduce


@rule(
    Seq(Conv(spatial).named("first"), Many(Conv(spatial)).named("rest")),
    source="ExpandNets (CK), arXiv:1811.10495, section 3.2",
    example=lambda: ExpandConv2d(4, 8, 7, padding=3, rate=2, mode="ck"),
)
def expandnet_ck(first: ConvMap, rest: list[ConvMap]) -> ConvMap:
    for conv in rest:
        first = first >> conv
    return first


@rule(
    Seq(Conv(pointwise).named("expand"), Conv(pointwise).named("middle"), Conv(pointwise).named("reduce")),
    source="ExpandNets (FC), arXiv:1811.10495, section 3.3",
    example=lambda: ExpandLinear(8, 4, rate=2),
)
def expandnet_fc(expand: ConvMap, middle: ConvMap, reduce: ConvMap) -> ConvMap:
    return expand >> middle >> reduce
