"""DEA-Net: Single image dehazing based on detail-enhanced convolution and content-guided attention. Chen et al., IEEE
TIP 2024, arXiv:2301.04805.

Training time: one convolution whose kernel is the sum of a plain one and of kernels that take differences of pixels
(DEConv). It depends on parameters alone, so it is evaluated once, by the block's own code.
"""

from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from structrep.algebra import ConvMap
from structrep.blocks import DEConv2d, DOConv2d
from structrep.pattern import Conv
from structrep.registry import rule
from structrep.rules.formulas import CONTRACTIONS, CONVOLUTIONS, DIFFERENCES, NORMS, SUMS
from structrep.terms.layer import Formula


def summed_differences(formula: Formula) -> bool:
    """Several kernels added, some after something was subtracted from them, and nothing else done to them."""
    kernels = [parameter for parameter in formula.parameters if parameter.ndim > 2]
    plain = not formula.calls & (CONTRACTIONS | CONVOLUTIONS | NORMS)
    return bool(plain and formula.calls & SUMS and formula.calls & DIFFERENCES and len(kernels) > 1)


@rule(
    Conv(formula=summed_differences).named("conv"),
    source="DEA-Net, arXiv:2301.04805, DEConv",
    example=lambda: DEConv2d(8, 8, 3, padding=1),
    counter_examples=[("", lambda: DOConv2d(8, 8, 3, padding=1)), ("", lambda: weight_norm(nn.Conv2d(8, 8, 3)))],
)
def deconv(conv: ConvMap) -> ConvMap:
    return conv
