"""ExpandNets: Linear Over-parameterization to Train Compact Convolutional Networks. Guo et al., NeurIPS 2020,
arXiv:1811.10495.

Training time: chains without anything between. CL: a 1x1 that expands the channels, the kxk, a 1x1 that reduces them
(section 3.1). CK: a large kxk as a chain of 3x3 (section 3.2). A Linear as a chain of Linears (section 3.3). The
padding is on the first of the chain; anywhere later the border pixels would differ and the algebra refuses.
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import DOConv2d, ExpandConv2d, ExpandLinear
from structrep.pattern import Conv, Many, Seq, pointwise, spatial
from structrep.registry import rule
from structrep.terms.layer import Formula


@rule(
    Seq(Conv(pointwise).named("expand"), Conv(spatial).named("conv"), Conv(pointwise).named("reduce")),
    source="ExpandNets (CL), arXiv:1811.10495, section 3.1",
    example=lambda: ExpandConv2d(4, 8, 3, padding=1, rate=2),
    counter_examples=[
        ("Inexact", lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 1))),
        ("Costlier", lambda: nn.Sequential(nn.Conv2d(16, 2, 1), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 16, 1))),
    ],
    published="The authors' (GUOShuxuan/expandnets at 065d4d3) forgets the first bias where the second layer has none.",
)
def expandnet(expand: ConvMap, conv: ConvMap, reduce: ConvMap) -> ConvMap:
    return expand >> conv >> reduce


def chain_of_kernels(formula: Formula) -> bool:
    """Kernels composed by a transposed convolution."""
    return any(name.startswith("conv_transpose") for name in formula.calls)


@rule(
    Conv(formula=chain_of_kernels).named("conv"),
    source="ExpandNets, arXiv:1811.10495, section 3",
    example=lambda: ExpandConv2d(4, 8, 3, padding=1, rate=2, online=True),
    counter_examples=[("", lambda: DOConv2d(8, 8, 3, padding=1))],
)
def expandnet_computed(conv: ConvMap) -> ConvMap:
    return conv


@rule(
    Seq(Conv(spatial).named("first"), Many(Conv(spatial)).named("rest")),
    source="ExpandNets (CK), arXiv:1811.10495, section 3.2",
    example=lambda: ExpandConv2d(4, 8, 7, padding=3, rate=2, mode="ck"),
    counter_examples=[
        ("Inexact", lambda: nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 8, 3, padding=1))),
    ],
)
def expandnet_ck(first: ConvMap, rest: list[ConvMap]) -> ConvMap:
    for conv in rest:
        first = first >> conv
    return first


@rule(
    Seq(Conv(pointwise).named("expand"), Conv(pointwise).named("middle"), Conv(pointwise).named("reduce")),
    source="ExpandNets (FC), arXiv:1811.10495, section 3.3",
    example=lambda: ExpandLinear(8, 4, rate=2),
    counter_examples=[("Costlier", lambda: nn.Sequential(nn.Linear(16, 2), nn.Linear(2, 2), nn.Linear(2, 16)))],
)
def expandnet_fc(expand: ConvMap, middle: ConvMap, reduce: ConvMap) -> ConvMap:
    return expand >> middle >> reduce
