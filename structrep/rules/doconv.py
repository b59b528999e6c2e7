"""DO-Conv: Depthwise Over-parameterized Convolutional Layer. Cao et al., IEEE TIP 2022, arXiv:2006.12030.

Training time: one convolution whose kernel is the contraction of a depthwise kernel D (D_mul x k*k per input
channel) with a conventional one W (section 3.2, kernel composition). It depends on parameters alone, so it is
evaluated once, by the block's own code: the pairing of channels with D in grouped forms is that of a reshape, which
only running it gets right.
"""

from structrep.algebra import ConvMap
from structrep.blocks import DiracConv2d, DOConv2d
from structrep.pattern import Conv
from structrep.registry import rule
from structrep.rules.formulas import CONTRACTIONS, NORMS
from structrep.terms.layer import Formula


def contracted(formula: Formula) -> bool:
    """Two or three parameters contracted to a kernel, none normalised."""
    return bool(formula.calls & CONTRACTIONS and not formula.calls & NORMS and 1 < len(formula.parameters) < 4)


@rule(
    Conv(formula=contracted).named("conv"),
    source="DO-Conv, arXiv:2006.12030, section 3.2",
    example=lambda: DOConv2d(8, 8, 3, padding=1),
    counter_examples=[("", lambda: DiracConv2d(8, 8, 3, padding=1))],
    published="The authors' (yangyanli/DO-Conv at 66fa862) is a script for one network of three layers, without "
    "groups.",
)
def doconv(conv: ConvMap) -> ConvMap:
    return conv
